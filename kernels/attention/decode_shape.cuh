// Sizes of the decode kernel's parts, and where they lie in shared memory.
#pragma once

#include <attention/config.cuh>
#include <core/device.cuh>
#include <core/math.cuh>
#include <tile/swizzle.cuh>

template <DecodeConfig config>
struct DecodeShape {
  static constexpr int32 slots = 2;  // of a warp's ring
  static constexpr int32 row_tiles = config.rows / 16;
  static constexpr int32 key_tiles = config.block_kv / 8;
  static constexpr int32 value_tiles = config.head_dim_v / 8;
  static_assert(config.rows % 16 == 0 && config.block_kv % 16 == 0);

  using QTile = SharedTile<config.rows, config.head_dim_qk>;
  using KTile = SharedTile<config.block_kv, config.head_dim_qk>;
  using VTile = SharedTile<config.block_kv, config.head_dim_v>;

  static constexpr int32 slot_bytes = maximum(KTile::bytes, VTile::bytes);
  static constexpr int32 ring_bytes = slots * slot_bytes;
  static constexpr int32 output_row_bytes = config.head_dim_v * 4;
  static_assert(config.rows * output_row_bytes <= ring_bytes, "O is merged where the ring was");
};

template <DecodeConfig config>
struct DecodeShared {
  using Shape = DecodeShape<config>;

  SharedAddress q, rings, rows, seeds, counts;

  DEVICE DecodeShared() {
    SharedCarver carver;
    q = carver.take(Shape::QTile::bytes, "q");
    rings = carver.take(config.warps * Shape::ring_bytes, "rings");
    rows = carver.take(config.warps * config.rows * 16, "rows");       // PartialRow
    seeds = carver.take(config.warps * config.rows * 8, "seeds", 16);  // maximum, mass
    counts = carver.take((config.warps + 1) * 4, "counts", 16);        // skipped; is last
  }
  DEVICE SharedAddress slot(int32 warp, int32 index) const {
    return rings + warp * Shape::ring_bytes + index * Shape::slot_bytes;
  }
};
