"""Instructions of a warp: matrices to and from fragments, mma, rounding, special functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from .case import Array, Case, Numbers

MATRICES = """
#include <ptx/cp_async.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/sync.cuh>

struct Params {
  const unsigned char* rows;  // [32 rows][16 bytes]
  const int32* order;         // [32]: the row that each lane addresses
  uint32* matrices;           // [plain, transposed, half zeros][32 lanes][4]
};

KERNEL void conformance(const __grid_constant__ Params params) {
  SharedCarver carver;
  const SharedAddress tile = carver.take(512, "tile");
  const int32 lane = lane_index();
  const SharedAddress row = tile + params.order[lane] * 16;
  for (int32 pass = 0; pass < 3; ++pass) {
    cp_async_16(tile + lane * 16, params.rows + lane * 16, pass < 2 || lane % 2 == 0);
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();
    uint32 fragment[4];
    if (pass == 1)
      ldmatrix_x4_transposed(fragment, row);
    else
      ldmatrix_x4(fragment, row);
    for (int32 i = 0; i < 4; ++i) params.matrices[(pass * 32 + lane) * 4 + i] = fragment[i];
    sync_block();
  }
}
"""

# Warp 0 stores its fragments and arrives; warp 1 waits and reads them as they lie, two rounds.
STORED = """
#include <ptx/ldmatrix.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/stmatrix.cuh>
#include <ptx/sync.cuh>

struct Params {
  const uint32* fragments;  // [round][32 lanes][4]
  const int32* order;       // [32]: the row that each lane addresses
  uint32* matrices;         // [round][32 lanes][4]
};

KERNEL void conformance(const __grid_constant__ Params params) {
  SharedCarver carver;
  const SharedAddress tile = carver.take(512, "tile"), full = carver.take(8, "full", 8);
  const SharedAddress empty = carver.take(8, "empty", 8);
  const int32 lane = lane_index();
  if (thread_index() == 0) {
    mbarrier_init(full, 32);
    mbarrier_init(empty, 1);
    fence_mbarrier_init();
  }
  sync_block();
  for (uint32 round = 0; round < 4; ++round) {
    const uint32 first = (round * 32 + lane) * 4;
    uint32 fragment[4];
    if (warp_index() == 0) {
      mbarrier_wait(empty, (round & 1) ^ 1);  // the reader is done with the round before
      for (int32 i = 0; i < 4; ++i) fragment[i] = params.fragments[first + i];
      if (round % 2 == 0)
        stmatrix_x4(tile + params.order[lane] * 16, fragment);
      else
        stmatrix_x4_transposed(tile + params.order[lane] * 16, fragment);
      mbarrier_arrive(full);
    } else {
      mbarrier_wait(full, round & 1);
      ldmatrix_x4(fragment, tile + lane * 16);
      for (int32 i = 0; i < 4; ++i) params.matrices[first + i] = fragment[i];
      sync_warp();
      if (lane == 0) mbarrier_arrive(empty);
    }
  }
  sync_block();
  if (thread_index() == 0) {
    mbarrier_invalidate(full);
    mbarrier_invalidate(empty);
  }
}
"""

# Warps 0 and 1 meet at barrier 1; warp 2 announces each of four rounds at barrier 2, by which they
# read what it wrote.
NAMED = """
#include <ptx/ldmatrix.cuh>
#include <ptx/stmatrix.cuh>
#include <ptx/sync.cuh>

struct Params {
  const uint32* fragments;  // [round][32 lanes][4]
  uint32* matrices;         // [round][2 warps][32 lanes][4]
};

KERNEL void conformance(const __grid_constant__ Params params) {
  SharedCarver carver;
  const SharedAddress tile = carver.take(2048, "tile");  // one of 512 bytes for each round
  const int32 warp = warp_index(), lane = lane_index();
  for (int32 round = 0; round < 4; ++round) {
    const SharedAddress row = tile + round * 512 + lane * 16;
    uint32 fragment[4];
    if (warp == 2) {
      for (int32 i = 0; i < 4; ++i) fragment[i] = params.fragments[(round * 32 + lane) * 4 + i];
      stmatrix_x4(row, fragment);
      named_barrier_arrive<2, 96>();
      named_barrier_sync<3, 96>();  // one round ahead of a barrier is allowed, two are not
    } else {
      named_barrier_sync<1, 64>();
      named_barrier_sync<2, 96>();
      ldmatrix_x4_transposed(fragment, row);
      for (int32 i = 0; i < 4; ++i)
        params.matrices[((round * 2 + warp) * 32 + lane) * 4 + i] = fragment[i];
      named_barrier_arrive<3, 96>();
    }
  }
}
"""

PRODUCT = """
#include <core/device.cuh>
#include <ptx/mma.cuh>

