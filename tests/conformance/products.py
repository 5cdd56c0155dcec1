"""wgmma: every element, both majors of A and B, A in registers, every swizzle, every width."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from .case import Array, Case, Numbers
from .copies import image_of

# D [64 × columns] = A · B over a depth of one swizzled row (32 bytes without a swizzle).  Tiles
# come as images of shared memory.
SOURCE = """
#include <ptx/mbarrier.cuh>
#include <ptx/sync.cuh>
#include <ptx/tma.cuh>
#include <ptx/wgmma.cuh>

struct Plan {
  int32 columns, swizzle;
  Major a_major, b_major;
  bool from_registers, accumulate;
};
constexpr Plan plan{CUATTN_CONFIG};
using Operand = ELEMENT;

struct Params {
  const unsigned char* a;     // image of [64 × depth]
  const unsigned char* b;     // image of [columns × depth]
  const uint32* a_registers;  // [128 threads][steps][4]
  const float* d_before;      // [64][columns]
  float* d;                   // [64][columns]
};

constexpr int32 width = plan.swizzle ? plan.swizzle : 32;  // bytes of the depth
constexpr int32 pitch = plan.swizzle ? plan.swizzle : 16;  // bytes of a row of a chunk
constexpr int32 steps = width / 32, depth = width / int32(sizeof(Operand));
constexpr int32 chunk = plan.swizzle && plan.b_major == Major::width
                            ? plan.swizzle / int32(sizeof(Operand)) : 1;  // whole ones of B
constexpr int32 a_bytes = 64 * width;
constexpr int32 b_bytes = (plan.columns + chunk - 1) / chunk * chunk * width;
constexpr uint64 mode = plan.swizzle == 32 ? 3 : plan.swizzle == 64 ? 2 : plan.swizzle / 128;

DEVICE uint64 descriptor(SharedAddress start, int32 leading, int32 stride) {
  return uint64(start >> 4) | uint64(leading >> 4) << 16 | uint64(stride >> 4) << 32 | mode << 62;
}

// Tiles are chunks of `pitch` bytes by all rows: of the depth, or of m or n.
DEVICE uint64 tile(SharedAddress start, int32 extent, Major major, int32 step) {
  if (major == Major::depth)
    return plan.swizzle ? descriptor(start + step * 32, 16, 8 * pitch)
                        : descriptor(start, extent * 16, 128);
  return plan.swizzle ? descriptor(start + step * 16 * pitch, depth * pitch, 8 * pitch)
                      : descriptor(start, 128, depth * 16);
}

