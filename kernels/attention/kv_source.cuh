// Where key j of a request lies in memory: in one array, or in pages of a shared pool.
#pragma once

#include <attention/params.cuh>
#include <tile/copy.cuh>

// Keys in pages: table[j / page_size] names the page, j % page_size the slot.  A page number
// outside the pool reads as zeros.
struct PagedRows {
  const char* first;   // page 0, slot 0 of this head
  int64 page_stride;   // bytes
  int64 slot_stride;   // bytes
  const int32* table;  // this request's pages
  int32 page_shift, pages;
  int32 keys;  // the table says nothing beyond

  DEVICE int32 page_of(int32 key) const {
    return 0 <= key && key < keys ? table[key >> page_shift] : 0;
  }
  DEVICE bool exists(int32 key) const { return uint32(page_of(key)) < uint32(pages); }
  DEVICE const char* row(int32 key) const {
    const int32 slot = key & ((1 << page_shift) - 1);
    return first + page_of(key) * page_stride + slot * slot_stride;
  }
};

// One head's rows of one request: where they start in the array, and how many there are.
struct Place {
  int32 outer;  // request or, where requests lie end to end, 0
  int32 first_row, head, rows;
};

template <bool paged>
struct Source;

template <>
struct Source<false> {
  static DEVICE StridedRows of(const void* array, const Strides& strides, const AttentionParams&,
                               Place place) {
    const int64 start =
        place.outer * strides.outer + place.first_row * strides.row + place.head * strides.head;
    return {static_cast<const char*>(array) + start * 2, strides.row * 2};
  }
};

template <>
struct Source<true> {
  static DEVICE PagedRows of(const void* array, const Strides& strides,
                             const AttentionParams& params, Place place) {
    return {.first = static_cast<const char*>(array) + place.head * strides.head * 2,
            .page_stride = strides.outer * 2,
            .slot_stride = strides.row * 2,
            .table = params.block_tables + place.outer * params.block_table_stride,
            .page_shift = params.page_shift,
            .pages = params.pages,
            .keys = place.rows};
  }
};
