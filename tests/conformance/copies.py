"""Bulk copies: boxes of tensors of two to five axes with every swizzle, and bytes in a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .case import Array, Case, Map, Numbers

# A box to shared memory; its bytes as they lie there, and the box stored elsewhere.
SOURCE = """
#include <ptx/mbarrier.cuh>
#include <ptx/sync.cuh>
#include <ptx/tma.cuh>

struct Plan {
  int32 bytes, rank;
};
constexpr Plan plan{CUATTN_CONFIG};

struct Params {
  TensorMap from, to;
  const unsigned char* source;
  const int32* load_at;   // [5]
  const int32* store_at;  // [5]
  unsigned char* target;
  unsigned char* image;  // [bytes]
};

KERNEL void conformance(const __grid_constant__ Params params) {
  SharedCarver carver;
  const SharedAddress box = carver.take(plan.bytes, "box"), full = carver.take(8, "full", 8);
  if (thread_index() == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    int32 load_at[plan.rank], store_at[plan.rank];
    for (int32 i = 0; i < plan.rank; ++i) {
      load_at[i] = params.load_at[i];
      store_at[i] = params.store_at[i];
    }
    mbarrier_arrive_expect(full, plan.bytes);
    tma_load(box, params.from, load_at, full);
    mbarrier_wait(full, 0);
    tma_store(params.to, store_at, box);
    bulk_commit();
    bulk_store(params.image, box, plan.bytes);
    bulk_commit();
    bulk_wait_read<0>();
    bulk_wait<0>();
  }
}
"""

# Threads write a tile through stmatrix, fence, and one thread stores it.
FENCED = """
#include <ptx/stmatrix.cuh>
#include <ptx/sync.cuh>
#include <ptx/tma.cuh>

struct Params {
  const uint32* fragments;  // [4 warps][32 lanes][4]
  unsigned char* image;     // [2048]
};

KERNEL void conformance(const __grid_constant__ Params params) {
  SharedCarver carver;
  const SharedAddress tile = carver.take(2048, "tile");
  const int32 thread = thread_index();
  uint32 fragment[4];
  for (int32 i = 0; i < 4; ++i) fragment[i] = params.fragments[thread * 4 + i];
  stmatrix_x4(tile + thread * 16, fragment);
  fence_proxy_async();
  sync_block();
  if (thread == 0) {
    bulk_store(params.image, tile, 2048);
    bulk_commit();
    bulk_wait<0>();
  }
}
"""

ROW = """
#include <ptx/mbarrier.cuh>
#include <ptx/tma.cuh>

struct Params {
  const unsigned char* row;  // [4096]
  unsigned char* image;      // [4096]: in pieces of 16, 2048 and 2032 bytes
};

KERNEL void conformance(const __grid_constant__ Params params) {
  SharedCarver carver;
  const SharedAddress row = carver.take(4096, "row", 128), full = carver.take(8, "full", 8);
  if (thread_index() == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(full, 4096);
    bulk_load(row, params.row, 16, full);
    bulk_load(row + 16, params.row + 16, 2048, full);
    bulk_load(row + 2064, params.row + 2064, 2032, full);
    mbarrier_wait(full, 0);
    bulk_store(params.image, row, 4096);
    bulk_commit();
    bulk_wait<0>();
  }
}
"""


# Eight lanes load a box each, of other columns, rows and pages; those of page −1 are zeros.
LANES = """
#include <ptx/mbarrier.cuh>
#include <ptx/sync.cuh>
#include <ptx/tma.cuh>

struct Params {
  TensorMap from;
  const unsigned char* source;
  const int32* load_at;  // [8][4]
  unsigned char* image;  // [8][1024]
};

