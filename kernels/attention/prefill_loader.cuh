// The loader of fmha_sm90.cu: one warp that takes items, and brings their Q, K and V by TMA.
#pragma once

#include <attention/prefill_shared.cuh>
#include <ptx/atomic.cuh>
#include <ptx/tma.cuh>

// Maps have the axes columns, rows, heads, requests or pages; a box is 64 columns of rows.  That of
// packed queries has columns, heads of a group, tokens, groups, requests; a box is 64 columns of
// all heads of as many tokens as a warp-group has rows for.
struct FmhaHopperParams {
  AttentionParams attention;
  TensorMap q, k, v, packed_q;
};

template <FmhaHopperConfig config>
struct PrefillLoader {
  using Shared = PrefillShared<config>;

  const FmhaHopperParams& maps;
  const AttentionParams& params;
  const Shared& shared;
  uint32 landed = 0;  // tiles of V that went by way of `v_landed`

  DEVICE PrefillLoader(const FmhaHopperParams& params, const Shared& shared)
      : maps(params), params(params.attention), shared(shared) {}

  // All items of this block, and one that does not exist.
  DEVICE void run() {
    const ItemOrder<config.block_q(), group_rows> items(params);
    int32 turn = 0, tile = 0;
    for (int32 item = block_index(); item < params.items; item = next_item()) {
      const Work work = items.find(item);
      if (!work.exists) continue;
      tile += load(work, turn, tile);
      ++turn;
    }
    mbarrier_wait(shared.q_empty, (turn & 1) ^ 1);
    if (lane_index() == 0) {
      shared.publish(turn, Work{});
      mbarrier_arrive(shared.q_full);
    }
  }

 private:
  // The first items are the blocks' own numbers.  Every block asks once in vain, so there are as
  // many questions as items: the counter is then at zero again.
  DEVICE int32 next_item() const {
    int32 count = 0;
    if (lane_index() == 0) count = atomic_take(params.arrivals, params.items - 1);
    return grid_size() + shuffle(count, 0);
  }

  // Load an item; returns how many tiles it has.
  DEVICE int32 load(const Work& work, int32 turn, int32 first_tile) {
    const Range seen = work.keys<group_rows>(params, config.consumers);
    const TileOrder order(seen, config.block_kv);

    // K of a tile is wanted before V of the one before it, and Q as soon as K of the first.
    for (int32 step = 0; step < order.count + 2; ++step) {
      if (step < order.count) load_k(work, order.at(step), first_tile + step);
      if (step == 0) load_q(work, turn);
      if (step > 1) clear_unseen(order.at(step - 2), first_tile + step - 2, seen);
      if (0 < step && step <= order.count)
        load_v(work, order.at(step - 1), first_tile + step - 1, seen);
    }
    return order.count;
  }

  // Whether a tile has keys that no row sees.  Only the first and the last may.
  DEVICE static bool partial(int32 key_tile, Range seen) {
    const int32 first_key = key_tile * config.block_kv;
    return first_key < seen.begin || first_key + config.block_kv > seen.end;
  }

  DEVICE void load_k(const Work& work, int32 key_tile, int32 tile) const {
    const SharedAddress full = shared.k_full + shared.stage(tile);
    mbarrier_wait(shared.k_empty + shared.stage(tile), shared.phase(tile) ^ 1);
    request_keys(shared.k.tile(tile), maps.k, work, key_tile, full);
  }

  // A tile with unseen keys goes by way of `clear_unseen` before it is full.
  DEVICE void load_v(const Work& work, int32 key_tile, int32 tile, Range seen) const {
    const SharedAddress full = shared.v_full + shared.stage(tile);
    mbarrier_wait(shared.v_empty + shared.stage(tile), shared.phase(tile) ^ 1);
    request_keys(shared.v.tile(tile), maps.v, work, key_tile,
                 partial(key_tile, seen) ? shared.v_landed : full);
  }

