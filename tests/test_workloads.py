"""The benchmark inputs are what they are said to be, and what measures them measures right."""

from __future__ import annotations

from dataclasses import replace
from math import log
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import cuattn
from cuattn import reference
from cuattn._records import Geometry
from cuattn._workloads import (
    LOCAL,
    SINK_HEAVY,
    ExactRows,
    Inputs,
    Mix,
    Size,
    Stopwatch,
    constructed,
    dropped_mass,
    exact_rows,
    iid,
    iid_skip_rate,
    structured,
)

Array = NDArray[Any]

HOPPER = Geometry(block_q=128, block_kv=128, rows_per_vote=64)
PORTABLE = Geometry(block_q=128, block_kv=64, rows_per_vote=32)
LONG = Size(1, 16384, 6, 3)


def makers() -> dict[str, Any]:
    return {
        "w0": iid,
        "w1": structured,
        "w1-sink-heavy": lambda size, **options: structured(size, mix=SINK_HEAVY, **options),
        "w2": lambda size, **options: constructed(size, tile_keys=8, fraction=0.5, **options)[0],
    }


@pytest.mark.parametrize("name", makers())
def test_shapes_dtype_and_seed(name: str) -> None:
    make, size = makers()[name], Size(2, 64, 4, 2, 64, 72)
    inputs = make(size)
    assert inputs.q.shape == (2, 64, 4, 64)
    assert inputs.k.shape == (2, 64, 2, 64)
    assert inputs.v.shape == (2, 64, 2, 72)
    assert all(x.dtype.name == "bfloat16" for x in inputs)
    for same, again in zip(inputs, make(size), strict=True):
        assert np.isfinite(same.astype(np.float32)).all()
        assert np.array_equal(same, again)
    assert not np.array_equal(inputs.q, make(size, seed=1).q)
    assert not np.array_equal(inputs.q[0], inputs.q[1]), "requests of a batch must differ"


@pytest.mark.parametrize(("rows", "tiles"), [(16, 64), (64, 64), (16, 16)])
def test_w0_skip_rate_at_one_is_the_formula(rows: int, tiles: int) -> None:
    geometry = Geometry(block_q=rows, block_kv=16, rows_per_vote=rows)
    size = Size(1, 16 * tiles, 4, 4)
    q, k, v = (x[0] for x in iid(size, dtype=np.float32))
    result = reference.attention(q[:256], k, v, skip=1.0, unsafe=True, geometry=geometry)
    rate = result.skipped.sum() / result.visited.sum()
    assert rate == pytest.approx(iid_skip_rate(tiles, rows), abs=0.02)
    assert 0.05 < rate < 0.95


def some_blocks(inputs: Inputs, geometry: Geometry) -> list[tuple[Array, Array, Array]]:
    """Q, K and V of a few blocks of query rows of a causal call, one head each."""
    q, k, v = (x[0] for x in inputs)
    blocks = []
    for head in range(q.shape[1]):
        kv_head = head * k.shape[1] // q.shape[1]
        for first in (5120, 10240, 15360):
            end = first + geometry.block_q
            blocks.append(
                (q[first:end, head, None], k[:end, kv_head, None], v[:end, kv_head, None])
            )
    return blocks


def sample(inputs: Inputs, geometry: Geometry, threshold: float) -> tuple[float, float]:
    """Skip rate and mean dropped mass over sampled blocks of a causal call."""
    visited = skipped = 0
    masses = []
    for block in some_blocks(inputs, geometry):
        result = reference.attention(*block, causal=True, skip=threshold, geometry=geometry)
        visited += int(result.visited.sum())
        skipped += int(result.skipped.sum())
        masses.append(result.dropped_mass.mean())
    return skipped / visited, float(np.mean(masses))


def skip_rates(inputs: Inputs, geometry: Geometry, thresholds: list[float]) -> list[float]:
    """Skip rate per threshold; one replay gives all, as none is above 1."""
    statistics = np.concatenate(
        [
            reference.attention(*block, causal=True, geometry=geometry).statistics[:, 0]
            for block in some_blocks(inputs, geometry)
        ]
    )
    return [float((statistics < log(threshold)).mean()) for threshold in thresholds]


