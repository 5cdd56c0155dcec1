"""Tensor maps of arrays on a GPU, as bulk copies want them; the driver makes them.

The emulator has its own: `emulator.tensor_map`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache

from ._config import CHUNK
from ._records import Problem

SIZE = 128  # bytes
ALIGNMENT = 64
_ITEMSIZE = 2

# CUtensorMapDataType, …Interleave, …Swizzle, …L2promotion, …FloatOOBfill
_UINT16, _NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_128B, _FILL_ZEROS = 1, 0, 3, 2, 0

_Numbers = tuple[int, ...]
# Pointer, sizes (innermost first), strides in bytes of all axes but the first, box → a map of
# 2-byte elements whose boxes have rows of 128 bytes, swizzled.
Encode = Callable[[int, _Numbers, _Numbers, _Numbers], bytes]


@lru_cache(maxsize=1024)
def encode(pointer: int, sizes: _Numbers, strides: _Numbers, box: _Numbers) -> bytes:
    """Let the driver describe an array and the box of it that one copy moves; an `Encode`."""
    rank = len(sizes)
    room = ctypes.create_string_buffer(SIZE + ALIGNMENT)
    start = -(-ctypes.addressof(room) // ALIGNMENT) * ALIGNMENT
    failed = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(
        ctypes.c_void_p(start),
        ctypes.c_int(_UINT16),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(pointer),
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


def maps_of(problem: Problem, pointer: int, encode: Encode) -> bytes:
    """Return the two maps of an MLA cache that stand behind the parameters: `wide` and `one`.

    Axes are the columns of a chunk, the slots of a page, chunks and pages. A box of `wide` has four
    chunks where 64 keys are of one page.
    """
    pages, _, page_size, row = problem.k.shape
    page_stride, _, slot_stride, _ = problem.k.strides
    if pages == 0:  # no page is inside: whatever lies there is not read
        pages, page_stride, slot_stride = 1, page_size * row, row
        pointer = ALIGNMENT
    sizes = (CHUNK, page_size, row // CHUNK, pages)
    strides = (slot_stride * _ITEMSIZE, CHUNK * _ITEMSIZE, page_stride * _ITEMSIZE)
    rows = min(page_size, CHUNK)
    chunks = 4 if page_size >= CHUNK else 1
    wide, one = (encode(pointer, sizes, strides, (CHUNK, rows, n, 1)) for n in (chunks, 1))
    return wide + one
