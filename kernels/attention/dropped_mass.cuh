// The weight that rows lose: counted, and kept below a bound by every warp for itself.
//
//   mass of a tile   Σ exp(score) over the row's keys
//   known            masses of the tiles this warp has met, and its share of the seeds'
//   leave it out     ⇔  for every row:  dropped + mass ≤ ε · (known + mass)
//
// Known masses of all warps add up to the row's total, so what all of them drop is at most ε of it.
// No calibration, no communication.
#pragma once

#include <attention/online_softmax.cuh>

// Float arithmetic must not spend what was not granted.
constexpr float mass_margin = 1.f - 1.f / 1024.f;

template <int32 row_tiles>
struct MassLedger {
  float reference[row_tiles][2];  // masses are times exp2(−scale · reference)
  float known[row_tiles][2], dropped[row_tiles][2];

  // Go over to larger references; whether some were larger.
  DEVICE bool raise(const float (&maxima)[row_tiles][2], float scale) {
    bool raised = false;
#pragma unroll
    for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
      for (int32 half = 0; half < 2; ++half) {
        const float old_reference = reference[r][half];
        if (!(maxima[r][half] > old_reference)) continue;
        const float shrink = exp2_approximate((old_reference - maxima[r][half]) * scale);
        reference[r][half] = maxima[r][half];
        known[r][half] *= shrink;
        dropped[r][half] *= shrink;
        raised = true;
      }
    return raised;
  }

  // Masses of a tile, from sums relative to `maxima` over each lane's own columns.
  DEVICE void weigh(float (&mass)[row_tiles][2], const RowStatistics<row_tiles>& tile,
                    float scale) const {
    RowStatistics<row_tiles> whole = tile;
#pragma unroll
    for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
      for (int32 half = 0; half < 2; ++half) whole.sum[r][half] = quad_sum(tile.sum[r][half]);
    weigh_whole(mass, whole, scale);
  }
  // The same from sums over all columns.
  DEVICE void weigh_whole(float (&mass)[row_tiles][2], const RowStatistics<row_tiles>& tile,
                          float scale) const {
#pragma unroll
    for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
      for (int32 half = 0; half < 2; ++half) {
        const float sum = tile.sum[r][half];
        const float shift = (tile.maximum[r][half] - reference[r][half]) * scale;
        mass[r][half] = sum == 0.f ? 0.f : sum * exp2_approximate(shift);
      }
  }

  // Whether all rows can afford to lose masses; a row that sees no key of the tile can.
  DEVICE bool affordable(const float (&mass)[row_tiles][2], float budget) const {
    bool willing = true;
#pragma unroll
    for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
      for (int32 half = 0; half < 2; ++half) {
        const float lost = dropped[r][half] + mass[r][half];
        willing &= mass[r][half] == 0.f || lost <= budget * (known[r][half] + mass[r][half]);
      }
    return willing;
  }

  DEVICE void add(const float (&mass)[row_tiles][2], bool known_already, bool lost) {
#pragma unroll
    for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
      for (int32 half = 0; half < 2; ++half) {
        if (!known_already) known[r][half] += mass[r][half];
        if (lost) dropped[r][half] += mass[r][half];
      }
  }
};
