// Skip-softmax where many warps share the keys of a row: all judge by the same seeds.
//
//   seeds       the last tiles and the first one: one for each warp of a block; and what is known
//               of keys that are not here
//   reference   the larger of the warp's own maximum and that of the seeds
//   skip        ⇔  for every row:  tile maximum − reference < ln λ
//
// A warp that met only light tiles so far still knows, by the seeds, that they are light.  Seeds
// are never skipped by the warps that own them, so that the reference is part of the result.
#pragma once

#include <attention/decode_work.cuh>
#include <attention/online_softmax.cuh>
#include <attention/skip_softmax.cuh>

// Whether step `step` of a deal is a seed tile; warp `seed` of a block works out seed `seed`.
DEVICE bool is_seed(const TileDeal& deal, int32 step, int32 warps) {
  const int32 tile = deal.at(step);
  return tile > deal.last - (warps - 1) || tile == deal.first;
}
// The tile of a warp's seed; below `deal.first` if there are fewer tiles than warps.
DEVICE int32 seed_tile(const TileDeal& deal, int32 warp, int32 warps) {
  if (warp == warps - 1) return deal.tiles() > 0 ? deal.first : deal.first - 1;
  const int32 tile = deal.last - warp;
  return tile > deal.first ? tile : deal.first - 1;
}

// What is known from elsewhere of the largest score of a row, which it may not exceed; log2 units.
DEVICE float given_seed(const AttentionParams& params, const DecodeWork& work, int32 row) {
  if (!params.seeds) return -infinity();
  const int32 index = work.first_row + row;
  const int64 token = work.q_start + index / params.group;
  const int32 head = work.kv_head * params.group + index % params.group;
  return params.seeds[token * params.q_heads + head] * log2_e;
}

// Add a vote's counts to those of every head that has a row in it; by `threads` threads, of which
// this one is number `thread`.
template <bool mass_rule, int32 threads>
DEVICE void report_block(const AttentionParams& params, const DecodeWork& work, int32 visited,
                         uint32 skipped, int32 thread = thread_index()) {
  const Voters voters{work.request, work.kv_len,    work.kv_head * params.group,
                      params.group, work.first_row, work.rows};
  report_votes<mass_rule, threads>(params, voters, visited, skipped, thread);
}

// Whether all rows agree to leave a tile out.  A row that sees no key of it (−∞) does not object,
// unless it never does let go.
template <int32 row_tiles>
DEVICE bool vote_seeded(const float (&tile_maxima)[row_tiles][2],
                        const float (&reference)[row_tiles][2],
                        const float (&threshold)[row_tiles][2]) {
  bool willing = true;
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const float maximum = tile_maxima[r][half];
      const float distance = maximum == -infinity() ? maximum : maximum - reference[r][half];
      willing &= distance < threshold[r][half];
    }
  return warp_all(willing);
}
