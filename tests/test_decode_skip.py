"""Skip-softmax in decode: the same tiles as the replay, counted exactly, and its legal corners."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import Call, numpy_skip
from compare import assert_same_bits
from decode_cases import LONG, SKIP_DECODE, DecodeCase, alone, call_of, decode_call
from numpy.typing import NDArray
from skip_checks import (
    SAFE_MARGIN,
    check_against_replay,
    check_given_seeds,
    counts,
    threshold_for,
)

from cuattn._records import DecodeGeometry, SplitRule

Array = NDArray[Any]

LIKELY = [  # geometries like the kernel's, for what needs no device
    DecodeGeometry(16, 32, 4, SplitRule(1 / 8, 256, False)),
    DecodeGeometry(16, 64, 8, SplitRule(1 / 16, 512, False)),
    DecodeGeometry(32, 32, 8, SplitRule(1 / 4, 512, True)),
]


def level_for(call: Call, geometry: DecodeGeometry, share: float) -> float:
    """λ for all heads; a vote is carried when the largest of its statistics is below ln λ."""
    return threshold_for(call.votes(geometry).statistics.max(axis=1), share)


@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("case", SKIP_DECODE, ids=str)
def test_skips_the_same_tiles(device: Any, case: DecodeCase, share: float) -> None:
    call = decode_call(case)
    check_against_replay(device, call, threshold=level_for(call, device.geometry(call), share))


@pytest.mark.parametrize("case", SKIP_DECODE[:8], ids=str)
def test_a_certificate_is_the_dropped_share(device: Any, case: DecodeCase) -> None:
    call = decode_call(case)
    level = level_for(call, device.geometry(call), 0.4)
    check_against_replay(device, call, certificate=True, threshold=level)


def test_what_is_returned_with_a_certificate(device: Any) -> None:
    import cuattn

    call = decode_call(LONG)
    skip = cuattn.SkipSoftmax(threshold=0.5, certificate=True)
    wanted = device.run(call, skip_softmax=skip)
    arrays, options = device.arguments(call)
    out, mass = cuattn.decode(*arrays, **options, skip_softmax=skip)
    assert mass.shape == wanted.lse.shape and mass.dtype == np.float32
    assert_same_bits(device.to_host(out), wanted.out, LONG)
    assert_same_bits(device.to_host(mass), wanted.dropped_mass, LONG)
    assert wanted.dropped_mass.max() > 0


@pytest.mark.parametrize(
    ("case", "certificate"),
    [(LONG, True), (SKIP_DECODE[5], False), (SKIP_DECODE[7], False), (SKIP_DECODE[11], False)],
    ids=str,
)
def test_votes_begin_with_given_seeds(device: Any, case: DecodeCase, certificate: bool) -> None:
    """More tiles go than by the request's own keys; a row with −∞ knows nothing more."""
    check_given_seeds(device, decode_call(case), certificate=certificate)


def test_seeds_that_know_nothing_change_no_bit(device: Any) -> None:
    import cuattn

    call = decode_call(LONG)
    nothing = device.to_device(np.full((2, 8), -np.inf, np.float32))
    plain, same = (
        device.run(call, skip_softmax=cuattn.SkipSoftmax(threshold=0.01, seeds=seeds))
        for seeds in (None, nothing)
    )
    assert_same_bits(same.out, plain.out, LONG)
    assert_same_bits(same.lse, plain.lse, LONG)


def test_far_larger_seeds_leave_the_seed_tiles(device: Any) -> None:
    """A certificate speaks of the keys that are here, however small their weights are elsewhere."""
    call = decode_call(LONG)
    geometry = device.geometry(call)
    seeds = np.full((2, 8), 1e4, np.float32)
    skipped = check_against_replay(device, call, certificate=True, threshold=0.01, seeds=seeds)
    assert (call.votes(geometry).visited - skipped == geometry.warps).all()


def table_of_thresholds(call: Call, geometry: DecodeGeometry, shares: list[list[float]]) -> Array:
    """λ by request and head, each far from its own head's part in the votes of all requests."""
    table = np.zeros((len(shares), len(shares[0])), np.float32)
    statistics = call.votes(geometry).statistics
    for request, row in enumerate(shares):
        for head, share in enumerate(row):
            own = statistics[:, head]
            table[request, head] = threshold_for(own[own > -np.inf], share) if share else 0.0
    return table


def test_thresholds_by_request_and_head(device: Any) -> None:
    """One head of a group that may skip nothing holds back the others, and no other group."""
    call = decode_call(LONG)
    geometry = device.geometry(call)
    shares = [[0.6, 0.5, 0.7, 0.8, 0.5, 0.0, 0.6, 0.6], [0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.8, 0.6]]
    table = table_of_thresholds(call, geometry, shares)
    skipped = check_against_replay(device, call, threshold=table)
    assert (skipped > 0).tolist() == [[True] * 4 + [False] * 4, [False] * 4 + [True] * 4]


