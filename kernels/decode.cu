// Paged decode attention: few query tokens a request, limited by the speed of memory.
//
// Work:    one item is a block of rows of one kv head (query heads of its group × tokens) and one
//          split of the request's keys (decode_work.cuh); blocks take items in order.
// Roles:   every warp is a machine of its own: it owns whole tiles of keys, loads them into its own
//          ring of two slots, and keeps maximum, sum and output of all rows.  Warps meet to share
//          seeds (skipping only) and to merge their results, once an item each.
// Slots:   hold the keys of a tile and then, if the tile is kept, its values: those are requested
//          into the slot that the keys just left.  Slots take turns, oldest first:
//
//            wait for the older slot
//            keys:    S = Q Kᵀ │ mask │ leave out? │ P = softmax │ request values, or the next keys
//            values:  O += P V │ request the next keys
//
//          so that a warp always has two loads in flight, but for the moment between the two.
// Result:  O and LSE; of a request cut into splits, partial results, which the last of its blocks
//          to arrive merges.
#include <attention/config.cuh>
#include <attention/decode_item.cuh>
#include <attention/decode_merge.cuh>
#include <attention/decode_shape.cuh>
#include <attention/decode_work.cuh>
#include <attention/dropped_mass.cuh>
#include <attention/kv_source.cuh>
#include <attention/mask.cuh>
#include <attention/online_softmax.cuh>
#include <attention/seeded_skip.cuh>
#include <attention/soft_cap.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/shared.cuh>
#include <ptx/sync.cuh>
#include <tile/copy.cuh>
#include <tile/gemm.cuh>

constexpr DecodeConfig config{CUATTN_CONFIG};

using Shape = DecodeShape<config>;
using Shared = DecodeShared<config>;
using Item = DecodeItem<config>;

constexpr int32 slots = Shape::slots;
constexpr int32 row_tiles = Shape::row_tiles;
constexpr int32 key_tiles = Shape::key_tiles;
constexpr int32 value_tiles = Shape::value_tiles;

using Input = Element<config.element>;
using QTile = Shape::QTile;
using KTile = Shape::KTile;
using VTile = Shape::VTile;

// What a tile leaves behind until its values are there.
struct Pending {
  uint32 probabilities[config.block_kv / 16][row_tiles][4];
  float shrink[row_tiles][2];  // of the output so far
};

// What one warp carries from tile to tile.
struct WarpState {
  float output[row_tiles][value_tiles][4];
  RowStatistics<row_tiles> rows;
  MassLedger<row_tiles> ledger;
  float seed[row_tiles][2], threshold[row_tiles][2];
  uint32 skipped = 0;
  float squash_factor, scale;  // see fmha_sm80.cu
};

// --- One tile.

// Scores of the tile of keys in a slot, masked.
DEVICE void score(float (&scores)[row_tiles][key_tiles][4], const WarpState& state,
                  const Item& item, int32 slot, int32 tile) {
  multiply_qk<config.head_dim_qk, Input>(
      scores, row_reader(QTile{item.shared.q}),
      column_reader(KTile{item.shared.slot(warp_index(), slot)}));
  if constexpr (config.soft_cap) squash(scores, state.squash_factor);
  const Range keys = item.tile_keys(tile);
  if (keys.begin < item.common.begin || item.common.end < keys.end) {
    mask_scores(scores, item.visibility, 0, keys.begin);
  }
}

// Whether to leave the tile out, whose sums are `tile`.
DEVICE bool leave_out(const AttentionParams& params, WarpState& state,
                      const float (&tile_maxima)[row_tiles][2],
                      const RowStatistics<row_tiles>& tile, bool seed) {
  if constexpr (!config.masses) {
    float reference[row_tiles][2];
    larger(reference, state.rows.maximum, state.seed);
    return !seed && vote_seeded(tile_maxima, reference, state.threshold);
  }
  bool willing = !seed;
  if constexpr (!config.mass_rule) {
    float reference[row_tiles][2];
    larger(reference, state.rows.maximum, state.seed);
    willing &= vote_seeded(tile_maxima, reference, state.threshold);
  }
  float mass[row_tiles][2];
  const bool raised = state.ledger.raise(tile_maxima, state.scale);
  state.ledger.weigh(mass, tile, state.scale);
  if constexpr (config.mass_rule) {
    willing &= !raised && state.ledger.affordable(mass, params.threshold * mass_margin);
    willing = warp_all(willing);
  }
  state.ledger.add(mass, seed, willing);
  return willing;
}

