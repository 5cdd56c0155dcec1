// Request a tile from global memory: every thread of the block takes part, nobody waits.
#pragma once

#include <ptx/cp_async.cuh>
#include <tile/swizzle.cuh>

// Rows or keys [begin, end).
struct Range {
  int32 begin, end;
  DEVICE bool contains(int32 i) const { return begin <= i && i < end; }
  DEVICE bool empty() const { return begin >= end; }
};

// Rows at a fixed distance in memory.
struct StridedRows {
  const char* first;  // row 0
  int64 stride;       // bytes

  DEVICE const char* row(int32 index) const { return first + index * stride; }
  DEVICE bool exists(int32) const { return true; }
};

// Copy rows `first_row`, … of `source` into `tile`; rows outside `valid` and columns from
// `valid_columns` on become zeros and are not read.  Eight threads share a row, 16 bytes each;
// `threads` is a whole block or, where every warp copies for itself, 32.
template <int32 threads, typename Tile, typename Source>
DEVICE void request_tile(Tile tile, const Source& source, int32 first_row, Range valid,
                         int32 valid_columns) {
  constexpr int32 rows_at_once = threads / 8, passes = Tile::rows / rows_at_once;
  static_assert(Tile::rows % rows_at_once == 0, "every thread copies the same number of rows");
  const uint32 thread = recomputed(thread_index()) % threads;
  const uint32 column = thread % 8, first = thread / 8;

  const char* pointers[passes];  // all looked up before the first copy, so that look-ups overlap
  bool readable[passes];
#pragma unroll
  for (int32 pass = 0; pass < passes; ++pass) {
    const int32 index = first_row + int32(first) + pass * rows_at_once;
    const bool exists = source.exists(index);  // every lane asks: some sources ask others
    readable[pass] = valid.contains(index) && exists;
    pointers[pass] = source.row(index) + column * 16;
  }
#pragma unroll
  for (int32 pass = 0; pass < passes; ++pass) {
#pragma unroll
    for (int32 chunk = 0; chunk < Tile::chunks; ++chunk) {
      const int32 first_column = chunk * chunk_columns + int32(column) * 8;
      if (first_column < Tile::columns) {
        cp_async_16(tile.at(chunk, first + pass * rows_at_once, column),
                    pointers[pass] + chunk * row_bytes,
                    readable[pass] && first_column < valid_columns);
      }
    }
  }
}
