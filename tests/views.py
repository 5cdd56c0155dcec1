"""Views that no array is behind, for tests of what looks at views only."""

from __future__ import annotations

from typing import Any

from cuattn._records import View

BF16 = "bfloat16"


def packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))[-len(shape) :] if shape else ()


def array(
    *shape: int,
    dtype: str = BF16,
    strides: tuple[int, ...] | None = None,
    pointer: int = 1 << 20,
    device: int = 0,
) -> View:
    strides = packed(shape) if strides is None else strides
    return View(pointer, shape, strides, dtype, device, None, False, None, 0)


def index(*shape: int, **more: Any) -> View:
    return array(*shape, dtype="int32", **more)


def real(*shape: int, **more: Any) -> View:
    return array(*shape, dtype="float32", **more)
