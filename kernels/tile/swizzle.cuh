// A tile of 16-bit elements in shared memory, laid out so that no access conflicts.
//
//   [chunk of 64 columns][row][128 bytes]      16-byte column c of row r lies at c ^ (r % 8)
//
// Eight rows of one column then touch all 32 banks: ldmatrix and 16-byte copies run at full speed.
// The layout is also the one that TMA writes and wgmma reads with a 128-byte swizzle.
#pragma once

#include <core/device.cuh>
#include <core/math.cuh>

constexpr int32 chunk_columns = 64;
constexpr int32 row_bytes = chunk_columns * 2;

template <int32 rows_, int32 columns_>
struct SharedTile {
  static constexpr int32 rows = rows_, columns = columns_;
  static constexpr int32 chunks = (columns + chunk_columns - 1) / chunk_columns;
  static constexpr int32 chunk_bytes = rows * row_bytes;
  static constexpr int32 bytes = chunks * chunk_bytes;
  static_assert(rows % 8 == 0, "the swizzle repeats every 8 rows");

  SharedAddress start;  // a multiple of 1024

  // Where the 16-byte column `column` (0..7) of a chunk's row starts.
  DEVICE SharedAddress at(int32 chunk, uint32 row, uint32 column) const {
    return start + chunk * chunk_bytes + row * row_bytes + ((column ^ (row % 8)) << 4);
  }
};

// Tiles of one kind, one behind the other, used in turn.
template <typename Tile, int32 stages>
struct TileRing {
  static constexpr int32 bytes = stages * Tile::bytes;

  SharedAddress start;

  DEVICE Tile tile(uint32 step) const { return {start + step % stages * Tile::bytes}; }
};

// This lane's place in every 16 × 16 block that it reads from a tile with ldmatrix.
//
// Blocks differ from the first by whole rows of 16 and, inside a chunk, by two 16-byte columns; the
// latter is an exclusive or on address bits 5 and 6, because the swizzle is one on bits 4 to 6.
template <typename Tile>
struct BlockReader {
  SharedAddress first;

  // `row` 0..15 and `half` 0..1 of the 16-byte column: what this lane addresses in a block.
  DEVICE BlockReader(Tile tile, uint32 row, uint32 half) : first(tile.at(0, row, half)) {}

  DEVICE SharedAddress at(int32 row_block, int32 column_block) const {
    return (first ^ ((column_block % 4) << 5)) + (column_block / 4) * Tile::chunk_bytes +
           row_block * 16 * row_bytes;
  }
};
