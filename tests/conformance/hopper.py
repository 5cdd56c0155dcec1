"""A small product of matrices as Hopper kernels are built: TMA, mbarriers, wgmma, a bulk store."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from .case import Array, Case, Map, Numbers

# C [64 × 64] = A [64 × depth] · B [depth × 64].  Warp-group 0 loads tiles of A and B, 64 of the
# depth each, through a ring of two stages; warp-group 1 multiplies.  C leaves by plain stores (`c`)
# and, rounded to bf16, by shared memory and a bulk store (`c16`).
SOURCE = """
#include <ptx/convert.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/stmatrix.cuh>
#include <ptx/sync.cuh>
#include <ptx/tma.cuh>
#include <ptx/wgmma.cuh>

struct Plan {
  int32 swizzle = 128;
  bool move_registers = false;
  bool sync_after_init = true, fence_init = true, wait_full = true, wait_empty = true;
  bool arrive_empty = true, flip_parity = true, wgmma_fence = true, wgmma_wait = true;
  bool touch_in_flight = false, proxy_fence = true, wait_store = true;
  int32 missing_bytes = 0, empty_arrivals = 4;
};
constexpr Plan plan{CUATTN_CONFIG};

struct Params {
  TensorMap a, b, c16;  // tiles of [64][64]
  const void *a_whole, *b_whole, *c16_whole;  // not used: where the tensors begin
  float* c;                                   // [64][64]
};

constexpr int32 tile_bytes = 64 * 128, stages = 2, steps = 4;  // tiles of 64 along the depth
constexpr uint64 mode = plan.swizzle == 128 ? 1 : plan.swizzle == 64 ? 2 : 3;

// Operands with 128-byte rows; `leading` matters only to tiles wider than a row.
DEVICE uint64 descriptor(SharedAddress start) {
  return start >> 4 | uint64(1) << 16 | uint64(1024 >> 4) << 32 | mode << 62;
}

struct Shared {
  SharedAddress a, b, c, full, empty;
  DEVICE Shared() {
    SharedCarver carver;
    a = carver.take(stages * tile_bytes, "a");
    b = carver.take(stages * tile_bytes, "b");
    c = carver.take(tile_bytes, "c");
    full = carver.take(stages * 8, "full", 8);
    empty = carver.take(stages * 8, "empty", 8);
  }
};

DEVICE void load(const Params& params, const Shared& shared) {
  for (int32 step = 0; step < steps; ++step) {
    const int32 stage = step % stages, round = step / stages;
    if (plan.wait_empty) mbarrier_wait(shared.empty + stage * 8, (round & 1) ^ 1);
    mbarrier_arrive_expect(shared.full + stage * 8, 2 * tile_bytes - plan.missing_bytes);
    tma_load(shared.a + stage * tile_bytes, params.a, {step * 64, 0}, shared.full + stage * 8);
    tma_load(shared.b + stage * tile_bytes, params.b, {0, step * 64}, shared.full + stage * 8);
  }
}

DEVICE void multiply(const Params& params, const Shared& shared) {
  const int32 warp = warp_index() - 4, lane = lane_index();
  float c[32];
  for (float& x : c) x = 0.f;
  for (int32 step = 0; step < steps; ++step) {
    const int32 stage = step % stages;
    if (plan.wait_full)
      mbarrier_wait(shared.full + stage * 8, plan.flip_parity ? step / stages & 1 : 0);
    if (plan.wgmma_fence) wgmma_fence();
    for (int32 k = 0; k < 4; ++k) {
      wgmma_shared<bf16, Major::depth, Major::width>(
          c, descriptor(shared.a + stage * tile_bytes) + k * 2,
          descriptor(shared.b + stage * tile_bytes) + k * (2048 >> 4), true);
    }
    wgmma_commit();
    if (plan.touch_in_flight) c[3] *= 2.f;
    if (plan.wgmma_wait) wgmma_wait<0>();
    if (plan.arrive_empty && lane == 0) mbarrier_arrive(shared.empty + stage * 8);
  }
  if (!plan.wgmma_wait) wgmma_wait<0>();

  for (int32 i = 0; i < 32; ++i) {
    const int32 row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
    params.c[row * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = c[i];
  }
  for (int32 step = 0; step < 4; ++step) {  // 16 columns each
    const uint32 fragment[4] = {
        pack(c[8 * step], c[8 * step + 1], bf16{}), pack(c[8 * step + 2], c[8 * step + 3], bf16{}),
        pack(c[8 * step + 4], c[8 * step + 5], bf16{}),
        pack(c[8 * step + 6], c[8 * step + 7], bf16{})};
    const int32 row = warp * 16 + lane % 16, column = 2 * step + lane / 16;
    stmatrix_x4(shared.c + row * 128 + ((column ^ (row & 7)) << 4), fragment);
  }
  if (plan.proxy_fence) fence_proxy_async();
  named_barrier_sync<1, 128>();
  if (warp == 0 && lane == 0) {
    tma_store(params.c16, {0, 0}, shared.c);
    bulk_commit();
    if (plan.wait_store) bulk_wait<0>();
  }
}

// Two blocks of 256 threads: 128 registers each, to be shared as 40 and 208.
KERNEL void __launch_bounds__(256, 2) conformance(const __grid_constant__ Params params) {
  const Shared shared;
  if (thread_index() == 0) {
    for (int32 stage = 0; stage < stages; ++stage) {
      mbarrier_init(shared.full + stage * 8, 1);
      mbarrier_init(shared.empty + stage * 8, plan.empty_arrivals);
    }
    if (plan.fence_init) fence_mbarrier_init();
  }
  if (plan.sync_after_init) sync_block();
  if (warp_index() < 4) {
    if constexpr (plan.move_registers) registers_decrease<40>();
    if (thread_index() == 0) load(params, shared);
  } else {
    if constexpr (plan.move_registers) registers_increase<208>();
    multiply(params, shared);
  }
}
"""
BF16 = np.dtype(ml_dtypes.bfloat16)
DEPTH = 200  # the fourth tile hangs over the edge and is filled with zeros


def _product(given: Mapping[str, Array]) -> dict[str, Array]:
    c = given["a"].astype(np.float32) @ given["b"].astype(np.float32)
    return {"c16": c.astype(BF16), "c": c}


def case(config: str = ".swizzle = 128", name: str = "product", wrappers: str = "") -> Case:
    """The product, perhaps with a fault."""
    random = Numbers(17)
    return Case(
        "hopper",
        name,
        wrappers,
        SOURCE,
        {
            "a": random.integers(-4, 5, (64, DEPTH)).astype(BF16),
            "b": random.integers(-4, 5, (DEPTH, 64)).astype(BF16),
        },
        {"c16": np.zeros((64, 64), BF16), "c": np.zeros((64, 64), np.float32)},
        config=config,
        threads=256,
        maps=tuple(Map(name, (64, 64), 128) for name in ("a", "b", "c16")),
        expected=_product,
    )


CASES = (
    case(),
    case(".move_registers = true", "registers", "registers_decrease registers_increase"),
)
