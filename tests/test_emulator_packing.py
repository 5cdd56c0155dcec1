"""Requests of few tokens, whose heads share blocks: results, votes, and that blocks are fewer.

In race mode, in every order in turn, with both kernels of prefill.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import RAGGED, USUAL, Call, batched, paged, problem_of, ragged
from compare import assert_same_bits
from numpy.typing import NDArray
from skip_checks import SAFE_MARGIN, check_against_replay, numpy_skip, threshold_for
from test_emulator_decode import ONE, On
from test_emulator_prefill import ORDERS

from cuattn import _device, _heuristics, _params, _sources, emulator
from cuattn._records import Geometry

Array = NDArray[Any]

TWO = replace(ONE, multiprocessors=2)  # so that blocks of Hopper's kernel have several items
DEVICES = {"portable": _device.EMULATOR, "hopper": TWO}

both = pytest.mark.parametrize("prefill_kernel", DEVICES, indirect=True)
pytestmark = [pytest.mark.emulator]

GQA = replace(USUAL, q_heads=8, kv_heads=2)
# Packed and not, at the limits of both kernels and above, without tokens, without keys.
MIXED = ((7, 64), (64, 150), (1, 129), (65, 70), (0, 5), (97, 110), (96, 96), (5, 0))
CASES: dict[str, Call] = {
    "usual": batched(replace(GQA, lengths=((20, 150),) * 2)),
    "full-sinks": batched(replace(GQA, lengths=((3, 203),) * 2, causal=False, sinks=True)),
    "window-sinks": ragged(replace(GQA, lengths=MIXED, window_left=30, sinks=True)),
    "one-token": ragged(replace(GQA, lengths=((1, 1), (1, 70), (1, 300)), q_heads=16)),
    "group-2": ragged(replace(GQA, lengths=MIXED, q_heads=4)),
    "group-3-paged": paged(replace(GQA, lengths=RAGGED, q_heads=6)),
    "group-5": batched(replace(GQA, lengths=((40, 40),) * 2, q_heads=5, kv_heads=1, memory="qkv")),
    "group-48": ragged(replace(GQA, lengths=((5, 90), (2, 70)), q_heads=48, kv_heads=1)),
    "group-72": ragged(replace(GQA, lengths=((2, 9),), q_heads=72, kv_heads=1)),
    "by-head": batched(replace(GQA, lengths=((33, 97),) * 2, memory="bhsd", poison="huge")),
    "wide": ragged(
        replace(GQA, lengths=((64, 130), (30, 40), (80, 90)), q_heads=6, d_qk=128, d_v=128)
    ),
}


def orders(names: Any) -> Any:
    """Parametrize names, each with an order of threads and copies."""
    pairs = [(name, ORDERS[i % len(ORDERS)]) for i, name in enumerate(names)]
    return pytest.mark.parametrize(("name", "options"), pairs, ids=list(names))


def is_packed(call: Call, kernel: str, request: int) -> bool:
    geometry = On(DEVICES[kernel]).geometry(call)
    case = call.case
    return geometry.pack(case.lengths[request][0], case.q_heads // case.kv_heads) > 1


@both
@orders(CASES)
def test_matches_reference(prefill_kernel: str, name: str, options: dict[str, Any]) -> None:
    call, device = CASES[name], DEVICES[prefill_kernel]
    packed = {is_packed(call, prefill_kernel, i) for i in range(len(call.case.lengths))}
    if call.case.lengths == MIXED:
        assert packed == {True, False}
    else:
        assert (True in packed) == (name != "group-72" or prefill_kernel == "portable")
    with emulator.enabled(race=True, device=device, **options) as launches:
        On(device).check(call)
    assert [launch.bank_conflicts for launch in launches] == [0]


# In the tiles that other tests of the two kernels have compiled.
SPECIAL = {
    ("cap-sinks", "portable"): replace(GQA, soft_cap=20.0, sinks=True),
    ("cap-sinks", "hopper"): replace(GQA, soft_cap=20.0, sinks=True, dtype="float16"),
    ("float32", "portable"): replace(GQA, out_dtype="float32", out_scale=2.5),
    ("float32", "hopper"): replace(GQA, out_dtype="float32", out_scale=2.5, d_qk=128, d_v=128),
}


@both
@orders(["cap-sinks", "float32"])
def test_special_results(prefill_kernel: str, name: str, options: dict[str, Any]) -> None:
    call = batched(replace(SPECIAL[name, prefill_kernel], lengths=((40, 150),)))
    assert is_packed(call, prefill_kernel, 0)
    with emulator.enabled(race=True, device=DEVICES[prefill_kernel], **options):
        On(DEVICES[prefill_kernel]).check(call)


LONG = replace(GQA, data="structured", scale=0.25)
SKIPS: dict[str, Call] = {
    "group-4": batched(replace(LONG, lengths=((30, 700),))),
    "group-2-window": ragged(
        replace(LONG, lengths=((50, 640), (130, 500)), q_heads=4, window_left=300)
    ),
    "group-5": ragged(replace(LONG, lengths=((1, 640), (45, 700)), q_heads=10)),
    "group-3": ragged(replace(LONG, lengths=((20, 600), (100, 300), (3, 300)), q_heads=6)),
}


@both
@orders(SKIPS)
def test_skips_the_same_tiles(prefill_kernel: str, name: str, options: dict[str, Any]) -> None:
    call, device = SKIPS[name], On(DEVICES[prefill_kernel])
    assert is_packed(call, prefill_kernel, 0)
    level = threshold_for(call.votes(device.geometry(call)).statistics, 0.4)
    with emulator.enabled(race=True, device=device.device, **options):
        check_against_replay(device, call, threshold=level)


def table_of_thresholds(call: Call, geometry: Geometry) -> Array:
    """λ by request and head, none near a vote that it decides; the second kv head has a λ of 0."""
    statistics = call.votes(geometry).statistics
    for share in np.linspace(0.5, 0.9, 20):
        levels = [threshold_for(statistics[:, h], share + 0.02 * h) for h in range(4)]
        table = np.array([[*levels, *levels[:3], 0.0]], np.float32)
        expected = call.reference(geometry=geometry, skip_softmax=numpy_skip(threshold=table))
        if expected.margin > SAFE_MARGIN:
            return table
    raise AssertionError("every table of thresholds is too close to a vote")


@both
def test_every_head_has_its_own_threshold(prefill_kernel: str) -> None:
    """All heads of a vote must agree: one that never lets a tile go keeps it for the others."""
    call, device = batched(replace(LONG, lengths=((30, 1500),))), On(DEVICES[prefill_kernel])
    table = table_of_thresholds(call, device.geometry(call))
    assert len(np.unique(table)) > 3
    with emulator.enabled(race=True, device=device.device):
        skipped = check_against_replay(device, call, threshold=table)
    assert (skipped[0, :4] > 0).all() and not skipped[0, 4:].any()


@both
def test_votes_count_for_every_head_that_has_a_row(prefill_kernel: str) -> None:
    """Of 3 tokens of 24 heads, the last 8 heads have a row in each of three votes of 32 rows.

    The others have two rows in one of them.  Of 64 rows, one vote has two tokens, one the last.
    """
    call = batched(replace(LONG, lengths=((3, 900),), q_heads=24, kv_heads=1, causal=False))
    device = On(DEVICES[prefill_kernel])
    level = threshold_for(call.votes(device.geometry(call)).statistics, 0.5)
    with emulator.enabled(race=True, device=device.device):
        check_against_replay(device, call, threshold=level)
    geometry = device.geometry(call)
    votes = call.votes(geometry).visited[0] // -(-900 // geometry.block_kv)
    assert votes.tolist() == ([2] * 24 if prefill_kernel == "hopper" else [2] * 16 + [3] * 8)


@both
def test_bits_are_those_of_the_request_alone(prefill_kernel: str) -> None:
    """Rows behind a request's last are of the next one, whose queries are far larger here."""
    case = replace(GQA, lengths=((70, 500), (9, 300), (100, 400), (40, 350)), q_heads=4)
    call, device = ragged(case), On(DEVICES[prefill_kernel])
    q, k, v, cu_q, cu_kv = call.arrays
    for i in (1, 3):
        q[cu_q[i] : cu_q[i + 1]] *= q.dtype.type(40)
    q[cu_q[4] :] = q.dtype.type(40)
    with emulator.enabled(race=True, device=device.device):
        together = device.run(call)
        for i, (tokens, keys) in enumerate(case.lengths):
            rows = slice(cu_q[i], cu_q[i + 1])
            alone = [x[cu[i] : cu[i + 1]][None] for x, cu in ((q, cu_q), (k, cu_kv), (v, cu_kv))]
            options = {name: x for name, x in call.options.items()}
            one = Call(replace(case, lengths=((tokens, keys),)), "prefill", tuple(alone), options)
            result = device.run(one)
            assert_same_bits(together.out[rows], result.out[0], f"request {i}")
            assert_same_bits(together.lse[rows], result.lse[0], f"request {i}")


