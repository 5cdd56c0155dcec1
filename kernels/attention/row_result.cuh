// One finished row, held by one warp: to O, LSE and the share that was dropped.
#pragma once

#include <attention/output.cuh>
#include <attention/params.cuh>
#include <attention/partial.cuh>
#include <attention/query_rows.cuh>

// The share of the denominator, sink included, that was left out.
DEVICE float dropped_share(const PartialRow& row, const Finish& finish) {
  if (row.dropped == 0.f) return 0.f;
  const float kept_or_dropped = fmaxf(row.maximum, row.reference);
  const float top = finish.has_sink ? fmaxf(kept_or_dropped, finish.sink) : kept_or_dropped;
  const float dropped = row.dropped * weight_of(row.reference, top);
  const float sink = finish.has_sink ? exp2_approximate(finish.sink - top) : 0.f;
  const float total = row.sum * weight_of(row.maximum, top) + dropped + sink;
  return dropped * reciprocal_approximate(total);
}

// Write a row, or its columns from `first_column` on.
template <typename Output, int32 columns>
DEVICE void write_row(const AttentionParams& params, const QueryRow& place,
                      const WarpRow<columns>& merged, int32 first_column = 0) {
  const Finish finish{
      .scale = 1.f,
      .out_scale = params.out_scale_array ? *params.out_scale_array : params.out_scale,
      .has_sink = params.sinks != nullptr,
      .sink = params.sinks ? params.sinks[place.head] * log2_e : 0.f};
  const RowResult result = finish_row(merged.row.maximum, merged.row.sum, finish);
  Output* out = static_cast<Output*>(params.out) + place.in(params.out_strides, params);
#pragma unroll
  for (int32 chunk = 0; chunk < merged.chunks; ++chunk) {
    const int32 column = first_column + chunk * 128 + lane_index() * 4;
    float values[4];
#pragma unroll
    for (int32 c = 0; c < 4; ++c) values[c] = merged.values[chunk][c] * result.factor;
    if (column < params.head_dim_v) store_four(out + column, values);
  }
  if (lane_index() != 0 || first_column != 0) return;
  const int64 statistic = place.in(params.lse_strides, params);
  if (params.lse) params.lse[statistic] = result.lse;
  if (params.dropped_mass) params.dropped_mass[statistic] = dropped_share(merged.row, finish);
}
