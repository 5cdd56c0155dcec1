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
                  const Item& item, SharedAddress q, SharedAddress k, int32 tile) {
  multiply_qk<config.head_dim_qk, Input>(scores, row_reader(QTile{q}), column_reader(KTile{k}));
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
DEVICE bool take_keys(WarpState& state, Pending& pending, const AttentionParams& params,
                      const Item& item, SharedAddress q, SharedAddress k, int32 step) {
  float scores[row_tiles][key_tiles][4];
  score(scores, state, item, q, k, item.deal.at(step));
  float tile_maxima[row_tiles][2];
  row_maxima(tile_maxima, scores);
  const bool seed = is_seed(item.deal, step, config.warps);
  if constexpr (config.skip_softmax && !config.masses) {
    if (leave_out(params, state, tile_maxima, state.rows, seed)) {
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
    if (leave_out(params, state, tile_maxima, tile, seed)) {
      ++state.skipped;
      return false;
    }
  }
  raise_maxima(state.rows, pending.shrink, tile_maxima, state.scale);
  add_sums(state.rows, tile);
  return true;
}

DEVICE void take_values(WarpState& state, const Pending& pending, SharedAddress values) {
  if (some_shrink(pending.shrink)) shrink_output(state.output, pending.shrink);
  const auto v = row_reader(VTile{values});
#pragma unroll
  for (int32 key_step = 0; key_step < key_tiles / 2; ++key_step)
    multiply_pv<Input>(state.output, pending.probabilities[key_step], v, key_step);
}

// --- Seeds.

// Maximum and mass of this warp's seed tile for all to read.
DEVICE void publish_seed(const WarpState& state, const Shared& shared, const Item& item,
                         SharedAddress q) {
  const int32 tile = seed_tile(item.deal, warp_index(), config.warps);
  float scores[row_tiles][key_tiles][4];
  RowStatistics<row_tiles> statistics;
  if (tile >= item.deal.first) {
    score(scores, state, item, q, shared.slot(warp_index(), Shape::first_slot), tile);
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
        shared_store_2(shared.seeds + row * 8, statistics.maximum[r][half], mass);
      }
    }
}

// What all seeds say of this lane's rows.
DEVICE void read_seeds(WarpState& state, const Shared& shared, const Item& item) {
  const float share = float(item.deal.count) * reciprocal_approximate(float(item.deal.tiles()));
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const SharedAddress first = shared.seeds + (r * 16 + half * 8 + fragment_row()) * 8;
      float maximum = -infinity(), mass = 0.f;
#pragma unroll
      for (int32 warp = 0; warp < config.warps; ++warp)
        maximum = fmaxf(maximum, shared_load(first + warp * config.rows * 8));
      if constexpr (config.mass_rule) {
#pragma unroll
        for (int32 warp = 0; warp < config.warps; ++warp) {
          const float shift = shared_load(first + warp * config.rows * 8);
          const float part = shared_load(first + warp * config.rows * 8 + 4);
          mass += part * weight_of(shift * state.scale, maximum * state.scale);
        }
      }
      state.seed[r][half] = maximum;
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
      }
    }
  return state;
}

enum class Held { nothing, keys, values };

// All tiles of this warp.
DEVICE void stream(WarpState& state, const AttentionParams& params, const Shared& shared,
                   Item& item, SharedAddress q) {
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
      const SharedAddress tile = shared.slot(warp_index(), slot);
      bool more = held[slot] != Held::nothing;
      if (held[slot] == Held::keys) {
        if (take_keys(state, pending[slot], params, item, q, tile, step_of[slot])) {
          sync_warp();  // nobody reads the keys any more
          item.request_values(params, tile, step_of[slot]);
          held[slot] = Held::values;
          more = false;
        }
      } else if (held[slot] == Held::values) {
        take_values(state, pending[slot], tile);
      }
      if (more) {
        held[slot] = next < item.deal.count ? Held::keys : Held::nothing;
        step_of[slot] = next;
        if (held[slot] == Held::keys) {
          sync_warp();  // nobody reads the slot any more
          item.request_keys(params, tile, next++);
        }
      }
      cp_async_commit();
    }
  }
}