  // Values of unseen keys become zeros: whatever is there, a weight of 0 must make nothing of it.
  DEVICE void clear_unseen(int32 key_tile, int32 tile, Range seen) {
    using Tile = typename Shared::VTile;
    if (!partial(key_tile, seen)) return;
    mbarrier_wait(shared.v_landed, landed & 1);
    ++landed;
    const SharedAddress target = shared.v.tile(tile).start + lane_index() % 8 * 16;
    for (int32 row = lane_index() / 8; row < Tile::rows; row += 4) {
      if (seen.contains(key_tile * config.block_kv + row)) continue;
#pragma unroll
      for (int32 chunk = 0; chunk < Tile::chunks; ++chunk)
        shared_store_4(target + chunk * Tile::chunk_bytes + row * row_bytes, {0.f, 0.f, 0.f, 0.f});
    }
    fence_proxy_async();
    sync_warp();
    if (lane_index() == 0) mbarrier_arrive(shared.v_full + shared.stage(tile));
  }

  // Keys of a tile, and what lies behind the request's last; the lanes share the boxes.
  template <typename Tile>
  DEVICE void request_keys(Tile target, const TensorMap& map, const Work& work, int32 key_tile,
                           SharedAddress barrier) const {
    if (lane_index() == 0) mbarrier_arrive_expect(barrier, Tile::bytes);
    sync_warp();
    const int32 head = work.head / params.group, first_key = key_tile * config.block_kv;
    if constexpr (config.paged) {
      const int32 page_size = 1 << params.page_shift;
      const int32 rows = minimum(page_size, Tile::rows & -Tile::rows);
      for (int32 row = lane_index() * rows; row < Tile::rows; row += warp_size * rows) {
        const int32 key = first_key + row, slot = key & (page_size - 1);
        const int32 page = page_of(work, key);
#pragma unroll
        for (int32 chunk = 0; chunk < Tile::chunks; ++chunk)
          tma_load(target.start + chunk * Tile::chunk_bytes + row * row_bytes, map,
                   {chunk * chunk_columns, slot, head, page}, barrier);
      }
    } else if (lane_index() < Tile::chunks) {
      const int32 chunk = lane_index(), outer = params.cu_seqlens_kv ? 0 : work.request;
      tma_load(target.start + chunk * Tile::chunk_bytes, map,
               {chunk * chunk_columns, work.kv_start + first_key, head, outer}, barrier);
    }
  }

  // The page of a key; −1, which reads as zeros, past the request's keys and outside of the pool.
  DEVICE int32 page_of(const Work& work, int32 key) const {
    if (key >= work.kv_len) return -1;
    const int32* table = params.block_tables + work.request * params.block_table_stride;
    const int32 page = table[key >> params.page_shift];
    return uint32(page) < uint32(params.pages) ? page : -1;
  }

  // Q of an item, and what the item is.
  DEVICE void load_q(const Work& work, int32 turn) const {
    using Tile = typename Shared::QTile;
    const int32 tokens = group_rows / work.pack, rows = tokens * work.pack;  // of a warp-group
    mbarrier_wait(shared.q_empty, (turn & 1) ^ 1);
    clear_rows(rows);
    if (lane_index() == 0) {
      shared.publish(turn, work);
      mbarrier_arrive_expect(shared.q_full, config.consumers * Tile::chunks * rows * row_bytes);
    }
    sync_warp();
    const int32 group = lane_index() / Tile::chunks, chunk = lane_index() % Tile::chunks;
    const int32 outer = params.cu_seqlens_q ? 0 : work.request;
    if (group < config.consumers) {
      const SharedAddress target = shared.q_of(group).start + chunk * Tile::chunk_bytes;
      const int32 column = chunk * chunk_columns;
      const int32 token = work.q_start + work.first_token + group * tokens;
      if (work.pack == 1) {
        tma_load(target, maps.q, {column, token, work.head, outer}, shared.q_full);
      } else {
        tma_load(target, maps.packed_q, {column, 0, token, work.head / work.pack, outer},
                 shared.q_full);
      }
    }
  }

  // Rows of each warp-group from `first_row` on, which no token fills, become zeros.
  DEVICE void clear_rows(int32 first_row) const {
    using Tile = typename Shared::QTile;
    if (first_row == group_rows) return;
    for (int32 chunk = 0; chunk < config.consumers * Tile::chunks; ++chunk) {
      const SharedAddress target = shared.q + chunk * Tile::chunk_bytes + lane_index() % 8 * 16;
      for (int32 row = first_row + lane_index() / 8; row < group_rows; row += 4)
        shared_store_4(target + row * row_bytes, {0.f, 0.f, 0.f, 0.f});
    }
    fence_proxy_async();
    sync_warp();
  }
};
