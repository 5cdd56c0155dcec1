"""Whether arrays share memory: byte by byte, without touching any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ._records import View

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4}
_MOST_STEPS = 20_000


def check_overlap(outputs: Mapping[str, View | None], inputs: Mapping[str, Any]) -> None:
    """Raise ValueError if an output shares memory with an input or with another output.

    Values that are None or no views (a scale given as a number) are passed over.
    """
    spans = [(*_span(view), name, view) for name, view in inputs.items() if isinstance(view, View)]
    for name, view in outputs.items():
        if view is None:
            continue
        low, high = _span(view)
        for other_low, other_high, other, second in spans:
            if low < other_high and other_low < high and overlap(view, second):
                raise ValueError(f"{name} shares memory with {other}; wanted an array of its own")
        spans.append((low, high, name, view))


def extents(views: Sequence[View]) -> list[tuple[int, int]]:
    """Return the bytes [low, high) that each view spans, counted from its pointer."""
    return [_extent(view[1], view[2], view[3]) for view in views]


def near(views: Sequence[View], reaches: Sequence[tuple[int, int]], outputs: int) -> bool:
    """Say whether one of the last views, the outputs, lies where another of all of them does.

    `reaches` are the `extents` of views like these.  A quick look before `check_overlap`.
    """
    spans = [
        (view[0] + low, view[0] + high) for view, (low, high) in zip(views, reaches, strict=True)
    ]
    for number in range(len(spans) - outputs, len(spans)):
        low, high = spans[number]
        for other_low, other_high in spans[:number]:
            if low < other_high and other_low < high:
                return True
    return False


def overlap(a: View, b: View) -> bool:
    """Say whether two views have a byte in common.

    Exact for dense arrays, for slices of a common packed array and for every other nesting of
    strides met in practice. Strides so irregular that the search takes more than 20 000 steps
    count as overlapping.
    """
    (low_a, high_a), (low_b, high_b) = _span(a), _span(b)
    if not (low_a < high_b and low_b < high_a) or low_a == high_a or low_b == high_b:
        return False
    if a.device != b.device:
        return False
    distance = a.pointer - b.pointer
    run_a, axes_a = _runs(a.shape, a.strides, a.dtype)
    run_b, axes_b = _runs(b.shape, b.strides, b.dtype)
    # Byte runs [x, x + run_a) and [y, y + run_b) meet if -run_a < x - y < run_b, and x - y is
    # distance + Σ stride·n, where n runs over 0 … size-1 for a's axes and 1-size … 0 for b's.
    spans: dict[int, list[int]] = {}  # by stride: axes of one stride act as a single axis
    for stride, size in (*axes_a, *((-stride, size) for stride, size in axes_b)):
        span = spans.setdefault(abs(stride), [0, 0])
        if stride > 0:
            span[1] += size - 1
        else:
            span[0] -= size - 1
    terms = [(stride, least, most) for stride, (least, most) in spans.items()]
    return _reaches(terms, 1 - run_a - distance, run_b - 1 - distance)


def reach(view: View) -> int:
    """Return how many bytes from its pointer on a view spans; its strides are not below 0."""
    return _extent(view[1], view[2], view[3])[1]


def _span(view: View) -> tuple[int, int]:
    """Return the addresses [low, high) that a view lies between."""
    low, high = _extent(view[1], view[2], view[3])
    return view[0] + low, view[0] + high


@lru_cache(maxsize=1024)
def _extent(shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """Return the bytes [low, high) that a view spans, counted from its pointer."""
    if 0 in shape:
        return 0, 0
    reach = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    itemsize = ITEMSIZE.get(dtype, 16)
    return (
        itemsize * sum(step for step in reach if step < 0),
        itemsize * (1 + sum(step for step in reach if step > 0)),
    )


@lru_cache(maxsize=1024)
def _runs(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: str
) -> tuple[int, list[tuple[int, int]]]:
    """Return the bytes of one contiguous run, and (stride in bytes, size) of the axes over it."""
    run = ITEMSIZE.get(dtype, 16)
    axes = [
        (stride * run, size)
        for size, stride in zip(shape, strides, strict=True)
        if size > 1 and stride
    ]
    axes.sort(key=lambda axis: abs(axis[0]))
    while axes and axes[0][0] == run:
        run *= axes.pop(0)[1]
    return run, axes


def distinct(view: View) -> bool:
    """Say whether every element of a view has memory of its own."""
    if 0 in view.shape:
        return True
    axes = [axis for axis in zip(view.strides, view.shape, strict=True) if axis[1] > 1]
    axes.sort(reverse=True)
    if axes and axes[-1][0] == 0:
        return False
    for first, (stride, size) in enumerate(axes):
        # Two elements that differ by n ≥ 1 along this axis, and anyhow along the smaller ones.
        terms = [(stride, 1, size - 1)]
        terms += [(step, 1 - count, count - 1) for step, count in axes[first + 1 :]]
        if _reaches(terms, 0, 0):
            return False
    return True


def _reaches(terms: list[tuple[int, int, int]], low: int, high: int) -> bool:
    """Say whether Σ stride·n can lie in [low, high]; terms are (stride, least n, greatest n)."""
    terms = sorted(terms, reverse=True)
    rest_low, rest_high = [0], [0]  # what the terms from here on can add at least and at most
    for stride, least, most in reversed(terms):
        rest_low.append(rest_low[-1] + stride * least)
        rest_high.append(rest_high[-1] + stride * most)
    rest_low.reverse()
    rest_high.reverse()
    pending = [(0, low, high)]
    for _ in range(_MOST_STEPS):
        if not pending:
            return False
        depth, low, high = pending.pop()
        if rest_high[depth] < low or rest_low[depth] > high:
            continue
        if depth == len(terms):
            return True
        stride, least, most = terms[depth]
        first = max(least, -((rest_high[depth + 1] - low) // stride))
        last = min(most, (high - rest_low[depth + 1]) // stride)
        if last - first > _MOST_STEPS:
            return True
        pending.extend(
            (depth + 1, low - stride * n, high - stride * n) for n in range(first, last + 1)
        )
    return True
