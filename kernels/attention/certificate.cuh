// What a row of prefill has lost at most.  A bound, since keys that are left out are not weighed
// one by one:
//
//   lost    Σ over tiles left out:  keys that the row sees · exp(tile maximum)
//   share   ≤ lost / (lost + kept + sink)
//
// A quad has two or four rows, and each of its lanes accounts for one of them: one exponential for
// a tile that is left out, nothing for one that is kept.
#pragma once

#include <attention/mask.cuh>
#include <attention/online_softmax.cuh>
#include <attention/prefill_rows.cuh>
#include <attention/row_result.cuh>
#include <ptx/shared.cuh>

// Float arithmetic must not certify less than was lost: less than 1/256 is what all roundings make,
// for 2¹⁷ keys and logits up to 2¹², if they go the same way.  A share too small for float32 is not
// 0.
constexpr float certificate_margin = 1.f + 1.f / 256.f;
constexpr float smallest_share = 0x1p-80f;

// Each thread has eight bytes of shared memory for its row: few tiles are left out, and registers
// are wanted in all.
constexpr int32 lost_weight_bytes = 8;

template <int32 row_tiles>
struct LostWeight {
  static constexpr int32 quad_rows = 2 * row_tiles;

  SharedAddress start;  // of the first thread's
  int32 first_thread = 0;

  // The largest score that was left out, and the weight of all, times exp2(−scale · that score).
  // The reference is its own: when the row's maximum grows, nothing is to do.
  struct Sum {
    float reference, weight;
  };
  DEVICE SharedAddress place() const {
    return start + (int32(recomputed(thread_index())) - first_thread) * lost_weight_bytes;
  }
  DEVICE Sum kept() const { return {shared_load(place()), shared_load(place() + 4)}; }

  DEVICE void begin() const { shared_store_2(place(), -infinity(), 0.f); }

  // This lane's row of the warp's.
  DEVICE static int32 own_row() {
    const int32 lane = recomputed(lane_index()), own = lane % quad_rows;
    return own / 2 * 16 + own % 2 * 8 + lane / 4;
  }

  DEVICE static float own(const float (&values)[row_tiles][2]) {
    const int32 place = recomputed(lane_index()) % quad_rows;
    float value = values[0][0];
#pragma unroll
    for (int32 i = 1; i < quad_rows; ++i)
      if (place == i) value = values[i / 2][i % 2];
    return value;
  }

  // A tile is left out; rows count from `first_row`.
  template <typename RowVisibility>
  DEVICE void add(const float (&tile_maxima)[row_tiles][2], const RowVisibility& visibility,
                  int32 first_row, Range tile, float scale) const {
    const float tile_maximum = own(tile_maxima);
    if (tile_maximum == -infinity()) return;  // the row sees none of it
    const Range keys = visibility.keys_of(first_row + own_row());
    const float seen = minimum(keys.end, tile.end) - maximum(keys.begin, tile.begin);
    const auto [reference, weight] = kept();
    const float top = fmaxf(reference, tile_maximum);
    const float shrink = exp2_approximate((fminf(reference, tile_maximum) - top) * scale);
    shared_store_2(
        place(), top,
        tile_maximum > reference ? fmaf(weight, shrink, seen) : fmaf(seen, shrink, weight));
  }

  DEVICE float largest_share(float row_maximum, float sum, const Finish& finish) const {
    const auto [reference, weight] = kept();
    if (weight == 0.f) return 0.f;
    const PartialRow row{row_maximum * finish.scale, sum, reference * finish.scale, weight};
    return fminf(fmaxf(dropped_share(row, finish) * certificate_margin, smallest_share), 1.f);
  }

  // Write the certificates of a warp's rows, the first of which is `first_row`.
  DEVICE void write(const PrefillRows& rows, const RowStatistics<row_tiles>& statistics,
                    float scale, int32 first_row) const {
    float sums[row_tiles][2];
#pragma unroll
    for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
      for (int32 half = 0; half < 2; ++half) sums[r][half] = quad_sum(statistics.sum[r][half]);
    const int32 row = first_row + own_row();
    const AttentionParams& params = rows.params;
    const QueryRow place = rows.tokens.at(row);
    const float share =
        largest_share(own(statistics.maximum), own(sums), finish_of(params, place.head, scale));
    if (row < rows.end && fragment_column() < 2 * quad_rows)
      params.dropped_mass[place.in(params.lse_strides, params)] = share;
  }
};
