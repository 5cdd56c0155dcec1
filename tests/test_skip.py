"""Skip-softmax on a GPU: the same tiles as the reference, counted exactly, and its legal corners.

Counts can be demanded exactly because λ is put where no vote is close: the statistic of a vote does
not depend on λ up to 1, so all of them are worked out first and ln λ goes into a wide gap.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from cases import (
    SKIP_CASES,
    SKIP_PAGED,
    SKIP_RAGGED,
    Call,
    Case,
    batched,
    numpy_skip,
    paged,
    ragged,
)
from compare import assert_same_bits
from numpy.typing import NDArray
from skip_checks import SAFE_MARGIN, check_against_replay, counts, threshold_for

from cuattn._records import Geometry

Array = NDArray[Any]

pytestmark = pytest.mark.usefixtures("prefill_kernel")

SHORT = replace(SKIP_CASES[0], lengths=((200, 1500),) * 2)


@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("case", SKIP_CASES, ids=str)
def test_batched_skips_the_same_tiles(device: Any, case: Case, share: float) -> None:
    call = batched(case)
    check_against_replay(
        device, call, threshold=threshold_for(call.votes(device.geometry(call)).statistics, share)
    )


@pytest.mark.parametrize("case", SKIP_RAGGED, ids=str)
def test_ragged_skips_the_same_tiles(device: Any, case: Case) -> None:
    call = ragged(case)
    check_against_replay(
        device, call, threshold=threshold_for(call.votes(device.geometry(call)).statistics, 0.3)
    )


@pytest.mark.parametrize("case", SKIP_PAGED, ids=str)
def test_paged_skips_the_same_tiles(device: Any, case: Case) -> None:
    call = paged(case)
    check_against_replay(
        device, call, threshold=threshold_for(call.votes(device.geometry(call)).statistics, 0.3)
    )


def request_call(call: Call, request: int) -> Call:
    """One request of a batched call alone."""
    return replace(call, arrays=tuple(x[request : request + 1] for x in call.arrays))


def table_of_thresholds(device: Any, call: Call, shares: list[list[float]]) -> Array:
    """λ by request and head, each far from the votes it decides."""
    geometry = device.geometry(call)
    table = np.zeros((len(shares), len(shares[0])), np.float32)
    for request, row in enumerate(shares):
        statistics = request_call(call, request).votes(geometry).statistics
        for head, share in enumerate(row):
            table[request, head] = threshold_for(statistics[:, head], share) if share else 0.0
    return table


def test_thresholds_by_request_and_head(device: Any) -> None:
    call = batched(SHORT)
    table = table_of_thresholds(device, call, [[0.5, 0.1, 0.0, 0.3], [0.0, 0.2, 0.6, 0.0]])
    skipped = check_against_replay(device, call, threshold=table)
    assert (skipped > 0).tolist() == (table > 0).tolist()


def test_thresholds_by_request(device: Any) -> None:
    call = batched(SHORT)
    geometry = device.geometry(call)
    chosen = threshold_for(request_call(call, 1).votes(geometry).statistics, 0.4)
    skipped = check_against_replay(device, call, threshold=np.array([0.0, chosen], np.float32))
    assert not skipped[0].any() and skipped[1].all()


def test_thresholds_may_be_a_slice(device: Any) -> None:
    """A live array need not be packed."""
    call = batched(SHORT)
    table = table_of_thresholds(device, call, [[0.5, 0.1, 0.0, 0.3], [0.0, 0.2, 0.6, 0.0]])
    wide = np.full((4, 12), 0.9, np.float32)
    wide[::2, 1:9:2] = table
    check_against_replay(device, call, threshold=wide[::2, 1:9:2])


def test_thresholds_are_read_at_every_call(device: Any) -> None:
    import cuattn

    call = batched(SHORT)
    geometry = device.geometry(call)
    levels = [threshold_for(call.votes(geometry).statistics, share) for share in (0.1, 0.5)]
    live = device.xp.zeros(2, "float32")
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=live, stats=stats)
    seen = []
    for level in (0.0, *levels):
        live.fill(level)
        stats.reset()
        device.run(call, skip_softmax=skip)
        expected = call.reference(geometry=geometry, skip_softmax=numpy_skip(threshold=level))
        assert stats.skipped == expected.skipped.sum()
        seen.append(stats.skipped)
    assert 0 == seen[0] < seen[1] < seen[2] < stats.visited


@pytest.mark.parametrize("build", [ragged, paged], ids=lambda f: f.__name__)
def test_a_scale_factor_is_divided_by_each_length(device: Any, build: Any) -> None:
    """λ = factor / kv_len, so a short request is cut more; λ of 1 or more does not skip."""
    import cuattn

    call = build(replace(SHORT, lengths=((200, 500), (100, 900), (50, 64), (20, 0))))
    geometry = device.geometry(call)
    votes = call.votes(geometry)
    factor = 900 * threshold_for(votes.statistics, 0.25)
    for nudge in np.linspace(1, 1.3, 40):  # to a factor that suits every length
        skip = numpy_skip(threshold_scale_factor=float(nudge * factor))
        expected = call.reference(geometry=geometry, skip_softmax=skip)
        if expected.margin > SAFE_MARGIN:
            break
    skipped = check_against_replay(
        device, call, threshold_scale_factor=skip.threshold_scale_factor
    ).sum(axis=1)
    assert skipped[0] > 0 and skipped[1] > 0
    stats = cuattn.SkipStats()
    everything = cuattn.SkipSoftmax(threshold_scale_factor=600.0, stats=stats)
    device.run(call, skip_softmax=everything)
    seen = counts(stats)
    assert (seen["ineligible"][[0, 2]] == seen["visited"][[0, 2]]).all()
    assert seen["visited"][:3].all() and not seen["visited"][3].any()
    assert not seen["skipped"][[0, 2, 3]].any() and not seen["ineligible"][1].any()


@pytest.mark.parametrize("build", [batched, ragged, paged], ids=lambda f: f.__name__)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_thresholds_that_skip_nothing_give_the_dense_bits(
    device: Any, build: Any, sinks: bool
) -> None:
    import cuattn

    call = build(replace(SHORT, sinks=sinks))
    dense = device.check(call)
    zeros = device.to_device(np.zeros(2, np.float32))
    nan = device.to_device(np.full((2, 4), np.nan, np.float32))
    for fields in (
        {"threshold": 0.0},
        {"threshold": 1e-30},
        {"threshold_scale_factor": 0.0},
        {"threshold_scale_factor": 1e-30},
        {"threshold": zeros},
        {"threshold": nan},
        {"threshold_scale_factor": 1e5},
    ):
        outcome = device.run(call, skip_softmax=cuattn.SkipSoftmax(**fields))
        assert_same_bits(outcome.out, dense.out, f"{call.case} with {fields}")
        assert_same_bits(outcome.lse, dense.lse, f"{call.case} with {fields}")
    some = device.run(call, skip_softmax=cuattn.SkipSoftmax(threshold=0.5))
    assert (some.lse != dense.lse).any(), "this data has nothing to skip, the test shows nothing"


@pytest.mark.parametrize("value", [1.0, 3.0, math.inf, math.nan, -0.5])
def test_live_thresholds_outside_zero_to_one_count_as_ineligible(device: Any, value: float) -> None:
    import cuattn

    call = batched(SHORT)
    dense = device.run(call)
    live = np.array([0.3, value], np.float32)
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=device.to_device(live), stats=stats)
    outcome = device.run(call, skip_softmax=skip)
    assert_same_bits(outcome.out[1], dense.out[1], call.case)
    seen = counts(stats)
    assert seen["skipped"][0].all() and not seen["ineligible"][0].any()
    assert not seen["skipped"][1].any() and seen["visited"][1].all()
    assert (seen["ineligible"][1] == seen["visited"][1]).all()


def two_tiers(geometry: Geometry, tiles: int, high: list[int], gap: float) -> Call:
    """Tiles of equal keys: scores 0 and values 1 in `high`, scores -gap and values -1 elsewhere."""
    keys = np.repeat(np.arange(tiles), geometry.block_kv)
    is_high = np.isin(keys, high)
    rows = geometry.block_q + geometry.rows_per_vote // 2
    q = np.ones((1, rows, 2, 64))
    k = np.where(is_high, 0.0, -gap / 64)[None, :, None, None] * np.ones((2, 64))
    v = np.where(is_high, 1.0, -1.0)[None, :, None, None] * np.ones((2, 64))
    case = Case(lengths=((rows, len(keys)),), q_heads=2, causal=False)
    dtype = np.float16
    case = replace(case, dtype="float16")
    return Call(case, "prefill", tuple(x.astype(dtype) for x in (q, k, v)), {"scale": 1.0})


def votes_of(call: Call, geometry: Geometry) -> int:
    """Groups of rows of both heads."""
    return 2 * -(-call.arrays[0].shape[1] // geometry.rows_per_vote)


def test_half_of_equal_keys_takes_ln_2_off_lse(device: Any) -> None:
    """Two tiles of equal scores: λ = 2 drops the second, whose values would have cancelled."""
    import cuattn

    geometry = device.geometry(two_tiers(Geometry(128, 64, 16), 2, [0], 0.0))
    call = two_tiers(geometry, 2, [0], 0.0)
    keys = 2 * geometry.block_kv
    dense = device.run(call)
    np.testing.assert_array_equal(dense.out, 0)
    np.testing.assert_allclose(dense.lse, math.log(keys), rtol=1e-6)
    stats = cuattn.SkipStats()
    for fields in (
        {"threshold": 2.0},
        {"threshold": device.to_device(np.array([2.0], np.float32))},
        {"threshold_scale_factor": 2.0 * keys},
    ):
        stats.reset()
        skip = cuattn.SkipSoftmax(**fields, unsafe=True, stats=stats)
        cut = device.run(call, skip_softmax=skip)
        np.testing.assert_array_equal(cut.out, 1)
        np.testing.assert_allclose(dense.lse - cut.lse, math.log(2), atol=5e-6)
        groups = votes_of(call, geometry)
        assert (stats.visited, stats.skipped, stats.ineligible) == (2 * groups, groups, 0)


def test_a_tile_exactly_at_the_threshold_is_kept(device: Any) -> None:
    """The comparison is strict: with λ = 1 equal keys stay."""
    import cuattn

    geometry = device.geometry(two_tiers(Geometry(128, 64, 16), 4, [0, 1, 2, 3], 0.0))
    call = two_tiers(geometry, 4, [0, 2], 0.0)
    stats = cuattn.SkipStats()
    outcome = device.run(
        call, skip_softmax=cuattn.SkipSoftmax(threshold=1.0, unsafe=True, stats=stats)
    )
    np.testing.assert_array_equal(outcome.out, 0)
    assert stats.skipped == 0 and stats.visited == 4 * votes_of(call, geometry)


@pytest.mark.parametrize(
    ("tiles", "high"), [(8, [0, 7]), (8, [0, 2, 4, 6]), (8, [7]), (10, [0]), (8, [3])]
)
def test_a_constructed_share_is_skipped(device: Any, tiles: int, high: list[int]) -> None:
    """Tiles 4 below the others go at λ = e^-2, once a higher one has been seen."""
    import cuattn

    geometry = device.geometry(two_tiers(Geometry(128, 64, 16), tiles, high, 4.0))
    call = two_tiers(geometry, tiles, high, 4.0)
    order = [0, *range(tiles - 1, 0, -1)]
    first_high = min(order.index(tile) for tile in high)
    gone = [tile for tile in order[first_high:] if tile not in high]
    low_kept = tiles - len(high) - len(gone)
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=math.exp(-2), stats=stats)
    outcome = device.run(call, skip_softmax=skip)
    groups = votes_of(call, geometry)
    assert (stats.visited, stats.skipped) == (tiles * groups, len(gone) * groups)
    low = low_kept * math.exp(-4)
    kept = len(high) + low
    np.testing.assert_allclose(outcome.lse, math.log(kept * geometry.block_kv), rtol=2e-6)
    wanted = np.full(outcome.out.shape, (len(high) - low) / kept)
    np.testing.assert_allclose(outcome.out.astype(np.float64), wanted, rtol=2e-3)


def test_one_objecting_row_keeps_the_tile_for_its_group_only(device: Any) -> None:
    import cuattn

    geometry = device.geometry(two_tiers(Geometry(128, 64, 16), 8, [0], 8.0))
    call = two_tiers(geometry, 8, [0], 8.0)
    q = call.arrays[0].copy()
    row = geometry.rows_per_vote + 3
    q[0, row, 1] = 1 / 16  # its scores differ by 0.5 only
    call = replace(call, arrays=(q, *call.arrays[1:]))
    stats = cuattn.SkipStats()
    device.run(call, skip_softmax=cuattn.SkipSoftmax(threshold=math.exp(-2), stats=stats))
    groups = votes_of(call, geometry) // 2
    assert counts(stats)["skipped"].tolist() == [[7 * groups, 7 * (groups - 1)]]


def test_independent_data_skips_at_the_rate_of_records(gpu: Any) -> None:
    """λ = 1 on i.i.d. data: tile j escapes a new maximum in all rows with (1 - 1/j)^rows."""
    import cuattn

    case = Case(lengths=((128, 8192),), q_heads=32, kv_heads=32, causal=False, memory="packed")
    call = batched(case)
    geometry = gpu.geometry(call)
    stats = cuattn.SkipStats()
    gpu.run(call, skip_softmax=cuattn.SkipSoftmax(threshold=1.0, unsafe=True, stats=stats))
    tiles = 8192 // geometry.block_kv
    rows = geometry.rows_per_vote
    wanted = sum((1 - 1 / j) ** rows for j in range(2, tiles + 1)) / tiles
    assert stats.visited == 32 * 128 // rows * tiles
    assert stats.rate == pytest.approx(wanted, rel=0.15)


@pytest.mark.parametrize("build", [batched, ragged, paged], ids=lambda f: f.__name__)
def test_dropped_mass_bounds_the_distance_from_dense(device: Any, build: Any) -> None:
    """Skipping is near the dense result, by as much as the dropped mass says, and not equal."""
    import cuattn

    call = build(SHORT)
    geometry = device.geometry(call)
    level = threshold_for(call.votes(geometry).statistics, 0.3)
    expected = call.reference(geometry=geometry, skip_softmax=numpy_skip(threshold=level))
    dense = device.run(call)
    cut = device.run(call, skip_softmax=cuattn.SkipSoftmax(threshold=level))
    shape = (-1, *dense.out.shape[-2:])
    tokens = sum(q_len for q_len, _ in call.case.lengths)
    one, other = (x.out.reshape(shape)[:tokens].astype(np.float64) for x in (dense, cut))
    mass = expected.dropped_mass.reshape(shape[:2])[:tokens]
    longest = 6.0 * math.sqrt(call.case.d_v)  # of a row of standard normal values
    bound = 2 * mass * longest + 0.02 * np.linalg.norm(one, axis=2) + 1e-3
    distance = np.linalg.norm(one - other, axis=2)
    assert (distance <= bound).all() and distance.max() > 0
    assert mass.max() > 1e-6


@pytest.mark.parametrize("case", SKIP_CASES, ids=str)
def test_thresholds_of_these_tests_lie_in_gaps(case: Case) -> None:
    """The helper's λ skips about the share asked for, and no vote is near it."""
    geometry = Geometry(block_q=128, block_kv=64, rows_per_vote=16)
    votes = batched(case).votes(geometry).statistics
    levels = [threshold_for(votes, share) for share in (0.2, 0.5)]
    for level, share in zip(levels, (0.2, 0.5), strict=True):
        assert np.abs(votes - math.log(level)).min() > 2 * SAFE_MARGIN
        assert share - 0.15 < (votes < math.log(level)).mean() < share + 0.15
    assert all(a < b for a, b in pairwise(levels))
