"""The reference of decode: against loops over single numbers, and against what is known by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import numpy_skip
from decode_cases import LOGITS, adversarial
from decode_loops import Requests, both
from hypothesis import given, settings
from hypothesis import strategies as st

from cuattn import reference
from cuattn._records import DecodeGeometry, SplitRule

WHOLE = SplitRule(share=1.0, smallest=1, alone=True)
THIRDS = SplitRule(share=1 / 3, smallest=1, alone=False)
SMALL = DecodeGeometry(rows_per_vote=4, block_kv=4, warps=2, splits=THIRDS)  # seeds: both ends
ALONE = replace(SMALL, warps=1, splits=WHOLE)  # its seed is the first tile

SKIPS = {
    "dense": None,
    "zero": numpy_skip(threshold=0.0),
    "some": numpy_skip(threshold=0.2),
    "factor": numpy_skip(threshold_scale_factor=9.0),
    "ineligible": numpy_skip(threshold=1.5),
    "unsafe": numpy_skip(threshold=1.5, unsafe=True),
    "mass": numpy_skip(max_dropped_mass=0.1),
    "no-mass": numpy_skip(max_dropped_mass=0.0),
    "much-mass": numpy_skip(max_dropped_mass=0.6),
}
LENGTHS = [(1, 40), (3, 61), (1, 0), (0, 9), (5, 3), (1, 1), (2, 33)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window_left": 5},
    {"window_left": 0},
    {"soft_cap": 1.5},
    {"sinks": np.array([0.5, -1.0, 2.0, 0.0])},
    {"window_left": 19, "sinks": np.array([3.0, -1.0, 0.0, 1.0])},
]


@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_agrees_with_loops(options: dict[str, Any], skip: Any) -> None:
    both(Requests.normal(LENGTHS), SMALL, skip, options)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 45)), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (5, 1), (2, 2)]),
    window_left=st.integers(-1, 20),
    skip=st.sampled_from([key for key in SKIPS if key != "factor"]),
    rows=st.sampled_from([1, 2, 4, 16]),
    block_kv=st.sampled_from([1, 3, 8]),
    warps=st.integers(1, 3),
    rule=st.builds(
        SplitRule, st.sampled_from([0.02, 0.1, 0.3, 1.0]), st.integers(1, 20), st.booleans()
    ),
    seed=st.integers(0, 5),
)
def test_any_lengths_and_geometry_agree_with_loops(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    window_left: int,
    skip: str,
    rows: int,
    block_kv: int,
    warps: int,
    rule: SplitRule,
    seed: int,
) -> None:
    geometry = DecodeGeometry(rows, block_kv, warps, rule)
    requests = Requests.normal(lengths, *heads, seed=seed)
    result = both(requests, geometry, SKIPS[skip], {"window_left": window_left})
    bound = SKIPS[skip].max_dropped_mass if SKIPS[skip] else None
    assert bound is None or result.dropped_mass.max(initial=0.0) <= bound


def test_thresholds_differ_by_request_and_head() -> None:
    """A vote is held by rows of several heads, each with the λ of its own."""
    table = np.array([[0.9, 0.9, 0.9, 0.3], [0.8, math.nan, 0.8, 0.8]])
    requests = Requests.normal([(1, 100), (2, 100)])
    result = both(requests, SMALL, numpy_skip(threshold=table), {})
    first, second = result.skipped
    assert first[0] == first[1] > first[2] == first[3] and second[0] == 0 < second[2]
    assert result.ineligible[1].tolist() == [0, result.visited[1, 1], 0, 0]


def test_seeds_of_other_keys_are_those_of_their_rows() -> None:
    """By token and head; one that is larger lets more go, one that is smaller nothing less."""
    requests = Requests.normal([(1, 100), (3, 100)])
    seeds = np.full((4, 4), -np.inf)
    seeds[0, :2], seeds[1:, 2], seeds[2, 3] = 9.0, 9.0, -9.0
    skip = numpy_skip(threshold=0.2, seeds=seeds)
    alone = both(requests, SMALL, numpy_skip(threshold=0.2), {}).skipped
    more = both(requests, SMALL, skip, {}).skipped - alone
    assert (more >= 0).all() and (more[0, :2] > 0).all() and not more[0, 2:].any()


def test_these_cases_skip_something_and_not_everything() -> None:
    requests = Requests.normal(LENGTHS)
    for name in ("some", "unsafe", "mass", "much-mass"):
        result = requests.decode(geometry=SMALL, skip_softmax=SKIPS[name])
        assert 0 < result.skipped.sum() < result.visited.sum(), name
        assert 0 < result.margin < 1, name


@pytest.mark.parametrize(
    ("keys", "load", "splits"),
    [
        (0, 0, 1),
        (63, 63, 1),
        (127, 127, 1),
        (128, 128, 2),  # parts of at least 64 keys
        (8000, 8000, 8),
        (8000, 16000, 4),
        (100, 16000, 1),
        (7999, 8000, 7),
    ],
)
def test_splits_of_a_length(keys: int, load: int, splits: int) -> None:
    assert SplitRule(1 / 8, 64, False).splits(keys, load) == splits


def test_a_request_is_cut_by_the_load_of_all_or_by_its_own() -> None:
    requests = Requests.normal([(1, 120), (4, 300)])
    first = Requests(requests.q[:1], requests.k[:1], requests.v[:1])
    skip = numpy_skip(threshold=0.5)
    same = []
    for alone in (True, False):
        geometry = replace(SMALL, splits=SplitRule(0.1, 4, alone))
        together, single = (
            x.decode(geometry=geometry, skip_softmax=skip) for x in (requests, first)
        )
        same.append(bool((together.skipped[0] == single.skipped[0]).all()))
    assert same == [True, False]


def tiers(high: list[int], tiles: int, gap: float, rows: int = 4) -> Requests:
    """Tiles of four equal keys: score 0, value 1 in `high`; score -gap, value -1 elsewhere."""
    is_high = np.isin(np.repeat(np.arange(tiles), 4), high)[:, None, None]
    ones = np.ones((1, 1, 8))
    return Requests(
        [np.ones((1, rows, 8))],
        [np.where(is_high, 0.0, -gap / 8) * ones],
        [np.where(is_high, 1.0, -1.0) * ones],
    )


def test_half_of_equal_keys_takes_ln_2_off_lse() -> None:
    """Four tiles of equal keys at λ = 2: the two seeds stay, the two others go."""
    equal = tiers([0, 3], 4, 0.0)
    unsafe = numpy_skip(threshold=2.0, unsafe=True)
    dense = equal.decode(geometry=SMALL)
    cut = equal.decode(geometry=SMALL, skip_softmax=unsafe)
    np.testing.assert_allclose(dense.out, 0, atol=1e-15)
    np.testing.assert_allclose(cut.out, 1)
    np.testing.assert_allclose(dense.lse - cut.lse, math.log(2))
    np.testing.assert_allclose(cut.dropped_mass, 0.5)
    assert cut.visited.tolist() == [[4] * 4] and cut.skipped.tolist() == [[2] * 4]
    assert cut.margin == pytest.approx(math.log(2))
    strict = equal.decode(geometry=SMALL, skip_softmax=numpy_skip(threshold=1.0, unsafe=True))
    assert not strict.skipped.any() and strict.margin == 0


def test_all_but_seeds_go_under_an_endless_threshold() -> None:
    requests = Requests.normal([(1, 83)])
    endless = numpy_skip(threshold=1e30, unsafe=True)
    result = requests.decode(geometry=SMALL, skip_softmax=endless)
    assert result.visited.tolist() == [[21] * 4] and result.skipped.tolist() == [[19] * 4]
    k, v = requests.k[0], requests.v[0]
    seeds = np.r_[:4, 80:83]
    kept = Requests(requests.q, [k[seeds]], [v[seeds]]).decode(geometry=SMALL)
    np.testing.assert_allclose(result.out, kept.out, rtol=1e-12)
    np.testing.assert_allclose(result.lse, kept.lse, rtol=1e-12)


@pytest.mark.parametrize("high", [0, 9])
def test_seeds_let_every_lane_drop_what_is_low(high: int) -> None:
    """One high tile, at either end, is a reference for all lanes and not only for its owner."""
    requests = tiers([high], 10, 5.0)
    skip = numpy_skip(threshold=math.exp(-4))
    result = requests.decode(geometry=SMALL, skip_softmax=skip)
    assert result.skipped.tolist() == [[8] * 4]  # the low seed stays
    assert result.margin == pytest.approx(1.0)
    np.testing.assert_allclose(result.lse, math.log(4 + 4 * math.exp(-5)))


def test_a_high_tile_in_the_middle_helps_only_the_lane_that_owns_it() -> None:
    requests = tiers([11], 12, 5.0)
    requests = replace(requests, k=[np.roll(requests.k[0], -4 * 4, axis=0)])  # tile 7, visit 5th
    skip = numpy_skip(threshold=math.exp(-4))
    alone = requests.decode(geometry=ALONE, skip_softmax=skip)
    assert alone.skipped.tolist() == [[6] * 4]  # tiles 6 … 1
    shared = requests.decode(geometry=replace(ALONE, warps=2), skip_softmax=skip)
    assert shared.skipped.tolist() == [[3] * 4]  # tiles 5, 3, 1


def test_a_dropped_tile_does_not_raise_the_reference() -> None:
    """Scores rise by 1 a visit: λ = e^1.5 drops every second tile, the last one too."""
    requests = tiers([], 12, 0.0)
    rise = np.repeat([0, *range(10, 0, -1), 0], 4)[:, None, None] / 8  # tile 10 is visited second
    requests = replace(requests, k=[rise * np.ones((1, 8))])
    skip = numpy_skip(threshold=math.exp(1.5), unsafe=True)
    result = requests.decode(geometry=ALONE, skip_softmax=skip)
    assert result.skipped.tolist() == [[6] * 4] and result.margin == pytest.approx(0.5)
    kept = 4 * (1 + sum(math.exp(score) for score in range(2, 11, 2)))
    np.testing.assert_allclose(result.lse, math.log(kept))


@pytest.mark.parametrize("warps", [1, 2, 3, 5])
@pytest.mark.parametrize("tiles", [1, 2, 3, 9])
def test_there_is_a_seed_for_every_warp(tiles: int, warps: int) -> None:
    """The first tile and the last ones stay under an endless threshold; the others go."""
    requests = tiers(list(range(tiles)), tiles, 0.0)
    endless = numpy_skip(threshold=1e30, unsafe=True)
    geometry = replace(ALONE, warps=warps)
    result = requests.decode(geometry=geometry, skip_softmax=endless)
    kept = min(tiles, warps)
    assert result.skipped.tolist() == [[tiles - kept] * 4]
    np.testing.assert_allclose(result.lse, math.log(4 * kept))
    k, v = requests.k[0].copy(), requests.v[0].copy()
    free = slice(4, 4 * max(1, tiles - warps + 1))
    k[free], v[free] = -7.0, np.nan  # it is these that go
    other = replace(requests, k=[k], v=[v]).decode(geometry=geometry, skip_softmax=endless)
    np.testing.assert_array_equal(other.out, result.out)


def test_splits_change_who_votes_and_never_the_dense_result() -> None:
    requests = Requests.normal([(1, 150), (3, 90)], seed=3)
    geometries = [
        replace(SMALL, warps=warps, splits=SplitRule(1 / n, 1, True))
        for warps, n in ((1, 1), (1, 3), (2, 3), (4, 4))
    ]
    dense = requests.decode()
    skip = numpy_skip(threshold=0.3)
    skipped = []
    for geometry in geometries:
        same = requests.decode(geometry=geometry)
        np.testing.assert_allclose(same.out, dense.out, rtol=1e-12)
        np.testing.assert_allclose(same.lse, dense.lse, rtol=1e-13)
        assert not same.skipped.any() and same.visited.all()
        skipped.append(int(requests.decode(geometry=geometry, skip_softmax=skip).skipped.sum()))
    assert len(set(skipped)) > 2 and skipped[0] > skipped[-1] > 0


def test_every_count_follows_from_statistics() -> None:
    """Thresholds below 1 leave statistics alone, and a vote is carried when all are below."""
    requests = Requests.normal([(3, 120), (1, 90)], q_heads=6, kv_heads=2)
    votes = requests.decode(geometry=SMALL).statistics
    assert np.isposinf(votes).any() and np.isneginf(votes).any()
    for level in (0.05, 0.3, 0.9):
        skip = numpy_skip(threshold=level)
        result = requests.decode(geometry=SMALL, skip_softmax=skip)
        np.testing.assert_array_equal(result.statistics, votes)
        carried = votes.max(axis=1) < math.log(level)
        # A vote of four rows of a group of three counts for three heads, the last one for less.
        by_head = (carried[:, None] & (votes > -np.inf)).sum(axis=0)
        np.testing.assert_array_equal(result.skipped.sum(axis=0), by_head)
        assert 0 < carried.sum() < len(carried)


@pytest.mark.parametrize("geometry", [ALONE, SMALL], ids=["alone", "shared"])
@pytest.mark.parametrize("bound", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("kind", LOGITS)
def test_no_row_loses_more_than_the_bound(
    kind: str, bound: float, geometry: DecodeGeometry
) -> None:
    call = adversarial(kind, 240)
    dense = call.reference()
    skip = numpy_skip(max_dropped_mass=bound)
    result = call.reference(geometry=geometry, skip_softmax=skip)
    lost = -np.expm1(result.lse - dense.lse)
    np.testing.assert_allclose(result.dropped_mass, lost, atol=1e-12)
    assert result.dropped_mass.max() <= bound
    assert not result.ineligible.any()


@pytest.mark.parametrize("kind", ["flat", "falling", "one-high", "random"])
def test_a_bound_on_mass_is_used(kind: str) -> None:
    """A generous bound really drops tiles, and a larger one drops more."""
    call = adversarial(kind, 240)
    results = [
        call.reference(geometry=SMALL, skip_softmax=numpy_skip(max_dropped_mass=bound))
        for bound in (0.0, 0.1, 0.5)
    ]
    none, some, more = (int(result.skipped.sum()) for result in results)
    assert 0 == none < some < more < results[0].visited.sum()


def test_mass_by_hand() -> None:
    """Ten equal tiles in one lane, ε = 0.25: one is a seed, after n others n + 1 are known."""
    requests = tiers(list(range(10)), 10, 0.0)
    geometry = replace(ALONE, rows_per_vote=4)
    result = requests.decode(geometry=geometry, skip_softmax=numpy_skip(max_dropped_mass=0.25))
    # 1 ≤ ε' (n + 1) first at n = 4 (ε' is a hair below ε), 2 at n = 8, and n ends at 9.
    assert result.skipped.tolist() == [[2] * 4]
    np.testing.assert_allclose(result.dropped_mass, 0.2)


def test_lengths_zero_and_one_and_more_tokens_than_keys() -> None:
    result = Requests.normal([(1, 0), (1, 1), (6, 4), (0, 7)]).decode(
        geometry=SMALL, skip_softmax=numpy_skip(threshold=0.5)
    )
    assert np.isneginf(result.lse[[0, 2, 3]]).all() and not result.out[[0, 2, 3]].any()
    assert np.isfinite(result.lse[[1, 4, 5, 6, 7]]).all()
    assert result.visited[[0, 3]].sum() == 0 and result.visited[1].tolist() == [1] * 4
    # Rows come in blocks of two tokens; the first block sees no key.
    assert result.visited[2].tolist() == [2] * 4


def test_three_forms_of_q_are_one() -> None:
    cache = np.random.default_rng(0).standard_normal((5, 2, 2, 8, 6))
    q = np.random.default_rng(1).standard_normal((2, 4, 6))
    tables, seq_lens = np.array([[0, 1], [2, 3]]), np.array([11, 16])
    flat = reference.decode(q, cache, tables, seq_lens)
    deep = reference.decode(q[:, None], cache, tables, seq_lens)
    ragged = reference.decode(q, cache, tables, seq_lens, cu_seqlens_q=np.array([0, 1, 2]))
    assert flat.out.shape == (2, 4, 6) and deep.out.shape == (2, 1, 4, 6)
    assert deep.lse.shape == deep.dropped_mass.shape == (2, 1, 4)
    np.testing.assert_array_equal(deep.out[:, 0], flat.out)
    np.testing.assert_array_equal(ragged.out, flat.out)
    prefill = reference.prefill_paged(q, cache, tables, seq_lens, np.array([0, 1, 2]))
    np.testing.assert_allclose(prefill.out, flat.out, rtol=1e-13)
    np.testing.assert_allclose(prefill.lse, flat.lse, rtol=1e-13)


def test_plain_arithmetic_is_close_and_not_exact() -> None:
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((5, 2, 2, 8, 32)).astype(np.float16)
    q = rng.standard_normal((2, 4, 32)).astype(np.float16)
    tables, seq_lens = np.array([[0, 1], [2, 3]]), np.array([11, 16])
    exact = reference.decode(q, cache, tables, seq_lens)
    plain = reference.decode(q, cache, tables, seq_lens, arithmetic="float32-plain")
    assert (plain.out.dtype, plain.lse.dtype) == (np.float16, np.float32)
    error = np.abs(plain.out.astype(np.float64) - exact.out).max()
    assert 0 < error < 4 * float(np.finfo(np.float16).eps)


def test_options_are_refused_in_one_sentence() -> None:
    requests = Requests.normal([(1, 9)])
    with pytest.raises(ValueError, match="skip_softmax is given without geometry"):
        requests.decode(skip_softmax=numpy_skip(threshold=0.5))
    with pytest.raises(ValueError, match="arithmetic is 'float8'"):
        requests.decode(arithmetic="float8")
    with pytest.raises(ValueError, match="order 'ascending'"):
        requests.decode(geometry=replace(SMALL, order="ascending"))
