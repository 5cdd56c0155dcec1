"""Hopper's prefill kernel in the emulator: in race mode, in every order, votes counted exactly.

On a GPU that has its instructions the whole tables run, of `test_prefill.py` and `test_skip.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import RAGGED, USUAL, Call, Case, batched, paged, problem_of, ragged
from compare import assert_same_bits
from skip_checks import check_against_replay
from test_emulator_decode import ONE, On, Race, by_order
from test_emulator_prefill import ORDERS, SMALL, UNEVEN

import cuattn
from cuattn import _device, _heuristics, _params, _sources, emulator
from cuattn._records import Device

TWO = replace(ONE, multiprocessors=2)

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.usefixtures("prefill_kernel"),
    pytest.mark.parametrize("prefill_kernel", ["hopper"], indirect=True, ids=[""]),
]


def race(build: Any, case: Case, device: Device = _device.EMULATOR, **skip: Any) -> Race:
    return Race(build(case), skip, device)


LARGE = replace(SMALL, d_qk=128, d_v=128)
# Requests with rows for one warp-group only, without rows, without keys, and of several tiles.
MIXED = replace(SMALL, lengths=(*UNEVEN, (200, 350)))
# Every branch of the kernel between them.
RACES: dict[str, Race] = {
    "usual": race(batched, replace(LARGE, lengths=((150, 300),))),
    "ragged-window-sinks": race(
        ragged, replace(MIXED, d_qk=128, d_v=128, window_left=70, sinks=True), TWO
    ),
    "many-items": race(batched, replace(LARGE, lengths=((300, 300),) * 2, causal=False), ONE),
    "three-consumers": race(ragged, MIXED, ONE),
    "packed-group-3": race(ragged, replace(MIXED, q_heads=6, kv_heads=2), ONE),
    "soft-cap-fp16": race(batched, replace(SMALL, dtype="float16", soft_cap=20.0)),
    "float32-out": race(
        batched,
        replace(
            LARGE, lengths=((70, 300),), out_dtype="float32", out_scale=2.5, device_scalars=True
        ),
    ),
    "unequal-heads": race(batched, replace(SMALL, d_qk=192, d_v=128, poison="huge")),
    "odd-heads": race(batched, replace(SMALL, d_qk=72, d_v=88)),
    "square-heads": race(paged, replace(MIXED, d_qk=192, d_v=192, page_size=64)),
    "largest-heads": race(batched, replace(SMALL, d_qk=256, d_v=256)),
    "paged": race(paged, replace(MIXED, page_size=8), TWO),
    "paged-NHD-window": race(
        paged, replace(MIXED, layout="NHD", page_size=256, window_left=40), ONE
    ),
}
UNLIKE = replace(SMALL, data="structured", scale=0.25)
SKIPS: dict[str, Race] = {
    "skip": race(batched, replace(UNLIKE, lengths=((300, 900),)), threshold=0.4),
    "skip-ragged": race(
        ragged,
        replace(UNLIKE, lengths=((7, 64), (250, 900), (0, 5), (1, 640), (5, 0)), window_left=500),
        TWO,
        threshold_scale_factor=300.0,
        certificate=True,
    ),
    "skip-float32": race(
        batched,
        replace(UNLIKE, lengths=((200, 900),), d_qk=128, d_v=128, out_dtype="float32"),
        threshold=0.4,
        certificate=True,
    ),
}


def test_the_kernel_is_the_one_asked_for(prefill_kernel: str) -> None:
    for one in (*RACES.values(), *SKIPS.values()):
        plan = _heuristics.prefill(problem_of(one.call), one.device)
        assert plan.kernel == "fmha_sm90"


@pytest.mark.parametrize("options", ORDERS, ids=by_order)
@pytest.mark.parametrize("name", RACES)
def test_no_race(name: str, options: dict[str, Any]) -> None:
    one = RACES[name]
    with emulator.enabled(race=True, device=one.device, **options) as launches:
        On(one.device).check(one.call)
    assert [launch.bank_conflicts for launch in launches] == [0]


@pytest.mark.parametrize("options", ORDERS, ids=by_order)
@pytest.mark.parametrize("name", SKIPS)
def test_no_race_with_skipping(name: str, options: dict[str, Any]) -> None:
    one = SKIPS[name]
    with emulator.enabled(race=True, device=one.device, **options):
        check_against_replay(On(one.device), one.call, **one.skip)


# What long full attention gets, at small lengths.
TALL: dict[str, Race] = {
    "tall": race(batched, replace(LARGE, lengths=((200, 300),) * 2, causal=False, q_heads=1), ONE),
    "tall-skip": race(
        batched,
        replace(UNLIKE, d_qk=128, d_v=128, lengths=((200, 900),), causal=False),
        threshold=0.4,
        certificate=True,
    ),
}


@pytest.fixture
def tall(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the plans of long full attention be those of any."""
    monkeypatch.setattr(_heuristics, "HOPPER_LONG", 0)
    _heuristics.hopper_prefill.cache_clear()
    yield
    _heuristics.hopper_prefill.cache_clear()


