"""Portable MLA decode: chosen keys and other rows everywhere, all of it on other architectures.

The latter in the emulator, in race mode, whose results are as good as any.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from call_checks import assert_same, with_arrays
from cases import view_of
from compare import assert_same_bits
from mla_cases import (
    PAIRS,
    RAGGED,
    SHORT,
    SPARSE,
    UNEVEN,
    USUAL,
    MlaCase,
    mla_call,
    ones,
    problem_of_mla,
)
from skip_checks import check_against_replay
from test_emulator_decode import CLOSE, On, by_order
from test_emulator_prefill import ORDERS, card
from test_mla_decode import assert_refusal, refused

import cuattn
from cuattn import _check, _check_mla, _heuristics, emulator
from cuattn._records import Plan, SkipMode


@pytest.mark.parametrize("case", [*SPARSE, *PAIRS], ids=str)
def test_matches_reference(device: Any, case: MlaCase) -> None:
    device.check(mla_call(case))


def test_tables_are_not_read_beside_a_list(device: Any) -> None:
    call = mla_call(SPARSE[0])
    garbage = np.full((2, 1), 2147480000, np.int32)
    assert_same(device, call, with_arrays(call, tables=garbage))
    assert_same(device, call, replace(call, arrays=(*call.arrays[:2], None, call.arrays[3])))


def test_a_list_of_one_token_has_two_forms(device: Any) -> None:
    call = mla_call(SPARSE[0])
    options = {**call.options, "sparse_indices": call.options["sparse_indices"][:, None]}
    assert_same(device, call, replace(call, options=options))


def test_a_token_does_not_know_its_batch(device: Any) -> None:
    """With `batch_invariant`, lists are cut by their own lengths."""
    call = mla_call(SPARSE[2])
    both = device.run(call, batch_invariant=True)
    doubled = replace(
        call,
        arrays=(
            np.repeat(call.arrays[0], 2, 0),
            call.arrays[1],
            None,
            np.repeat(call.arrays[3], 2),
        ),
        options={
            **call.options,
            "sparse_indices": np.repeat(call.options["sparse_indices"], 2, 0),
        },
    )
    result = device.run(doubled, batch_invariant=True)
    for request in range(2):
        assert_same_bits(result.out[request], both.out[0], f"request {request}")


def test_pages_that_are_all_the_same_one(device: Any) -> None:
    """A stride of 0, which tensor maps cannot have: the portable kernel reads such a cache."""
    call = mla_call(MlaCase(top_k=64, lengths=ones(40)))
    q, cache, tables, lengths = call.arrays
    one = replace(call, options={"scale": 0.1}, arrays=(q, cache, 0 * tables, lengths))
    cache = device.to_device(cache)[:1]
    strides = (0, *cache.strides[1:])
    again = device.xp.lib.stride_tricks.as_strided(cache, (5, *cache.shape[1:]), strides)
    given = (device.to_device(q), again, device.to_device(tables % 5), device.to_device(lengths))
    assert_same_bits(
        device.to_host(cuattn.mla_decode(*given, scale=0.1)), device.run(one).out, "one page"
    )
    layout = replace(
        problem_of_mla(one).k, shape=(5, 1, *cache.shape[1:]), strides=(0, 576, 576, 1)
    )
    plan = _heuristics.mla_decode(replace(problem_of_mla(one), k=layout), card("sm_90a"))
    assert plan.kernel == "mla_decode_sm80"


# --- other architectures -------------------------------------------------------------------------

FLOAT = {"dtype": "float16", "out_dtype": "float32"}
# Few kernels: those of 16 and of 64 rows, for 163 KB; of 32 and of 16 rows, sparse, for 99 KB.
OTHERS: list[tuple[str, MlaCase]] = [
    *(
        ("sm_80", case)
        for case in (
            MlaCase(lengths=ones(0, 1, 63, 64, 65, 130, 300)),
            MlaCase(lengths=ones(2500), sinks=True),
            MlaCase(lengths=ones(33, 700, 0, 255), out_scale=-3.0, page_size=16),
            MlaCase(lengths=ones(7, 8, 9, 75), page_size=8, q_heads=3),
            MlaCase(lengths=ones(300, 256), page_size=256, poison="huge"),
            MlaCase(lengths=ones(*(1 + 3 * i for i in range(33))), q_heads=1),
            MlaCase(lengths=((4, 3), (4, 67)), form="tokens", q_heads=4),
            MlaCase(lengths=RAGGED, form="ragged", q_heads=1, scale=0.05, device_scalars=True),
            MlaCase(lengths=ones(130), scale=1000.0),
            MlaCase(q_heads=128),
            MlaCase(q_heads=65, lengths=ones(600), sinks=True),
            MlaCase(lengths=((4, 130),), q_heads=20, form="tokens", scale=0.1),
            replace(UNEVEN, q_heads=128, lengths=((2, 65), (0, 9), (1, 64), (3, 2))),
        )
    ),
    *(
        ("sm_86", case)
        for case in (
            MlaCase(q_heads=20, lengths=ones(0, 100, 33), **FLOAT),
            MlaCase(q_heads=32, lengths=ones(1000), sinks=True, out_scale=2.0, **FLOAT),
            MlaCase(q_heads=128, lengths=ones(70), **FLOAT),
            MlaCase(top_k=64, lengths=ones(0, 40, 90)),
            MlaCase(top_k=640, lengths=ones(700), sinks=True),
            replace(UNEVEN, top_k=64, page_size=16),
        )
    ),
]


@pytest.mark.emulator
@pytest.mark.usefixtures("short_lines")
@pytest.mark.parametrize(("arch", "case"), OTHERS, ids=str)
def test_other_architectures(arch: str, case: MlaCase) -> None:
    there = card(arch)
    order = ORDERS[zlib.crc32(case.id.encode()) % len(ORDERS)]
    with emulator.enabled(race=True, device=there, **order) as launches:
        On(there).check(mla_call(case))
    assert {launch.bank_conflicts for launch in launches} == {0}


# Votes of 16 rows, of two times 16, and of 32; keys and lists, merged by a block and apart.
# The first token sees a tile less than the second.
FEW = replace(SHORT, lengths=((2, 449), (0, 3)), form="ragged")
LEFT = replace(FEW, lengths=(*FEW.lengths, (1, 120)))  # the last is not cut into splits
SKIPS: list[tuple[str, MlaCase, dict[str, Any]]] = [
    ("sm_80", replace(LEFT, q_heads=8), {"max_dropped_mass": 0.3, "certificate": True}),
    ("sm_86", replace(FEW, q_heads=20, top_k=320), {"threshold": 0.1}),
    ("sm_80", replace(FEW, q_heads=40), {"threshold": 0.1, "certificate": True}),
]


@pytest.mark.emulator
@pytest.mark.parametrize("options", ORDERS[:2], ids=by_order)
@pytest.mark.parametrize(("arch", "case", "skip"), SKIPS, ids=str)
def test_no_race_with_skipping(
    arch: str, case: MlaCase, skip: dict[str, Any], options: dict[str, Any]
) -> None:
    there = card(arch)
    with emulator.enabled(race=True, device=there, **options) as launches:
        check_against_replay(On(there), mla_call(case), margin=CLOSE, **skip)
    assert {launch.bank_conflicts for launch in launches} == {0}


def run_races() -> None:
    """Every one of them once, without looking at the results."""
    for arch, case, *rule in (*OTHERS, *SKIPS):
        skip = cuattn.SkipSoftmax(**rule[0], stats=cuattn.SkipStats()) if rule else None
        with emulator.enabled(device=card(arch)):
            On(card(arch)).run(mla_call(case), skip_softmax=skip)


@pytest.mark.emulator
@pytest.mark.usefixtures("short_lines")
@pytest.mark.parametrize("q_heads", [16, 64])
@pytest.mark.parametrize("options", ORDERS, ids=by_order)
def test_every_order_is_free_of_races_and_makes_the_same_bits(
    options: dict[str, Any], q_heads: int
) -> None:
    one = replace(card("sm_80"), multiprocessors=2)  # blocks do several items
    call = mla_call(MlaCase(lengths=ones(600, 0, 30, 0, 65), q_heads=q_heads))
    with emulator.enabled(race=True, device=one, **options):
        result = On(one).check(call)
    with emulator.enabled(race=True, device=one):
        usual = On(one).run(call)
    assert_same_bits(result.out, usual.out, call.case)
    assert_same_bits(result.lse, usual.lse, call.case)


# --- plans ---------------------------------------------------------------------------------------


def plan_of(case: MlaCase, arch: str, skip: SkipMode | None = None) -> Plan:
    q, cache, tables, lengths = mla_call(case).arrays
    cache = view_of(cache[:, None])
    options = _check.Options(causal=True, scale=0.1, skip=skip)
    given: dict[str, Any] = dict(latent=None, cu_seqlens_q=None, layout="HND", options=options)
    problem = _check_mla.mla_decode(
        q=view_of(q),
        kv_cache=cache,
        block_tables=view_of(tables),
        seq_lens=view_of(lengths),
        **given,
    )
    return _heuristics.mla_decode(replace(problem, sparse=case.top_k > 0), card(arch))


@pytest.mark.parametrize("arch", sorted(_heuristics.SHARED_MEMORY))
def test_hopper_has_its_kernel_and_all_have_the_other(arch: str) -> None:
    hopper = arch == "sm_90a"
    for case in (USUAL, MlaCase(page_size=16), MlaCase(page_size=128, q_heads=128)):
        kernel = _heuristics.MLA_HOPPER if hopper else _heuristics.MLA_PORTABLE
        assert plan_of(case, arch).kernel == kernel
    for case in (MlaCase(page_size=8), MlaCase(page_size=256), MlaCase(d_qk=512)):
        assert plan_of(case, arch).kernel == _heuristics.MLA_PORTABLE
    for heads, size in ((1, 64), (32, 64), (33, 64), (128, 8), (128, 256)):
        plan = plan_of(MlaCase(q_heads=heads, page_size=size, top_k=64), arch)
        gathers = hopper and heads > 32
        assert plan.kernel == (_heuristics.MLA_HOPPER if gathers else _heuristics.MLA_PORTABLE)


@pytest.mark.parametrize("arch", sorted(_heuristics.SHARED_MEMORY))
def test_every_rule_has_a_kernel_with_the_tiles_of_the_dense_one(arch: str) -> None:
    for case in (MlaCase(page_size=8), MlaCase(page_size=8, q_heads=128)):
        dense = plan_of(case, arch)
        for skip in (SkipMode("threshold", False), SkipMode("dropped_mass", False)):
            plan = plan_of(case, arch, skip)
            assert plan.config.skip_softmax and plan.kernel == _heuristics.MLA_PORTABLE
            assert plan.geometry == dense.geometry and plan.grid == dense.grid
            assert plan.geometry.block_rows == plan.config.rows
            assert plan.shared_memory <= _heuristics.SHARED_MEMORY[arch]


@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize("dims", _check_mla.PAIRS)
def test_tiles_fit_every_architecture(dims: tuple[int, int], rows: int) -> None:
    for arch, room in _heuristics.SHARED_MEMORY.items():
        tile = _heuristics.mla_tile(*dims, rows, room)
        assert tile.shared_memory <= room and tile.stages >= 2 and tile.rows <= rows, arch
        assert tile.rows == rows or room < _heuristics.SHARED_MEMORY["sm_80"]


# --- refusals ------------------------------------------------------------------------------------


def lists(*shape: int, dtype: Any = np.int32) -> dict[str, Any]:
    return {"sparse_indices": np.zeros(shape, dtype)}


CU = np.array([0, 1, 2, 3], np.int32)
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"block_tables": None}, "block_tables", "None.*sparse_indices"),
    ({**lists(3, 64), "block_tables": np.zeros((2, 2), np.int32)}, "seq_lens", r"\(3,\).*2"),
    ({**lists(3, 64), "block_tables": np.zeros((3, 2))}, "block_tables", "float64.*int32"),
    ({**lists(3, 64), "seq_lens": np.ones(2, np.int32), "block_tables": None}, "seq_lens", "3"),
    (lists(3, 64, dtype=np.int64), "sparse_indices", "int64.*int32"),
    (lists(2, 64), "sparse_indices", r"\(2, 64\).*3"),
    (lists(3, 2, 64), "sparse_indices", r"\(3, 2, 64\).*3"),
    (lists(64), "sparse_indices", r"\(64,\).*3"),
    (lists(), "sparse_indices", r"\(\)"),
    *((lists(3, n), "sparse_indices", f"{n}.*64.*4096") for n in (0, 32, 100, 4160)),
    ({"sparse_indices": np.zeros((3, 128), np.int32)[:, ::2]}, "sparse_indices", "contiguous"),
    ({"sparse_indices": "words"}, "sparse_indices", "str.*array"),
    ({**lists(2, 64), "cu_seqlens_q": CU}, "sparse_indices", r"\(2, 64\).*3"),
    *(({"latent_dim": x}, "latent_dim", "512, 256") for x in (0, 576, "512", True)),
    ({"latent_dim": 256}, "kv_cache", "576.*256.*wanted"),
]


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("change", "name", "words"), REFUSED, ids=[f"{n}-{i}" for i, (_, n, _) in enumerate(REFUSED)]
)
def test_refusals(change: dict[str, Any], name: str, words: str) -> None:
    said = refused(change)
    assert_refusal(said, name, words)


@pytest.mark.emulator
def test_results_may_not_lie_in_the_list() -> None:
    room = np.zeros((3, 512), np.int32)
    said = refused({"sparse_indices": room, "lse": room.reshape(-1)[:48].view("f4").reshape(3, 16)})
    assert said.startswith("lse shares memory with sparse_indices")


def test_cases_cost_the_emulator_little() -> None:
    assert sum(case.tiles for case in (*SPARSE, *PAIRS)) <= 250
    assert sum(case.tiles for _, case in OTHERS) <= 250
    assert {case.top_k for case in SPARSE} >= {64, 128, 2048}


def test_an_empty_batch_is_legal(device: Any) -> None:
    xp = device.xp
    cache = xp.ones((1, 64, 576), "float16")
    for shape, ends in (((0, 4, 576), None), ((2, 4, 576), xp.zeros(1, "int32"))):
        out = cuattn.mla_decode(
            xp.ones(shape, "float16"),
            cache,
            None,
            xp.zeros(0, "int32"),
            scale=0.1,
            sparse_indices=xp.zeros((shape[0], 64), "int32"),
            cu_seqlens_q=ends,
        )
        assert out.shape == (*shape[:-1], 512)