// Keys: their probabilities wait in `pending` for the values, if the tile is kept.
DEVICE bool take_keys(WarpState& state, Pending& pending, const Item& item, int32 slot,
                      int32 step) {
  float scores[row_tiles][key_tiles][4];
  score(scores, state, item, slot, item.deal.at(step));
  float tile_maxima[row_tiles][2];
  row_maxima(tile_maxima, scores);
  const bool seed = is_seed(item.deal, step, config.warps);
  if constexpr (config.skip_softmax && !config.masses) {
    if (leave_out(item.params, state, tile_maxima, state.rows, seed)) {
      ++state.skipped;
      return false;
    }
  }
  RowStatistics<row_tiles> tile;  // sums of this tile alone, relative to the maxima so far
  larger(tile.maximum, state.rows.maximum, tile_maxima);
#pragma unroll
  for (int32 key_step = 0; key_step < key_tiles / 2; ++key_step)
    exponentiate<Input>(pending.probabilities[key_step], tile, scores, key_step, state.scale);
  if constexpr (config.masses) {
    if (leave_out(item.params, state, tile_maxima, tile, seed)) {
      ++state.skipped;
      return false;
    }
  }
  raise_maxima(state.rows, pending.shrink, tile_maxima, state.scale);
  add_sums(state.rows, tile);
  return true;
}

DEVICE void take_values(WarpState& state, const Pending& pending, const Item& item, int32 slot) {
  if (some_shrink(pending.shrink)) shrink_output(state.output, pending.shrink);
  const auto v = row_reader(VTile{item.shared.slot(warp_index(), slot)});
#pragma unroll
  for (int32 key_step = 0; key_step < key_tiles / 2; ++key_step)
    multiply_pv<Input>(state.output, pending.probabilities[key_step], v, key_step);
}

// --- Seeds.

// Maximum and mass of this warp's seed tile, in slot 1, for all to read.
DEVICE void publish_seed(const WarpState& state, const Item& item, int32 tile) {
  float scores[row_tiles][key_tiles][4];
  RowStatistics<row_tiles> statistics;
  if (tile >= item.deal.first) {
    score(scores, state, item, 1, tile);
    row_maxima(statistics.maximum, scores);
    if constexpr (config.mass_rule) {
      uint32 unused[row_tiles][4];
#pragma unroll
      for (int32 key_step = 0; key_step < key_tiles / 2; ++key_step)
        exponentiate<Input>(unused, statistics, scores, key_step, state.scale);
    }
  }
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const float mass = quad_sum(statistics.sum[r][half]);
      const int32 row = warp_index() * config.rows + r * 16 + half * 8 + fragment_row();
      if (fragment_column() == 0) {
        shared_store_2(item.shared.seeds + row * 8, statistics.maximum[r][half], mass);
      }
    }
}

// What all seeds say of this lane's rows.
DEVICE void read_seeds(WarpState& state, const Item& item) {
  const float share = float(item.deal.count) * reciprocal_approximate(float(item.deal.tiles()));
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const SharedAddress first = item.shared.seeds + (r * 16 + half * 8 + fragment_row()) * 8;
      float maximum = -infinity(), mass = 0.f;
#pragma unroll
      for (int32 warp = 0; warp < config.warps; ++warp)
        maximum = fmaxf(maximum, shared_load(first + warp * config.rows * 8));
      if constexpr (config.mass_rule) {
#pragma unroll 1  // or ptxas spills at d 256
        for (int32 warp = 0; warp < config.warps; ++warp) {
          const float shift = shared_load(first + warp * config.rows * 8);
          const float part = shared_load(first + warp * config.rows * 8 + 4);
          mass += part * weight_of(shift * state.scale, maximum * state.scale);
        }
      }
      if constexpr (!config.mass_rule) {
        state.seed[r][half] = fmaxf(state.seed[r][half], maximum);
      }
      state.ledger.reference[r][half] = fmaxf(state.rows.maximum[r][half], maximum);
      state.ledger.known[r][half] = mass * share;
      state.ledger.dropped[r][half] = 0.f;
    }
}

// --- One item.

DEVICE WarpState begin(const AttentionParams& params, const DecodeWork& work) {
  const float given = params.scale_array ? *params.scale_array : params.scale;
  WarpState state{.scale = (config.soft_cap ? params.soft_cap : given) * log2_e};
  if constexpr (config.soft_cap) {
    state.squash_factor = given * reciprocal_approximate(params.soft_cap);
  }
  clear(state.output);
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const int32 row = r * 16 + half * 8 + fragment_row();
      const bool exists = row < work.rows;
      // A row that does not exist has an infinite maximum: no key of it counts.
      state.rows.maximum[r][half] = exists ? -infinity() : infinity();
      if constexpr (config.skip_softmax && !config.mass_rule) {
        const int32 head = work.kv_head * params.group + (work.first_row + row) % params.group;
        state.threshold[r][half] =
            exists ? row_threshold(params, work.request, head, work.kv_len, state.scale) : 0.f;
        state.seed[r][half] =
            exists ? given_seed(params, work, row) * reciprocal_approximate(state.scale)
                   : -infinity();
      }
    }
  return state;
}

