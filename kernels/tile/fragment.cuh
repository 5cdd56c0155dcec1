// Pieces of a matrix in the registers of one warp, as mma.sync m16n8k16 leaves them.
//
//   float tile[row_tiles][column_tiles][4]     tile (r, c) covers rows 16·r … and columns 8·c …
//   tile[r][c][2·h + i]                        row 16·r + 8·h + lane / 4,
//                                              column 8·c + 2·(lane % 4) + i
//
// So four lanes, a quad, share a row, and a thread has two rows (h = 0, 1) of every row tile.
#pragma once

#include <core/device.cuh>

// The row (h = 0) and the first column of tile (0, 0) that this lane holds.
DEVICE int32 fragment_row() { return lane_index() / 4; }
DEVICE int32 fragment_column() { return lane_index() % 4 * 2; }

DEVICE float quad_maximum(float value) {
  value = fmaxf(value, shuffle_xor(value, 1));
  return fmaxf(value, shuffle_xor(value, 2));
}

DEVICE float quad_sum(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

template <int32 row_tiles, int32 column_tiles>
DEVICE void clear(float (&tile)[row_tiles][column_tiles][4]) {
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 c = 0; c < column_tiles; ++c)
#pragma unroll
      for (int32 i = 0; i < 4; ++i) tile[r][c][i] = 0.f;
}
