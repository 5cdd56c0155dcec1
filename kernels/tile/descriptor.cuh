// Descriptors by which wgmma finds operands of 16-bit elements in a tile of swizzle.cuh.
#pragma once

#include <tile/swizzle.cuh>

// Rows along the depth: 64 columns of a chunk, from `start` on; + 2 for 16 more.
DEVICE uint64 depth_major(SharedAddress start) {
  return uint64(start >> 4) | uint64(1) << 16 | uint64(8 * row_bytes >> 4) << 32 | uint64(1) << 62;
}

// Rows are the depth, chunks of `rows` rows follow each other along the width; + 128 for 16 rows.
template <int32 rows>
DEVICE uint64 width_major(SharedAddress start) {
  return uint64(start >> 4) | uint64(rows * row_bytes >> 4) << 16 |
         uint64(8 * row_bytes >> 4) << 32 | uint64(1) << 62;
}
