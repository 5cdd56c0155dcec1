"""The decode kernel in race mode, in every order, and in the tiles of every architecture.

The whole tables of cases run in the emulator too, through the fixture `device`, where there is no
GPU: see `test_decode.py`, `test_decode_skip.py` and `test_decode_mass.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from cases import Call, requests_of
from compare import assert_same_bits
from conftest import Emulated
from decode_cases import LONG, RAGGED, DecodeCase, call_of, decode_call, problem_of_decode
from skip_checks import check_against_replay
from test_emulator_prefill import ORDERS, card

import cuattn
from cuattn import _device, _heuristics, _shipped, emulator
from cuattn._records import Device

pytestmark = [pytest.mark.emulator, pytest.mark.usefixtures("short_lines")]

ONE = replace(_device.EMULATOR, multiprocessors=1)  # few blocks, so that each has several items
CLOSE = 1e-4  # a vote nearer to its bound than this may go either way


@dataclass(frozen=True)
class Race:
    """A call, how it skips, and what it is planned for."""

    call: Call
    skip: dict[str, Any] = field(default_factory=dict)
    device: Device = _device.EMULATOR


class On(Emulated):
    """The emulator, with plans for another device than usual."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def current(self) -> Device:
        return self.device


def dense(device: Device = _device.EMULATOR, **fields: Any) -> Race:
    return Race(decode_call(DecodeCase(**fields)), device=device)


def skipping(case: DecodeCase, device: Device = _device.EMULATOR, **skip: Any) -> Race:
    return Race(decode_call(case), skip, device)


