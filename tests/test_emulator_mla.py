"""The kernel of MLA decode in race mode, in every order.

The whole table of cases runs in the emulator too, through the fixture `hopper`, where there is no
GPU: see `test_mla_decode.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from compare import assert_same_bits
from mla_cases import MLA, RAGGED, SHORT, MlaCase, mla_call, ones
from skip_checks import check_against_replay
from test_emulator_decode import CLOSE, ONE, On, Race, by_order
from test_emulator_prefill import ORDERS

import cuattn
from cuattn import _device, _heuristics, emulator
from cuattn._records import Device, Plan

pytestmark = [pytest.mark.emulator, pytest.mark.usefixtures("short_lines")]

THREE = replace(ONE, multiprocessors=3)  # requests are cut, and blocks have several items
# Items of no tile, of one and of two; parts of requests, one of them of no tile.
MIXED = MlaCase(lengths=ones(700, 30, 0, 1, 260, 64), q_heads=65)
EARLY = MlaCase(lengths=((90, 150), (90, 95)), form="tokens", q_heads=2)


def dense(device: Device = _device.EMULATOR, **fields: Any) -> Race:
    return Race(mla_call(MlaCase(**fields)), device=device)


# Every branch of the kernel between them.
RACES: dict[str, Race] = {
    "usual": dense(),
    "tokens": dense(lengths=((4, 130),), q_heads=20, form="tokens", scale=0.1, out_scale=0.5),
    "ragged-page-16": dense(lengths=RAGGED, form="ragged", page_size=16, q_heads=20, sinks=True),
    "fp16": dense(dtype="float16", lengths=ones(0, 203), q_heads=1),
    "page-32": dense(page_size=32, lengths=ones(161)),
    "page-128": dense(page_size=128, lengths=((2, 200),), form="tokens"),
    "float32-out": dense(
        out_dtype="float32",
        scale=0.1,
        out_scale=2.5,
        device_scalars=True,
        lengths=ones(200),
    ),
    "splits": dense(lengths=ones(600, 0, 33), sinks=True),
    "splits-page-16": dense(lengths=ones(520), page_size=16, q_heads=65),
    "splits-float32-out": dense(lengths=ones(520), out_dtype="float32", out_scale=2.5),
    "many-items": dense(ONE, lengths=ones(30, 130, 0, 65, 200)),
    "many-items-ragged": dense(ONE, lengths=RAGGED, form="ragged"),
    "many-splits": Race(mla_call(MIXED), device=THREE),
    "many-splits-early": Race(mla_call(EARLY), device=THREE),
    "merged-apart": dense(lengths=ones(1000), q_heads=65),
    "chosen": dense(top_k=128, lengths=ones(0, 40, 200), q_heads=128, page_size=16),
    "chosen-ragged": dense(top_k=64, lengths=RAGGED, form="ragged", q_heads=40, sinks=True),
    "chosen-splits": dense(top_k=640, lengths=((2, 700),), form="tokens", q_heads=65),
    "chosen-one-split": dense(ONE, top_k=512, lengths=ones(500), q_heads=64),
}
# Votes, records of rows, and stages that nobody multiplies.
SKIPS: dict[str, Race] = {
    "threshold": Race(mla_call(SHORT), {"threshold": 0.3}, ONE),
    "mass": Race(mla_call(SHORT), {"max_dropped_mass": 0.1, "certificate": True}),
    "mass-one-split": Race(mla_call(SHORT), {"max_dropped_mass": 0.1, "certificate": True}, ONE),
    "many-splits": Race(
        mla_call(replace(MIXED, data="structured", sinks=True)), {"threshold": 0.3}, THREE
    ),
}


@pytest.mark.parametrize("options", ORDERS, ids=by_order)
@pytest.mark.parametrize("name", RACES)
def test_no_race(name: str, options: dict[str, Any]) -> None:
    race = RACES[name]
    with emulator.enabled(race=True, device=race.device, **options) as launches:
        On(race.device).check(race.call)
    assert [launch.bank_conflicts for launch in launches] == [0] * (1 + (name == "merged-apart"))


@pytest.mark.parametrize("options", ORDERS, ids=by_order)
@pytest.mark.parametrize("name", SKIPS)
def test_no_race_with_skipping(name: str, options: dict[str, Any]) -> None:
    race = SKIPS[name]
    with emulator.enabled(race=True, device=race.device, **options) as launches:
        check_against_replay(On(race.device), race.call, margin=CLOSE, **race.skip)
    assert [launch.bank_conflicts for launch in launches] == [0]


@pytest.mark.parametrize("name", ["splits", "splits-page-16", "many-items"])
def test_order_does_not_matter_to_the_bit(name: str) -> None:
    """Which split arrives last, and so merges, is not seen in the result."""
    race = RACES[name]
    results = []
    for options in ORDERS:
        with emulator.enabled(device=race.device, **options):
            results.append(On(race.device).run(race.call))
    for other in results[1:]:
        assert_same_bits(other.out, results[0].out, name)
        assert_same_bits(other.lse, results[0].lse, name)


@pytest.mark.parametrize("options", [{}, SKIPS["threshold"].skip, SKIPS["mass"].skip], ids=str)
def test_who_takes_an_item_is_not_seen(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block takes all items, or two share them, or each has a block of its own."""
    call = SKIPS["many-splits"].call
    results, seen = [], []
    for blocks in (1, 2, 1 << 20):

        def plan(blocks: int = blocks, **given: Any) -> Plan:
            return Plan(**{**given, "grid": (min(blocks, given["items"]), 1, 1)})

        monkeypatch.setattr(_heuristics, "Plan", plan)
        _heuristics.mla_decode.cache_clear()
        skip = cuattn.SkipSoftmax(**options, stats=cuattn.SkipStats()) if options else None
        with emulator.enabled(race=True, schedule=5, device=THREE):
            results.append(On(THREE).run(call, skip_softmax=skip))
        seen.append(skip and (skip.stats.visited, skip.stats.skipped))
    assert seen[1:] == seen[:-1] and (not options or 0 < seen[0][1] < seen[0][0])
    for other in results[1:]:
        assert_same_bits(other.out, results[0].out, call.case)
        assert_same_bits(other.lse, results[0].lse, call.case)
        if options.get("certificate"):
            assert_same_bits(other.dropped_mass, results[0].dropped_mass, call.case)


def test_races_need_no_kernels_of_their_own() -> None:
    """g++ takes longer than all of them."""
    cases = [[race.call.case for race in RACES.values()], MLA]
    of_races, of_table = ({(c.dtype, c.out_dtype, c.page_size) for c in table} for table in cases)
    assert of_races <= of_table


def run_races() -> None:
    """Every one of them once, without looking at the results."""
    for race in (*RACES.values(), *SKIPS.values()):
        skip = cuattn.SkipSoftmax(**race.skip, stats=cuattn.SkipStats()) if race.skip else None
        with emulator.enabled(device=race.device):
            On(race.device).run(race.call, skip_softmax=skip)