KERNEL void conformance(const __grid_constant__ Params params) {
  SharedCarver carver;
  const SharedAddress a = carver.take(a_bytes, "a"), b = carver.take(b_bytes, "b");
  const SharedAddress full = carver.take(8, "full", 8);
  const int32 thread = thread_index();
  if (thread == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(full, a_bytes + b_bytes);
    bulk_load(a, params.a, a_bytes, full);
    bulk_load(b, params.b, b_bytes, full);
  }
  sync_block();
  mbarrier_wait(full, 0);

  float d[plan.columns / 2];
  const int32 first_row = thread / 32 * 16 + thread % 32 / 4, first_column = thread % 4 * 2;
  for (int32 i = 0; i < plan.columns / 2; ++i)
    d[i] = params.d_before[(first_row + i / 2 % 2 * 8) * plan.columns + i / 4 * 8 + first_column +
                           i % 2];
  uint32 registers[steps][4];
  for (int32 i = 0; i < steps * 4; ++i)
    registers[i / 4][i % 4] = params.a_registers[thread * steps * 4 + i];
  wgmma_fence();
#pragma unroll
  for (int32 step = 0; step < steps; ++step) {
    const uint64 b_tile = tile(b, plan.columns, plan.b_major, step);
    if constexpr (plan.from_registers)
      wgmma_registers<Operand, plan.b_major>(d, registers[step], b_tile,
                                             plan.accumulate || step > 0);
    else
      wgmma_shared<Operand, plan.a_major, plan.b_major>(d, tile(a, 64, plan.a_major, step), b_tile,
                                                        plan.accumulate || step > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int32 i = 0; i < plan.columns / 2; ++i)
    params.d[(first_row + i / 2 % 2 * 8) * plan.columns + i / 4 * 8 + first_column + i % 2] = d[i];
}
"""
DTYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "e4m3": ml_dtypes.float8_e4m3fn}


def tile_image(matrix: Array, swizzle: int, major: str) -> Array:
    """[m or n][depth] as it lies in shared memory: chunks of `pitch` bytes by all rows."""
    rows = matrix if major == "depth" else matrix.T
    chunk = (swizzle or 16) // matrix.itemsize
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % chunk)))
    parts = np.split(np.ascontiguousarray(rows), rows.shape[1] // chunk, axis=1)
    return np.concatenate([image_of(part, swizzle) for part in parts])


def registers_of(a: Array, steps: int) -> Array:
    """A [64][depth] as [thread][step][register]."""
    thread = np.arange(128)
    per_register = 4 // a.itemsize
    parts = []
    for step in range(steps):
        for r in range(4):
            row = thread // 32 * 16 + thread % 32 // 4 + r % 2 * 8
            first = (step * 8 + r // 2 * 4 + thread % 4) * per_register
            parts.append(a[row[:, None], first[:, None] + np.arange(per_register)])
    words = np.ascontiguousarray(np.stack(parts, axis=1)).view(np.uint32)
    return np.ascontiguousarray(words[..., 0])


def _case(
    element: str,
    swizzle: int,
    b_major: str,
    a_major: str | None,
    columns: int = 64,
    accumulate: bool = True,
    exact: bool = True,
) -> Case:
    """`a_major` None: A in registers."""
    dtype = np.dtype(DTYPES[element])
    width = swizzle or 32
    depth, random = width // dtype.itemsize, Numbers(columns + swizzle)

    def numbers(*shape: int) -> Array:
        return random.integers(-4, 5, shape) if exact else random.uniform(-2, 2, shape)

    a, b = numbers(64, depth).astype(dtype), numbers(columns, depth).astype(dtype)
    before = numbers(64, columns).astype(np.float32)

    def expected(given: Mapping[str, Array]) -> dict[str, Array]:
        product = a.astype(np.float64) @ b.astype(np.float64).T
        return {"d": (product + (before if accumulate else 0)).astype(np.float32)}

    place = "registers" if a_major is None else f"a-{a_major}"
    suffix = ("" if accumulate else "-fresh") + ("" if exact else "-rounded")
    return Case(
        "wgmma",
        f"{element}-swizzle{swizzle}-{place}-b-{b_major}-{columns}{suffix}",
        f"wgmma_{'registers' if a_major is None else 'shared'} wgmma_fence wgmma_commit wgmma_wait",
        SOURCE.replace("ELEMENT", element),
        {
            "a": tile_image(a, swizzle, a_major or "depth"),
            "b": tile_image(b, swizzle, b_major),
            "a_registers": registers_of(a, width // 32),
            "d_before": before,
        },
        {"d": np.zeros((64, columns), np.float32)},
        config=(
            f".columns = {columns}, .swizzle = {swizzle}, "
            f".a_major = Major::{a_major or 'depth'}, .b_major = Major::{b_major}, "
            f".from_registers = {int(a_major is None)}, .accumulate = {int(accumulate)}"
        ),
        threads=128,
        # Tensor cores cut bits off before they add: e4m3 keeps 13 of a sum's.
        tolerances={} if exact else {"d": (1e-6, 5e-2 if element == "e4m3" else 2e-5)},
        expected=expected,
    )


def _layouts() -> list[Case]:
    cases = []
    for swizzle in (0, 32, 64, 128):
        for element in ("bf16", "fp16"):
            for b_major in ("depth", "width"):
                for a_major in ("depth", "width", None):
                    cases.append(_case(element, swizzle, b_major, a_major))
        cases += [_case("e4m3", swizzle, "depth", a_major) for a_major in ("depth", None)]
    return cases


def _widths() -> list[Case]:
    cases = []
    for columns in (80, 96, 128, 192, 256):
        cases += [
            _case("bf16", 128, "depth", "depth", columns, accumulate=False),
            _case("fp16", 64, "depth", None, columns),
            _case("e4m3", 128, "depth", "depth", columns),
            _case("bf16", 128, "width", None, columns),  # of 80 and 96, a chunk that is not full
        ]
    return cases


def _rounding() -> list[Case]:
    return [_case(e, 128, "depth", a, exact=False) for e in DTYPES for a in ("depth", None)]


CASES = (*_layouts(), *_widths(), *_rounding())