@pytest.mark.usefixtures("tall")
@pytest.mark.parametrize("options", ORDERS, ids=by_order)
@pytest.mark.parametrize("name", TALL)
def test_no_race_in_tall_items(name: str, options: dict[str, Any]) -> None:
    one = TALL[name]
    assert _heuristics.prefill(problem_of(one.call), one.device).config.block_kv == 80
    with emulator.enabled(race=True, device=one.device, **options):
        if one.skip:
            check_against_replay(On(one.device), one.call, **one.skip)
        else:
            On(one.device).check(one.call)


@pytest.mark.parametrize("name", SKIPS)
def test_a_threshold_that_skips_nothing_gives_the_dense_bits(name: str) -> None:
    one = SKIPS[name]
    with emulator.enabled(race=True, device=one.device):  # so is all else: fewer to compile
        device = On(one.device)
        dense = device.check(one.call)
        kept = device.run(one.call, skip_softmax=cuattn.SkipSoftmax(threshold=1e-30))
        some = device.run(one.call, skip_softmax=cuattn.SkipSoftmax(threshold=0.5))
    assert_same_bits(kept.out, dense.out, name)
    assert_same_bits(kept.lse, dense.lse, name)
    assert (some.lse != dense.lse).any(), "this data has nothing to skip, the test shows nothing"


@pytest.mark.parametrize("name", ["usual", "many-items", "paged"])
def test_order_does_not_matter_to_the_bit(name: str) -> None:
    """Which block takes which item is not seen in the result."""
    one, results = RACES[name], []
    for options, places in zip(ORDERS, (1, 3, 132), strict=True):
        device = replace(one.device, multiprocessors=places)
        with emulator.enabled(race=True, device=device, **options):
            results.append(On(device).run(one.call))
    for other in results[1:]:
        assert_same_bits(other.out, results[0].out, name)
        assert_same_bits(other.lse, results[0].lse, name)


TABLE: list[Call] = [
    *(batched(replace(USUAL, lengths=(n,) * 2)) for n in ((1, 1024), (203, 113), (799, 3))),
    batched(replace(USUAL, lengths=((193, 193),) * 2, q_heads=10)),
    batched(replace(USUAL, scale=4000.0, causal=False)),
    batched(replace(USUAL, lengths=((300, 1024),), window_left=100, poison="huge")),
    batched(replace(USUAL, memory="qkv", lengths=((113, 113),) * 2)),
    batched(replace(USUAL, memory="bhsd", sinks=True)),
    ragged(replace(USUAL, lengths=tuple((1 + i % 5, 3 + 7 * i) for i in range(70)))),
    paged(replace(USUAL, lengths=RAGGED, pair=True)),
    paged(replace(USUAL, lengths=RAGGED, page_size=128, window_left=50)),
]


