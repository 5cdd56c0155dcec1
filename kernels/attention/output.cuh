// From a warp's accumulators to O and LSE in global memory.
#pragma once

#include <attention/online_softmax.cuh>
#include <attention/params.cuh>
#include <ptx/convert.cuh>

DEVICE void store_pair(bf16* target, float first, float second) {
  *reinterpret_cast<uint32*>(target) = pack(first, second, bf16{});
}
DEVICE void store_pair(fp16* target, float first, float second) {
  *reinterpret_cast<uint32*>(target) = pack(first, second, fp16{});
}
struct alignas(8) FloatPair {
  float first, second;
};
DEVICE void store_pair(float* target, float first, float second) {
  *reinterpret_cast<FloatPair*>(target) = {first, second};
}

// A row's maximum and sum, finished: what its output is multiplied by, and its log-sum-exp.
struct RowResult {
  float factor, lse;
};

// An attention sink is one more logit (in log2 units) in the denominator.  A row that saw no key is
// 0, its LSE −∞, sink or not.
DEVICE RowResult finish_row(float maximum, float sum, float scale, bool has_sink, float sink,
                            float out_scale) {
  if (maximum == -infinity()) return {0.f, -infinity()};
  const float row_maximum = maximum * scale;
  const float reference = has_sink ? fmaxf(row_maximum, sink) : row_maximum;
  const float shrink = exp2_approximate(row_maximum - reference);
  const float total = sum * shrink + (has_sink ? exp2_approximate(sink - reference) : 0.f);
  return {shrink * out_scale * reciprocal_approximate(total),
          (reference + log2_approximate(total)) * ln_2};
}

// Write rows `first_row`, … below `q_len` and columns below `head_dim_v` of O, and LSE if wanted.
// `out` and `lse` point at row 0 of the request and head.
template <typename Output, int32 row_tiles, int32 value_tiles>
DEVICE void write_rows(const FmhaParams& params, Output* out, float* lse,
                       const float (&output)[row_tiles][value_tiles][4],
                       const RowStatistics<row_tiles>& rows, int32 first_row, int32 q_len,
                       float scale, bool has_sink, float sink, float out_scale) {
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const int32 row = first_row + r * 16 + half * 8 + fragment_row();
      const float sum = quad_sum(rows.sum[r][half]);
      const RowResult result =
          finish_row(rows.maximum[r][half], sum, scale, has_sink, sink, out_scale);
      if (row >= q_len) continue;
      if (lse && fragment_column() == 0) lse[row * params.lse_strides.row] = result.lse;
      Output* target = out + row * params.out_strides.row;
#pragma unroll
      for (int32 c = 0; c < value_tiles; ++c) {
        const int32 column = c * 8 + fragment_column();
        if (column < params.head_dim_v) {
          store_pair(target + column, output[r][c][half * 2] * result.factor,
                     output[r][c][half * 2 + 1] * result.factor);
        }
      }
    }
}