def test_thresholds_by_request(device: Any) -> None:
    call = decode_call(LONG)
    level = level_for(call, device.geometry(call), 0.4)
    skipped = check_against_replay(device, call, threshold=np.array([0.0, level], np.float32))
    assert not skipped[0].any() and skipped[1].all()


def test_thresholds_may_be_a_slice(device: Any) -> None:
    """A live array need not be packed."""
    call = decode_call(LONG)
    geometry = device.geometry(call)
    table = table_of_thresholds(call, geometry, [[0.5] * 8, [0.7] * 8])
    wide = np.full((4, 20), 0.9, np.float32)
    wide[::2, 1:17:2] = table
    check_against_replay(device, call, threshold=wide[::2, 1:17:2])


def test_thresholds_are_read_at_every_call(device: Any) -> None:
    import cuattn

    call = decode_call(LONG)
    geometry = device.geometry(call)
    levels = [level_for(call, geometry, share) for share in (0.1, 0.5)]
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


def test_a_scale_factor_is_divided_by_each_length(device: Any) -> None:
    """λ = factor / kv_len, so a short request is cut more; λ of 1 or more does not skip."""
    import cuattn

    call = decode_call(replace(LONG, lengths=((1, 1000), (1, 1600), (1, 64), (1, 0))))
    geometry = device.geometry(call)
    factor = 1600 * level_for(call, geometry, 0.25)
    for nudge in np.linspace(0.7, 1, 60):  # to a factor that suits every length
        skip = numpy_skip(threshold_scale_factor=float(nudge * factor))
        if call.reference(geometry=geometry, skip_softmax=skip).margin > SAFE_MARGIN:
            break
    skipped = check_against_replay(
        device, call, threshold_scale_factor=skip.threshold_scale_factor
    ).sum(axis=1)
    assert skipped[0] > 0 and skipped[1] > 0
    stats = cuattn.SkipStats()
    everything = cuattn.SkipSoftmax(threshold_scale_factor=1200.0, stats=stats)
    device.run(call, skip_softmax=everything)
    seen = counts(stats)
    assert (seen["ineligible"][[0, 2]] == seen["visited"][[0, 2]]).all()
    assert seen["visited"][:3].all() and not seen["visited"][3].any()
    assert not seen["skipped"][[0, 2, 3]].any() and not seen["ineligible"][1].any()


@pytest.mark.parametrize(
    "case",
    [LONG, replace(LONG, sinks=True), replace(SKIP_DECODE[5], window_left=500), SKIP_DECODE[7]],
    ids=str,
)
def test_thresholds_that_skip_nothing_give_the_dense_bits(device: Any, case: DecodeCase) -> None:
    import cuattn

    call = decode_call(case)
    dense = device.check(call)
    batch = len(case.lengths)
    for fields in (
        {"threshold": 0.0},
        {"threshold": 1e-30},
        {"threshold_scale_factor": 0.0},
        {"threshold_scale_factor": 1e-30},
        {"threshold": device.to_device(np.zeros(batch, np.float32))},
        {"threshold": device.to_device(np.full((batch, case.q_heads), np.nan, np.float32))},
        {"threshold_scale_factor": 1e5},
    ):
        outcome = device.run(call, skip_softmax=cuattn.SkipSoftmax(**fields))
        assert_same_bits(outcome.out, dense.out, f"{case} with {fields}")
        assert_same_bits(outcome.lse, dense.lse, f"{case} with {fields}")
    some = device.run(call, skip_softmax=cuattn.SkipSoftmax(threshold=0.9))
    rows = ~np.isnan(dense.lse)
    assert (some.lse != dense.lse)[rows].any(), "this data has nothing to skip, nothing is shown"


@pytest.mark.parametrize("value", [1.0, 3.0, math.inf, math.nan, -0.5])
def test_live_thresholds_outside_zero_to_one_count_as_ineligible(device: Any, value: float) -> None:
    import cuattn

    call = decode_call(LONG)
    dense = device.run(call)
    live = np.full((2, 8), 0.9, np.float32)
    live[1, 5] = value  # holds back its group, and counts at its own head alone
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=device.to_device(live), stats=stats)
    outcome = device.run(call, skip_softmax=skip)
    assert_same_bits(outcome.out[1, 4:], dense.out[1, 4:], LONG)
    seen = counts(stats)
    assert seen["skipped"][0].all() and seen["skipped"][1, :4].all()
    assert not seen["skipped"][1, 4:].any() and seen["visited"].all()
    wanted = np.zeros((2, 8), int)
    wanted[1, 5] = seen["visited"][1, 5]
    np.testing.assert_array_equal(seen["ineligible"], wanted)