struct Params {
  const uint32* a;  // [32 lanes][4]
  const uint32* b;  // [32 lanes][2]
  const float* d;   // [32 lanes][4]
  float* product;   // [32 lanes][4]
};

KERNEL void conformance(const __grid_constant__ Params params) {
  const int32 lane = lane_index();
  uint32 a[4];
  float d[4];
  for (int32 i = 0; i < 4; ++i) {
    a[i] = params.a[lane * 4 + i];
    d[i] = params.d[lane * 4 + i];
  }
  INSTRUCTION(d, a, params.b[lane * 2], params.b[lane * 2 + 1], ELEMENT{});
  for (int32 i = 0; i < 4; ++i) params.product[lane * 4 + i] = d[i];
}
"""

NUMBERS = """
#include <core/device.cuh>
#include <ptx/convert.cuh>
#include <ptx/special.cuh>

struct Params {
  const float* numbers;  // [1024]
  uint32* packed;        // [bf16, fp16][1024]: each number, then its negative
  float* special;        // [exp2, log2, 1/x][1024]
};

KERNEL void conformance(const __grid_constant__ Params params) {
  for (int32 i = thread_index(); i < 1024; i += 32) {
    const float x = params.numbers[i];
    params.packed[i] = pack(x, -x, bf16{});
    params.packed[1024 + i] = pack(x, -x, fp16{});
    params.special[i] = exp2_approximate(x);
    params.special[1024 + i] = log2_approximate(x);
    params.special[2048 + i] = reciprocal_approximate(x);
  }
}
"""

LANES = """
#include <core/device.cuh>
#include <ptx/sync.cuh>

struct Params {
  const int32* values;  // [32]
  int32* lanes;         // [from, xor, up, all, any, ballot, bits][32 lanes]
  uint64* sum;          // [1]: by all lanes, and a high bit by the elected one
};

KERNEL void conformance(const __grid_constant__ Params params) {
  const int32 lane = lane_index(), value = params.values[lane];
  const int32 results[7] = {shuffle(value, 5),
                            shuffle_xor(value, 3),
                            shuffle_up(value, 4),
                            warp_all(value >= 0) * 2 + warp_all(value > 0),
                            warp_any(value == 0) * 2 + warp_any(value < 0),
                            int32(warp_ballot(value % 3 == 0)),
                            count_ones(uint32(value * 77777))};
  for (int32 i = 0; i < 7; ++i) params.lanes[i * 32 + lane] = results[i];
  atomic_add(params.sum, uint64(value) << 20);
  sync_warp();
  if (elect_lane()) atomic_add(params.sum, uint64(1) << 40);
}
"""
REDUCTIONS = """
#include <ptx/grid.cuh>
#include <ptx/redux.cuh>

struct Params {
  const uint32* values;  // [32]
  uint32* reduced;       // [add, min, max, and, or, xor][32 lanes]
};

KERNEL void conformance(const __grid_constant__ Params params) {
  grid_dependency_wait();
  const uint32 lane = lane_index(), value = params.values[lane];
  const uint32 results[6] = {redux_add(value), redux_min(value), redux_max(value),
                             redux_and(value), redux_or(value),  redux_xor(value)};
  for (int32 i = 0; i < 6; ++i) params.reduced[i * 32 + lane] = results[i];
  grid_dependency_launch();
}
"""
_ORDER = Numbers(3).permutation(32)


def _bytes(*shape: int) -> Array:
    return Numbers(7).integers(0, 256, shape).astype(np.uint8)


def fragments(rows: Array, transposed: bool) -> Array:
    """[32 rows][16 bytes] as [lane][register], by ldmatrix's layout."""
    matrices = np.ascontiguousarray(rows).view(np.uint16).reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    words = np.ascontiguousarray(matrices).view(np.uint32)  # [matrix, row, pair]
    return np.ascontiguousarray(words.transpose(1, 2, 0).reshape(32, 4))


def _loaded(given: Mapping[str, Array]) -> dict[str, Array]:
    rows, order = given["rows"], given["order"]
    half = rows.copy()
    half[1::2] = 0
    passes = (rows, False), (rows, True), (half, False)
    return {"matrices": np.stack([fragments(r[order], turned) for r, turned in passes])}