@pytest.mark.parametrize("call", TABLE, ids=lambda call: f"{call.function}-{call.case}")
def test_matches_reference(device: Any, call: Call) -> None:
    device.check(call)


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
def test_a_maximum_that_lags_behind(out_dtype: str) -> None:
    """A late key outweighs all others, by less than 2⁸, so that its own weight may be rounded.

    It is nearly all of the row: a fine output must not show that rounding.
    """
    call = batched(Case(lengths=((70, 640),), causal=False, memory="packed", out_dtype=out_dtype))
    q, k, _ = call.arrays
    scores = np.full(640, -6.0)
    scores[[0, 200]] = 0.0, 5.4  # tile 0 comes first, tile 1 last
    k *= np.float32(0.05).astype(k.dtype)
    q[..., 0] = 8  # times the scale of 1 / 8
    k[..., 0] = scores[None, :, None]
    with emulator.enabled(race=True):
        On(_device.EMULATOR).check(call)


def test_queries_of_the_next_request_change_no_bit() -> None:
    """They are in the tile of the last rows before them, but raise no maxima of these."""
    call = ragged(
        Case(lengths=((8, 640), (60, 64)), q_heads=1, kv_heads=1, causal=False, dtype="float16")
    )
    q, results = call.arrays[0], []
    q[:8] *= 3
    for factor in (1, 8):
        q[8:] *= factor
        with emulator.enabled(race=True):
            results.append(On(_device.EMULATOR).run(call))
    one, other = results
    assert_same_bits(one.out[:8], other.out[:8], "of the first request")
    assert_same_bits(one.lse[:8], other.lse[:8], "of the first request")
    assert (one.lse[8:] != other.lse[8:]).any(), "nothing has changed, the test shows nothing"


FIND_ITEMS = """
#include <attention/schedule.cuh>
struct Parameters {
  AttentionParams attention;
  int32* found;
};
KERNEL void find_items(const __grid_constant__ Parameters p) {
  const ItemOrder<128> order(p.attention);
  for (int32 item = 0; item < p.attention.items; ++item) {
    const Work work = order.find(item);
    const int32 place[] = {work.request, work.head, work.first_token};
    if (lane_index() < 3) p.found[3 * item + lane_index()] = place[lane_index()];
  }
}
"""


@pytest.mark.parametrize(
    ("kv_len", "section"),
    [(1 << 30, 1), (16384, 4), (9000, 7), (100, 12)],  # heads whose K and V fill 32 MiB
)
def test_items_come_longest_first_in_sections_of_heads(kv_len: int, section: int) -> None:
    q_len, heads, batch = 300, 6, 2
    call = batched(Case(lengths=((q_len, 1),) * batch, q_heads=heads, kv_heads=heads))
    problem = replace(problem_of(call), kv_len=kv_len, head_dim_qk=128, head_dim_v=128)
    plan = _heuristics.prefill(problem, _device.EMULATOR)
    numbers = {"out": (1, 1, 1, 1), "lse": (1, 1, 1), "tables": 0}
    rest = _params.pack_rest(problem, plan, **numbers, scale=1.0, out_scale=1.0, threshold=0.0)
    with emulator.Memory() as memory:
        found = memory.add("found", np.full((plan.items, 3), -1, np.int32), writable=True)
        pointers = bytes(_params.POINTER_BYTES.size)
        sources = {**_sources.read(), "find_items.cu": FIND_ITEMS}
        emulator.run(
            "find_items", "", 1, 32, pointers + rest + struct.pack("Q", found), sources=sources
        )
        seen = memory["found"].tolist()
    assert seen == [
        [head // heads, head % heads, first_token]
        for first in range(0, batch * heads, section)
        for first_token in (256, 128, 0)
        for head in range(first, min(first + section, batch * heads))
    ]


def run_races() -> None:
    """Every one of them once, without looking at the results."""
    _heuristics.HOPPER_PREFILL = True
    for one in (*RACES.values(), *SKIPS.values()):
        skip = cuattn.SkipSoftmax(**one.skip, stats=cuattn.SkipStats()) if one.skip else None
        with emulator.enabled(device=one.device):
            On(one.device).run(one.call, **({"skip_softmax": skip} if skip else {}))
    _heuristics.HOPPER_PREFILL = False
