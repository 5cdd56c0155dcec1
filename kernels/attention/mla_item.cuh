// MLA decode's sizes, what its warp-groups share, what an item is, and what follows what.
#pragma once

#include <attention/decode_work.cuh>
#include <attention/split_parts.cuh>
#include <core/device.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/shared.cuh>

constexpr int32 block_rows = 64, tile_keys = 64, latent = 512, group_threads = 128;
constexpr int32 stages = 3, chunk_bytes = 8192, latent_chunks = 8;
constexpr int32 stage_bytes = latent_chunks * chunk_bytes;
constexpr int32 places = 3;            // of items that somebody may still be at work on
constexpr int32 q_chunks = 7;          // in registers
constexpr int32 chosen_bytes = 8 * 4;  // of a tile of chosen keys: a word for 8 of them, a bit each

// An item's place among those of its block: barriers run on from one to the next.
struct Turn {
  int32 number = 0;  // items before
  int32 first = 0;   // and their tiles and these themselves

  // Left and right are told of every tile and then, in step `count`, of the rows.
  DEVICE int32 message(int32 step) const { return first + step; }
  // Through the ring pass an item's Q, which is step −1, and then its tiles.
  DEVICE int32 entry(int32 step) const { return first + 1 + step; }
  // Through the rope's place, tiles only.
  DEVICE int32 tile(int32 step) const { return first - number + step; }
  DEVICE Turn after(int32 count) const { return {number + 1, first + count + 1}; }
};

// An item and its tiles of 64 keys.  They count from the last one down, tile i is that of split
// i % splits; the first tile to be counted and the last one, where weights tend to be, are seeds
// and come first.
struct Item {
  DecodeWork work;
  int32 tiles;    // of all splits
  int32 own;      // of this split
  int32 end_at;   // which of those has the first keys; `own`: none
  int32 foreign;  // seeds of other splits, that are scored before
  int32 count;    // steps in all

  DEVICE int32 seeds() const { return minimum(tiles, 2); }

  DEVICE int32 tile(int32 step) const {
    if (step < foreign) return step == 0 && work.split != 0 ? tiles - 1 : 0;
    int32 place = step - foreign;  // among the split's tiles
    if (place >= end_at) place = place == end_at ? own - 1 : place - 1;
    return tiles - 1 - work.split - place * work.splits;
  }
  DEVICE int32 first_key(int32 step) const { return tile(step) * tile_keys; }
};

// `seeded`: score seeds of other splits, too.
DEVICE Item item_of(const AttentionParams& params, const DecodeWork& work, bool seeded) {
  Item item{.work = work, .tiles = 0, .own = 0, .end_at = 0, .foreign = 0, .count = 0};
  if (!work.exists) return item;
  item.tiles = ceil_div(work.visibility(params).keys_of(work.rows - 1).end, tile_keys);
  item.own = ceil_div(maximum(item.tiles - work.split, 0), work.splits);
  const bool owns_end = (item.tiles - 1) % work.splits == work.split;
  item.end_at = owns_end ? work.split == 0 : item.own;
  if (seeded && item.own > 0) {
    item.foreign = item.seeds() - (work.split == 0) - (owns_end && item.tiles > 1);
  }
  item.count = item.foreign + item.own;
  return item;
}

// Numbers that lie in shared memory, where they are out of the way of registers.
DEVICE void keep_numbers(SharedAddress target, const int32 (&x)[4]) {
  float words[4];
  for (int32 i = 0; i < 4; ++i) words[i] = __builtin_bit_cast(float, x[i]);
  shared_store_4(target, words);
}
DEVICE void kept_numbers(int32 (&x)[4], SharedAddress source) {
  float words[4];
  shared_load_4(words, source);
  for (int32 i = 0; i < 4; ++i) x[i] = __builtin_bit_cast(int32, words[i]);
}

struct Shared {
  SharedAddress kv, rope, p, q, alpha, words, votes, chosen, rows, accounts, items, schedule, part,
      last;
  SharedAddress full, empty, known, rope_full, rope_free, p_ready, p_free;

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
    items = carver.take(places * 64, "items", 16);
    schedule = carver.take(16, "schedule", 16);
    part = carver.take(4, "part", 16);
    last = carver.take(4, "last", 16);
    full = carver.take((2 * stages + places + 4) * 8, "barriers", 8);
    empty = full + stages * 8;
    known = empty + stages * 8;
    rope_full = known + places * 8;
    rope_free = rope_full + 8;
    p_ready = rope_free + 8;
    p_free = p_ready + 8;
  }

  // `loaders` arrive when a tile is there.
  DEVICE void begin(int32 loaders) const {
    for (int32 stage = 0; stage < stages; ++stage) {
      mbarrier_init(full + stage * 8, loaders);
      mbarrier_init(empty + stage * 8, 8);  // warps of both P V
    }
    for (int32 place = 0; place < places; ++place) mbarrier_init(known + place * 8, 1);
    mbarrier_init(rope_full, loaders);
    mbarrier_init(rope_free, 4);
    mbarrier_init(p_ready, 4);
    mbarrier_init(p_free, 8);
    fence_mbarrier_init();
  }

  DEVICE SharedAddress stage(int32 entry) const { return kv + entry % stages * stage_bytes; }
  DEVICE void wait_full(int32 entry) const {
    mbarrier_wait(full + entry % stages * 8, entry / stages & 1);
  }
  DEVICE void wait_empty(int32 entry) const {
    mbarrier_wait(empty + entry % stages * 8, entry / stages & 1 ^ 1);
  }

  // What the block's item number `number` is: its work, and then its tiles, of which all are told;
  // one thread does.
  DEVICE void keep_work(int32 number, const DecodeWork& work) const {
    const SharedAddress target = place_of(number);
    keep_numbers(target, {work.request, work.split, work.splits, work.place});
    keep_numbers(target + 16, {work.first_row, work.rows, work.q_start, work.q_len});
    keep_numbers(target + 32, {work.kv_len, work.exists, 0, 0});
  }
  DEVICE void publish(int32 number, const Item& item) const {
    keep_numbers(place_of(number) + 48, {item.tiles, item.own, item.end_at, item.foreign});
    mbarrier_arrive(known + number % places * 8);
  }
  DEVICE void wait_known(int32 number) const {
    mbarrier_wait(known + number % places * 8, number / places & 1);
  }

  // Read anew wherever it is wanted, instead of being kept in registers.
  DEVICE DecodeWork work(int32 number) const {
    const SharedAddress source = place_of(recomputed(number));
    int32 x[3][4];
    for (int32 i = 0; i < 3; ++i) kept_numbers(x[i], source + i * 16);
    return {.request = x[0][0],
            .kv_head = 0,
            .split = x[0][1],
            .splits = x[0][2],
            .first_row = x[1][0],
            .rows = x[1][1],
            .q_start = x[1][2],
            .q_len = x[1][3],
            .kv_len = x[2][0],
            .place = x[0][3],
            .exists = x[2][1] != 0};
  }
  DEVICE Item item(int32 number) const {
    int32 x[4];
    kept_numbers(x, place_of(recomputed(number)) + 48);
    return {.work = work(number),
            .tiles = x[0],
            .own = x[1],
            .end_at = x[2],
            .foreign = x[3],
            .count = x[3] + x[1]};
  }

 private:
  DEVICE SharedAddress place_of(uint32 number) const { return items + number % places * 64; }
};
