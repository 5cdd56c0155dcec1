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

// log2 λ in the units of the scores, −∞ where λ is 0 or there is none: no score is further below
// the maximum.
DEVICE float skip_threshold(float lambda, float scale) {
  return lambda > 0.f ? log2_approximate(lambda) * reciprocal_approximate(scale) : -infinity();
}

// log2 λ of a row's head in the units of the scores; −∞: this row never lets a tile go.
DEVICE float row_threshold(const AttentionParams& params, int32 request, int32 head, int32 kv_len,
                           float scale) {
  return skip_threshold(skip_lambda(params, request, head, kv_len), scale);
}

// Rows may be of several heads, which have thresholds of their own.  The lanes of a quad have the
// same rows: each judges one of them, so that it needs one threshold.
template <int32 row_tiles>
struct SkipRule {
  static constexpr int32 rows = row_tiles * 2;
  static_assert(rows <= 4);

  float threshold;     // log2 λ of the lane's own row, in the units of the scores
  uint32 skipped = 0;  // tiles left out by this warp

  // `threshold_of(row)` is that of row `row` of the warp's.
  template <typename ThresholdOf>
  DEVICE SkipRule(const ThresholdOf& threshold_of)
      : threshold(threshold_of(own_row() * 8 + fragment_row())) {}

  // Which of its rows a lane judges: number 2 · row tile + half.
  static DEVICE int32 own_row() { return lane_index() % rows; }

  // Whether this lane's own row agrees to leave the tile out.  If it sees no key of it (−∞) it does
  // not object unless λ is 0; −∞ − −∞ is not a number, which is not ≥ anything: rows that do not
  // exist never object.
  DEVICE bool willing(const float (&tile_maxima)[row_tiles][2],
                      const float (&running_maxima)[row_tiles][2]) const {
    float distance = 0.f;
#pragma unroll
    for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
      for (int32 half = 0; half < 2; ++half) {
        const float candidate = tile_maxima[r][half] - running_maxima[r][half];
        if (own_row() == r * 2 + half) distance = candidate;
      }
    return !(distance >= threshold);
  }

  // Whether all rows of the warp do.
  DEVICE bool vote(const float (&tile_maxima)[row_tiles][2],
                   const float (&running_maxima)[row_tiles][2]) {
    const bool skip = warp_all(willing(tile_maxima, running_maxima));
    skipped += skip;
    return skip;
  }
};

// The same for the rows of one row tile: each lane judges what it has found of both of its rows.
// One lane that objects is enough, so they need not ask each other what a row's maximum is.
struct LaneSkipRule {
  float threshold[2];  // of its rows, as above
  uint32 skipped = 0;

  template <typename ThresholdOf>
  DEVICE LaneSkipRule(const ThresholdOf& threshold_of)
      : threshold{threshold_of(fragment_row()), threshold_of(8 + fragment_row())} {}

  DEVICE bool willing(const float (&found)[1][2], const float (&running_maxima)[1][2]) const {
    bool willing = true;
#pragma unroll
    for (int32 half = 0; half < 2; ++half)
      willing &= !(found[0][half] - running_maxima[0][half] >= threshold[half]);
    return willing;
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

// Rows that vote together; in turn they are those of `group` heads, of which row 0 has
// `first_head`.
struct Voters {
  int32 request, kv_len;
  int32 first_head, group;
  int32 first_row, rows;
};

// Add a vote's counts to those of every head that has a row in it; by `threads` threads, of which
// this one is number `thread`.
template <bool mass_rule, int32 threads>
DEVICE void report_votes(const AttentionParams& params, const Voters& voters, uint32 visited,
                         uint32 skipped, int32 thread) {
  for (int32 i = thread; i < minimum(voters.rows, voters.group); i += threads) {
    const int32 head = voters.first_head + (voters.first_row + i) % voters.group;
    const bool ineligible =
        !mass_rule && skip_lambda(params, voters.request, head, voters.kv_len) < 0.f;
    add_skips(params, voters.request, head, visited, skipped, ineligible);
  }
}