enum class Held { nothing, keys, values };

// All tiles of this warp.
DEVICE void stream(WarpState& state, Item& item) {
  Held held[slots];
  int32 step_of[slots];
  Pending pending[slots];
#pragma unroll
  for (int32 slot = 0; slot < slots; ++slot) {
    held[slot] = slot < item.deal.count ? Held::keys : Held::nothing;
    step_of[slot] = slot;
  }
  int32 next = slots;
  while (held[0] != Held::nothing || held[1] != Held::nothing) {
#pragma unroll
    for (int32 slot = 0; slot < slots; ++slot) {
      cp_async_wait<slots - 1>();  // this lane's part of the older load has landed
      sync_warp();                 // the whole warp's has
      bool more = held[slot] != Held::nothing;
      if (held[slot] == Held::keys) {
        if (take_keys(state, pending[slot], item, slot, step_of[slot])) {
          sync_warp();  // nobody reads the keys any more
          item.request_values(slot, step_of[slot]);
          held[slot] = Held::values;
          more = false;
        }
      } else if (held[slot] == Held::values) {
        take_values(state, pending[slot], item, slot);
      }
      if (more) {
        held[slot] = next < item.deal.count ? Held::keys : Held::nothing;
        step_of[slot] = next;
        if (held[slot] == Held::keys) {
          sync_warp();  // nobody reads the slot any more
          item.request_keys(slot, next++);
        }
      }
      cp_async_commit();
    }
  }
}

DEVICE void run(const AttentionParams& params, const Shared& shared,
                const DecodeSchedule<config.rows>& schedule, const DecodeWork& work) {
  Item item(params, shared, work);
  const int32 outer = params.cu_seqlens_q ? 0 : work.request;
  const int32 q_row = params.cu_seqlens_q ? work.q_start : 0;
  const GroupRows q{.first = static_cast<const char*>(params.q) +
                             (outer * params.q_strides.outer + q_row * params.q_strides.row +
                              work.kv_head * params.group * params.q_strides.head) *
                                 2,
                    .row_stride = params.q_strides.row * 2,
                    .head_stride = params.q_strides.head * 2,
                    .first_row = work.first_row,
                    .group = params.group};
  constexpr int32 q_threads = minimum(config.threads(), config.rows * 8);
  if (thread_index() < q_threads) {
    request_tile<q_threads>(QTile{shared.q}, q, 0, {0, work.rows}, params.head_dim_qk);
  }
  cp_async_commit();
  item.walk.begin();
  const int32 seed = seed_tile(item.deal, warp_index(), config.warps);
  if constexpr (config.skip_softmax) {
    if (seed >= item.deal.first) {
      const Place place{work.request, 0, work.kv_head, work.kv_len};
      item.request<KTile>(1, Source<true>::of(params.k, params.k_strides, params, place), seed,
                          params.head_dim_qk);
    }
    cp_async_commit();
  }
  if (item.deal.count > 0) item.request_keys(0, 0);
  cp_async_commit();

  WarpState state = begin(params, work);
  if constexpr (config.skip_softmax) {
    cp_async_wait<1>();  // Q and the seed; the first keys may still be on their way
    sync_block();
    publish_seed(state, item, seed);
    sync_warp();  // nobody reads the seed's keys any more
  }
  if (item.deal.count > 1) item.request_keys(1, 1);
  cp_async_commit();
  if constexpr (!config.skip_softmax) cp_async_wait<2>();  // Q
  sync_block();
  if constexpr (config.skip_softmax) read_seeds(state, item);

  stream(state, item);
  publish(state, shared);
  sync_block();
  if constexpr (config.skip_softmax) {
    if (params.skip_counts) report(params, shared, work, item.keys);
  }
  finish(params, shared, schedule, work);
}

KERNEL void __launch_bounds__(config.threads(), config.blocks)
    decode(const __grid_constant__ AttentionParams params) {
  const Shared shared;
  const DecodeSchedule<config.rows> schedule(params);
  for (int32 item = block_index(); item < params.items; item += grid_size()) {
    const DecodeWork work = schedule.find(item);
    if (!work.exists) continue;
    run(params, shared, schedule, work);
    sync_block();  // nobody reads shared memory any more
  }
}