def heavy_in_the_middle(case: DecodeCase) -> Call:
    """Some keys there have larger scores than every seed."""
    requests = requests_of(case, case.rng)
    for _, k, _ in requests:
        k[len(k) // 2] *= 4
    return call_of(case, requests)


def ones(*kv_lens: int) -> tuple[tuple[int, int], ...]:
    return tuple((1, kv_len) for kv_len in kv_lens)


# Every branch of the kernel between them.
RACES: dict[str, Race] = {
    "usual": dense(),
    "tall": dense(lengths=((5, 100), (5, 203)), form="tokens", q_heads=24, kv_heads=1),
    "large-head": dense(d_qk=128, d_v=128),
    "unequal-heads": dense(d_qk=192, d_v=128, pair=True),
    "largest-head": dense(d_qk=256, d_v=256, page_size=8),
    "odd-head": dense(d_qk=40, d_v=40, q_heads=6),
    "fp16-window": dense(
        dtype="float16", window_left=70, lengths=((4, 100), (4, 203)), form="tokens"
    ),
    "soft-cap-sinks": dense(soft_cap=20.0, sinks=True),
    "float32-out": dense(out_dtype="float32", scale=0.3, out_scale=2.5, device_scalars=True),
    "ragged": dense(lengths=RAGGED, form="ragged"),
    "ragged-NHD-window": dense(
        lengths=RAGGED, form="ragged", layout="NHD", page_size=32, window_left=50
    ),
    "page-128": dense(page_size=128, lengths=ones(127, 300)),
    "page-256": dense(page_size=256, pair=True, lengths=ones(255, 300)),
    "splits": dense(lengths=ones(2000, 0, 33)),
    "splits-ragged": dense(lengths=((1, 2000), (0, 9), (3, 900)), form="ragged", q_heads=4),
    "many-items": dense(ONE, lengths=ones(30, 70, 200, 0, 2500), q_heads=4),
    "many-equal-items": dense(ONE, lengths=ones(*[90] * 9)),
    "long-walk": dense(ONE, lengths=ones(5700), page_size=8, q_heads=4, kv_heads=1),
}
TALL = replace(LONG, q_heads=24, kv_heads=1, lengths=ones(1300))
# Of the first request far above its own keys, of the second unknown for half of the heads.
SEEDS = np.array([[9.0] * 8, [6.0, -np.inf] * 4], np.float32)
# About half of the votes of each let their tile go.
SKIPS: dict[str, Race] = {
    "threshold": skipping(LONG, threshold=0.009),
    "threshold-tall": skipping(TALL, threshold=0.05),
    "factor-ragged": skipping(
        replace(LONG, lengths=((1, 64), (4, 900), (0, 5), (2, 700), (5, 0)), form="ragged"),
        threshold_scale_factor=30.0,
    ),
    "seeds": skipping(LONG, threshold=0.002, seeds=SEEDS),
    "live": skipping(LONG, threshold=np.array([[0.012] * 8, [0.006] * 8], np.float32)),
    "live-by-request": skipping(LONG, threshold=np.array([0.012, 0.0], np.float32)),
    "certificate": skipping(LONG, threshold=0.009, certificate=True),
    "certificate-cap": skipping(
        replace(LONG, soft_cap=12.0, sinks=True, lengths=ones(900, 40)),
        threshold=0.06,
        certificate=True,
    ),
    "mass": skipping(LONG, max_dropped_mass=0.15, certificate=True),
    "mass-tall": skipping(TALL, max_dropped_mass=0.25),
    "mass-large-head": skipping(replace(LONG, d_qk=128, d_v=128), max_dropped_mass=0.25),
    "mass-beyond-seeds": Race(heavy_in_the_middle(LONG), {"max_dropped_mass": 0.15}),
    "many-items": skipping(
        replace(LONG, q_heads=4, lengths=ones(30, 70, 200, 2500)), ONE, threshold=0.009
    ),
}


def by_order(options: dict[str, Any]) -> str:
    return f"{options['schedule']}-{options['mode']}"


@pytest.mark.parametrize("options", ORDERS, ids=by_order)
@pytest.mark.parametrize("name", RACES)
def test_no_race(name: str, options: dict[str, Any]) -> None:
    race = RACES[name]
    with emulator.enabled(race=True, device=race.device, **options) as launches:
        On(race.device).check(race.call)
    assert [launch.bank_conflicts for launch in launches] == [0]


@pytest.mark.parametrize("options", ORDERS, ids=by_order)
@pytest.mark.parametrize("name", SKIPS)
def test_no_race_with_skipping(name: str, options: dict[str, Any]) -> None:
    race = SKIPS[name]
    with emulator.enabled(race=True, device=race.device, **options) as launches:
        check_against_replay(On(race.device), race.call, margin=CLOSE, **race.skip)
    assert [launch.bank_conflicts for launch in launches] == [0]


@pytest.mark.parametrize("name", ["splits", "splits-ragged", "many-items", "certificate", "mass"])
def test_order_does_not_matter_to_the_bit(name: str) -> None:
    """Which split arrives last, and so merges, is not seen in the result."""
    race = {**RACES, **SKIPS}[name]
    results = []
    for options in ORDERS:
        skip = cuattn.SkipSoftmax(**race.skip) if race.skip else None
        with emulator.enabled(race=True, device=race.device, **options):
            results.append(On(race.device).run(race.call, skip_softmax=skip))
    for other in results[1:]:
        assert_same_bits(other.out, results[0].out, name)
        assert_same_bits(other.lse, results[0].lse, name)
        if results[0].dropped_mass is not None:
            assert_same_bits(other.dropped_mass, results[0].dropped_mass, name)


def tiles() -> list[Any]:
    """One parameter for each geometry that an architecture and head dimensions lead to."""
    found: dict[Any, Any] = {}
    for arch in sorted(_heuristics.SHARED_MEMORY):
        for qk, v in _shipped.HEAD_DIMS:
            for q_heads in (4, 17):  # rows of one tile, and of two
                case = DecodeCase(d_qk=qk, d_v=v, pair=qk != v, q_heads=q_heads, kv_heads=1)
                plan = _heuristics.decode(problem_of_decode(decode_call(case)), card(arch))
                found.setdefault(plan.config, pytest.param(arch, case, id=f"{arch}-{case}"))
    return list(found.values())


@pytest.mark.parametrize(("arch", "case"), tiles())
def test_every_tile_of_every_architecture(arch: str, case: DecodeCase) -> None:
    with emulator.enabled(race=True, device=card(arch)):
        On(card(arch)).check(decode_call(case))


def run_races() -> None:
    """Every one of them once, without looking at the results."""
    for race in (*RACES.values(), *SKIPS.values()):
        skip = cuattn.SkipSoftmax(**race.skip, stats=cuattn.SkipStats()) if race.skip else None
        with emulator.enabled(device=race.device):
            On(race.device).run(race.call, skip_softmax=skip)
