// Skip-softmax (BLASST, arXiv 2512.12087): leave out a tile of keys that cannot matter.
//
//   skip the tile  ⇔  for every row of this warp:  tile maximum − running maximum < ln λ
//
// A skipped tile leaves maximum, sum and output as they are.  The running maximum is the one before
// the tile; a row that has seen no key objects, so the first tile is always kept.
#pragma once

#include <attention/params.cuh>
#include <core/math.cuh>
#include <ptx/special.cuh>
#include <tile/fragment.cuh>

struct SkipRule {
  float threshold;  // log2 λ, in the units of the scores
  bool enabled;     // λ lies in (0, 1), or is meant to be larger
  bool ineligible;  // λ ≥ 1 or not a number: this request runs without skipping, and is counted
  uint32 visited = 0, skipped = 0;

  DEVICE SkipRule(const FmhaParams& params, int32 request, int32 head, int32 kv_len, float scale) {
    float lambda = params.threshold;
    if (params.thresholds) {
      lambda = params.thresholds[request * params.threshold_strides[0] +
                                 head * params.threshold_strides[1]];
    }
    if (params.threshold_per_length) lambda *= reciprocal_approximate(float(kv_len));
    ineligible = !(lambda >= 0.f && (lambda < 1.f || params.unsafe));
    enabled = !ineligible && lambda > 0.f;
    threshold = log2_approximate(lambda) * reciprocal_approximate(scale);
  }

  // Whether all rows agree to leave the tile out.  Rows that see no key of it (−∞) do not object;
  // −∞ − −∞ is not a number, which is not ≥ anything.
  template <int32 row_tiles>
  DEVICE bool vote(const float (&tile_maxima)[row_tiles][2],
                   const float (&running_maxima)[row_tiles][2]) {
    bool willing = enabled;
#pragma unroll
    for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
      for (int32 half = 0; half < 2; ++half)
        willing &= !(tile_maxima[r][half] - running_maxima[r][half] >= threshold);
    const bool skip = warp_all(willing);
    ++visited;
    skipped += skip;
    return skip;
  }

  // Add this warp's counts to those of its request and head; whole numbers, so order is no matter.
  DEVICE void report(const FmhaParams& params, int32 request, int32 head) const {
    if (!params.skip_counts || lane_index() != 0) return;
    uint64* counts = params.skip_counts + request * params.q_heads + head;
    const int32 plane = params.batch * params.q_heads;
    atomic_add(counts, visited);
    atomic_add(counts + plane, skipped);
    if (ineligible) atomic_add(counts + 2 * plane, visited);
  }
};
