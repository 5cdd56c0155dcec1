// The end of an item: warps merge their results, and the last split to arrive those of all splits.
#pragma once

#include <attention/decode_shape.cuh>
#include <attention/decode_work.cuh>
#include <attention/partial.cuh>
#include <attention/row_result.cuh>
#include <attention/seeded_skip.cuh>
#include <attention/split_parts.cuh>
#include <ptx/shared.cuh>
#include <ptx/sync.cuh>

// Rows of the warps of a block, where their rings were.
template <DecodeConfig config>
struct WarpParts {
  using Shape = DecodeShape<config>;
  using Shared = DecodeShared<config>;

  const Shared& shared;
  int32 row;

  static DEVICE SharedAddress place(const Shared& shared, int32 warp, int32 row, int32 column) {
    // Rows 0 to 3 of a column pair lie in different banks.
    return shared.rings + warp * Shape::ring_bytes + row * Shape::output_row_bytes +
           ((column ^ (row % 4 * 8)) * 4);
  }
  DEVICE PartialRow statistics(int32 warp) const {
    float values[4];
    shared_load_4(values, shared.rows + (warp * config.rows + row) * 16);
    return {values[0], values[1], values[2], values[3]};
  }
  DEVICE void load(float (&values)[4], int32 warp, int32 column) const {
    shared_load_4(values, place(shared, warp, row, column));
  }
};

// This warp's results for the other warps.
template <DecodeConfig config, typename WarpState>
DEVICE void publish(const WarpState& state, const DecodeShared<config>& shared) {
  using Shape = DecodeShape<config>;
  const int32 warp = warp_index();
  sync_warp();  // nobody reads the ring any more
#pragma unroll
  for (int32 r = 0; r < Shape::row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const int32 row = r * 16 + half * 8 + fragment_row();
      const float sum = quad_sum(state.rows.sum[r][half]);
      float reference = -infinity(), dropped = 0.f;
      if constexpr (config.masses) {
        reference = state.ledger.reference[r][half] * state.scale;
        dropped = state.ledger.dropped[r][half];
      }
      if (fragment_column() == 0) {
        shared_store_4(shared.rows + (warp * config.rows + row) * 16,
                       {state.rows.maximum[r][half] * state.scale, sum, reference, dropped});
      }
#pragma unroll
      for (int32 c = 0; c < Shape::value_tiles; ++c)
        shared_store_2(WarpParts<config>::place(shared, warp, row, c * 8 + fragment_column()),
                       state.output[r][c][half * 2], state.output[r][c][half * 2 + 1]);
    }
  if (lane_index() == 0) shared_store(shared.counts + warp * 4, float(state.skipped));
}

// Add the block's counts to those of every head that has a row in it.
template <DecodeConfig config>
DEVICE void report(const AttentionParams& params, const DecodeShared<config>& shared,
                   const DecodeWork& work, Range keys) {
  const int32 visited = TileDeal(keys, config.block_kv, work.split, work.splits).count;
  float skipped = 0.f;
  for (int32 warp = 0; warp < config.warps; ++warp)
    skipped += shared_load(shared.counts + warp * 4);
  report_block<config.mass_rule, config.threads()>(params, work, visited, uint32(skipped));
}

// Whether this block is the last of its rows' splits to arrive.
template <DecodeConfig config>
DEVICE bool arrives_last(const AttentionParams& params, const DecodeShared<config>& shared,
                         const DecodeWork& work) {
  sync_block();  // all warps have written their rows
  if (thread_index() == 0) {
    shared_store(shared.counts + config.warps * 4, arrives_last(params, work) ? 1.f : 0.f);
  }
  sync_block();
  return shared_load(shared.counts + config.warps * 4) != 0.f;
}

// Merge the warps' results, and write O, or this split's part of it; the last split merges all.
template <DecodeConfig config>
DEVICE void finish(const AttentionParams& params, const DecodeShared<config>& shared,
                   const DecodeSchedule<config.rows>& schedule, const DecodeWork& work) {
  using Output = Element<config.output>;
  for (int32 row = warp_index(); work.splits == 1 && row < work.rows; row += config.warps) {
    write_row<Output>(params, query_row(params, work, row),
                      merge_row<config.head_dim_v>(WarpParts<config>{shared, row}, config.warps));
  }
  if (work.splits == 1) return;

  const GlobalParts first_row = parts_of(schedule, work, 0, params.head_dim_v);
  const auto parts = [&](int32 row) {
    GlobalParts own = first_row;
    own.first += row;
    own.second += row;
    return own;
  };
  for (int32 row = warp_index(); row < work.rows; row += config.warps) {
    const auto merged = merge_row<config.head_dim_v>(WarpParts<config>{shared, row}, config.warps);
    parts(row).store(merged, work.split);
  }
  if (!arrives_last(params, shared, work)) return;
  for (int32 row = warp_index(); row < work.rows; row += config.warps) {
    write_row<Output>(params, query_row(params, work, row),
                      merge_row<config.head_dim_v>(parts(row), work.splits));
  }
}
