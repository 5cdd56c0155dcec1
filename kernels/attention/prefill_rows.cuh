// Where rows of a prefill kernel go, and what turns them into results.
#pragma once

#include <attention/output.cuh>
#include <attention/schedule.cuh>

template <typename Output>
DEVICE RowTarget<Output> target_of(const AttentionParams& params, const Work& work) {
  const int32 outer = params.cu_seqlens_q ? 0 : work.request;
  const int64 lse_start = outer * params.lse_strides.outer + work.q_start * params.lse_strides.row +
                          work.head * params.lse_strides.head;
  return {.out = static_cast<Output*>(params.out) + outer * params.out_strides.outer +
                 work.q_start * params.out_strides.row + work.head * params.out_strides.head,
          .lse = params.lse ? params.lse + lse_start : nullptr,
          .dropped_mass = params.dropped_mass ? params.dropped_mass + lse_start : nullptr,
          .out_stride = params.out_strides.row,
          .lse_stride = params.lse_strides.row,
          .rows = work.q_len,
          .columns = params.head_dim_v};
}

DEVICE Finish finish_of(const AttentionParams& params, int32 head, float scale) {
  return {.scale = scale,
          .out_scale = params.out_scale_array ? *params.out_scale_array : params.out_scale,
          .has_sink = params.sinks != nullptr,
          .sink = params.sinks ? params.sinks[head] * log2_e : 0.f};
}

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

// As write_rows, of 16 bytes a lane.
template <typename Output, int32 value_tiles>
DEVICE void write_wide_rows(const RowTarget<Output>& target,
                            const float (&output)[1][value_tiles][4],
                            const RowStatistics<1>& statistics, const Finish& finish,
                            int32 first_row) {
  static_assert(sizeof(Output) == 2 && value_tiles % 4 == 0);
#pragma unroll
  for (int32 half = 0; half < 2; ++half) {
    const int32 row = first_row + half * 8 + fragment_row();
    const float sum = quad_sum(statistics.sum[0][half]);
    const RowResult result = finish_row(statistics.maximum[0][half], sum, finish);
    const bool exists = row < target.rows;
    if (exists && target.lse && fragment_column() == 0)
      target.lse[row * target.lse_stride] = result.lse;
#pragma unroll
    for (int32 c = 0; c < value_tiles; c += 4) {
      FourWords columns;
#pragma unroll
      for (int32 i = 0; i < 4; ++i)
        columns.words[i] = pack(output[0][c + i][half * 2] * result.factor,
                                output[0][c + i][half * 2 + 1] * result.factor, Output{});
      turn_quad(columns.words);
      const int32 column = (c + lane_index() % 4) * 8;
      if (exists && column < target.columns)
        *reinterpret_cast<FourWords*>(target.out + row * target.out_stride + column) = columns;
    }
  }
}
