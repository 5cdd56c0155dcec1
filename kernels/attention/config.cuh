// What is fixed when a kernel is compiled; the host names each field it sets (twin: _config.py).
#pragma once

#include <core/types.cuh>

// Prefill.  One block: `block_q` query rows of one head, `rows_per_warp` to a warp.
struct FmhaConfig {
  Dtype element = Dtype::bfloat16;  // of q, k, v and P
  Dtype output = Dtype::bfloat16;
  int32 head_dim_qk = 128;  // rounded up to a multiple of 32; the rest is zeros
  int32 head_dim_v = 128;
  int32 block_q = 128;
  int32 block_kv = 64;
  int32 rows_per_warp = 32;
  bool paged = false;
  bool soft_cap = false;
  bool skip_softmax = false;
  bool certificate = false;  // bound what rows lose; wants `skip_softmax`

  DEVICE constexpr int32 threads() const { return block_q / rows_per_warp * 32; }
};

// Prefill on Hopper.  One block: a warp-group that loads, and `consumers` of 64 query rows each.
struct FmhaHopperConfig {
  Dtype element = Dtype::bfloat16;
  Dtype output = Dtype::bfloat16;
  int32 head_dim_qk = 128;
  int32 head_dim_v = 128;
  int32 consumers = 2;
  int32 block_kv = 128;
  bool q_in_registers = true;
  bool paged = false;
  bool soft_cap = false;
  bool skip_softmax = false;
  bool certificate = false;

  DEVICE constexpr int32 block_q() const { return consumers * 64; }
  DEVICE constexpr int32 threads() const { return (consumers + 1) * 128; }
};

// Paged decode.  One block: `rows` query rows of one kv head, whose tiles of `block_kv` keys the
// warps share out.
struct DecodeConfig {
  Dtype element = Dtype::bfloat16;
  Dtype output = Dtype::bfloat16;
  int32 head_dim_qk = 128;
  int32 head_dim_v = 128;
  int32 rows = 16;
  int32 block_kv = 32;
  int32 warps = 4;
  int32 blocks = 2;  // to a multiprocessor, for which registers must suffice
  bool soft_cap = false;
  bool skip_softmax = false;
  bool masses = false;     // weigh every tile, also those that are left out
  bool mass_rule = false;  // leave out by weight, not by threshold; wants `masses`

  DEVICE constexpr int32 threads() const { return warps * 32; }
};

// Merging of splits, after decode: the rows of its blocks, and columns of O.
struct MergeSplitsConfig {
  Dtype output = Dtype::bfloat16;
  int32 rows = 64;
  int32 columns = 512;
  bool sparse = false;

  DEVICE constexpr int32 threads() const { return columns / 128 * 32; }
};

// MLA decode.  One block: 64 query rows of one request, tiles of 64 keys; sparse: of one token,
// whose keys have any pages.
struct MlaConfig {
  Dtype element = Dtype::bfloat16;
  Dtype output = Dtype::bfloat16;
  int32 page_size = 64;
  bool sparse = false;
  bool skip_softmax = false;
  bool masses = false;  // as of decode
  bool mass_rule = false;

  DEVICE constexpr int32 threads() const { return 384; }
};

// Portable MLA decode.  One block: `rows` query rows of one request, of which `rows_per_warp`
// belong to several warps together: they share out the keys of a tile, and then the latent columns
// of O.
struct MlaPortableConfig {
  Dtype element = Dtype::bfloat16;
  Dtype output = Dtype::bfloat16;
  int32 latent = 512;
  int32 rope = 64;
  int32 rows = 16;
  int32 rows_per_warp = 16;
  int32 block_kv = 64;
  int32 stages = 2;  // tiles of keys in shared memory
  int32 warps = 8;
  bool sparse = false;
  bool skip_softmax = false;
  bool masses = false;  // as of decode
  bool mass_rule = false;

  DEVICE constexpr int32 threads() const { return warps * 32; }
};