@pytest.fixture(scope="module")
def local() -> Inputs:
    return structured(LONG, mix=LOCAL, dtype=np.float32)


@pytest.fixture(scope="module")
def sink_heavy() -> Inputs:
    return structured(LONG, mix=SINK_HEAVY, dtype=np.float32)


def test_w1_follows_the_published_law(local: Inputs) -> None:
    """λ = 7.6 · exp(8.4 s) / L gives about a share s of skipped tiles."""
    wanted = [0.2, 0.4, 0.6, 0.8]
    thresholds = [7.6 * np.exp(8.4 * share) / LONG.seq for share in wanted]
    assert skip_rates(local, HOPPER, thresholds) == pytest.approx(wanted, abs=0.13)


@pytest.mark.parametrize(
    ("mix", "threshold", "low", "high"),
    [(LOCAL, 0.11, 0.49, 0.72), (SINK_HEAVY, 0.15, 0.33, 0.65)],
    ids=["locality", "sink-heavy"],
)
def test_w1_skips_about_half_for_a_hundredth_of_the_mass(
    mix: Mix, threshold: float, low: float, high: float, request: pytest.FixtureRequest
) -> None:
    inputs = request.getfixturevalue("local" if mix is LOCAL else "sink_heavy")
    rate, mass = sample(inputs, HOPPER, threshold)
    assert 0.005 < mass < 0.02
    assert low < rate < high


def test_w1_is_attended_near_by_and_at_the_sink(local: Inputs) -> None:
    q, k, _ = (x[0, :, 0].astype(np.float64) for x in local)
    scores = q[8192:8200] @ k[:8192].T * LONG.head_dim_qk**-0.5
    far = scores[:, 1024:4096].mean()
    assert scores[:, -16:].mean() > far + 5
    assert scores[:, :4].mean() > far + 4


def test_w1_values_have_equal_variance(local: Inputs) -> None:
    assert local.v.std() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("placement", ["spread", "clustered", "uneven"])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("threshold", [1e-20, 1e-3])
def test_w2_skips_exactly_its_weak_tiles(placement: str, fraction: float, threshold: float) -> None:
    size = Size(1, 1024, 4, 2, 64, 64)
    inputs, weak = constructed(
        size, tile_keys=PORTABLE.block_kv, fraction=fraction, placement=placement
    )
    q, k, v = (x[0] for x in inputs)
    assert weak.mean() == fraction
    assert not weak[:, 0].any()
    result = reference.attention(q, k, v, skip=threshold, geometry=PORTABLE)
    votes_a_tile = result.visited[0] // weak.shape[1]
    per_kv_head = result.skipped.reshape(2, 2)
    assert np.array_equal(per_kv_head, np.repeat(weak.sum(axis=1) * votes_a_tile, 2).reshape(2, 2))
    assert result.dropped_mass.max() < 1e-20
    assert result.margin > 1, "no vote may be close"


def test_w2_reaches_nine_tenths_and_differs_by_placement() -> None:
    weak = {}
    for placement in ("spread", "clustered", "uneven"):
        size = Size(1, 20 * 16, 4, 4, 64, 64)
        _, weak[placement] = constructed(size, tile_keys=16, fraction=0.5, placement=placement)
        _, most = constructed(size, tile_keys=16, fraction=0.9, placement=placement)
        assert most.mean() == 0.9
    changes = {name: np.abs(np.diff(mask.astype(int), axis=1)).sum() for name, mask in weak.items()}
    assert changes["clustered"] < changes["spread"]
    per_head = weak["uneven"].sum(axis=1)
    assert per_head.max() >= per_head.min() + 10
    assert len(set(weak["spread"].sum(axis=1))) == 1


