// What the warp-groups of fmha_sm90.cu share: tiles, barriers, and what an item is.
#pragma once

#include <attention/certificate.cuh>
#include <attention/config.cuh>
#include <attention/schedule.cuh>
#include <core/device.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/shared.cuh>
#include <tile/swizzle.cuh>

constexpr int32 group_rows = 64, group_threads = 128, group_warps = 4;
constexpr int32 stages = 2;  // tiles of K and of V

template <FmhaHopperConfig config>
struct PrefillShared {
  using QTile = SharedTile<group_rows, config.head_dim_qk>;  // of one warp-group
  using KTile = SharedTile<config.block_kv, config.head_dim_qk>;
  using VTile = SharedTile<config.block_kv, config.head_dim_v>;

  SharedAddress q;
  TileRing<KTile, stages> k;
  TileRing<VTile, stages> v;
  SharedAddress works;                             // [turn % 2]
  SharedAddress votes;                             // [warp-group][tile % 2][warp]
  SharedAddress k_full, k_empty, v_full, v_empty;  // [stage]
  SharedAddress q_full, q_empty, v_landed;
  LostWeight<1> lost{.first_thread = group_threads};  // of threads that compute

  DEVICE PrefillShared() {
    SharedCarver carver;
    q = carver.take(config.consumers * QTile::bytes, "q");
    k.start = carver.take(k.bytes, "k");
    v.start = carver.take(v.bytes, "v");
    works = carver.take(2 * 32, "works", 16);
    votes = carver.take(config.consumers * 2 * 16, "votes", 16);
    k_full = carver.take((4 * stages + 3) * 8, "barriers", 8);
    k_empty = k_full + stages * 8;
    v_full = k_empty + stages * 8;
    v_empty = v_full + stages * 8;
    q_full = v_empty + stages * 8;
    q_empty = q_full + 8;
    v_landed = q_empty + 8;
    if constexpr (config.certificate)
      lost.start = carver.take(config.consumers * group_threads * lost_weight_bytes, "lost", 8);
  }

  DEVICE void begin() const {
    constexpr int32 readers = config.consumers * group_warps;
    for (int32 stage = 0; stage < stages; ++stage) {
      mbarrier_init(k_full + stage * 8, 1);
      mbarrier_init(k_empty + stage * 8, readers);
      mbarrier_init(v_full + stage * 8, 1);
      mbarrier_init(v_empty + stage * 8, readers);
    }
    mbarrier_init(q_full, 1);
    mbarrier_init(q_empty, readers);
    mbarrier_init(v_landed, 1);
    fence_mbarrier_init();
  }

  DEVICE QTile q_of(int32 group) const { return {q + group * QTile::bytes}; }

  // Tiles are counted from the block's first to its last, over all of its items.
  DEVICE static int32 stage(uint32 tile) { return tile % stages * 8; }
  DEVICE static uint32 phase(uint32 tile) { return tile / stages & 1; }

  // What the block works on in its turn `turn`; it ends with one that does not exist.
  DEVICE void publish(int32 turn, const Work& work) const {
    const SharedAddress target = works + turn % 2 * 32;
    shared_store_4(target,
                   {bits(work.request), bits(work.head), bits(work.first_token), bits(work.pack)});
    shared_store_4(target + 16,
                   {bits(work.q_len), bits(work.kv_len), bits(work.q_start), bits(work.exists)});
  }

  DEVICE Work work(int32 turn) const {
    const SharedAddress source = works + turn % 2 * 32;
    float first[4], second[4];
    shared_load_4(first, source);
    shared_load_4(second, source + 16);
    return {.request = number(first[0]),
            .head = number(first[1]),
            .first_token = number(first[2]),
            .pack = number(first[3]),
            .q_len = number(second[0]),
            .kv_len = number(second[1]),
            .q_start = number(second[2]),
            .kv_start = 0,
            .exists = number(second[3]) != 0};
  }

 private:
  // Shared memory is written in words of float.
  DEVICE static float bits(int32 value) { return __builtin_bit_cast(float, value); }
  DEVICE static int32 number(float word) { return warp_uniform(__builtin_bit_cast(int32, word)); }
};