// The first loads of an item: Q, and the first of a warp's own.
DEVICE void start(const AttentionParams& params, const Shared& shared, Item& item, int32 parity) {
  item.request_q(params, shared.q + parity * QTile::bytes);
  cp_async_commit();
  item.walk.begin();
  const SharedAddress first = shared.slot(warp_index(), Shape::first_slot);
  if constexpr (config.skip_softmax) {
    const int32 seed = seed_tile(item.deal, warp_index(), config.warps);
    if (seed >= item.deal.first) item.request_seed(params, first, seed);
  } else {
    if (item.deal.count > 0) item.request_keys(params, first, 0);
  }
  cp_async_commit();
}

// From the first loads to each warp's result.
DEVICE void run(WarpState& state, const AttentionParams& params, const Shared& shared, Item& item,
                int32 parity) {
  const SharedAddress q = shared.q + parity * QTile::bytes;
  const auto request_keys = [&](int32 step) {
    const SharedAddress target = shared.slot(warp_index(), step);
    if (step < item.deal.count) item.request_keys(params, target, step);
    cp_async_commit();
  };
  if constexpr (config.skip_softmax) {
    cp_async_wait<0>();
    sync_block();  // Q and the seeds are there
    request_keys(0);
    publish_seed(state, shared, item, q);
    sync_warp();  // nobody reads the seed's keys any more
    request_keys(1);
    sync_block();
    read_seeds(state, shared, item);
  } else {
    cp_async_wait<1>();
    sync_block();  // Q is there, and the slot where the item before was merged is free
    request_keys(1);
  }
  stream(state, params, shared, item, q);
}

// The item after `item`: blocks fetch items in order, or have no more than one.
DEVICE int32 fetch(const AttentionParams& params, int32 item) {
  if (!params.queued) return item + params.blocks;
  return params.blocks + atomic_count(params.arrivals, ~0u);
}

// Leave the counters as they were: the last block to leave knows that none fetches any more.
DEVICE void leave(const AttentionParams& params) {
  if (!params.queued || thread_index() != 0) return;
  const uint32 last = params.blocks - 1;
  if (atomic_count(params.arrivals + 1, last) == last) params.arrivals[0] = 0;
}

KERNEL void __launch_bounds__(config.threads(), config.blocks)
    decode(const __grid_constant__ AttentionParams params) {
  const Shared shared;
  const int64 load = params.splitting ? total_load<config.rows>(params) : 0;
  DecodeWork work = find_decode_work<config.rows>(params, block_index(), load);
  if (!work.exists) return leave(params);
  Item item(params, work);
  start(params, shared, item, 0);
  for (int32 parity = 0;; parity ^= 1) {
    WarpState state = begin(params, work);
    if (thread_index() == 0) {
      shared_store(shared.next, __builtin_bit_cast(float, fetch(params, work.item)));
    }
    run(state, params, shared, item, parity);
    sync_block();  // all warps are done with their tiles
    const int32 number = __builtin_bit_cast(int32, shared_load(shared.next));
    const DecodeWork done = work;
    const Range keys = item.keys;
    work = find_decode_work<config.rows>(params, number, load);
    if (work.exists) item = Item(params, work);
    if (Shape::ahead && work.exists) start(params, shared, item, parity ^ 1);
    publish(state, shared);
    sync_block();
    if constexpr (config.skip_softmax) {
      if (params.skip_counts) report(params, shared, done, keys);
    }
    finish(params, shared, done);
    if (!work.exists) return leave(params);
    if constexpr (!Shape::ahead) {
      sync_block();  // nobody reads the rings any more
      start(params, shared, item, parity ^ 1);
    }
  }
}