FIND_WORK = """
#include <attention/schedule.cuh>
struct Parameters {
  AttentionParams attention;
  int32* found;
};
template <int32 block_q, int32 unit>
DEVICE void find(const Parameters& p, int32* found) {
  for (int32 item = 0; item < p.attention.items; ++item) {
    const Work work = find_work<block_q, unit>(p.attention, item);
    const int32 seen[] = {work.exists, work.request, work.head, work.first_token, work.pack};
    if (lane_index() < 5) found[5 * item + lane_index()] = seen[lane_index()];
  }
}
KERNEL void find_work_of_all(const __grid_constant__ Parameters p) {
  const int32 numbers = 5 * p.attention.items;
  find<128, 128>(p, p.found);
  find<128, 64>(p, p.found + numbers);
  find<192, 64>(p, p.found + 2 * numbers);
}
"""


@pytest.mark.parametrize(
    ("q_heads", "kv_heads"), [(4, 2), (3, 1), (8, 2), (7, 1), (72, 1), (130, 1), (3, 3)]
)
def test_every_row_is_of_one_block_and_blocks_are_few(q_heads: int, kv_heads: int) -> None:
    lengths = [q_len for q_len, _ in MIXED] + [300, 33, 32, 31]
    case = replace(
        USUAL, lengths=tuple((n, 1) for n in lengths), q_heads=q_heads, kv_heads=kv_heads
    )
    call, group = ragged(case), q_heads // kv_heads
    problem = problem_of(call)
    plan = _heuristics.portable_prefill(problem, _device.EMULATOR)
    items = plan.grid[0]
    numbers = {"out": (1, 1, 1), "lse": (1, 1), "tables": 0}
    rest = _params.pack_rest(
        problem, replace(plan, items=items), **numbers, scale=1.0, out_scale=1.0, threshold=0.0
    )
    with emulator.Memory() as memory:
        cu_q = memory.add("cu_seqlens_q", call.arrays[3])
        places = [cu_q if name == "cu_seqlens_q" else 0 for name in _params.POINTERS]
        found = memory.add("found", np.full((3, items, 5), -1, np.int32), writable=True)
        params = _params.POINTER_BYTES.pack(*places) + rest + struct.pack("Q", found)
        sources = {**_sources.read(), "find_work_of_all.cu": FIND_WORK}
        emulator.run("find_work_of_all", "", 1, 32, params, sources=sources)
        seen = memory["found"].copy()
    for geometry, works in zip(
        (
            Geometry(128, 1, 1, pack_rows=128),
            Geometry(128, 1, 1, pack_rows=64),
            Geometry(192, 1, 1, pack_rows=64),
        ),
        seen,
        strict=True,
    ):
        expected = []
        for request, q_len in enumerate(lengths):
            pack = geometry.pack(q_len, group)
            assert (pack > 1) == (
                group > 1 and 2 * q_len <= geometry.block_q and group <= geometry.pack_rows
            )
            expected += [
                [1, request, head, token, pack]
                for head in range(0, q_heads, pack)
                for token in range(0, q_len, geometry.tokens(pack))
            ]
        existing = works[works[:, 0] == 1].tolist()
        assert sorted(existing) == sorted(expected)
        if group > 1 and group <= geometry.pack_rows:
            unpacked = sum(-(-q_len // geometry.block_q) for q_len in lengths) * q_heads
            assert len(existing) < 0.9 * unpacked
