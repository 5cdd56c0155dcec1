// Results over a part of the keys, and how parts become one.
//
//   O = Σ wᵢ Oᵢ / Σ wᵢ lᵢ      wᵢ = exp2(mᵢ − max m)
//
// A part that kept nothing has m = −∞ and weighs nothing; its O is never read.
#pragma once

#include <attention/output.cuh>
#include <core/math.cuh>
#include <ptx/shared.cuh>

// One row of one part; exponents in log2 units.
struct alignas(16) PartialRow {
  float maximum, sum;        // of what was kept
  float reference, dropped;  // weight that was left out, times exp2(−reference)
};

constexpr PartialRow empty_row{-infinity(), 0.f, -infinity(), 0.f};

DEVICE float warp_maximum(float value) {
#pragma unroll
  for (int32 distance = 16; distance > 0; distance /= 2)
    value = fmaxf(value, shuffle_xor(value, distance));
  return value;
}

DEVICE float warp_sum(float value) {
#pragma unroll
  for (int32 distance = 16; distance > 0; distance /= 2) value += shuffle_xor(value, distance);
  return value;
}

// exp2(x − reference), 0 where x is −∞.
DEVICE float weight_of(float x, float reference) {
  return x == -infinity() ? 0.f : exp2_approximate(x - reference);
}

// A row as one warp holds it: a lane has columns 4·lane … of every 128.
template <int32 columns>
struct WarpRow {
  static constexpr int32 chunks = (columns + 127) / 128;

  PartialRow row;
  float values[chunks][4];
};

// Merge `count` parts of a row; `parts` gives statistics(i) and load(values, i, column).
template <int32 columns, int32 parts_at_once = 4, typename Parts>
DEVICE WarpRow<columns> merge_row(const Parts& parts, int32 count) {
  constexpr int32 chunks = WarpRow<columns>::chunks;
  const int32 lane = lane_index();
  PartialRow top = empty_row;  // of this lane's parts, then of all
  for (int32 part = lane; part < count; part += warp_size) {
    const PartialRow row = parts.statistics(part);
    top.maximum = fmaxf(top.maximum, row.maximum);
    top.reference = fmaxf(top.reference, row.reference);
  }
  top.maximum = warp_maximum(top.maximum);
  top.reference = warp_maximum(top.reference);

  WarpRow<columns> merged{.row = top};
  for (int32 first = 0; first < count; first += warp_size) {
    const PartialRow row = first + lane < count ? parts.statistics(first + lane) : empty_row;
    const float mine = weight_of(row.maximum, top.maximum);
    merged.row.sum += row.sum * mine;
    merged.row.dropped += row.dropped * weight_of(row.reference, top.reference);
    const int32 here = minimum(count - first, warp_size);
#pragma unroll parts_at_once
    for (int32 i = 0; i < here; ++i) {
      const float weight = shuffle(mine, i);
#pragma unroll
      for (int32 chunk = 0; chunk < chunks; ++chunk) {
        const int32 column = chunk * 128 + lane * 4;
        float values[4] = {};
        if (weight > 0.f && column < columns) parts.load(values, first + i, column);
#pragma unroll
        for (int32 c = 0; c < 4; ++c)
          merged.values[chunk][c] = fmaf(values[c], weight, merged.values[chunk][c]);
      }
    }
  }
  merged.row.sum = warp_sum(merged.row.sum);
  merged.row.dropped = warp_sum(merged.row.dropped);
  return merged;
}

// A row's parts in global memory: part 0 is row `first`, the others are rows `second`, `second` +
// `stride`, …
struct GlobalParts {
  float* out;
  PartialRow* rows;
  int32 columns;
  int64 first, second, stride;

  DEVICE int64 row(int32 part) const { return part == 0 ? first : second + (part - 1) * stride; }

  DEVICE PartialRow statistics(int32 part) const { return rows[row(part)]; }
  DEVICE void load(float (&values)[4], int32 part, int32 column) const {
    if (column >= columns) return;
    const FourFloats four =
        *reinterpret_cast<const FourFloats*>(out + row(part) * columns + column);
    for (int32 i = 0; i < 4; ++i) values[i] = four.values[i];
  }

  // Write this row's part number `part`; the values of one that kept nothing are never read.
  template <int32 padded_columns>
  DEVICE void store(const WarpRow<padded_columns>& merged, int32 part) const {
    if (lane_index() == 0) rows[row(part)] = merged.row;
    if (merged.row.maximum == -infinity()) return;
#pragma unroll
    for (int32 chunk = 0; chunk < merged.chunks; ++chunk) {
      const int32 column = chunk * 128 + lane_index() * 4;
      if (column < columns) store_four(out + row(part) * columns + column, merged.values[chunk]);
    }
  }
};
