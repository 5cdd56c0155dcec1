// Which items a block of Hopper's MLA decode takes: one warp finds them, while others work.
//
// The first items are the blocks' own numbers, the others go to who asks first.  A block asks
// shortly before the end of an item and not sooner, so that where lengths differ none takes work
// that another could begin before.
#pragma once

#include <attention/mla_item.cuh>
#include <attention/sparse_token.cuh>
#include <ptx/atomic.cuh>
#include <ptx/sync.cuh>

// How requests are cut, out of shared memory.
template <bool sparse>
using MlaSchedule = DecodeSchedule<block_rows, typename RequestKind<sparse>::Type>;
template <bool sparse>
DEVICE MlaSchedule<sparse> kept_schedule(const AttentionParams& params, const Shared& shared) {
  int32 x[4];
  kept_numbers(x, shared.schedule);
  return {params, int64(x[1]) << 32 | uint32(x[0])};
}

template <bool sparse>
struct ItemFinder {
  const AttentionParams& params;
  const Shared& shared;
  const bool seeded;

  // The first item.
  DEVICE void begin() const {
    const MlaSchedule<sparse> schedule(params);
    const int32 first = stays() ? schedule.existing_first_items() : schedule.first_items();
    publish(0, find(schedule, block_index(), first));
    const int32 items = stays() ? schedule.existing_items(first) : 0;
    if (lane_index() == 0) {
      keep_numbers(shared.schedule,
                   {int32(schedule.load), int32(schedule.load >> 32), first, items});
    }
    sync_warp();
    if constexpr (sparse) publish(1, {.exists = false});
  }

  // The item number `number` of the block.  Every block at work asks once in vain, so there are as
  // many questions as items: the counter is then at zero again.
  DEVICE void next(int32 number) const {
    DecodeWork work{.exists = false};
    if (stays()) {
      int32 x[4];
      kept_numbers(x, shared.schedule);
      const int32 first = x[2], items = x[3];
      int32 asked = 0;
      if (lane_index() == 0) asked = atomic_take(counter(), items - 1);
      const int32 item = grid_size() + shuffle(asked, 0);
      if (item < items) work = find(kept_schedule<sparse>(params, shared), item, first);
    }
    publish(number, work);
  }

 private:
  // Whether there may be more items than blocks.
  DEVICE bool stays() const { return params.items > grid_size(); }
  // Behind the counts of arrivals, of which there is one for each first item.
  DEVICE uint32* counter() const { return params.arrivals + params.q_blocks * params.kv_heads; }

  // Number `item`, where only items that exist are counted.
  static DEVICE DecodeWork find(const MlaSchedule<sparse>& schedule, int32 item, int32 first) {
    return schedule.find(item < first ? item : schedule.first_items() + item - first);
  }
  DEVICE void publish(int32 number, const DecodeWork& work) const {
    if (lane_index() == 0) shared.keep_work(number, work);
    sync_warp();
    const Item item = item_of(params, shared.work(number), seeded);
    if (lane_index() == 0) shared.publish(number, item);
  }
};
