// The two matrix products of attention, one warp each on its own rows.
#pragma once

#include <ptx/ldmatrix.cuh>
#include <ptx/mma.cuh>
#include <tile/fragment.cuh>
#include <tile/swizzle.cuh>

// How this lane reads operand A, or B from a tile of keys × columns that is transposed on the way:
// two halves of rows, then two halves of columns.
template <typename Tile>
DEVICE BlockReader<Tile> row_reader(Tile tile, int32 first_row = 0) {
  const uint32 lane = recomputed(lane_index());
  return BlockReader<Tile>({tile.start + first_row * row_bytes}, lane % 16, lane / 16);
}

// How it reads B from a tile of keys × columns as it lies: columns first, then rows.
template <typename Tile>
DEVICE BlockReader<Tile> column_reader(Tile tile) {
  const uint32 lane = recomputed(lane_index());
  return BlockReader<Tile>(tile, lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// scores = Q Kᵀ over `columns` of the head dimension.
template <int32 columns, typename Element, typename QTile, typename KTile, int32 row_tiles,
          int32 key_tiles>
DEVICE void multiply_qk(float (&scores)[row_tiles][key_tiles][4], BlockReader<QTile> q,
                        BlockReader<KTile> k) {
  clear(scores);
#pragma unroll
  for (int32 step = 0; step < columns / 16; ++step) {
    uint32 a[row_tiles][4];  // Q: 16 rows × 16 columns each
#pragma unroll
    for (int32 r = 0; r < row_tiles; ++r) ldmatrix_x4(a[r], q.at(r, step));
#pragma unroll
    for (int32 pair = 0; pair < key_tiles / 2; ++pair) {
      uint32 b[4];  // K: 16 keys × 16 columns
      ldmatrix_x4(b, k.at(pair, step));
#pragma unroll
      for (int32 r = 0; r < row_tiles; ++r) {
        mma_m16n8k16(scores[r][2 * pair], a[r], b[0], b[1], Element{});
        mma_m16n8k16(scores[r][2 * pair + 1], a[r], b[2], b[3], Element{});
      }
    }
  }
}

// output += P V over keys 16·step …
template <typename Element, typename VTile, int32 row_tiles, int32 value_tiles>
DEVICE void multiply_pv(float (&output)[row_tiles][value_tiles][4],
                        const uint32 (&probabilities)[row_tiles][4], BlockReader<VTile> v,
                        int32 step) {
#pragma unroll
  for (int32 pair = 0; pair < value_tiles / 2; ++pair) {
    uint32 b[4];  // V: 16 keys × 16 columns
    ldmatrix_x4_transposed(b, v.at(step, pair));
#pragma unroll
    for (int32 r = 0; r < row_tiles; ++r) {
      mma_m16n8k16(output[r][2 * pair], probabilities[r], b[0], b[1], Element{});
      mma_m16n8k16(output[r][2 * pair + 1], probabilities[r], b[2], b[3], Element{});
    }
  }
}
