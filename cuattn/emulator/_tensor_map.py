"""Tensor maps of the emulator: what cuTensorMapEncodeTiled makes on a GPU, with its checks."""

from __future__ import annotations

import struct
from collections.abc import Sequence

_MAGIC = 0x70616D74  # bulk.cpp
_LAYOUT = struct.Struct("=4IQ5I5I4Q32x")
SIZE = 128
assert _LAYOUT.size == SIZE


def tensor_map(
    pointer: int,
    element_bytes: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle: int = 0,
) -> bytes:
    """Describe a tensor and the box of it that one bulk copy moves.

    Parameters
    ----------
    pointer : int
        First element, a multiple of 16.
    element_bytes : int
        1, 2 or 4.
    sizes, box : sequence of int
        One to five numbers, the innermost axis first.
    strides : sequence of int
        Bytes from element to element along all axes but the first, which is contiguous.
    swizzle : {0, 32, 64, 128}
        Bytes that the pattern is wide, and a row of the box with it.

    Returns
    -------
    bytes
        128 of them, for a `TensorMap` parameter.

    Examples
    --------
    >>> len(tensor_map(4096, 2, (128, 50), (256,), (64, 64), 128))
    128
    """
    rank = len(sizes)
    if not 1 <= rank <= 5 or len(box) != rank or len(strides) != rank - 1:
        raise ValueError(
            f"sizes, box and strides have {rank}, {len(box)} and {len(strides)} numbers; wanted "
            "n, n and n - 1 with n from 1 to 5"
        )
    if pointer % 16:
        raise ValueError(f"pointer is {pointer:#x}; wanted a multiple of 16")
    if element_bytes not in (1, 2, 4):
        raise ValueError(f"element_bytes is {element_bytes}; wanted 1, 2 or 4")
    if any(not 0 < size < 1 << 32 for size in sizes):
        raise ValueError(f"sizes are {tuple(sizes)}; wanted 1 to 2³² − 1")
    if any(stride % 16 or not 0 <= stride < 1 << 40 for stride in strides):
        raise ValueError(f"strides are {tuple(strides)}; wanted multiples of 16 below 2⁴⁰")
    if any(not 0 < length <= 256 for length in box):
        raise ValueError(f"box is {tuple(box)}; wanted 1 to 256 along each axis")
    row = box[0] * element_bytes
    if row % 16:
        raise ValueError(f"a row of the box has {row} bytes; wanted a multiple of 16")
    if swizzle not in (0, 32, 64, 128):
        raise ValueError(f"swizzle is {swizzle}; wanted 0, 32, 64 or 128")
    if swizzle and row != swizzle:  # narrower rows lie on a GPU as no one has written down
        raise ValueError(f"a row of the box has {row} bytes; wanted {swizzle}, the swizzle's width")
    missing = 5 - rank
    return _LAYOUT.pack(
        _MAGIC,
        rank,
        element_bytes,
        swizzle,
        pointer,
        *sizes,
        *[1] * missing,
        *box,
        *[1] * missing,
        *strides,
        *[0] * (5 - rank),
    )