def test_w2_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="placement is 'random'; wanted one of"):
        constructed(Size(1, 64, 1, 1), tile_keys=16, fraction=0.5, placement="random")
    with pytest.raises(ValueError, match=r"fraction is 0\.9; wanted one from 0 to 3/4"):
        constructed(Size(1, 64, 1, 1), tile_keys=16, fraction=0.9)
    with pytest.raises(ValueError, match="seq of 65, no multiple of 16"):
        constructed(Size(1, 65, 1, 1), tile_keys=16, fraction=0.5)
    with pytest.raises(ValueError, match="head_dim_qk of 48"):
        structured(Size(1, 64, 1, 1, 48, 48))


def test_flops_of_a_causal_call_are_half() -> None:
    size = Size(2, 100, 8, 2, 192, 128)
    assert size.flops(causal=False) == 2 * (192 + 128) * 2 * 8 * 100 * 100
    assert size.flops(causal=True) == size.flops(causal=False) / 2


@pytest.fixture(scope="module")
def small() -> Inputs:
    return structured(Size(2, 300, 4, 2, 64, 40))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_exact_rows_are_rows_of_the_reference(small: Inputs, causal: bool) -> None:
    exact = exact_rows(small, causal)
    whole = reference.prefill(*small, causal=causal).out
    assert exact.error(whole) < 1e-12
    assert exact.error(np.zeros_like(whole)) == pytest.approx(1.0)
    assert exact.error(whole * 1.01) == pytest.approx(0.01)
    assert {request for request, *_ in exact.places} == {0, 1}
    ends = [end for *_, end in exact.places]
    assert max(ends) == 300
    whole[exact.places[0][0], exact.places[0][2], exact.places[0][1]] = np.nan
    assert not exact.error(whole) < 1e9, "NaN must not pass"


def test_error_beyond_the_bound_of_what_was_left_out(small: Inputs) -> None:
    """‖y − ŷ‖ ≤ 2 δ max‖v‖ holds for skipping and for nothing else."""
    exact: ExactRows = exact_rows(small, True)
    geometry = replace(PORTABLE, block_kv=16)
    skip = cuattn.SkipSoftmax(threshold=0.3)
    skipped = reference.prefill(*small, causal=True, skip_softmax=skip, geometry=geometry)
    dense = reference.prefill(*small, causal=True)
    dropped = dropped_mass(skipped.lse, dense.lse, xp=np)
    assert dropped == pytest.approx(skipped.dropped_mass, abs=1e-12)
    assert 0 < skipped.skipped.sum() < skipped.visited.sum()
    assert exact.error(skipped.out) > 1e-4
    assert exact.beyond_bound(skipped.out, dropped) < 1e-12
    assert exact.beyond_bound(-dense.out, dropped) > 0.1
    assert not exact.beyond_bound(dense.out * np.nan, dropped) < 1e-2


class FakeCuda:
    """Events on a clock that the timed function moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.flushes = 0

    def xp(self) -> SimpleNamespace:
        clock = self

        class Event:
            def record(self) -> None:
                self.at = clock.now

            def synchronize(self) -> None:
                pass

        def memset_async(value: int, size: int) -> None:
            assert (value, size) == (0, 256 << 20)
            clock.flushes += 1
            clock.now += 1000.0  # the flush must not be part of any time

        cuda = SimpleNamespace(Event=Event, get_elapsed_time=lambda start, end: end.at - start.at)
        flush = SimpleNamespace(data=SimpleNamespace(memset_async=memset_async), nbytes=256 << 20)
        return SimpleNamespace(cuda=cuda, uint8=np.uint8, empty=lambda *_, **__: flush)


@pytest.mark.parametrize(
    ("duration", "runs"), [(1.0, 21), (100.0, 11), (5000.0, 4)], ids=["fast", "slow", "very slow"]
)
def test_stopwatch_takes_the_median_of_flushed_runs(duration: float, runs: int) -> None:
    fake, count = FakeCuda(), 0

    def run() -> None:
        nonlocal count
        count += 1
        fake.now += 50 * duration if count in (1, 3) else duration  # warm-up, one disturbance

    ms = Stopwatch(fake.xp()).median_ms(run, repeats=20, budget_ms=1000.0)
    assert ms == duration
    assert count == runs
    assert fake.flushes == runs - 1
