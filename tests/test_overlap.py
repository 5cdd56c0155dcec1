"""Whether views share memory: what byte sets say, for every nesting of strides."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from views import BF16, array, real

from cuattn import _overlap
from cuattn._overlap import check_overlap, distinct, extents, near, overlap
from cuattn._records import View


def addresses(view: View) -> set[int]:
    """Every byte of a small view, one by one."""
    size = _overlap.ITEMSIZE[view.dtype]
    return {
        view.pointer + size * sum(n * step for n, step in zip(at, view.strides, strict=True)) + byte
        for at in itertools.product(*map(range, view.shape))
        for byte in range(size)
    }


@st.composite
def small_views(draw: Any) -> View:
    rank = draw(st.integers(0, 4))
    shape = tuple(draw(st.integers(0, 4)) for _ in range(rank))
    strides = tuple(draw(st.integers(-9, 24)) for _ in range(rank))
    dtype = draw(st.sampled_from([BF16, "float32"]))
    return array(*shape, strides=strides, dtype=dtype, pointer=1000 + draw(st.integers(0, 160)))


@settings(max_examples=1500, deadline=None)
@given(small_views(), small_views())
def test_overlap_is_what_the_bytes_say(a: View, b: View) -> None:
    assert overlap(a, b) == bool(addresses(a) & addresses(b))
    assert overlap(b, a) == overlap(a, b)


@settings(max_examples=500, deadline=None)
@given(st.lists(small_views(), min_size=2, max_size=4), st.integers(1, 2))
def test_near_overlooks_nothing(views: list[View], outputs: int) -> None:
    pairs = [(a, b) for at, b in enumerate(views) for a in views[:at] if at >= len(views) - outputs]
    found = near(views, extents(views), outputs)
    assert found >= any(overlap(a, b) for a, b in pairs)
    moved = [view._replace(pointer=view.pointer + 4096 * i) for i, view in enumerate(views)]
    assert not near(moved, extents(moved), outputs)


@settings(max_examples=800, deadline=None)
@given(small_views().filter(lambda view: min(view.strides, default=0) >= 0))
def test_distinct_is_what_the_bytes_say(view: View) -> None:
    elements = int(np.prod(view.shape)) * _overlap.ITEMSIZE[view.dtype]
    assert distinct(view) == (len(addresses(view)) == elements)


def heads(first: int, count: int, tokens: int = 100_000, total: int = 24) -> View:
    """Some heads of a packed [tokens, total, 128] array."""
    return array(
        tokens, count, 128, strides=(total * 128, 128, 1), pointer=(1 << 20) + first * 128 * 2
    )


def test_slices_of_one_packed_array_are_apart() -> None:
    """q, k, v and out as neighbours in one [tokens, 8 + 4 + 4 + 8, 128] array."""
    slices = [heads(0, 8), heads(8, 4), heads(12, 4), heads(16, 8)]
    for a, b in itertools.combinations(slices, 2):
        assert not overlap(a, b)
        assert not overlap(b, a)
    assert overlap(heads(0, 9), heads(8, 4))
    assert overlap(heads(16, 9), heads(0, 8))  # the ninth head is the next token's first


def test_batches_and_transposes_of_one_array() -> None:
    whole = array(4, 1000, 8, 64)
    half = whole._replace(shape=(2, 1000, 8, 64))
    rest = half._replace(pointer=whole.pointer + 2 * 2 * 1000 * 8 * 64)
    assert not overlap(half, rest)
    assert overlap(whole, rest)
    even = array(4, 500, 8, 64, strides=(512000, 1024, 64, 1))
    odd = even._replace(pointer=even.pointer + 2 * 512)
    assert not overlap(even, odd)
    transposed = array(4, 8, 500, 64, strides=(512000, 64, 1024, 1))
    assert not overlap(transposed, odd)
    assert overlap(transposed, even)


def test_arrays_on_two_devices_are_apart() -> None:
    assert not overlap(array(8), array(8, device=1))


def test_endless_search_counts_as_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_overlap, "_MOST_STEPS", 50)
    a = array(2000, 2000, 1, strides=(30030, 2310 * 7, 1))
    b = array(2000, 2000, 1, strides=(4290, 3570, 1), pointer=(1 << 20) + 2)
    assert overlap(a, b)


def test_check_overlap_names_both() -> None:
    q, out, lse = array(2, 5, 8, 64), array(2, 5, 8, 64, pointer=1 << 24), real(80, pointer=1 << 25)
    inputs = {"q": q, "sinks": None, "scale": 0.5}
    check_overlap({"out": out, "lse": lse}, inputs)
    check_overlap({"out": None, "lse": None}, inputs)
    with pytest.raises(ValueError, match="out shares memory with q; wanted an array of its own"):
        check_overlap({"out": q}, inputs)
    with pytest.raises(ValueError, match="lse shares memory with scale; wanted"):
        check_overlap({"out": out, "lse": lse}, {**inputs, "scale": lse._replace(shape=(1,))})
    with pytest.raises(ValueError, match="lse shares memory with out; wanted"):
        check_overlap({"out": out, "lse": lse._replace(pointer=out.pointer + 8)}, inputs)