KERNEL void conformance(const __grid_constant__ Params params) {
  SharedCarver carver;
  const SharedAddress boxes = carver.take(8 * 1024, "boxes"), full = carver.take(8, "full", 8);
  const int32 lane = lane_index();
  if (lane == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(full, 8 * 1024);
  }
  sync_warp();
  if (lane < 8) {
    const int32* at = params.load_at + 4 * lane;
    tma_load(boxes + 1024 * lane, params.from, {at[0], at[1], at[2], at[3]}, full);
  }
  mbarrier_wait(full, 0);
  sync_warp();
  if (lane == 0) {
    bulk_store(params.image, boxes, 8 * 1024);
    bulk_commit();
    bulk_wait<0>();
  }
}
"""


def swizzled(offset: Array, swizzle: int) -> Array:
    """Where the byte at `offset` of a tile lies: the address's bits 4 … exclusive-or'ed by 7 …"""
    bits = {0: 0, 32: 1, 64: 2, 128: 3}[swizzle]
    return offset ^ ((offset >> 7 & ((1 << bits) - 1)) << 4)


def image_of(box: Array, swizzle: int) -> Array:
    """The bytes of a box [..., innermost] as they lie in shared memory."""
    flat = np.ascontiguousarray(box).view(np.uint8).reshape(-1)
    image = np.empty_like(flat)
    image[swizzled(np.arange(flat.size), swizzle)] = flat
    return image


def overlap(x: int, length: int, size: int) -> tuple[slice, slice]:
    """Where [x, x + length) meets [0, size): in the box, and in the tensor."""
    start, stop = min(max(x, 0), size), min(max(x + length, 0), size)
    return slice(start - x, stop - x), slice(start, stop)


def cut(tensor: Array, at: tuple[int, ...], box: tuple[int, ...]) -> Array:
    """The box at `at` (innermost first), zeros outside of the tensor."""
    result = np.zeros(box[::-1], tensor.dtype)
    pairs = [overlap(*three) for three in zip(at[::-1], result.shape, tensor.shape, strict=True)]
    result[tuple(inner for inner, _ in pairs)] = tensor[tuple(outer for _, outer in pairs)]
    return result


def paste(tensor: Array, at: tuple[int, ...], box: Array) -> Array:
    """A copy of the tensor with the box at `at`, but for what lies outside."""
    result = tensor.copy()
    pairs = [overlap(*three) for three in zip(at[::-1], box.shape, tensor.shape, strict=True)]
    result[tuple(outer for _, outer in pairs)] = box[tuple(inner for inner, _ in pairs)]
    return result


def box_case(
    sizes: tuple[int, ...],
    box: tuple[int, ...],
    load_at: tuple[int, ...],
    store_at: tuple[int, ...],
    swizzle: int,
    dtype: Any = np.uint16,
) -> Case:
    itemsize = np.dtype(dtype).itemsize
    source = Numbers(1).integers(1, 250, sizes[::-1]).astype(dtype)

    def padded(values: tuple[int, ...]) -> Array:
        return np.array([*values, *[0] * (5 - len(values))], np.int32)

    def expected(given: Mapping[str, Array]) -> dict[str, Array]:
        loaded = cut(given["source"], load_at, box)
        target = paste(np.zeros(sizes[::-1], dtype), store_at, loaded)
        return {"target": target, "image": image_of(loaded, swizzle)}

    size = int(np.prod(box)) * itemsize
    swizzle_name = f"swizzle{swizzle}" if swizzle else "plain"
    return Case(
        "copies",
        f"{len(sizes)}d-{swizzle_name}-{8 * itemsize}bit-box{'x'.join(map(str, box))}",
        "tma_load tma_store bulk_commit bulk_wait bulk_wait_read mbarrier_arrive_expect",
        SOURCE,
        {"source": source, "load_at": padded(load_at), "store_at": padded(store_at)},
        {"target": np.zeros(sizes[::-1], dtype), "image": np.zeros(size, np.uint8)},
        config=f".bytes = {size}, .rank = {len(box)}",
        maps=(Map("source", box, swizzle), Map("target", box, swizzle)),
        expected=expected,
    )


_PLACES = [[64 * (i % 2), 8 * (i // 2 % 2), i % 3, i % 4 - 1] for i in range(8)]


def _boxes(given: Mapping[str, Array]) -> dict[str, Array]:
    boxes = (cut(given["source"], tuple(at), (64, 8, 1, 1)) for at in _PLACES)
    return {"image": np.concatenate([image_of(box, 128) for box in boxes])}


def _fenced(given: Mapping[str, Array]) -> dict[str, Array]:
    from .warps import _rows_of

    rows = [_rows_of(fragment, False) for fragment in given["fragments"]]
    return {"image": np.concatenate(rows).reshape(-1)}


_RANDOM = Numbers(5)
CASES = (
    *(
        box_case((48, 40), (width // 2, 40), (0, 0), (0, 0), width)
        for width in (32, 64)  # every swizzle inside of the tensor
    ),
    box_case((72, 40), (64, 40), (0, 0), (0, 0), 128),
    box_case((48, 40), (32, 8), (8, 16), (16, 32), 0),
    # Over every edge, before and behind.
    box_case((40, 9), (16, 5), (-8, 6), (32, 6), 32),
    box_case((40, 9), (32, 5), (24, -2), (16, 5), 64),
    box_case((72, 9), (64, 5), (-32, 7), (16, 6), 128),
    box_case((40, 9), (16, 5), (104, 0), (0, 0), 0),  # nothing of it inside
    box_case((24, 7, 5), (8, 3, 4), (16, -1, 3), (8, 5, 2), 0),
    box_case((72, 7, 5), (64, 3, 4), (16, 5, -2), (0, 5, 2), 128),
    box_case((32, 5, 3, 4), (32, 2, 2, 3), (0, 4, -1, 2), (0, 4, 2, 1), 64),
    box_case((24, 5, 3, 4), (16, 2, 2, 3), (8, 4, -1, 2), (8, 4, 2, 1), 32),
    box_case((64, 6, 2, 3, 2), (64, 4, 2, 1, 2), (0, 3, 0, 1, 0), (0, 4, 1, 0, 1), 128),
    box_case((16, 6, 2, 3, 2), (8, 4, 2, 1, 2), (8, 3, -1, 1, 1), (0, 4, 1, 0, 1), 0),
    # Elements of one byte and of four.
    box_case((144, 20), (128, 8), (16, 14), (0, 2), 128, np.uint8),
    box_case((48, 20), (32, 16), (20, 10), (16, 8), 128, np.uint32),
    Case(
        "copies",
        "boxes-by-lanes",
        "tma_load mbarrier_arrive_expect",
        LANES,
        {
            "source": Numbers(6).integers(1, 250, (3, 3, 16, 72)).astype(np.uint16),
            "load_at": np.array(_PLACES, np.int32),
        },
        {"image": np.zeros(8 * 1024, np.uint8)},
        maps=(Map("source", (64, 8, 1, 1), 128),),
        expected=_boxes,
    ),
    Case(
        "copies",
        "row",
        "bulk_load bulk_store",
        ROW,
        {"row": _RANDOM.integers(0, 256, (4096,)).astype(np.uint8)},
        {"image": np.zeros(4096, np.uint8)},
        expected=lambda given: {"image": given["row"]},
    ),
    Case(
        "copies",
        "proxy-fence",
        "fence_proxy_async",
        FENCED,
        {"fragments": _RANDOM.words(4, 32, 4).astype(np.uint32)},
        {"image": np.zeros(2048, np.uint8)},
        threads=128,
        expected=_fenced,
    ),
)
