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

template <MlaConfig config>
struct PageLoads {
  static constexpr int32 page_rows = minimum(config.page_size, tile_keys);

  const MlaParams& params;
  const Shared& shared;
  const Item& item;
  const bool loads;

  DEVICE PageLoads(const MlaParams& params, const Shared& shared, const Item& item)
      : params(params), shared(shared), item(item), loads(thread_index() == group_threads) {}

  // The page of a key; −1, which reads as zeros, past the request's keys and outside of the cache.
  DEVICE int32 page_of(int32 key) const {
    if (key >= item.work.kv_len) return -1;
    const AttentionParams& attention = params.attention;
    const int32* table = attention.block_tables + item.work.request * attention.block_table_stride;
    const int32 page = table[key >> attention.page_shift];
    return uint32(page) < uint32(attention.pages) ? page : -1;
  }
  DEVICE void load_latent(int32 step) const {
    const SharedAddress target = shared.kv + step % stages * stage_bytes;
    const SharedAddress full = shared.full + step % stages * 8;
    mbarrier_arrive_expect(full, stage_bytes);
    for (int32 row = 0; row < tile_keys; row += page_rows) {
      const int32 key = item.first_key(step) + row, slot = key & (config.page_size - 1);
      const int32 page = page_of(key);
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
  DEVICE void load_rope(int32 step) const {
    mbarrier_arrive_expect(shared.rope_full, chunk_bytes);
    for (int32 row = 0; row < tile_keys; row += page_rows) {
      const int32 key = item.first_key(step) + row, slot = key & (config.page_size - 1);
      tma_load(shared.rope + row * row_bytes, params.one, {0, slot, latent_chunks, page_of(key)},
               shared.rope_full);
    }
  }

  DEVICE void begin() const {
    if (loads) {
      for (int32 step = 1; step < minimum(stages, item.count); ++step) load_latent(step);
      mbarrier_wait(shared.q_read, 0);
      if (item.count > 0) {
        load_latent(0);
        load_rope(0);
      }
      if (item.count > 1) {
        mbarrier_wait(shared.rope_free, 0);
        load_rope(1);
      }
    }
    sync_warp();
  }
  DEVICE void beside_products(int32 step) const {
    if (!loads || step + 2 >= item.count) return;
    mbarrier_wait(shared.rope_free, step + 1 & 1);
    load_rope(step + 2);
  }
  DEVICE void after_products(int32 step) const {
    if (loads && step + stages < item.count) {
      mbarrier_wait(shared.empty + step % stages * 8, step / stages & 1);
      load_latent(step + stages);
    }
    sync_warp();
  }
};
