// The pages of one warp's tiles, looked up long before they are wanted.
//
// A lane holds one entry of the table for each of two windows of steps; 32 lanes hold those of
// 32 / (pages a tile) steps.  While the warp goes through one window, the next is on its way.
#pragma once

#include <attention/decode_work.cuh>
#include <tile/copy.cuh>

template <int32 block_kv>
struct PageWalk {
  const int32* table;       // the request's
  int32 page_shift, pages;  // pages: of the pool
  TileDeal deal;
  Range keys;        // that some row of the block sees
  int32 entries[2];  // of the even and of the odd window

  DEVICE int32 tile_shift() const {  // log2 of the pages a tile has
    static_assert(1 << shift_of(block_kv) == block_kv);
    return maximum(shift_of(block_kv) - page_shift, 0);
  }
  DEVICE int32 window_shift() const { return 5 - tile_shift(); }  // log2 of the steps it has

  DEVICE int32 look_up(int32 window) const {
    const int32 lane = lane_index(), page = lane & ((1 << tile_shift()) - 1);
    const int32 step = (window << window_shift()) + (lane >> tile_shift());
    const int32 key = deal.at(step) * block_kv + (page << page_shift);
    const bool wanted = step < deal.count && key < keys.end && keys.begin < key + (1 << page_shift);
    return wanted ? table[key >> page_shift] : -1;
  }

  DEVICE void begin() {
    entries[0] = look_up(0);
    entries[1] = look_up(1);
  }

  // To be called once for each step, in order.  The window before is needed no more when keys of
  // the second step of the next one are requested.
  DEVICE void advance(int32 step) {
    const int32 window = step >> window_shift();
    if (window == 0 || (step & ((1 << window_shift()) - 1)) != 1) return;
    const int32 next = look_up(window + 1);
    if (window & 1) {
      entries[0] = next;
    } else {
      entries[1] = next;
    }
  }

  // The page of row `row` of step `step`'s tile.
  DEVICE int32 page_of(int32 step, int32 row) const {
    const int32 place = (step & ((1 << window_shift()) - 1)) << tile_shift();
    return shuffle(step >> window_shift() & 1 ? entries[1] : entries[0],
                   place + (row >> page_shift));
  }
};

// The keys, or values, of one step's tile; rows are keys of the request.
template <int32 block_kv>
struct WalkedRows {
  const char* first;               // page 0, slot 0 of this head
  int64 page_stride, slot_stride;  // bytes
  const PageWalk<block_kv>& walk;
  int32 step;

  DEVICE int32 page_of(int32 key) const { return walk.page_of(step, key % block_kv); }
  DEVICE bool exists(int32 key) const { return uint32(page_of(key)) < uint32(walk.pages); }
  DEVICE const char* row(int32 key) const {
    const int32 slot = key & ((1 << walk.page_shift) - 1);
    return first + page_of(key) * page_stride + slot * slot_stride;
  }
};
