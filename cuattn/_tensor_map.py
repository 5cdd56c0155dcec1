"""Tensor maps of arrays on a GPU, as bulk copies want them; the driver makes them.

The emulator has its own: `emulator.tensor_map`.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from ._config import CHUNK
from ._records import Plan, Problem

SIZE = 128  # bytes
ALIGNMENT = 64
_ITEMSIZE = 2

# CUtensorMapDataType, …Interleave, …Swizzle, …L2promotion, …FloatOOBfill
_UINT16, _NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_128B, _FILL_ZEROS = 1, 0, 3, 2, 0


class Map(NamedTuple):
    """An array of 2-byte elements, and the box of it that one copy moves; its rows are swizzled."""

    pointer: str  # a name of `_params.POINTERS`
    sizes: tuple[int, ...]  # the innermost axis first
    strides: tuple[int, ...]  # bytes, of all axes but the innermost
    box: tuple[int, ...]  # its rows have 128 bytes


def encode(pointer: int, array: Map) -> bytes:
    """Let the driver describe an array that lies at `pointer`; 0: nothing of it is read."""
    _, sizes, strides, box = array
    rank = len(sizes)
    room = ctypes.create_string_buffer(SIZE + ALIGNMENT)
    start = -(-ctypes.addressof(room) // ALIGNMENT) * ALIGNMENT
    failed = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(
        ctypes.c_void_p(start),
        ctypes.c_int(_UINT16),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(pointer or ALIGNMENT),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),  # every element
        ctypes.c_int(_NO_INTERLEAVE),
        ctypes.c_int(_SWIZZLE_128B),
        ctypes.c_int(_PROMOTE_128B),
        ctypes.c_int(_FILL_ZEROS),
    )
    if failed:
        raise RuntimeError(
            f"cuTensorMapEncodeTiled failed with CUDA error {failed} for sizes {sizes}, strides "
            f"{strides} bytes, box {box}"
        )
    return ctypes.string_at(start, SIZE)


def maps_of(problem: Problem, plan: Plan) -> tuple[Map, ...]:
    """Return what the tensor maps describe that stand behind the parameters of a plan's kernel."""
    return _OF_KERNEL[plan.kernel](problem) if plan.kernel in _OF_KERNEL else ()


def _mla_cache(problem: Problem) -> tuple[Map, ...]:
    """Return `wide` and `one`, of an MLA cache.

    Axes are the columns of a chunk, the slots of a page, chunks and pages.  A box of `wide` has
    four chunks where 64 keys are of one page.
    """
    pages, _, page_size, row = problem.k.shape
    page_stride, _, slot_stride, _ = problem.k.strides
    if pages == 0:  # no page is inside: whatever lies there is not read
        pages, page_stride, slot_stride = 1, page_size * row, row
    sizes = (CHUNK, page_size, row // CHUNK, pages)
    strides = (slot_stride * _ITEMSIZE, CHUNK * _ITEMSIZE, page_stride * _ITEMSIZE)
    rows = min(page_size, CHUNK)
    chunks = 4 if page_size >= CHUNK else 1
    return tuple(Map("k", sizes, strides, (CHUNK, rows, n, 1)) for n in (chunks, 1))


_OF_KERNEL = {"mla_decode_sm90": _mla_cache}
