"""What the tests of skip-softmax share: a λ far from every vote, a comparison with the replay."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from cases import Call, numpy_skip
from numpy.typing import NDArray

import cuattn

Array = NDArray[Any]

SAFE_MARGIN = 1e-3  # natural-log units; float32 scores of these cases are good to about 1e-5


def threshold_for(statistics: Array, share: float) -> float:
    """A λ below 1 that skips about `share` of the votes and is far from the statistic of any."""
    votes = np.sort(statistics[np.isfinite(statistics)].ravel())
    below = votes[: np.searchsorted(votes, -2 * SAFE_MARGIN)]
    assert len(below) > 8, "too few votes could skip their tile below λ = 1"
    target = min(int(share * statistics.size), len(below) - 2)
    around = range(
        max(target - len(below) // 10, 0), min(target + len(below) // 10, len(below) - 1)
    )
    widest = max(around or [target], key=lambda i: below[i + 1] - below[i])
    return float(np.float32(math.exp((below[widest] + below[widest + 1]) / 2)))


def seeds_above(call: Call) -> Array:
    """What keys elsewhere might say of each row: near its LSE here, up to 3 more, or nothing."""
    lse = call.reference().lse
    rng = np.random.default_rng(0)
    seeds = np.where(np.isnan(lse), 0.0, lse) + rng.uniform(-1, 3, lse.shape)
    return np.where(rng.random(lse.shape) < 0.1, -np.inf, seeds).astype(np.float32)


def counts(stats: Any) -> dict[str, Array]:
    """Counters by request and head."""
    return {name: np.asarray(array) for name, array in stats.per_head().items()}


def check_against_replay(
    device: Any,
    call: Call,
    certificate: bool = False,
    margin: float = SAFE_MARGIN,
    **threshold: Any,
) -> Array:
    """Run with skipping; results and counts must be those of the replay, which skipped a part."""
    geometry = device.geometry(call, **threshold)
    skip = numpy_skip(**threshold)
    expected = call.reference(geometry=geometry, skip_softmax=skip)
    assert expected.margin > margin, f"{call.case}: a vote is undecided by {expected.margin}"
    assert 0 < expected.skipped.sum() < expected.visited.sum(), f"{call.case}: nothing to see"
    stats = cuattn.SkipStats()
    threshold = {
        name: device.to_device(value) if isinstance(value, np.ndarray) else value
        for name, value in threshold.items()
    }
    asked = cuattn.SkipSoftmax(**threshold, stats=stats, certificate=certificate)
    outcome = device.run(call, skip_softmax=asked)
    for name, seen in counts(stats).items():
        np.testing.assert_array_equal(seen, getattr(expected, name), f"{call.case}: {name}")
    assert (stats.visited, stats.skipped, stats.ineligible) == (
        expected.visited.sum(),
        expected.skipped.sum(),
        expected.ineligible.sum(),
    )
    assert stats.rate == pytest.approx(expected.skipped.sum() / expected.visited.sum())
    device.compare(call, outcome, geometry=geometry, skip_softmax=skip)
    return expected.skipped


def check_given_seeds(device: Any, call: Call, **more: Any) -> None:
    """More tiles go than by the request's own keys; a row with −∞ knows nothing more."""
    geometry, seeds = device.geometry(call), seeds_above(call)
    known = numpy_skip(threshold=0.5, seeds=seeds)
    votes = call.reference(geometry=geometry, skip_softmax=known).statistics
    level = threshold_for(votes.max(axis=1), 0.5)
    alone = call.reference(geometry=geometry, skip_softmax=numpy_skip(threshold=level))
    skipped = check_against_replay(device, call, threshold=level, seeds=seeds, **more)
    assert skipped.sum() > alone.skipped.sum() + 8
