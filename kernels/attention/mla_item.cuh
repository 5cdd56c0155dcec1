// MLA decode's sizes, what its warp-groups share, and what an item is.
#pragma once

#include <attention/decode_work.cuh>
#include <attention/partial.cuh>
#include <core/device.cuh>
#include <ptx/mbarrier.cuh>

constexpr int32 block_rows = 64, tile_keys = 64, latent = 512, group_threads = 128;
constexpr int32 stages = 3, chunk_bytes = 8192, latent_chunks = 8;
constexpr int32 stage_bytes = latent_chunks * chunk_bytes;
constexpr int32 barriers = 2 * stages + 5;
constexpr int32 q_chunks = 7;  // in registers
using Schedule = DecodeSchedule<block_rows>;

struct Shared {
  SharedAddress kv, rope, p, q, alpha, flags, last;
  SharedAddress full, empty, rope_full, rope_free, p_ready, p_free, q_read;

  DEVICE Shared() {
    SharedCarver carver;
    kv = carver.take(stages * stage_bytes, "kv");
    rope = carver.take(chunk_bytes, "rope");
    p = carver.take(chunk_bytes, "p");
    q = carver.take(2 * chunk_bytes, "q");  // its last two chunks
    alpha = carver.take(block_rows * 4, "alpha", 16);
    flags = carver.take(4 * 4, "flags", 16);
    last = carver.take(4, "last", 16);
    full = carver.take(barriers * 8, "barriers", 8);
    empty = full + stages * 8;
    rope_full = empty + stages * 8;
    rope_free = rope_full + 8;
    p_ready = rope_free + 8;
    p_free = p_ready + 8;
    q_read = p_free + 8;
  }

  DEVICE void begin() const {
    for (int32 stage = 0; stage < stages; ++stage) {
      mbarrier_init(full + stage * 8, 1);
      mbarrier_init(empty + stage * 8, 8);  // warps of both P V
    }
    mbarrier_init(rope_full, 1);
    mbarrier_init(rope_free, 4);
    mbarrier_init(p_ready, 4);
    mbarrier_init(p_free, 8);
    mbarrier_init(q_read, 4);
    fence_mbarrier_init();
  }
};

// An item and its tiles.
struct Item {
  DecodeWork work;
  RowVisibility visibility;
  int32 keys;   // that some row sees: [0, keys)
  int32 count;  // tiles of this split

  DEVICE Item(const AttentionParams& params, const DecodeWork& work)
      : work(work),
        visibility(work.visibility(params)),
        keys(visibility.keys_of(work.rows - 1).end),
        count(ceil_div(maximum(ceil_div(keys, tile_keys) - work.split, 0), work.splits)) {}

  DEVICE int32 first_key(int32 step) const { return (work.split + step * work.splits) * tile_keys; }
};

// This item's rows of all splits; `first`, … are those of its row 0.
DEVICE GlobalParts parts_of(const AttentionParams& params, const DecodeWork& work) {
  if (work.splits == 1) return {};
  const Schedule schedule(params);
  const int32 step = schedule.row_blocks(DecodeRequest(params, work.request));
  const int32 second = schedule.first_items() + schedule.more_items_before(work.request) +
                       work.first_row / block_rows;
  return {.out = params.partial_out,
          .rows = static_cast<PartialRow*>(params.partial_rows),
          .columns = latent,
          .first = int64(work.place) * block_rows,
          .second = int64(second) * block_rows,
          .stride = int64(step) * block_rows};
}
