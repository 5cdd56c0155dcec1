"""Skip-softmax in MLA decode: the tiles of the replay, counted exactly, and its legal corners.

Of Hopper's kernel where there is one, and of the portable kernel in the emulator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import Call, numpy_skip
from compare import assert_same_bits
from mla_cases import LONG, SHORT, MlaCase, mla_call, ones
from skip_checks import (
    SAFE_MARGIN,
    Array,
    check_against_replay,
    check_given_seeds,
    counts,
    threshold_for,
)
from test_decode_mass import MARGIN, assert_within, bound_near
from test_emulator_decode import On
from test_emulator_prefill import card

import cuattn
from cuattn import emulator
from cuattn._records import MlaGeometry, SplitRule

TOKENS = replace(LONG, lengths=((4, 900),), form="tokens", q_heads=20)  # two blocks of rows
UNEVEN = replace(
    LONG, lengths=((0, 9), (2, 800), (1, 64), (3, 1)), form="ragged", q_heads=40, sinks=True
)

WIDE = replace(LONG, q_heads=40)  # two votes of a portable block
# Lists shorter than their requests, by two votes of 16 rows; tokens of no request.
LISTS = replace(
    LONG, lengths=((2, 900), (3, 500), (0, 5)), form="ragged", q_heads=20, top_k=640, sinks=True
)


@pytest.fixture
def kernel(request: pytest.FixtureRequest, device: Any) -> Iterator[Any]:
    """A device that has Hopper's kernel, or the emulator as one that has the portable kernel."""
    if request.param == "sm_90a":
        if device.current().capability != (9, 0):
            pytest.skip("the device is not Hopper")
        yield device
        return
    with emulator.enabled(race=True, device=card(request.param)) as launches:
        yield On(card(request.param))
    assert launches and not any(launch.bank_conflicts for launch in launches)


def on(arch: str, *given: Any) -> Any:
    """Parameters of a test that has the fixture `kernel`."""
    marks = [] if arch == "sm_90a" else [pytest.mark.emulator]
    return pytest.param(arch, *given, marks=marks, id="-".join(map(str, (arch, *given))))


def level_for(call: Call, geometry: Any, share: float) -> float:
    """λ for all heads; a vote is carried when the largest of its statistics is below ln λ."""
    return threshold_for(call.votes(geometry).statistics.max(axis=1), share)


def flat(tiles: int) -> Call:
    """Keys of equal scores; values of 1 in the first and the last tile, −1 between them."""
    call = mla_call(MlaCase(lengths=ones(tiles * 64), dtype="bfloat16", scale=1.0, memory="packed"))
    q, cache, tables, lens = call.arrays
    q, cache = np.zeros_like(q), np.full_like(cache, -1)
    cache[tables[0, [0, tiles - 1]]] = 1
    return replace(call, arrays=(q, cache, tables, lens))


@pytest.mark.parametrize(
    ("kernel", "case", "share"),
    [
        *(on("sm_90a", *x) for x in ((LONG, 0.2), (LONG, 0.5), (TOKENS, 0.4), (UNEVEN, 0.4))),
        *(on("sm_80", *x) for x in ((WIDE, 0.2), (TOKENS, 0.5), (UNEVEN, 0.4))),
        *(on("sm_86", LISTS, share) for share in (0.2, 0.5)),
    ],
    indirect=["kernel"],
)
def test_skips_the_same_tiles(kernel: Any, case: MlaCase, share: float) -> None:
    call = mla_call(case)
    check_against_replay(kernel, call, threshold=level_for(call, kernel.geometry(call), share))


@pytest.mark.parametrize(
    ("kernel", "case"),
    [on("sm_90a", LONG), on("sm_90a", TOKENS), on("sm_80", TOKENS)],
    indirect=["kernel"],
)
def test_a_certificate_is_the_dropped_share(kernel: Any, case: MlaCase) -> None:
    call = mla_call(case)
    level = level_for(call, kernel.geometry(call), 0.4)
    check_against_replay(kernel, call, certificate=True, threshold=level)


@pytest.mark.parametrize(
    ("kernel", "case", "bound"),
    [
        *(on("sm_90a", *x) for x in ((LONG, 0.05), (LONG, 0.3), (UNEVEN, 0.3))),
        *(on("sm_80", *x) for x in ((UNEVEN, 0.3), (TOKENS, 0.1))),
    ],
    indirect=["kernel"],
)
def test_dropped_mass_stays_below_its_bound(kernel: Any, case: MlaCase, bound: float) -> None:
    call = mla_call(case)
    bound = bound_near(call, kernel.geometry(call, max_dropped_mass=bound), bound)
    check_against_replay(kernel, call, certificate=True, margin=MARGIN, max_dropped_mass=bound)
    skip = cuattn.SkipSoftmax(max_dropped_mass=bound, certificate=True)
    if not case.sinks:
        assert_within(call, kernel.run(call, skip_softmax=skip), bound)


@pytest.mark.parametrize(
    ("kernel", "case"),
    [on("sm_90a", LONG), on("sm_90a", UNEVEN), on("sm_80", UNEVEN)],
    indirect=["kernel"],
)
def test_thresholds_that_skip_nothing_give_the_dense_bits(kernel: Any, case: MlaCase) -> None:
    call = mla_call(case)
    dense = kernel.run(call)
    stats = cuattn.SkipStats()
    for fields in (
        {"threshold_scale_factor": 1e-30},
        {"threshold": 0.0},
        {"threshold": 0.0, "certificate": True},
        {"max_dropped_mass": 0.0},
    ):
        outcome = kernel.run(call, skip_softmax=cuattn.SkipSoftmax(**fields, stats=stats))
        assert_same_bits(outcome.out, dense.out, fields)
        assert_same_bits(outcome.lse, dense.lse, fields)
    assert stats.visited and not stats.skipped


