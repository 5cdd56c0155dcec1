// How rows of portable MLA decode vote on a tile: those that several warps share, 16 or 32 of them.
//
//   reference   the larger of a row's running maximum and that of the seeds, whose ever they are
//   skip        ⇔  for all rows:  tile maximum − reference < ln λ;  or all can afford the loss
//
// As in decode (seeded_skip.cuh, dropped_mass.cuh).  Every warp knows the largest scores, and where
// masses are counted the sums, of all keys of its rows: each holds the whole vote by itself, and
// all come to the same answer.  Of two row tiles, every other lane speaks for the first and its
// neighbour for the second: to know all of both would take too many registers.
#pragma once

#include <attention/config.cuh>
#include <attention/dropped_mass.cuh>
#include <attention/mla_keys.cuh>
#include <attention/mla_shape.cuh>
#include <attention/online_softmax.cuh>
#include <attention/partial.cuh>
#include <attention/seeded_skip.cuh>

template <MlaPortableConfig config>
struct MlaVotes {
  static constexpr int32 row_tiles = MlaShape<config>::row_tiles, parts = MlaShape<config>::parts;
  using Shared = MlaShared<config>;
  using Place = MlaPlace<config>;

  float seed[1][2];       // largest scores in seeds of other splits, and known from elsewhere
  float threshold[1][2];  // log2 λ in the units of the scores
  MassLedger<1> ledger;
  int32 skipped;

  // The row tile that this lane speaks for.
  static DEVICE int32 row_tile() { return row_tiles == 1 ? 0 : recomputed(lane_index()) % 2; }
  static DEVICE void of_row_tile(float (&own)[1][2], const float (&all)[row_tiles][2]) {
#pragma unroll
    for (int32 half = 0; half < 2; ++half)
      own[0][half] = row_tile() == 0 ? all[0][half] : all[row_tiles - 1][half];
  }

  // `work`: as its request's.
  DEVICE void begin(RowStatistics<row_tiles>& kept, const AttentionParams& params,
                    const DecodeWork& work, const Place& place, float scale) {
    skipped = 0;
    // A row that does not exist has an infinite maximum: no key of it counts.
#pragma unroll
    for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
      for (int32 half = 0; half < 2; ++half)
        kept.maximum[r][half] = place.row(r, half) < work.rows ? -infinity() : infinity();
    of_row_tile(ledger.reference, kept.maximum);
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const int32 row = place.row(row_tile(), half);
      seed[0][half] = -infinity();
      threshold[0][half] = 0.f;
      if constexpr (!config.mass_rule) {
        const int32 head = (work.first_row + row) % params.group;
        if (row < work.rows) {
          threshold[0][half] = row_threshold(params, work.request, head, work.kv_len, scale);
          seed[0][half] = given_seed(params, work, row) * reciprocal_approximate(scale);
        }
      }
      ledger.known[0][half] = ledger.dropped[0][half] = 0.f;
    }
  }

  // Whether a tile with the maxima `maxima` is left out.  For masses its sums are in shared memory,
  // relative to the larger of these maxima and those that were kept.
  DEVICE bool leave_out(const RowStatistics<row_tiles>& kept, const float (&maxima)[row_tiles][2],
                        const AttentionParams& params, const Shared& shared, const Place& place,
                        const SeedsFirst& order, int32 visit, float scale) {
    const bool is_seed = visit < order.seeds();
    bool willing = !is_seed;
    float top[1][2], maximum[1][2];
    of_row_tile(top, maxima);
    of_row_tile(maximum, kept.maximum);
    if constexpr (!config.mass_rule) {
      float reference[1][2];
      larger(reference, maximum, seed);
      willing &= vote_seeded(top, reference, threshold);
    }
    if constexpr (config.masses) {
      float mass[1][2];
      const bool raised = ledger.raise(top, scale);
      RowStatistics<1> tile;
      larger(tile.maximum, maximum, top);
      add_parts(tile, shared, place);
      ledger.weigh_whole(mass, tile, scale);
      if constexpr (config.mass_rule) {
        const float budget = params.threshold * mass_margin;
        willing &= warp_all(!raised && ledger.affordable(mass, budget));
      }
      if (is_seed) {  // which this split counts its share of
        const float share =
            float(order.deal.count) * reciprocal_approximate(float(order.deal.tiles()));
        mass[0][0] *= share;
        mass[0][1] *= share;
      }
      ledger.add(mass, false, willing);
    }
    skipped += willing;
    if (visit >= order.foreign) return willing;
    larger(seed, seed, top);
    return true;
  }

  static DEVICE void add_parts(RowStatistics<1>& tile, const Shared& shared, const Place& place) {
#pragma unroll
    for (int32 half = 0; half < 2; ++half)
#pragma unroll
      for (int32 part = 0; part < parts; ++part) {
        const int32 row = place.row(row_tile(), half);
        tile.sum[0][half] += shared_load(shared.row(shared.sums, part, row));
      }
  }

  // What is known of a row's losses, to all lanes that share it; `scale`: to log2 units.
  DEVICE void account(PartialRow& row, int32 r, int32 half, float scale) const {
    const int32 lane = lane_index() / 2 * 2 + r;
    row.reference = shuffle(ledger.reference[0][half], lane) * scale;
    row.dropped = shuffle(ledger.dropped[0][half], lane);
  }

  // Add this warp's counts, if it speaks for its rows; `work`: as its request's.
  DEVICE void report(const AttentionParams& params, DecodeWork work, const Place& place,
                     int32 visited) const {
    if (!params.skip_counts || place.part != 0) return;
    work.first_row += place.first_row;
    work.rows = minimum(work.rows - place.first_row, config.rows_per_warp);
    report_block<config.mass_rule, warp_size>(params, work, visited, skipped, lane_index());
  }
};
