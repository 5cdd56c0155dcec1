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

// One head's keys (or values) of one request.
template <bool paged>
struct KvSource;

template <>
struct KvSource<false> {
  using type = StridedRows;
  static DEVICE type make(const void* array, const Strides& strides, const FmhaParams&, int32 outer,
                          int32 first_row, int32 head, int32) {
    const int64 start = outer * strides.outer + first_row * strides.row + head * strides.head;
    return {static_cast<const char*>(array) + start * 2, strides.row * 2};
  }
};

template <>
struct KvSource<true> {
  using type = PagedRows;
  static DEVICE type make(const void* array, const Strides& strides, const FmhaParams& params,
                          int32 request, int32, int32 head, int32 keys) {
    return {static_cast<const char*>(array) + head * strides.head * 2,
            strides.outer * 2,
            strides.row * 2,
            params.block_tables + request * params.block_table_stride,
            params.page_shift,
            params.pages,
            keys};
  }
};
