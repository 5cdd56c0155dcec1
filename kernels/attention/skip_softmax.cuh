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

// λ of one request and head; negative where the request runs without skipping, because its λ is
// not below 1 (and that is not meant) or not a number.
DEVICE float skip_lambda(const AttentionParams& params, int32 request, int32 head, int32 kv_len) {
  float lambda = params.threshold;
  if (params.thresholds) {
    lambda =
        params
            .thresholds[request * params.threshold_strides[0] + head * params.threshold_strides[1]];
  }
  if (params.threshold_per_length) lambda *= reciprocal_approximate(float(kv_len));
  return lambda >= 0.f && (lambda < 1.f || params.unsafe) ? lambda : -1.f;
}

struct SkipRule {
  float threshold;     // log2 λ, in the units of the scores
  uint32 skipped = 0;  // tiles left out by this warp

  // λ = 0, and none, never skip: no score is further below the maximum than −∞.
  DEVICE SkipRule(float lambda, float scale)
      : threshold(lambda > 0.f ? log2_approximate(lambda) * reciprocal_approximate(scale)
                               : -infinity()) {}

  // Whether this lane's rows agree to leave the tile out.  Rows that see no key of it (−∞) do not
  // object; −∞ − −∞ is not a number, which is not ≥ anything.
  template <int32 row_tiles>
  DEVICE bool willing(const float (&tile_maxima)[row_tiles][2],
                      const float (&running_maxima)[row_tiles][2]) const {
    bool willing = true;
#pragma unroll
    for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
      for (int32 half = 0; half < 2; ++half)
        willing &= !(tile_maxima[r][half] - running_maxima[r][half] >= threshold);
    return willing;
  }

  // Whether all rows of the warp do.
  template <int32 row_tiles>
  DEVICE bool vote(const float (&tile_maxima)[row_tiles][2],
                   const float (&running_maxima)[row_tiles][2]) {
    const bool skip = warp_all(willing(tile_maxima, running_maxima));
    skipped += skip;
    return skip;
  }
};

// Add to the counts of a request and head: whole numbers, so order is no matter.
DEVICE void add_skips(const AttentionParams& params, int32 request, int32 head, uint32 visited,
                      uint32 skipped, bool ineligible) {
  uint64* counts = params.skip_counts + request * params.q_heads + head;
  const int32 plane = params.batch * params.q_heads;
  atomic_add(counts, visited);
  atomic_add(counts + plane, skipped);
  if (ineligible) atomic_add(counts + 2 * plane, visited);
}

// One warp's counts, if they are wanted.
DEVICE void report_skips(const AttentionParams& params, int32 request, int32 head, uint32 visited,
                         uint32 skipped, bool ineligible) {
  if (params.skip_counts && lane_index() == 0) {
    add_skips(params, request, head, visited, skipped, ineligible);
  }
}
