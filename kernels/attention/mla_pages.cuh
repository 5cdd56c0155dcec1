// Tiles of Hopper's MLA decode out of whole pages, by bulk copies of one thread of P V.
#pragma once

#include <attention/config.cuh>
#include <attention/mla_item.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/sync.cuh>
#include <ptx/tma.cuh>
#include <tile/swizzle.cuh>

struct MlaParams {
  AttentionParams attention;
  TensorMap wide, one;  // of the cache: boxes of 64 columns, four chunks (of large pages) and one
};

// What is wanted of an item may be wanted of the next one, too: steps past the last tile are the
// next item's, of which its first two tiles are asked for before this item ends.
template <MlaConfig config>
struct PageLoads {
  static constexpr int32 page_rows = minimum(config.page_size, tile_keys);

  const MlaParams& params;
  const Shared& shared;
  const bool loads;

  DEVICE PageLoads(const MlaParams& params, const Shared& shared)
      : params(params), shared(shared), loads(thread_index() == group_threads) {}

  // The page of a key; −1, which reads as zeros, past the request's keys and outside of the cache.
  DEVICE int32 page_of(int32 number, int32 key) const {
    const DecodeWork work = shared.work(number);
    if (key >= work.kv_len) return -1;
    const AttentionParams& attention = params.attention;
    const int32* table = attention.block_tables + work.request * attention.block_table_stride;
    const int32 page = table[key >> attention.page_shift];
    return uint32(page) < uint32(attention.pages) ? page : -1;
  }
  DEVICE void load_latent(int32 number, int32 step, int32 entry) const {
    const int32 first_key = shared.item(number).first_key(step);
    const SharedAddress target = shared.stage(entry), full = shared.full + entry % stages * 8;
    mbarrier_arrive_expect(full, stage_bytes);
    for (int32 row = 0; row < tile_keys; row += page_rows) {
      const int32 key = first_key + row, slot = key & (config.page_size - 1);
      const int32 page = page_of(number, key);
      if constexpr (page_rows == tile_keys) {
        tma_load(target, params.wide, {0, slot, 0, page}, full);
        tma_load(target + 4 * chunk_bytes, params.wide, {0, slot, 4, page}, full);
      } else {
        for (int32 chunk = 0; chunk < latent_chunks; ++chunk)
          tma_load(target + chunk * chunk_bytes + row * row_bytes, params.one,
                   {0, slot, chunk, page}, full);
      }
    }
  }

  // Ask for a step's entry of the ring: the latent part of a tile, or a stage for Q.
  DEVICE void request_latent(const Turn& turn, int32 step) const {
    const int32 entry = turn.entry(step), count = shared.item(turn.number).count;
    int32 number = turn.number;
    if (step >= count) {
      ++number;
      step -= count + 1;
      shared.wait_known(number);
    }
    const Item item = shared.item(number);
    if (step >= item.count && step >= 0 || !item.work.exists) return;
    shared.wait_empty(entry);
    if (step >= 0) {
      load_latent(number, step, entry);
    } else {
      mbarrier_arrive(shared.full + entry % stages * 8);
    }
  }
  DEVICE void request_rope(const Turn& turn, int32 step) const {
    const int32 before = turn.tile(step - 1);  // the tile whose place it takes
    const int32 count = shared.item(turn.number).count;
    int32 number = turn.number;
    if (step >= count) {
      ++number;
      step -= count;
      shared.wait_known(number);
    }
    if (step >= shared.item(number).count) return;
    mbarrier_wait(shared.rope_free, before & 1);
    mbarrier_arrive_expect(shared.rope_full, chunk_bytes);
    const int32 first_key = shared.item(number).first_key(step);
    for (int32 row = 0; row < tile_keys; row += page_rows) {
      const int32 key = first_key + row, slot = key & (config.page_size - 1);
      tma_load(shared.rope + row * row_bytes, params.one,
               {0, slot, latent_chunks, page_of(number, key)}, shared.rope_full);
    }
  }

  // The first tiles of a block.
  DEVICE void begin(const Turn& turn) const {
    if (loads) {
      const int32 count = shared.item(turn.number).count;
      for (int32 step = -1; step < minimum(2, count); ++step) request_latent(turn, step);
      if (count > 0) request_rope(turn, 0);
      continue_beginning(turn);
    }
    sync_warp();
  }
  // What comes in place of tiles that a short item has not.
  DEVICE void begin_short(const Turn& turn) const {
    if (loads) {
      const int32 count = shared.item(turn.number).count;
      for (int32 step = count; step < stages; ++step) request_latent(turn, step);
      if (count < 2) request_rope(turn, count);
    }
    sync_warp();
  }
  DEVICE void beside_products(const Turn& turn, int32 step) const {
    if (loads && step + 2 <= shared.item(turn.number).count) request_rope(turn, step + 2);
  }
  DEVICE void after_products(const Turn& turn, int32 step) const {
    if (loads) request_latent(turn, step + stages);
    sync_warp();
  }
  // Before the end of an item, whose O is being written: what of the next one could not be asked
  // for, because its Q lay there and its first tile was in use.
  DEVICE void beside_output(const Turn& next) const {
    if (loads) {
      shared.wait_known(next.number);
      continue_beginning(next);
    }
    sync_warp();
  }

 private:
  DEVICE void continue_beginning(const Turn& turn) const {
    const int32 count = shared.item(turn.number).count;
    if (count > 2) request_latent(turn, 2);
    if (count > 1) request_rope(turn, 1);
  }
};