@pytest.mark.parametrize("case", [LONG, SKIP_DECODE[5], SKIP_DECODE[7]], ids=str)
def test_only_seeds_stay_under_an_endless_threshold(device: Any, case: DecodeCase) -> None:
    """Splits that own no seed keep nothing, and merge as nothing."""
    call = decode_call(case)
    skipped = check_against_replay(device, call, threshold=1e30, unsafe=True)
    geometry = device.geometry(call)
    kept = call.votes(geometry).visited - skipped
    rows = case.q_heads // case.kv_heads * max(q_len for q_len, _ in case.lengths)
    assert kept.any() and (kept <= geometry.warps * -(-rows // geometry.rows_per_vote)).all()


def test_requests_without_keys_have_no_votes(device: Any) -> None:
    call = decode_call(replace(LONG, lengths=((1, 0), (1, 1500), (1, 1), (1, 0))))
    level = level_for(call, device.geometry(call), 0.4)
    skipped = check_against_replay(device, call, threshold=level)
    assert skipped[1].all() and not skipped[[0, 2, 3]].any()


def test_batch_invariant_skipping_does_not_know_its_batch(device: Any) -> None:
    import cuattn

    call = decode_call(LONG)

    def run(part: Call) -> tuple[Any, dict[str, Array]]:
        stats = cuattn.SkipStats()
        skip = cuattn.SkipSoftmax(threshold=0.8, stats=stats)
        return device.run(part, skip_softmax=skip, batch_invariant=True), counts(stats)

    together, seen = run(call)
    assert (seen["skipped"] > 0).all() and (seen["skipped"] < seen["visited"]).all()
    for request in range(len(LONG.lengths)):
        single, own = run(alone(call, request))
        assert_same_bits(single.out[0], together.out[request], LONG)
        assert_same_bits(single.lse[0], together.lse[request], LONG)
        for name, plane in own.items():
            np.testing.assert_array_equal(plane[0], seen[name][request], name)


def tiers(geometry: DecodeGeometry, tiles: int, high: list[int], gap: float) -> Call:
    """Tiles of equal keys: score 0, value 1 in `high`; score -gap, value -1 elsewhere."""
    tile = np.repeat(np.arange(tiles), geometry.block_kv)
    is_high = np.isin(tile, high)[:, None, None]
    case = DecodeCase(lengths=((1, len(tile)),), dtype="float16", scale=1.0)
    q, ones = np.ones((1, 8, 64)), np.ones((1, 2, 64))
    k, v = np.where(is_high, 0.0, -gap / 64) * ones, np.where(is_high, 1.0, -1.0) * ones
    return call_of(case, [(q, k, v)])


def constructed(
    device: Any, tiles: int, high: list[int], gap: float
) -> tuple[Call, DecodeGeometry]:
    """Such a call with `tiles` more tiles than warps; `high` is counted from the first or last."""
    geometry = device.geometry(tiers(LIKELY[0], tiles, high, gap))
    count = tiles + geometry.warps
    call = tiers(geometry, count, [tile % count for tile in high], gap)
    again = device.geometry(call)
    assert (again.block_kv, again.warps) == (geometry.block_kv, geometry.warps)
    return call, again


def test_half_of_equal_keys_takes_ln_2_off_lse(device: Any) -> None:
    """Equal scores in two tiles a warp: λ = 2 drops all but the seeds, and their values."""
    import cuattn

    warps = device.geometry(tiers(LIKELY[0], 2, [0], 0.0)).warps
    call, geometry = constructed(device, warps, [0, *range(-1, -warps, -1)], 0.0)
    keys = 2 * warps * geometry.block_kv
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
        skip = cuattn.SkipSoftmax(**fields, unsafe=True, stats=stats, certificate=True)
        cut = device.run(call, skip_softmax=skip)
        np.testing.assert_array_equal(cut.out, 1)
        np.testing.assert_allclose(dense.lse - cut.lse, math.log(2), atol=5e-6)
        np.testing.assert_allclose(cut.dropped_mass, 0.5, rtol=1e-5)
        assert (stats.visited, stats.skipped) == (2 * warps * 8, warps * 8)
        assert stats.ineligible == 0


def test_a_tile_exactly_at_the_threshold_is_kept(device: Any) -> None:
    """The comparison is strict: with λ = 1 equal keys stay."""
    import cuattn

    call, geometry = constructed(device, 4, [0, 2], 0.0)
    dense = device.run(call)
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=1.0, unsafe=True, stats=stats)
    assert_same_bits(device.run(call, skip_softmax=skip).out, dense.out, call.case)
    assert (stats.visited, stats.skipped) == ((geometry.warps + 4) * 8, 0)


@pytest.mark.parametrize(
    ("tiles", "high"), [(6, [0]), (6, [-1]), (6, [0, -1]), (6, [-2]), (20, [16]), (-3, [0])]
)
def test_a_constructed_share_is_skipped(device: Any, tiles: int, high: list[int]) -> None:
    """Tiles 4 below a seed go at λ = e^-2; below another tile only in its lane, after it."""
    import cuattn

    call, geometry = constructed(device, tiles, high, 4.0)
    keys = call.case.lengths[0][1]
    count = keys // geometry.block_kv
    lanes = geometry.warps * geometry.splits.splits(keys, keys)
    places = {tile % count for tile in high}
    seeds = {0, *range(max(count - geometry.warps + 1, 0), count)}
    below = {tile for x in places for tile in range(x - lanes, 0, -lanes)}  # after it in its lane
    inner = set(range(count)) - seeds - places
    gone = len(inner if seeds & places else inner & below)
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=math.exp(-2), stats=stats)
    outcome = device.run(call, skip_softmax=skip)
    assert (stats.visited, stats.skipped) == (count * 8, gone * 8)
    low = (count - len(places) - gone) * math.exp(-4)
    kept = len(places) + low
    np.testing.assert_allclose(outcome.lse, math.log(kept * geometry.block_kv), rtol=2e-6)
    wanted = np.full(outcome.out.shape, (len(places) - low) / kept)
    np.testing.assert_allclose(outcome.out.astype(np.float64), wanted, rtol=2e-3, atol=1e-3)


