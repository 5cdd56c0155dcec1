// Chosen keys of Hopper's MLA decode: rows of the cache that lie anywhere, copied one by one with
// cp.async by the eight warps of P V, which wait for others a third of the time.
//
//   rows    warp w has rows 8 w … 8 w + 7 of a tile; eight lanes share a row
//   none    a position outside of the cache, or past the list's end, is no key: its row is zeros,
//           its bit of the warp's word is not set, and the scores are masked by these words
//   there   each thread waits for its own copies and fences them; then its warp arrives
//
//   latent part of tile i   requested after P V of tile i − 3; told of during that of tile i − 2
//   rope part of tile i     requested during P V of tile i − 2, when Q Kᵀ of tile i − 1 has left
//                           its place; told of right after that P V
#pragma once

#include <attention/mla_item.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/redux.cuh>
#include <ptx/shared.cuh>
#include <ptx/sync.cuh>
#include <ptx/tma.cuh>
#include <tile/swizzle.cuh>

constexpr int32 gathering_warps = 8;

// A block takes one item: tokens of no request, of which there may be many, are then blocks that
// leave at once.
struct KeyGather {
  static constexpr int32 passes = tile_keys / gathering_warps / 4;  // rows of a thread

  const AttentionParams& params;
  const Shared& shared;
  int32 positions[passes];  // in the cache, of this thread's rows of one tile; −1: none

  DEVICE KeyGather(const AttentionParams& params, const Shared& shared)
      : params(params), shared(shared) {}

  // Of the thread: worked out where they are wanted, for O leaves no registers to keep them in.
  static DEVICE int32 thread() { return recomputed(thread_index()) % (gathering_warps * 32); }
  static DEVICE int32 warp() { return thread() / 32; }
  static DEVICE int32 row(int32 pass) { return warp() * 8 + pass * 4 + thread() % 32 / 8; }

  DEVICE void look_up(const Turn& turn, int32 step) {
    const Item item = shared.item(turn.number);
    if (step >= item.count) return;
    const int32* list = params.block_tables + item.work.request * params.block_table_stride;
    const int32 first_key = item.first_key(step);
#pragma unroll
    for (int32 pass = 0; pass < passes; ++pass) {
      const int32 key = first_key + row(pass);
      const int32 found = key < item.work.kv_len ? list[key] : -1;
      positions[pass] = uint32(found >> params.page_shift) < uint32(params.pages) ? found : -1;
    }
  }

  // Request chunks of the rows whose positions are there.
  template <int32 first, int32 chunks>
  DEVICE void request(SharedAddress target) const {
    const SharedTile<tile_keys, chunks * chunk_columns> tile{target};
    const int32 column = thread() % 8;
#pragma unroll
    for (int32 pass = 0; pass < passes; ++pass) {
      const int32 position = positions[pass], page = position >> params.page_shift;
      const int32 slot = position & (1 << params.page_shift) - 1;
      const char* source = static_cast<const char*>(params.k) + first * row_bytes + column * 16 +
                           (page * params.k_strides.outer + slot * params.k_strides.row) * 2;
#pragma unroll
      for (int32 chunk = 0; chunk < chunks; ++chunk)
        cp_async_16(tile.at(chunk, row(pass), column), source + chunk * row_bytes, position >= 0);
    }
  }
  DEVICE void request_latent(int32 entry) const {
    shared.wait_empty(entry);
    uint32 bits = 0;
#pragma unroll
    for (int32 pass = 0; pass < passes; ++pass)
      bits |= uint32(positions[pass] >= 0) << pass * 4 + thread() % 32 / 8;
    bits = redux_or(bits);
    const SharedAddress words = shared.chosen + entry % stages * chosen_bytes;
    if (thread() % 32 == 0) shared_store(words + warp() * 4, bits);
    request<0, latent_chunks>(shared.stage(entry));
  }
  DEVICE void request_rope() const { request<latent_chunks, 1>(shared.rope); }

  // Tell `full` that this warp's copies are there, but for the newest groups.
  template <int32 pending>
  DEVICE void announce(SharedAddress full) const {
    cp_async_wait<pending>();
    fence_proxy_async();
    sync_warp();
    if (thread() % 32 == 0) mbarrier_arrive(full);
  }

  DEVICE SharedAddress full(int32 entry) const { return shared.full + entry % stages * 8; }

  DEVICE void begin(const Turn& turn) {
    const int32 count = shared.item(turn.number).count;
    if (thread() % 32 == 0) mbarrier_arrive(full(turn.entry(-1)));  // a stage for Q
    for (int32 step = 0; step < minimum(stages, count); ++step) {
      look_up(turn, step);
      request_latent(turn.entry(step));
      if (step == 0) request_rope();
    }
    cp_async_commit();
    for (int32 step = 0; step < minimum(stages, count); ++step) announce<0>(full(turn.entry(step)));
    if (count > 0) announce<0>(shared.rope_full);
    if (count < 2) return;
    look_up(turn, 1);
    mbarrier_wait(shared.rope_free, 0);
    request_rope();
    cp_async_commit();
    look_up(turn, 2);
    announce<0>(shared.rope_full);
  }
  DEVICE void begin_short(const Turn&) const {}

  // While P V of a tile runs: the tile two ahead.
  DEVICE void beside_products(const Turn& turn, int32 step) {
    const int32 next = step + 2, count = shared.item(turn.number).count;
    if (next >= count) return;
    mbarrier_wait(shared.rope_free, next - 1 & 1);
    request_rope();
    cp_async_commit();
    look_up(turn, step + stages);
    // Its latent part; of the first tiles, `begin` told.
    if (next >= stages) announce<1>(full(turn.entry(next)));
  }

  // When this warp is done with a tile: the one that follows in its stage.  The rope part of the
  // tile two ahead must be told of before P of the next one is awaited, which comes after it.
  DEVICE void after_products(const Turn& turn, int32 step) {
    const int32 count = shared.item(turn.number).count;
    if (step + stages < count) request_latent(turn.entry(step + stages));
    cp_async_commit();
    if (step + 2 < count) announce<1>(shared.rope_full);
  }
  DEVICE void beside_output(const Turn&) const {}
};