def _rows_of(fragment: Array, transposed: bool) -> Array:
    """The inverse of `fragments`."""
    words = fragment.reshape(8, 4, 4).transpose(2, 0, 1)  # [matrix, row, pair]
    matrices = np.ascontiguousarray(words).view(np.uint16)
    if transposed:
        matrices = np.ascontiguousarray(matrices.transpose(0, 2, 1))
    return matrices.view(np.uint8).reshape(32, 16)


def _stored(given: Mapping[str, Array]) -> dict[str, Array]:
    matrices = []
    for number, fragment in enumerate(given["fragments"]):
        rows = np.zeros((32, 16), np.uint8)
        rows[given["order"]] = _rows_of(fragment, number % 2 == 1)
        matrices.append(fragments(rows, False))
    return {"matrices": np.stack(matrices)}


def _named(given: Mapping[str, Array]) -> dict[str, Array]:
    turned = [fragments(_rows_of(fragment, False), True) for fragment in given["fragments"]]
    return {"matrices": np.stack([np.stack([one, one]) for one in turned])}


# --- mma -----------------------------------------------------------------------------------------


def _matrices(given: Mapping[str, Array], dtype: Any) -> tuple[Array, Array, Array]:
    """A, B and D in float64, by the layout that ptx/mma.cuh states."""
    e = 4 // np.dtype(dtype).itemsize  # elements of a register
    lane = np.arange(32)
    a, b, d = np.zeros((16, 8 * e)), np.zeros((8 * e, 8)), np.zeros((16, 8))
    parts_a, parts_b = (
        np.ascontiguousarray(given[n]).view(dtype).astype(np.float64) for n in ("a", "b")
    )
    for i in range(e):
        for r in range(4):
            a[lane // 4 + r % 2 * 8, lane % 4 * e + i + r // 2 * 4 * e] = parts_a[:, e * r + i]
        for r in range(2):
            b[lane % 4 * e + i + r * 4 * e, lane // 4] = parts_b[:, e * r + i]
    for i in range(4):
        d[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2] = given["d"][:, i]
    return a, b, d


def _product(dtype: Any) -> Any:
    def product(given: Mapping[str, Array]) -> dict[str, Array]:
        a, b, d = _matrices(given, dtype)
        total, lane = a @ b + d, np.arange(32)
        places = [(lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2) for i in range(4)]
        return {"product": np.stack([total[at] for at in places], axis=1).astype(np.float32)}

    return product


def _mma(instruction: str, element: str, dtype: Any, exact: bool) -> Case:
    random = Numbers(11)
    e = 4 // np.dtype(dtype).itemsize

    def operand(registers: int) -> Array:
        shape = (32, registers * e)
        values = random.integers(-8, 9, shape) if exact else random.uniform(-2, 2, shape)
        return np.ascontiguousarray(values.astype(dtype)).view(np.uint32)

    d = random.integers(-99, 99, (32, 4)) if exact else random.uniform(-2, 2, (32, 4))
    return Case(
        "warps",
        f"{instruction}-{element}-{'integers' if exact else 'rounded'}",
        instruction,
        PRODUCT.replace("INSTRUCTION", instruction).replace("ELEMENT", element),
        {"a": operand(4), "b": operand(2), "d": d.astype(np.float32)},
        {"product": np.zeros((32, 4), np.float32)},
        # Tensor cores cut bits off before they add: e4m3 keeps 13 of a sum's.
        tolerances={} if exact else {"product": (1e-6, 2e-2 if element == "e4m3" else 1e-5)},
        expected=_product(dtype),
    )


# --- numbers -------------------------------------------------------------------------------------


def _numbers() -> Array:
    """Numbers with every exponent, ties of rounding, and what is no number."""
    random = Numbers(9)
    exponents = random.integers(-150, 128, (900,))
    numbers = np.ldexp(1 + random.integers(0, 1 << 14, (900,)) / (1 << 14), exponents)
    edges = [0, 1, -1, 65504, 65519, 65520, 3.39e38, np.inf, -np.inf, np.nan, 2.0**-24, 2.0**-25]
    small = random.uniform(-20, 20, (1024 - 900 - len(edges),))
    return np.concatenate([numbers, edges, small]).astype(np.float32)


def _rounded(given: Mapping[str, Array]) -> dict[str, Array]:
    x = given["numbers"]
    packed = []
    with np.errstate(all="ignore"):
        for dtype in (ml_dtypes.bfloat16, np.float16):
            halves = [y.astype(dtype).view(np.uint16).astype(np.uint32) for y in (x, -x)]
            low, high = (np.where(np.isnan(x), np.uint32(0x7FFF), half) for half in halves)
            packed.append(low | high << 16)
        y = np.where(np.abs(x) < 2.0**-126, 0 * x, x).astype(np.float64)
        special = np.stack([np.exp2(y), np.log2(y), 1 / y])
        special = np.where(np.abs(special) < 2.0**-126, 0, special).astype(np.float32)
    return {"packed": np.stack(packed).astype(np.uint32), "special": special}


def _lanes(given: Mapping[str, Array]) -> dict[str, Array]:
    value = given["values"]
    ones = np.array([int(v) * 77777 % 2**32 for v in value], np.uint64)
    rows = [
        np.full(32, value[5]),
        value[np.arange(32) ^ 3],
        np.concatenate([value[:4], value[:-4]]),
        np.full(32, 2 * (value >= 0).all() + (value > 0).all()),
        np.full(32, 2 * (value == 0).any() + (value < 0).any()),
        np.full(32, sum(1 << lane for lane in range(32) if value[lane] % 3 == 0)),
        np.array([int(v).bit_count() for v in ones]),
    ]
    sums = np.array([(1 << 40) + sum(int(v) << 20 for v in value)], np.uint64)
    return {"lanes": np.stack(rows).astype(np.int64).astype(np.int32), "sum": sums}


def _reduced(given: Mapping[str, Array]) -> dict[str, Array]:
    functions = (np.add, np.minimum, np.maximum, np.bitwise_and, np.bitwise_or, np.bitwise_xor)
    rows = [np.full(32, function.reduce(given["values"])) for function in functions]
    return {"reduced": np.stack(rows).astype(np.uint32)}


_FRAGMENTS = _bytes(4, 32, 16).view(np.uint32)
CASES = (
    Case(
        "warps",
        "ldmatrix",
        "cp_async_16 cp_async_commit cp_async_wait sync_block ldmatrix_x4 ldmatrix_x4_transposed",
        MATRICES,
        {"rows": _bytes(32, 16), "order": _ORDER},
        {"matrices": np.zeros((3, 32, 4), np.uint32)},
        expected=_loaded,
    ),
    _mma("mma_m16n8k16", "bf16", ml_dtypes.bfloat16, True),
    _mma("mma_m16n8k16", "fp16", np.float16, True),
    _mma("mma_m16n8k16", "bf16", ml_dtypes.bfloat16, False),
    _mma("mma_m16n8k16", "fp16", np.float16, False),
    _mma("mma_m16n8k32", "e4m3", ml_dtypes.float8_e4m3fn, True),
    _mma("mma_m16n8k32", "e4m3", ml_dtypes.float8_e4m3fn, False),
    Case(
        "warps",
        "numbers",
        "pack exp2_approximate log2_approximate reciprocal_approximate",
        NUMBERS,
        {"numbers": _numbers()},
        {"packed": np.zeros((2, 1024), np.uint32), "special": np.zeros((3, 1024), np.float32)},
        # Near 1 a logarithm is small: PTX promises lg2.approx there to 2^-22, absolutely.
        tolerances={"special": (2.0**-21, (1e-37, 2.0**-22, 1e-37))},
        expected=_rounded,
    ),
    Case(
        "warps",
        "lanes",
        "elect_lane",
        LANES,
        {"values": _ORDER},
        {"lanes": np.zeros((7, 32), np.int32), "sum": np.zeros(1, np.uint64)},
        expected=_lanes,
    ),
    Case(
        "warps",
        "reductions",
        "redux_add redux_min redux_max redux_and redux_or redux_xor grid_dependency_wait "
        "grid_dependency_launch",
        REDUCTIONS,
        {"values": _bytes(32, 4).view(np.uint32).reshape(32) | 0x01000001},
        {"reduced": np.zeros((6, 32), np.uint32)},
        expected=_reduced,
    ),
    Case(
        "warps",
        "stmatrix-mbarrier",
        "stmatrix_x4 stmatrix_x4_transposed mbarrier_init mbarrier_arrive mbarrier_wait "
        "mbarrier_invalidate fence_mbarrier_init",
        STORED,
        {"fragments": _FRAGMENTS, "order": _ORDER},
        {"matrices": np.zeros((4, 32, 4), np.uint32)},
        threads=64,
        expected=_stored,
    ),
    Case(
        "warps",
        "named-barriers",
        "named_barrier_sync named_barrier_arrive",
        NAMED,
        {"fragments": _FRAGMENTS},
        {"matrices": np.zeros((4, 2, 32, 4), np.uint32)},
        threads=96,
        expected=_named,
    ),
)
