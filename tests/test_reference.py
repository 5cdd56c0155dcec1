"""The reference itself: against loops over single numbers, against laws, and against PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import BATCHED, PAGED_CASES, RAGGED_CASES, Call, Case, batched, numpy_skip, paged, ragged
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from prefill_loops import SMALL, loops

from cuattn import reference
from cuattn._records import Geometry

Array = NDArray[Any]

KERNEL_LIKE = Geometry(block_q=128, block_kv=64, rows_per_vote=16)


def normal(seed: int, *shape: int, spread: float = 1.0) -> Array:
    return spread * np.random.default_rng(seed).standard_normal(shape)


LOOPS = [
    {},
    {"causal": True},
    {"causal": True, "window_left": 3},
    {"window_left": 0},
    {"window_left": 5, "sinks": np.array([0.5, -1.0, 2.0, 0.0])},
    {"soft_cap": 1.5, "scale": 0.7},
    {"sinks": np.array([9.0, -9.0, 0.0, 1.0]), "out_scale": 0.25, "causal": True},
]


@pytest.mark.parametrize("skip", [None, 0.0, 0.05, 0.4, 3.0])
@pytest.mark.parametrize("lengths", [(5, 17), (19, 19), (21, 9), (1, 6), (18, 33)])
@pytest.mark.parametrize("options", LOOPS, ids=lambda o: "-".join(o) or "plain")
def test_agrees_with_loops(
    options: dict[str, Any], lengths: tuple[int, int], skip: float | None
) -> None:
    q_len, kv_len = lengths
    q, k, v = normal(1, q_len, 4, 6), normal(2, kv_len, 2, 6), normal(3, kv_len, 2, 5)
    options = {"scale": 1.0, **options}
    slow = loops(q, k, v, **options, skip=skip or 0.0)
    fast = reference.attention(q, k, v, **options, skip=skip, unsafe=True, geometry=SMALL)
    np.testing.assert_allclose(fast.out, slow["out"], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(fast.lse, slow["lse"], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(fast.dropped_mass, slow["mass"], rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(fast.certificate, slow["certificate"], rtol=1e-11)
    assert (fast.certificate >= fast.dropped_mass).all()
    assert fast.visited.tolist() == slow["visited"]
    assert fast.skipped.tolist() == slow["skipped"]
    assert not fast.ineligible.any()


def test_the_loops_cases_skip_something_and_not_everything() -> None:
    q, k, v = normal(1, 18, 4, 6), normal(2, 33, 2, 6), normal(3, 33, 2, 5)
    result = reference.attention(q, k, v, scale=1.0, skip=0.4, geometry=SMALL)
    assert 0 < result.skipped.sum() < result.visited.sum()
    assert 0 < result.margin < 1


@settings(max_examples=40, deadline=None)
@given(
    q_len=st.integers(0, 20),
    kv_len=st.integers(0, 30),
    causal=st.booleans(),
    window_left=st.integers(-1, 12),
    skip=st.sampled_from([0.0, 0.1, 0.9]),
    block_q=st.sampled_from([4, 8]),
    block_kv=st.sampled_from([1, 3, 8]),
    rows=st.sampled_from([1, 2, 4]),
)
def test_any_lengths_and_geometry_agree_with_loops(
    q_len: int,
    kv_len: int,
    causal: bool,
    window_left: int,
    skip: float,
    block_q: int,
    block_kv: int,
    rows: int,
) -> None:
    geometry = Geometry(block_q=block_q, block_kv=block_kv, rows_per_vote=rows)
    q, k, v = normal(1, q_len, 2, 4), normal(2, kv_len, 1, 4), normal(3, kv_len, 1, 3)
    options = {"causal": causal, "window_left": window_left, "scale": 1.5}
    slow = loops(q, k, v, **options, skip=skip, geometry=geometry)
    fast = reference.attention(q, k, v, **options, skip=skip, geometry=geometry)
    np.testing.assert_allclose(fast.lse, slow["lse"], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(fast.out, slow["out"], rtol=1e-12, atol=1e-13)
    assert fast.visited.tolist() == slow["visited"]
    assert fast.skipped.tolist() == slow["skipped"]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), kv_len=st.integers(1, 40))
def test_order_of_keys_does_not_matter_without_a_mask(seed: int, kv_len: int) -> None:
    q, k, v = normal(seed, 3, 2, 4), normal(seed + 1, kv_len, 2, 4), normal(seed + 2, kv_len, 2, 4)
    order = np.random.default_rng(seed).permutation(kv_len)
    one, other = reference.attention(q, k, v), reference.attention(q, k[order], v[order])
    np.testing.assert_allclose(one.out, other.out, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(one.lse, other.lse, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), kv_len=st.integers(2, 40), cut=st.floats(0, 1))
def test_two_halves_merge_by_lse(seed: int, kv_len: int, cut: float) -> None:
    q, k, v = normal(seed, 3, 2, 4), normal(seed + 1, kv_len, 2, 4), normal(seed + 2, kv_len, 2, 4)
    at = int(cut * kv_len)
    whole = reference.attention(q, k, v)
    halves = [reference.attention(q, k[s], v[s]) for s in (slice(at), slice(at, None))]
    lse = np.logaddexp(halves[0].lse, halves[1].lse)
    out = sum(np.exp(half.lse - lse)[..., None] * half.out for half in halves)
    np.testing.assert_allclose(lse, whole.lse, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(out, whole.out, rtol=1e-11, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), threshold=st.sampled_from([0.0, 1e-300, 1e-30]))
def test_a_vanishing_threshold_is_dense(seed: int, threshold: float) -> None:
    q, k, v = (normal(seed + i, 40, 2, 8) for i in range(3))
    dense = reference.attention(q, k, v, causal=True)
    skipping = reference.attention(q, k, v, causal=True, skip=threshold, geometry=SMALL)
    np.testing.assert_allclose(skipping.out, dense.out, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(skipping.lse, dense.lse, rtol=1e-13)
    assert not skipping.skipped.any() and skipping.visited.all()
    assert not skipping.dropped_mass.any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), threshold=st.floats(0.01, 0.99))
def test_dropped_mass_bounds_the_error(seed: int, threshold: float) -> None:
    q, k, v = (normal(seed + i, 24, 2, 8) for i in range(3))
    dense = reference.attention(q, k, v, scale=1.0)
    cut = reference.attention(q, k, v, scale=1.0, skip=threshold, geometry=SMALL)
    distance = np.linalg.norm(dense.out - cut.out, axis=2)
    longest = np.linalg.norm(v, axis=2).max()
    assert (distance <= 2 * cut.dropped_mass * longest + 1e-12).all()
    np.testing.assert_allclose(cut.lse, dense.lse + np.log1p(-cut.dropped_mass), atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), position=st.floats(0.05, 0.95))
def test_counts_follow_from_statistics(seed: int, position: float) -> None:
    q, k, v = (normal(seed + i, 48, 2, 8) for i in range(3))
    options = {"causal": True, "scale": 1.0, "geometry": SMALL}
    votes = reference.attention(q, k, v, **options).statistics
    level = np.quantile(votes[np.isfinite(votes)], position)
    assume(level < 0)
    result = reference.attention(q, k, v, **options, skip=math.exp(level))
    assert result.skipped.tolist() == (votes < math.log(math.exp(level))).sum(axis=0).tolist()
    np.testing.assert_array_equal(result.statistics, votes)
    margin = np.abs(votes - math.log(math.exp(level))).min()
    assert result.margin == pytest.approx(margin, rel=1e-9)  # exp and log differ by library


def test_a_wide_window_is_no_window() -> None:
    q, k, v = (normal(i, 30, 2, 8) for i in range(3))
    plain = reference.attention(q, k, v, causal=True)
    windowed = reference.attention(q, k, v, causal=True, window_left=29)
    narrow = reference.attention(q, k, v, causal=True, window_left=28)
    np.testing.assert_array_equal(windowed.out, plain.out)
    np.testing.assert_array_equal(narrow.out[:-1], plain.out[:-1])
    assert np.abs(narrow.out[-1] - plain.out[-1]).max() > 1e-6


def test_a_window_of_one_key_gives_that_value() -> None:
    q, k, v = (normal(i, 9, 2, 8) for i in range(3))
    np.testing.assert_allclose(reference.attention(q, k, v, causal=True, window_left=0).out, v)


def test_causal_rows_are_prefixes() -> None:
    q, k, v = normal(0, 4, 2, 8), normal(1, 9, 2, 8), normal(2, 9, 2, 8)
    result = reference.attention(q, k, v, causal=True)
    for row in range(4):
        keys = slice(9 - 4 + row + 1)
        alone = reference.attention(q[row : row + 1], k[keys], v[keys])
        np.testing.assert_allclose(result.out[row], alone.out[0], rtol=1e-12)


def test_rows_without_keys_give_zero_and_minus_infinity() -> None:
    q, k, v = normal(0, 7, 2, 8), normal(1, 3, 2, 8), normal(2, 3, 2, 8)
    for sinks in (None, np.array([1.0, 2.0])):
        result = reference.attention(q, k, v, causal=True, sinks=sinks, geometry=SMALL)
        assert np.isneginf(result.lse[:4]).all() and np.isfinite(result.lse[4:]).all()
        assert not result.out[:4].any() and result.out[4:].any()


def test_equal_keys_lose_half_under_an_unsafe_threshold() -> None:
    """256 of 512 equal keys kept: the output is the same mean, LSE is lower by ln 2."""
    q, k = np.ones((16, 1, 8)), np.zeros((512, 1, 8))
    k[256:] = -1.0
    v = np.where(np.arange(512) < 256, 1.0, 0.0)[:, None, None] * np.ones(8)
    options = {"scale": 0.25, "geometry": Geometry(16, 64, 16)}
    dense = reference.attention(q, 0 * k, v, **options)
    cut = reference.attention(q, k, v, **options, skip=math.exp(-1.9))
    np.testing.assert_allclose(dense.out, 0.5)
    np.testing.assert_allclose(cut.out, 1.0)
    np.testing.assert_allclose(dense.lse - cut.lse, math.log(2))
    assert (int(cut.visited[0]), int(cut.skipped[0])) == (8, 4)
    assert cut.margin == pytest.approx(0.1)


@pytest.mark.parametrize("threshold", [1.0, 7.0, math.nan, -0.5, math.inf])
def test_thresholds_outside_zero_to_one_are_ineligible(threshold: float) -> None:
    q, k, v = (normal(i, 40, 2, 8) for i in range(3))
    dense = reference.attention(q, k, v)
    result = reference.attention(q, k, v, skip=threshold, geometry=SMALL)
    np.testing.assert_allclose(result.out, dense.out, rtol=1e-12, atol=1e-13)
    assert result.visited.all() and not result.skipped.any()
    np.testing.assert_array_equal(result.ineligible, result.visited)
    unsafe = reference.attention(q, k, v, skip=threshold, unsafe=True, geometry=SMALL)
    assert bool(unsafe.skipped.any()) == (threshold >= 1)
    assert bool(unsafe.ineligible.any()) == (not threshold >= 1)


def test_random_data_skip_at_the_rate_of_records() -> None:
    """λ = 1 keeps tile j of independent data when some row finds a new maximum in it: j in
    (1 - 1/j)^rows escape."""
    rows, tiles = 2, 16
    geometry = Geometry(block_q=rows, block_kv=4, rows_per_vote=rows)
    q, k, v = normal(0, 2, 600, 4), normal(1, tiles * 4, 600, 4), normal(2, tiles * 4, 600, 4)
    result = reference.attention(q, k, v, skip=1.0, unsafe=True, geometry=geometry)
    wanted = sum((1 - 1 / (j + 1)) ** rows for j in range(1, tiles)) / tiles
    assert result.skipped.sum() / result.visited.sum() == pytest.approx(wanted, abs=0.02)


def test_thresholds_differ_by_request_and_head() -> None:
    q, k, v = (normal(i, 2, 40, 2, 8) for i in range(3))
    table = np.array([[0.9, 0.0], [0.2, 1.5]], np.float32)
    result = reference.prefill(
        q, k, v, scale=1.0, skip_softmax=numpy_skip(threshold=table), geometry=SMALL
    )
    for request in range(2):
        alone = reference.attention(
            *(x[request] for x in (q, k, v)), scale=1.0, skip=table[request], geometry=SMALL
        )
        for name in ("visited", "skipped", "ineligible"):
            np.testing.assert_array_equal(getattr(result, name)[request], getattr(alone, name))
    assert result.skipped[0, 0] > result.skipped[1, 0] > 0 == result.skipped[0, 1]
    assert result.ineligible[1, 1] == result.visited[1, 1] > 0 == result.ineligible[0].sum()
    per_request = reference.prefill(
        q, k, v, scale=1.0, skip_softmax=numpy_skip(threshold=table[:, 0]), geometry=SMALL
    )
    np.testing.assert_array_equal(per_request.skipped[:, 0], result.skipped[:, 0])
    assert per_request.skipped[0, 1] > 0


def test_a_scale_factor_is_divided_by_each_length() -> None:
    q, k, v = (normal(i, 60, 2, 8) for i in range(3))
    cu = np.array([0, 20, 60])
    factor = numpy_skip(threshold_scale_factor=12.0)
    result = reference.prefill_ragged(
        q, k, v, cu, cu, scale=1.0, skip_softmax=factor, geometry=SMALL
    )
    for request, length in enumerate((20, 40)):
        span = slice(cu[request], cu[request + 1])
        alone = reference.attention(
            q[span], k[span], v[span], scale=1.0, skip=12.0 / length, geometry=SMALL
        )
        np.testing.assert_array_equal(result.skipped[request], alone.skipped)
    assert (result.skipped > 0).all()
    short = numpy_skip(threshold_scale_factor=20.0)  # λ = 1 for the first request
    result = reference.prefill_ragged(
        q, k, v, cu, cu, scale=1.0, skip_softmax=short, geometry=SMALL
    )
    assert (result.ineligible[0] == result.visited[0]).all() and not result.skipped[0].any()
    assert not result.ineligible[1].any() and result.skipped[1].all()


@pytest.mark.parametrize("case", [c for c in PAGED_CASES if len(c.lengths) < 20], ids=str)
def test_paged_equals_ragged(case: Case) -> None:
    """The same numbers out of pages as end to end; poison shows what is read."""
    call = paged(case)
    q, cache, tables, seq_lens, cu_q = call.arrays
    pools = cache if case.pair else (cache[:, 0], cache[:, 1])
    if case.layout == "HND":
        pools = tuple(pool.transpose(0, 2, 1, 3) for pool in pools)
    k, v = (
        np.concatenate(
            [
                pool[page, slot][None]
                for request, length in enumerate(seq_lens)
                for page, slot in (
                    (tables[request, key // case.page_size], key % case.page_size)
                    for key in range(length)
                )
            ]
        )
        for pool in pools
    )
    cu_kv = np.concatenate([[0], np.cumsum(seq_lens)])
    options = {name: value for name, value in call.options.items() if name != "layout"}
    wanted = reference.prefill_ragged(q, k, v, cu_q, cu_kv, **options)
    result = call.reference()
    np.testing.assert_array_equal(result.out, wanted.out)
    np.testing.assert_array_equal(result.lse, wanted.lse)


def test_pages_that_do_not_exist_read_as_zeros_and_lengths_end_with_the_table() -> None:
    cache = normal(0, 3, 2, 1, 4, 8)
    tables = np.array([[1, 77], [-1, 2]], np.int32)
    q = normal(1, 2, 1, 8)
    result = reference.prefill_paged(q, cache, tables, np.array([8, 1000]), np.array([0, 1, 2]))
    for request, pages in enumerate(([1, None], [None, 2])):
        k, v = (
            np.concatenate([cache[p, i, 0] if p is not None else np.zeros((4, 8)) for p in pages])
            for i in range(2)
        )
        alone = reference.attention(q[request : request + 1], k[:, None], v[:, None], causal=True)
        np.testing.assert_allclose(result.out[request], alone.out[0], rtol=1e-13)


@pytest.mark.parametrize(
    ("build", "case"),
    [
        (build, case)
        for build, table in ((batched, BATCHED), (ragged, RAGGED_CASES), (paged, PAGED_CASES))
        for case in table
    ],
    ids=lambda x: x.__name__ if callable(x) else x.id,
)
def test_no_case_reads_its_poison(build: Callable[[Case], Call], case: Case) -> None:
    """What a request owns is finite, so NaN stands in rows of no request and nowhere else."""
    call = build(case)
    result = call.reference()
    tokens = sum(q_len for q_len, _ in call.case.lengths)
    out = result.out.reshape(-1, *result.out.shape[-2:])
    assert np.isfinite(out[:tokens]).all()
    assert not np.isnan(result.lse.reshape(len(out), -1)[:tokens]).any()
    assert np.isnan(out[tokens:]).all()
    assert np.abs(out[:tokens]).max(initial=0) > 0
    if call.case.poison == "huge":
        assert np.abs(out[:tokens]).max() < 100


def test_ids_of_cases_are_all_different() -> None:
    for table in (BATCHED, RAGGED_CASES, PAGED_CASES):
        ids = [case.id for case in table]
        assert len(set(ids)) == len(ids), sorted(x for x in ids if ids.count(x) > 1)


def test_values_that_no_row_sees_do_not_matter() -> None:
    q, k, v = (normal(i, 40, 2, 8) for i in range(3))
    options = {"causal": True, "window_left": 4}
    clean = reference.attention(q[-8:], k, v, **options)
    k[:20], v[:20] = np.nan, np.inf
    np.testing.assert_array_equal(reference.attention(q[-8:], k, v, **options).out, clean.out)
    v[39, 0, 0] = np.nan  # seen by the last row only
    dirty = reference.attention(q[-8:], k, v, **options).out
    assert np.isnan(dirty[7, 0, 0]) and np.isnan(dirty).sum() == 1


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=lambda d: d.__name__)
def test_plain_arithmetic_is_close_and_not_exact(dtype: Any) -> None:
    q, k, v = (normal(i, 70, 2, 64).astype(dtype) for i in range(3))
    exact = reference.attention(q, k, v, causal=True)
    plain = reference.attention(q, k, v, causal=True, arithmetic="float32-plain")
    assert plain.out.dtype == dtype and plain.lse.dtype == np.float32
    error = np.abs(plain.out.astype(np.float64) - exact.out).max()
    assert 0 < error < 4 * float(ml_dtypes.finfo(dtype).eps)
    assert 0 < np.abs(plain.lse - exact.lse).max() < 1e-5
    wide = reference.attention(q, k, v, arithmetic="float32-plain", out_dtype="float32")
    assert wide.out.dtype == np.float32


def test_options_are_refused_in_one_sentence() -> None:
    q = np.zeros((2, 1, 8))
    with pytest.raises(ValueError, match="skip is given without geometry"):
        reference.attention(q, q, q, skip=0.5)
    with pytest.raises(ValueError, match="arithmetic is 'float8'"):
        reference.attention(q, q, q, arithmetic="float8")
    with pytest.raises(ValueError, match="order 'ascending'"):
        reference.attention(q, q, q, geometry=Geometry(8, 8, 8, order="ascending"))
    seeded = numpy_skip(threshold=0.1, seeds=np.zeros((1, 2, 1)))
    with pytest.raises(ValueError, match="skip_softmax has seeds, which prefill cannot use"):
        reference.prefill(q[None], q[None], q[None], skip_softmax=seeded)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, 3])
def test_agrees_with_torch(causal: bool, group: int) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = normal(0, 2, 33, 2 * group, 16), normal(1, 2, 50, 2, 16), normal(2, 2, 50, 2, 24)
    mask = torch.ones(33, 50, dtype=torch.bool)
    if causal:
        mask = mask.tril(50 - 33)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    )
    result = reference.prefill(q, k, v, causal=causal)
    np.testing.assert_allclose(result.out, wanted.transpose(1, 2).numpy(), rtol=1e-10, atol=1e-12)


def test_prefix_sums_of_cases_cover_all_lengths() -> None:
    call = ragged(Case(lengths=((3, 4), (0, 2))))
    assert [b - a for a, b in pairwise(call.arrays[3])] == [3, 0]
    assert [b - a for a, b in pairwise(call.arrays[4])] == [4, 2]
