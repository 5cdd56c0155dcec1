"""Tensor maps of arrays on a GPU, as bulk copies want them; the driver makes them.

The emulator has its own: `emulator.tensor_map`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

from ._config import CHUNK, GROUP_ROWS
from ._records import Layout, Plan, Problem

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
    """Let the driver describe an array that lies at `pointer`, on 16 bytes unless it is empty."""
    _, sizes, strides, box = array
    rank = len(sizes)
    room = ctypes.create_string_buffer(SIZE + ALIGNMENT)
    start = -(-ctypes.addressof(room) // ALIGNMENT) * ALIGNMENT
    failed = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(start),
        ctypes.c_int(_UINT16),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(pointer & -16 or ALIGNMENT),
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


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def maps_of(problem: Problem, plan: Plan) -> tuple[Map, ...]:
    """Return what the tensor maps describe that stand behind the parameters of a plan's kernel."""
    return _OF_KERNEL[plan.kernel](problem, plan) if plan.kernel in _OF_KERNEL else ()


def _mla_cache(problem: Problem, _plan: Plan) -> tuple[Map, ...]:
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


def _prefill(problem: Problem, plan: Plan) -> tuple[Map, ...]:
    """Return the maps of q, k, v and of packed q.

    Axes are columns, rows, heads, requests or pages.  Boxes are 64 columns of the rows of a
    warp-group, of a tile's keys, or of what of a tile is of one page.
    """
    keys = plan.config.block_kv
    if problem.page_size:
        keys = min(problem.page_size, keys & -keys)
    arrays = {"q": (problem.q, GROUP_ROWS), "k": (problem.k, keys), "v": (problem.v, keys)}
    rows_of = (
        Map(name, *_rows_of(array, problem.page_size > 0 and name != "q"), (CHUNK, rows, 1, 1))
        for name, (array, rows) in arrays.items()
    )
    return (*rows_of, _packed(problem))


def _packed(problem: Problem) -> Map:
    """Return the map of packed queries: axes are columns, heads, tokens, groups, requests.

    A box is 64 columns of all heads of a group, of as many tokens as a warp-group has rows for: its
    rows lie one behind the other, token by token.  Groups that do not fit are never packed.
    """
    group = problem.q_heads // problem.kv_heads
    pack = group if group <= GROUP_ROWS else 1
    (columns, tokens, heads, requests), (row, head, outer) = _rows_of(problem.q, False)
    sizes = (columns, pack, tokens, max(heads // pack, 1), requests)
    return Map("q", sizes, (head, row, pack * head, outer), (CHUNK, pack, GROUP_ROWS // pack, 1, 1))


def _rows_of(array: Layout, pages: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return sizes and strides of columns, rows, heads and requests or pages."""
    *outer, rows, heads, columns = array.shape
    *outer_strides, row, head, _ = array.strides
    if pages:  # [pages, heads, slots, columns]
        rows, heads, row, head = heads, rows, head, row
    if 0 in array.shape:  # nothing of it is read
        return (columns, 1, 1, 1), (columns * _ITEMSIZE,) * 3
    # Where requests lie end to end there is one, and a distance to the next that nobody goes.
    sizes = (columns, rows, heads, *(outer or [1]))
    strides = (row, head, *(outer_strides or [row]))
    return sizes, tuple(step * _ITEMSIZE for step in strides)


_OF_KERNEL = {"fmha_sm90": _prefill, "mla_decode_sm90": _mla_cache}
