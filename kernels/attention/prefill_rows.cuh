// Where rows of a prefill kernel go, and what turns them into results.
#pragma once

#include <attention/online_softmax.cuh>
#include <attention/output.cuh>
#include <attention/query_rows.cuh>
#include <attention/schedule.cuh>

// Rows of prefill as its blocks or warp-groups have them: those before `end` exist.
struct PrefillRows {
  const AttentionParams& params;
  TokenRows tokens;
  int32 end;

  // Those of unit number `index` of a block.
  template <int32 unit>
  static DEVICE PrefillRows of_unit(const AttentionParams& params, const Work& work,
                                    int32 index = 0) {
    const int32 token = work.first_token + index * (unit / work.pack);
    return {.params = params,
            .tokens = {{work.request, work.q_start, token, work.head}, work.pack},
            .end = work.unit_visibility<unit>(params, index).rows};
  }
};

DEVICE Finish finish_of(const AttentionParams& params, int32 head, float scale) {
  return {.scale = scale,
          .out_scale = params.out_scale_array ? *params.out_scale_array : params.out_scale,
          .has_sink = params.sinks != nullptr,
          .sink = params.sinks ? params.sinks[head] * log2_e : 0.f};
}

// Where a row's columns go, and what they are multiplied by; one lane writes its LSE.
template <typename Output>
struct FinishedRow {
  bool exists;
  Output* out;
  float factor;

  DEVICE FinishedRow(const PrefillRows& rows, int32 row, float maximum, float sum, float scale)
      : exists(row < rows.end) {
    const AttentionParams& params = rows.params;
    const QueryRow place = rows.tokens.at(row);
    const RowResult result = finish_row(maximum, sum, finish_of(params, place.head, scale));
    out = static_cast<Output*>(params.out) + place.in(params.out_strides, params);
    factor = result.factor;
    if (exists && params.lse && fragment_column() == 0)
      params.lse[place.in(params.lse_strides, params)] = result.lse;
  }
};

struct alignas(16) FourWords {
  uint32 words[4];
};

// Four lanes hold a word each of four tiles; afterwards each holds the four words of one.
DEVICE void turn_quad(uint32 (&words)[4]) {
#pragma unroll
  for (int32 distance = 1; distance <= 2; distance *= 2) {
    const bool upper = lane_index() & distance;
#pragma unroll
    for (int32 i = 0; i < 4; ++i) {
      if (i & distance) continue;
      const uint32 received = shuffle_xor(upper ? words[i] : words[i + distance], distance);
      (upper ? words[i] : words[i + distance]) = received;
    }
  }
}

// Write rows `first_row`, … of O, and LSE if wanted.
template <typename Output, int32 row_tiles, int32 value_tiles>
DEVICE void write_rows(const PrefillRows& rows, const float (&output)[row_tiles][value_tiles][4],
                       const RowStatistics<row_tiles>& statistics, float scale, int32 first_row) {
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const float sum = quad_sum(statistics.sum[r][half]);
      const FinishedRow<Output> row(rows, first_row + r * 16 + half * 8 + fragment_row(),
                                    statistics.maximum[r][half], sum, scale);
      if (!row.exists) continue;
#pragma unroll
      for (int32 c = 0; c < value_tiles; ++c) {
        const int32 column = c * 8 + fragment_column();
        if (column < rows.params.head_dim_v) {
          store_pair(row.out + column, output[r][c][half * 2] * row.factor,
                     output[r][c][half * 2 + 1] * row.factor);
        }
      }
    }
}

// The same, of 16 bytes a lane.
template <typename Output, int32 value_tiles>
DEVICE void write_wide_rows(const PrefillRows& rows, const float (&output)[1][value_tiles][4],
                            const RowStatistics<1>& statistics, float scale, int32 first_row) {
  static_assert(sizeof(Output) == 2 && value_tiles % 4 == 0);
#pragma unroll
  for (int32 half = 0; half < 2; ++half) {
    const float sum = quad_sum(statistics.sum[0][half]);
    const FinishedRow<Output> row(rows, first_row + half * 8 + fragment_row(),
                                  statistics.maximum[0][half], sum, scale);
#pragma unroll
    for (int32 c = 0; c < value_tiles; c += 4) {
      FourWords columns;
#pragma unroll
      for (int32 i = 0; i < 4; ++i)
        columns.words[i] = pack(output[0][c + i][half * 2] * row.factor,
                                output[0][c + i][half * 2 + 1] * row.factor, Output{});
      turn_quad(columns.words);
      const int32 column = (c + lane_index() % 4) * 8;
      if (row.exists && column < rows.params.head_dim_v)
        *reinterpret_cast<FourWords*>(row.out + column) = columns;
    }
  }
}
