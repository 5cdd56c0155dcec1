"""`max_dropped_mass`: no row loses more than it says, and tiles do go."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import Call, numpy_skip
from conftest import Outcome
from decode_cases import LOGITS, LONG, SKIP_DECODE, DecodeCase, adversarial, decode_call
from skip_checks import check_against_replay, counts

from cuattn._records import DecodeGeometry

MARGIN = 2e-4  # relative, of a mass; float32 sums of these cases are good to about 1e-5
LSE_ERROR = 4e-6  # of float32 LSEs of about 10, two of them
KEYS = 1600  # of an adversarial request


def bound_near(call: Call, geometry: DecodeGeometry, wanted: float) -> float:
    """A bound about as large for which no vote is close."""
    for bound in np.geomspace(wanted, 1.25 * wanted, 60).astype(np.float32):
        skip = numpy_skip(max_dropped_mass=float(bound))
        if call.reference(geometry=geometry, skip_softmax=skip).margin > MARGIN:
            return float(bound)
    raise AssertionError(f"{call.case}: every bound near {wanted} has a close vote")


def assert_within(call: Call, outcome: Outcome, bound: float) -> None:
    """Demand that no row lost more than the bound: by its certificate, and by float64's LSE."""
    dense = call.reference().lse
    rows = np.isfinite(dense)
    lost = -np.expm1(outcome.lse[rows].astype(np.float64) - dense[rows])
    certificate = outcome.dropped_mass[rows]
    assert lost.max() <= bound + LSE_ERROR * max(1.0, np.abs(dense[rows]).max() / 10)
    assert certificate.min() >= 0 and certificate.max() <= bound


@pytest.mark.parametrize("bound", [0.25, 0.5])
@pytest.mark.parametrize("case", SKIP_DECODE, ids=str)
def test_drops_the_same_tiles(device: Any, case: DecodeCase, bound: float) -> None:
    """Structured data: the counts, LSE, output and shares of the replay, which keeps the bound."""
    import cuattn

    call = decode_call(case)
    geometry = device.geometry(call, max_dropped_mass=bound)
    bound = bound_near(call, geometry, bound)
    replay = {"geometry": geometry, "skip_softmax": numpy_skip(max_dropped_mass=bound)}
    shares = call.reference(**replay).dropped_mass
    assert np.nanmax(shares) <= bound
    check_against_replay(device, call, certificate=True, margin=MARGIN, max_dropped_mass=bound)
    skip = cuattn.SkipSoftmax(max_dropped_mass=bound, certificate=True)
    assert_within(call, device.run(call, skip_softmax=skip), bound)


@pytest.mark.parametrize("bound", [1e-4, 0.02, 0.3, 0.9])
@pytest.mark.parametrize("kind", LOGITS)
def test_no_row_loses_more_than_the_bound(device: Any, kind: str, bound: float) -> None:
    """Equal weights, weights that grow along the way, seeds of no weight, scores far apart."""
    import cuattn

    call = adversarial(kind, KEYS)
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(max_dropped_mass=bound, certificate=True, stats=stats)
    assert_within(call, device.run(call, skip_softmax=skip), bound)
    if bound == 0.9 and kind in ("falling", "deep-middle", "far-apart"):
        assert 0 < stats.skipped < stats.visited


@pytest.mark.parametrize("q_heads", [1, 5, 16])
def test_independent_data_keep_the_bound(device: Any, q_heads: int) -> None:
    import cuattn

    case = DecodeCase(lengths=((1, 5000), (1, 700)), q_heads=q_heads, kv_heads=1, scale=0.05)
    call = decode_call(case)
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(max_dropped_mass=0.6, certificate=True, stats=stats)
    assert_within(call, device.run(call, skip_softmax=skip), 0.6)
    assert stats.skipped or q_heads > 1


def test_a_larger_bound_drops_more(device: Any) -> None:
    import cuattn

    call = decode_call(LONG)
    skipped, lost = [], []
    for bound in (0.0, 0.03, 0.1, 0.5):
        stats = cuattn.SkipStats()
        skip = cuattn.SkipSoftmax(max_dropped_mass=bound, certificate=True, stats=stats)
        lost.append(float(device.run(call, skip_softmax=skip).dropped_mass.max()))
        skipped.append(stats.skipped)
        assert not counts(stats)["ineligible"].any()
    assert 0 == skipped[0] < skipped[1] < skipped[2] < skipped[3] < stats.visited
    assert 0 == lost[0] < lost[1] < lost[2] < lost[3]


def test_at_zero_only_tiles_of_no_mass_go(device: Any) -> None:
    """Scores a thousand below the seeds have weights of exactly 0 in float32."""
    import cuattn

    skip = cuattn.SkipSoftmax(max_dropped_mass=0.0, certificate=True)
    for kind in ("deep-middle", "flat"):
        call = adversarial(kind, KEYS)
        outcome = device.run(call, skip_softmax=skip)
        assert not outcome.dropped_mass.any()
        device.compare(call, replace(outcome, dropped_mass=None))


def test_a_certificate_comes_with_every_way_to_skip(device: Any) -> None:
    import cuattn

    call = decode_call(LONG)
    arrays, options = device.arguments(call)
    for fields in ({"threshold": 0.9}, {"max_dropped_mass": 0.2}, {"threshold": 0.0}):
        skip = cuattn.SkipSoftmax(**fields, certificate=True)
        out, lse, mass = cuattn.decode(*arrays, **options, skip_softmax=skip, return_lse=True)
        assert mass.shape == lse.shape == out.shape[:-1]
        shares = device.to_host(mass)
        assert bool(shares.any()) == (fields != {"threshold": 0.0}) and (shares < 1).all()


@pytest.mark.parametrize("bound", [1.0, 1.5, -0.1, math.nan])
def test_a_bound_that_means_nothing_is_refused(bound: float) -> None:
    import cuattn

    with pytest.raises(ValueError, match="max_dropped_mass"):
        cuattn.SkipSoftmax(max_dropped_mass=bound)