@pytest.mark.parametrize(
    ("kernel", "case"),
    [on("sm_90a", TOKENS), on("sm_80", UNEVEN), on("sm_86", LISTS)],
    indirect=["kernel"],
)
def test_votes_begin_with_given_seeds(kernel: Any, case: MlaCase) -> None:
    """More tiles go than by the request's own keys; a row with −∞ knows nothing more."""
    check_given_seeds(kernel, mla_call(case))


@pytest.mark.parametrize("kernel", [on("sm_90a")], indirect=True)
def test_half_of_equal_keys_takes_ln_2_off_lse(kernel: Any) -> None:
    """λ = 2 drops all tiles but the seeds, and their values; with λ = 1 equal keys stay."""
    call = flat(4)
    dense = kernel.run(call)
    np.testing.assert_array_equal(dense.out, 0)
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=2.0, unsafe=True, stats=stats, certificate=True)
    cut = kernel.run(call, skip_softmax=skip)
    np.testing.assert_array_equal(cut.out, 1)
    np.testing.assert_allclose(dense.lse - cut.lse, math.log(2), atol=5e-6)
    np.testing.assert_allclose(cut.dropped_mass, 0.5, rtol=1e-5)
    assert (stats.visited, stats.skipped) == (4 * 16, 2 * 16)
    stats.reset()
    skip = cuattn.SkipSoftmax(threshold=1.0, unsafe=True, stats=stats)
    assert_same_bits(kernel.run(call, skip_softmax=skip).out, dense.out, call.case)
    assert (stats.visited, stats.skipped) == (4 * 16, 0)


@pytest.mark.parametrize(
    ("kernel", "case"), [on("sm_90a", LONG), on("sm_80", WIDE)], indirect=["kernel"]
)
def test_thresholds_by_request_and_head(kernel: Any, case: MlaCase) -> None:
    """Live numbers; a head that may skip nothing holds back all others of its vote."""
    call = mla_call(case)
    geometry = kernel.geometry(call)
    level = level_for(call, geometry, 0.4)
    table: Array = np.full((2, 2 * case.q_heads), level, np.float32)[:, ::2]
    table[1, 5] = 0.0
    skipped = check_against_replay(kernel, call, threshold=table)
    assert skipped[0].all() and not skipped[1, : geometry.rows_per_vote].any()
    assert skipped[1, geometry.rows_per_vote :].all()
    table[1, 5] = np.nan  # ineligible: counted, and an objection to everything
    stats = cuattn.SkipStats()
    kernel.run(
        call, skip_softmax=cuattn.SkipSoftmax(threshold=kernel.to_device(table), stats=stats)
    )
    seen = counts(stats)
    np.testing.assert_array_equal(seen["skipped"], skipped)
    assert seen["ineligible"][1, 5] == seen["visited"][1, 5] > 0
    assert seen["ineligible"].sum() == seen["ineligible"][1, 5]


@pytest.mark.parametrize(
    ("kernel", "case"), [on("sm_90a", LONG), on("sm_86", LISTS)], indirect=["kernel"]
)
def test_a_scale_factor_is_divided_by_each_length(kernel: Any, case: MlaCase) -> None:
    """By that of the request, however long its lists are."""
    call = mla_call(case)
    geometry = kernel.geometry(call)
    factor = case.lengths[0][1] * level_for(call, geometry, 0.5)
    for nudge in np.linspace(0.8, 1.2, 60):  # to a factor that suits both lengths
        skip = numpy_skip(threshold_scale_factor=float(nudge * factor))
        if call.reference(geometry=geometry, skip_softmax=skip).margin > SAFE_MARGIN:
            break
    skipped = check_against_replay(kernel, call, threshold_scale_factor=skip.threshold_scale_factor)
    assert skipped[0].any()
    assert float(skip.threshold_scale_factor) < case.lengths[0][1]


def test_what_is_returned_with_a_certificate(hopper: Any) -> None:
    call = mla_call(SHORT)
    arrays, options = hopper.arguments(call)
    skip = cuattn.SkipSoftmax(threshold=0.5, certificate=True)
    out, mass = cuattn.mla_decode(*arrays, **options, skip_softmax=skip)
    assert mass.shape == out.shape[:-1] and mass.dtype == np.float32
    assert 0 < hopper.to_host(mass).max() < 1


def test_the_replay_knows_the_seeds() -> None:
    """Of 24 tiles in five splits the first and the last are always kept, by whom they belong to."""
    geometry = MlaGeometry(64, 64, 1, SplitRule(1 / 16, 256, False))
    votes = mla_call(LONG).votes(geometry)
    assert np.isinf(votes.statistics.max(axis=1)).sum() == 2 * 2
    np.testing.assert_array_equal(votes.visited, np.array([[24] * 16, [11] * 16]))


@pytest.mark.emulator
def test_only_a_skip_softmax_is_taken() -> None:
    arrays, options = mla_call(MlaCase(lengths=ones(3), memory="packed")), {}
    with emulator.enabled(), pytest.raises(TypeError, match=r"skip_softmax is a float; wanted"):
        cuattn.mla_decode(*arrays.arrays, scale=0.1, skip_softmax=0.5, **options)
