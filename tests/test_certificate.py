"""Certificates of prefill: those of the replay, and never less than float64 says was lost."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import Call, Case, batched, paged, ragged
from compare import assert_same_bits
from skip_checks import check_against_replay, threshold_for

import cuattn
from cuattn._records import Geometry
from cuattn._replay import CERTIFICATE_MARGIN, SMALLEST_SHARE

pytestmark = [
    pytest.mark.usefixtures("prefill_kernel"),
    pytest.mark.parametrize("prefill_kernel", ["portable", "hopper"], indirect=True),
]

LONG = Case(lengths=((150, 900),), q_heads=2, kv_heads=1, data="structured", scale=0.25)
UNEVEN = ((7, 64), (150, 900), (0, 5), (1, 640), (5, 0), (90, 33))
CALLS: dict[str, Call] = {
    "causal": batched(LONG),
    "full-groups": batched(replace(LONG, lengths=((70, 900),), causal=False, q_heads=4)),
    "window-sinks": batched(replace(LONG, window_left=500, sinks=True)),
    "ragged": ragged(replace(LONG, lengths=UNEVEN)),
    "paged-soft-cap-window": paged(replace(LONG, lengths=UNEVEN, soft_cap=12.0, window_left=600)),
}


@pytest.mark.parametrize("name", CALLS)
def test_is_that_of_the_replay_and_bounds_what_was_lost(device: Any, name: str) -> None:
    call = CALLS[name]
    level = threshold_for(call.votes(device.geometry(call)).statistics, 0.4)
    check_against_replay(device, call, certificate=True, threshold=level)


def tiers(
    geometry: Geometry, rows: int, scores: tuple[float, ...], last_keys: int, **options: Any
) -> Call:
    """A request of which every key of a tile has one score, the same for all rows.

    The last tile has `last_keys`, and its score is that of tiles it is made longer by.
    """
    keys = np.repeat(scores, [geometry.block_kv] * (len(scores) - 1) + [last_keys])
    case = Case(lengths=((rows, len(keys)),), q_heads=2, kv_heads=1, causal=False)
    q, k = np.ones((1, rows, 2, 64)), keys[None, :, None, None] / 64 * np.ones(64)
    arrays = tuple(x.astype("bfloat16") for x in (q, k, k))
    return Call(case, "prefill", arrays, {"scale": 1.0, **options})


def certificates(device: Any, call: Call, **fields: Any) -> np.ndarray:
    """What the kernel certifies, per row and head; results must be numbers."""
    skip = cuattn.SkipSoftmax(**fields, certificate=True)
    outcome = device.run(call, skip_softmax=skip)
    assert np.isfinite(outcome.lse).all()
    return np.asarray(outcome.dropped_mass[0], np.float64)


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_equal_keys_just_below_the_threshold(device: Any, sinks: bool) -> None:
    """The bound is then the share itself, to be told from less by the margin alone.

    Under the causal mask each row sees another part of the last tiles.
    """
    geometry = device.geometry(batched(LONG))
    sink = np.array([3.0, -1.0], np.float32)
    options = {"sinks": sink} if sinks else {}
    call = tiers(geometry, 150, (0.0, -2.0), 700, causal=True, **options)
    seen = certificates(device, call, threshold=math.exp(-2) * 1.0001)
    kept = geometry.block_kv + (np.exp(np.float64(sink)) if sinks else 0.0)
    lost = math.exp(-2) * (551.0 + np.arange(150))[:, None]
    share = lost / (lost + kept)
    assert (seen >= share).all()
    np.testing.assert_allclose(seen, np.broadcast_to(share * CERTIFICATE_MARGIN, seen.shape), 5e-6)


FAR = {
    # The second tile's weights are nothing to float32 once the third has been seen.
    "flushed": ((0.0, 60.0, -80.0), math.exp(-79), SMALLEST_SHARE),
    # Tiles that are left out outweigh all others by more than float32 holds.
    "nearly-all": ((0.0, 88.0, 88.0), 3.4e38, 1.0),
    "then-heavier": ((0.0, 100.0, 80.0), 3.4e38, math.exp(-20) * CERTIFICATE_MARGIN),
}


@pytest.mark.parametrize("name", FAR)
def test_weights_far_apart(device: Any, name: str) -> None:
    """Tiles are visited in the order 0, 2, 1."""
    scores, level, wanted = FAR[name]
    geometry = device.geometry(batched(LONG))
    call = tiers(geometry, 70, scores, geometry.block_kv)
    seen = certificates(device, call, threshold=level, unsafe=True)
    np.testing.assert_allclose(seen, np.full((70, 2), wanted), 1e-4)
    assert (seen <= 1).all()


def test_rows_that_lose_nothing_are_certified_0(device: Any) -> None:
    """Also those that see no key, and where a threshold of 0 takes another kernel otherwise."""
    call = batched(replace(LONG, lengths=((200, 110),)))
    for fields in ({"threshold": 1e-30}, {"threshold_scale_factor": 0.0}):
        outcome = device.run(call, skip_softmax=cuattn.SkipSoftmax(**fields, certificate=True))
        np.testing.assert_array_equal(outcome.dropped_mass, 0)
        assert np.isneginf(outcome.lse[0, :90]).all()


def test_it_changes_no_bit_and_comes_last(device: Any) -> None:
    call = CALLS["causal"]
    level = threshold_for(call.votes(device.geometry(call)).statistics, 0.4)
    plain = device.run(call, skip_softmax=cuattn.SkipSoftmax(threshold=level))
    skip = cuattn.SkipSoftmax(threshold=level, certificate=True)
    outcome = device.run(call, skip_softmax=skip)
    assert_same_bits(outcome.out, plain.out, call.case)
    assert_same_bits(outcome.lse, plain.lse, call.case)
    arrays, options = device.arguments(call)
    out, lost = cuattn.prefill(*arrays, **options, skip_softmax=skip)
    assert lost.shape == out.shape[:-1] and lost.dtype == np.float32
    assert_same_bits(device.to_host(lost), outcome.dropped_mass, call.case)
    assert outcome.dropped_mass.any()
