// MLA decode's sizes, what its warp-groups share, and what an item is.
#pragma once

#include <attention/decode_work.cuh>
#include <attention/split_parts.cuh>
#include <core/device.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/shared.cuh>

constexpr int32 block_rows = 64, tile_keys = 64, latent = 512, group_threads = 128;
constexpr int32 stages = 3, chunk_bytes = 8192, latent_chunks = 8;
constexpr int32 stage_bytes = latent_chunks * chunk_bytes;
constexpr int32 barriers = 2 * stages + 5;
constexpr int32 q_chunks = 7;          // in registers
constexpr int32 chosen_bytes = 8 * 4;  // of a tile of chosen keys: a word for 8 of them, a bit each

struct Shared {
  SharedAddress kv, rope, p, q, alpha, words, votes, chosen, rows, accounts, work, last;
  SharedAddress full, empty, rope_full, rope_free, p_ready, p_free, q_read;

  DEVICE Shared() {
    SharedCarver carver;
    kv = carver.take(stages * stage_bytes, "kv");
    rope = carver.take(chunk_bytes, "rope");
    p = carver.take(chunk_bytes, "p");
    q = carver.take(2 * chunk_bytes, "q");  // its last two chunks
    alpha = carver.take(block_rows * 4, "alpha", 16);
    words = carver.take(4 * 4, "words", 16);
    votes = carver.take(2 * 4 * 4, "votes", 16);
    chosen = carver.take(stages * chosen_bytes, "chosen", 16);
    rows = carver.take(block_rows * 16, "rows", 16);
    accounts = carver.take(block_rows * 16, "accounts", 16);
    work = carver.take(3 * 16, "work", 16);
    last = carver.take(4, "last", 16);
    full = carver.take(barriers * 8, "barriers", 8);
    empty = full + stages * 8;
    rope_full = empty + stages * 8;
    rope_free = rope_full + 8;
    p_ready = rope_free + 8;
    p_free = p_ready + 8;
    q_read = p_free + 8;
  }

  // `loaders` arrive when a tile is there.
  DEVICE void begin(int32 loaders) const {
    for (int32 stage = 0; stage < stages; ++stage) {
      mbarrier_init(full + stage * 8, loaders);
      mbarrier_init(empty + stage * 8, 8);  // warps of both P V
    }
    mbarrier_init(rope_full, loaders);
    mbarrier_init(rope_free, 4);
    mbarrier_init(p_ready, 4);
    mbarrier_init(p_free, 8);
    mbarrier_init(q_read, 4);
    fence_mbarrier_init();
  }
};

// What is known of an item, out of the way of registers until it is wanted again.
DEVICE void keep_work(const Shared& shared, const DecodeWork& work) {
  const auto store = [&](int32 place, const int32(&x)[4]) {
    float bits[4];
    for (int32 i = 0; i < 4; ++i) bits[i] = __builtin_bit_cast(float, x[i]);
    shared_store_4(shared.work + place * 16, bits);
  };
  store(0, {work.request, work.split, work.splits, work.place});
  store(1, {work.first_row, work.rows, work.q_start, work.q_len});
  store(2, {work.kv_len});
}
DEVICE DecodeWork kept_work(const Shared& shared) {
  int32 words[3][4];
  for (int32 place = 0; place < 3; ++place) {
    float bits[4];
    shared_load_4(bits, shared.work + place * 16);
    for (int32 i = 0; i < 4; ++i) words[place][i] = __builtin_bit_cast(int32, bits[i]);
  }
  return {.request = words[0][0],
          .kv_head = 0,
          .split = words[0][1],
          .splits = words[0][2],
          .first_row = words[1][0],
          .rows = words[1][1],
          .q_start = words[1][2],
          .q_len = words[1][3],
          .kv_len = words[2][0],
          .place = words[0][3],
          .exists = true};
}

// An item and its tiles of 64 keys.  They count from the last one down, tile i is that of split
// i % splits; the first tile to be counted and the last one, where weights tend to be, are seeds
// and come first.
struct Item {
  DecodeWork work;
  int32 tiles;    // of all splits
  int32 own;      // of this split
  int32 foreign;  // seeds of other splits, that are scored before
  int32 count;    // steps in all
  int32 end_at;   // which of the split's own is the one with the first keys; `own`: none

  // `seeded`: score seeds of other splits, too.
  DEVICE Item(const AttentionParams& params, const DecodeWork& work, bool seeded)
      : work(work),
        tiles(ceil_div(work.visibility(params).keys_of(work.rows - 1).end, tile_keys)),
        own(ceil_div(maximum(tiles - work.split, 0), work.splits)),
        foreign(seeded && own > 0 ? seeds() - (work.split == 0) - (owns_end() && tiles > 1) : 0),
        count(foreign + own),
        end_at(owns_end() ? work.split == 0 : own) {}

  DEVICE int32 seeds() const { return minimum(tiles, 2); }
  // Whether the last tile to be counted, with the first keys, is this split's.
  DEVICE bool owns_end() const { return (tiles - 1) % work.splits == work.split; }

  DEVICE int32 tile(int32 step) const {
    if (step < foreign) return step == 0 && work.split != 0 ? tiles - 1 : 0;
    int32 place = step - foreign;  // among the split's tiles
    if (place >= end_at) place = place == end_at ? own - 1 : place - 1;
    return tiles - 1 - work.split - place * work.splits;
  }
  DEVICE int32 first_key(int32 step) const { return tile(step) * tile_keys; }
};
