// Sizes of the portable MLA kernel's parts, and where they lie in shared memory.
#pragma once

#include <attention/config.cuh>
#include <core/device.cuh>
#include <tile/swizzle.cuh>

template <MlaPortableConfig config>
struct MlaShape {
  static constexpr int32 columns = config.latent + config.rope;
  static constexpr int32 steps = columns / 16;  // of Q Kᵀ
  static constexpr int32 row_tiles = config.rows_per_warp / 16;
  static constexpr int32 parts = config.warps / (config.rows / config.rows_per_warp);
  static constexpr int32 part_keys = config.block_kv / parts;
  static constexpr int32 key_tiles = part_keys / 8;
  static constexpr int32 part_columns = config.latent / parts;
  static constexpr int32 value_tiles = part_columns / 8;
  // Of Q's steps, these stay in registers, as far as O and votes leave any: they are no traffic of
  // shared memory, and no room there.
  static constexpr int32 most_kept = config.skip_softmax && config.block_kv == 32 ? 16 : 24;
  static constexpr int32 kept_steps = row_tiles > 1 ? 0 : minimum(steps, most_kept);
  static_assert(columns % chunk_columns == 0 && part_columns % 32 == 0);
  static_assert(key_tiles == 1 || key_tiles % 2 == 0, "ldmatrix reads 8 keys or 16 at a time");
  static_assert(config.block_kv <= chunk_columns, "P is one chunk wide");

  using KeptTile = SharedTile<config.rows, kept_steps * 16>;
  using QTile = SharedTile<config.rows, (steps - kept_steps) * 16>;
  using KvTile = SharedTile<config.block_kv, columns>;
  using PTile = SharedTile<config.rows, config.block_kv>;
  static_assert(KeptTile::bytes <= KvTile::bytes, "what is kept passes through the last stage");
};

template <MlaPortableConfig config>
struct MlaShared {
  using Shape = MlaShape<config>;
  SharedAddress ring, q, p, maxima, sums, said;

  DEVICE MlaShared() {
    SharedCarver carver;
    ring = carver.take(config.stages * Shape::KvTile::bytes, "ring");
    q = carver.take(Shape::QTile::bytes, "q");
    p = carver.take(Shape::PTile::bytes, "p");
    maxima = carver.take(Shape::parts * config.rows * 4, "maxima", 16);
    sums = carver.take(Shape::parts * config.rows * 4, "sums", 16);
    said = carver.take(4, "said", 16);
  }
  DEVICE SharedAddress stage(int32 step) const {
    return ring + step % config.stages * Shape::KvTile::bytes;
  }
  // Of a row's maxima, or sums, that of part `part`.
  static DEVICE SharedAddress row(SharedAddress first, int32 part, int32 index) {
    return first + (part * config.rows + index) * 4;
  }
};

// A warp's rows are those from `first_row` of the block on, its part of the keys and of the columns
// of O is number `part`.
template <MlaPortableConfig config>
struct MlaPlace {
  int32 first_row, part;

  DEVICE MlaPlace()
      : first_row(warp_index() / MlaShape<config>::parts * config.rows_per_warp),
        part(warp_index() % MlaShape<config>::parts) {}
  DEVICE int32 row(int32 r, int32 half) const {
    return first_row + r * 16 + half * 8 + fragment_row();
  }
};