def test_one_objecting_row_keeps_the_tile_for_its_group_only(device: Any) -> None:
    import cuattn

    call, _ = constructed(device, 6, [-1], 8.0)
    q = call.arrays[0].copy()
    q[0, 6] = 1 / 16  # its scores differ by 0.5 only
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=math.exp(-2), stats=stats)
    device.run(replace(call, arrays=(q, *call.arrays[1:])), skip_softmax=skip)
    assert counts(stats)["skipped"].tolist() == [[6] * 4 + [0] * 4]


def test_counters_add_up_until_they_are_reset(device: Any) -> None:
    import cuattn

    call = decode_call(LONG)
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=0.9, stats=stats)
    device.run(call, skip_softmax=skip)
    first = counts(stats)
    assert first["skipped"].shape == (2, 8) and first["skipped"].all()
    device.run(call, skip_softmax=skip)
    for name, twice in counts(stats).items():
        np.testing.assert_array_equal(twice, 2 * first[name])
    stats.reset()
    device.run(call, skip_softmax=skip)
    np.testing.assert_array_equal(counts(stats)["skipped"], first["skipped"])


def test_dropped_mass_bounds_the_distance_from_dense(device: Any) -> None:
    """Skipping is near the dense result, by as much as the dropped mass says, and not equal."""
    import cuattn

    call = decode_call(LONG)
    level = level_for(call, device.geometry(call), 0.4)
    dense = device.run(call)
    cut = device.run(call, skip_softmax=cuattn.SkipSoftmax(threshold=level, certificate=True))
    longest = 6.0 * math.sqrt(call.case.d_v)  # of a row of standard normal values
    one, other = (x.out.astype(np.float64) for x in (dense, cut))
    bound = 2 * cut.dropped_mass * longest + 0.02 * np.linalg.norm(one, axis=-1) + 1e-3
    distance = np.linalg.norm(one - other, axis=-1)
    assert (distance <= bound).all() and distance.max() > 0
    assert cut.dropped_mass.max() > 1e-6


@pytest.mark.parametrize("geometry", LIKELY, ids=lambda g: f"{g.rows_per_vote}x{g.block_kv}")
@pytest.mark.parametrize("case", SKIP_DECODE, ids=str)
def test_thresholds_of_these_tests_lie_in_gaps(case: DecodeCase, geometry: DecodeGeometry) -> None:
    """The helper's λ skips about the share asked for, and no vote is near it."""
    call = decode_call(case)
    votes = call.votes(geometry).statistics.max(axis=1)
    levels = [threshold_for(votes, share) for share in (0.2, 0.5)]
    for level in levels:
        assert np.abs(votes - math.log(level)).min() > 2 * SAFE_MARGIN
        assert 0.05 < (votes < math.log(level)).mean() < 0.7
    assert levels[0] < levels[1]
