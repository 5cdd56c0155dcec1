"""MLA decode against the reference: every shape and option; what it refuses."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from call_checks import (
    assert_same,
    check_out_dtype,
    check_strided_out,
    check_ways_to_ask,
    with_arrays,
)
from cases import DTYPES
from compare import assert_same_bits
from decode_cases import alone
from mla_cases import LENGTHS, MLA, UNEVEN, USUAL, MlaCase, mla_call, ones, problem_of_mla

import cuattn
from cuattn import _call, _heuristics, emulator

TOKENS = MlaCase(lengths=((4, 100), (4, 203)), form="tokens")
LONG = MlaCase(lengths=ones(1, 900, 0, 333))
FORMS = [USUAL, TOKENS, UNEVEN]


@pytest.mark.parametrize("case", MLA, ids=str)
def test_matches_reference(hopper: Any, case: MlaCase) -> None:
    hopper.check(mla_call(case))


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_results_are_the_same_however_they_are_asked_for(hopper: Any, case: MlaCase) -> None:
    check_ways_to_ask(hopper, mla_call(case))


@pytest.mark.parametrize("out_dtype", [None, "float32"])
def test_out_may_have_any_strides(hopper: Any, out_dtype: str | None) -> None:
    check_strided_out(hopper, mla_call(replace(TOKENS, out_dtype=out_dtype)))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_out_dtype_is_a_name_or_a_dtype(hopper: Any, dtype: str) -> None:
    check_out_dtype(hopper, mla_call(USUAL), dtype)


@pytest.mark.parametrize("case", [LONG, UNEVEN], ids=str)
def test_results_repeat_to_the_bit(hopper: Any, case: MlaCase) -> None:
    call = mla_call(case)
    assert_same(hopper, call, call)


@pytest.mark.parametrize("batch_invariant", [None, True])
def test_a_wider_table_changes_nothing(hopper: Any, batch_invariant: bool | None) -> None:
    """How long a request may become has no say in how it is split."""
    call = mla_call(LONG)
    tables = call.arrays[2]
    wide = np.full((len(tables), 40 * tables.shape[1]), 2147480000, np.int32)
    wide[:, : tables.shape[1]] = tables
    assert_same(hopper, call, with_arrays(call, tables=wide), batch_invariant=batch_invariant)


def test_one_token_with_and_without_its_axis(hopper: Any) -> None:
    call = mla_call(replace(LONG, memory="packed"))
    assert_same(hopper, call, with_arrays(call, q=call.arrays[0][:, None]))


@pytest.mark.parametrize("threshold", [None, 1e-30, 0.3])
def test_a_list_of_all_keys_gives_the_dense_bits(hopper: Any, threshold: float | None) -> None:
    """Gathered one by one or by pages: the same tiles, votes and sums."""
    case = MlaCase(lengths=ones(0, 1500, 700), q_heads=64, data="structured", sinks=True)
    call = mla_call(case)
    places = np.repeat(call.arrays[2] * case.page_size, case.page_size, axis=1)
    places = places + np.arange(places.shape[1], dtype=np.int32) % case.page_size
    lists = np.full((len(places), 1536), -1, np.int32)
    lists[:, : places.shape[1]] = places[:, :1536]
    sparse = replace(call, options={**call.options, "sparse_indices": lists})
    results, counted = [], []
    for either in (call, sparse):
        stats = cuattn.SkipStats()
        skip = threshold and cuattn.SkipSoftmax(threshold=threshold, stats=stats, certificate=True)
        results.append(hopper.run(either, skip_softmax=skip))
        counted.append((stats.visited, stats.skipped))
    assert_same_bits(results[1].out, results[0].out, case)
    assert_same_bits(results[1].lse, results[0].lse, case)
    assert counted[1] == counted[0]
    assert (counted[0][1] > 0) == (threshold == 0.3)
    if threshold:
        assert_same_bits(results[1].dropped_mass, results[0].dropped_mass, case)
    if threshold == 1e-30:
        assert_same_bits(results[1].out, hopper.run(sparse).out, case)


@pytest.mark.parametrize(
    "case",
    [
        MlaCase(lengths=ones(1, 2500, 0, 333)),  # the second is split in any case
        replace(TOKENS, lengths=((4, 300), (4, 3), (4, 65)), q_heads=20),
    ],
    ids=str,
)
def test_batch_invariant_results_do_not_know_their_batch(hopper: Any, case: MlaCase) -> None:
    call = mla_call(case)
    together = hopper.check(call, batch_invariant=True)
    for request in range(len(case.lengths)):
        single = hopper.run(alone(call, request), batch_invariant=True)
        assert_same_bits(single.out[0], together.out[request], f"{case}, request {request}")
        assert_same_bits(single.lse[0], together.lse[request], f"{case}, request {request}")


@pytest.mark.parametrize(
    ("case", "skip"),
    [
        (LONG, {}),
        (replace(LONG, sinks=True, data="structured"), {"threshold": 0.5, "certificate": True}),
        (MlaCase(lengths=((2, 300), (0, 33), (5, 700), (0, 0)), form="ragged", q_heads=20), {}),
        (MlaCase(lengths=((2, 700), (2, 0)), form="tokens", q_heads=65, top_k=640), {}),
    ],
    ids=str,
)
def test_who_merges_splits_is_not_seen(
    hopper: Any, monkeypatch: pytest.MonkeyPatch, case: MlaCase, skip: dict[str, Any]
) -> None:
    """The last block of a row, or a kernel of its own: the same bits."""
    call = mla_call(case)
    results = []
    for most, kernels in ((1 << 40, 1), (0, 2)):
        monkeypatch.setattr(_heuristics, "MOST_MERGED", most)
        _heuristics.mla_decode.cache_clear()
        _call._prepared.clear()
        plan = _heuristics.mla_decode(problem_of_mla(call), hopper.current())
        assert len(plan.steps) == kernels and any(plan.partials[:2])
        asked = {"skip_softmax": cuattn.SkipSoftmax(**skip)} if skip else {}
        results.append(hopper.run(call, **asked))
    _heuristics.mla_decode.cache_clear()
    _call._prepared.clear()
    by_block, by_kernel = results
    for one, other in ((by_block.out, by_kernel.out), (by_block.lse, by_kernel.lse)):
        assert_same_bits(other, one, case)
    if skip:
        assert_same_bits(by_kernel.dropped_mass, by_block.dropped_mass, case)
        assert by_block.dropped_mass.any()


@pytest.mark.parametrize("form", ["flat", "tokens", "no tokens", "ragged"])
def test_an_empty_batch_is_legal(hopper: Any, form: str) -> None:
    xp = hopper.xp
    shape = {"flat": (0, 4, 576), "tokens": (0, 3, 4, 576), "ragged": (0, 4, 576)}.get(
        form, (2, 0, 4, 576)
    )
    batch = 2 if form == "no tokens" else 0
    cache = xp.ones((0, 64, 576), "float16")
    tables, lens = xp.zeros((batch, 3), "int32"), xp.zeros(batch, "int32")
    options = {"cu_seqlens_q": xp.zeros(1, "int32")} if form == "ragged" else {}
    out, lse = cuattn.mla_decode(
        xp.ones(shape, "float16"), cache, tables, lens, scale=0.1, **options, return_lse=True
    )
    assert out.shape == (*shape[:-1], 512) and lse.shape == shape[:-1]


@pytest.mark.parametrize("max_pages", [0, 3])
def test_a_cache_without_pages_is_legal_for_requests_without_keys(
    hopper: Any, max_pages: int
) -> None:
    xp = hopper.xp
    cache = xp.ones((0, 64, 576), "float16")
    tables, lens = xp.zeros((2, max_pages), "int32"), xp.zeros(2, "int32")
    q = xp.ones((2, 8, 576), "float16")
    out, lse = cuattn.mla_decode(q, cache, tables, lens, scale=0.1, return_lse=True)
    assert not hopper.to_host(out).any() and np.isneginf(hopper.to_host(lse)).all()


class TestPages:
    """What only a paged cache can get wrong."""

    case = MlaCase(lengths=ones(100, 200, 16), page_size=16)

    def test_lengths_may_have_unit_axes(self, hopper: Any) -> None:
        call = mla_call(self.case)
        lengths = call.arrays[3].reshape(-1, 1, 1, 1)
        assert_same(hopper, call, with_arrays(call, seq_lens=lengths))

    @pytest.mark.parametrize("page_size", [16, 64, 128])
    def test_a_page_outside_the_cache_reads_as_zeros(self, hopper: Any, page_size: int) -> None:
        lengths = [5 * page_size + 3, 2 * page_size, page_size]
        call = mla_call(replace(self.case, lengths=ones(*lengths), page_size=page_size))
        tables = call.arrays[2].copy()
        tables[0, 2], tables[0, 4], tables[1, 0] = 10**6, -1, call.arrays[1].shape[0]
        tables[2, 0] = -(2**31)
        hopper.check(with_arrays(call, tables=tables))

    def test_lengths_end_where_the_table_ends(self, hopper: Any) -> None:
        call = mla_call(replace(self.case, lengths=ones(96, 96, 96)))
        narrow = np.ascontiguousarray(call.arrays[2][:, :6])
        longer = np.array([97, 2**31 - 1, 5000], np.int32)
        assert_same(hopper, call, with_arrays(call, tables=narrow, seq_lens=longer))

    def test_negative_lengths_count_as_zero(self, hopper: Any) -> None:
        call = mla_call(self.case)
        seq_lens = np.array([100, -5, 16], np.int32)
        result = hopper.check(with_arrays(call, seq_lens=seq_lens))
        assert np.isneginf(result.lse[1]).all() and not result.out[1].any()

    def test_requests_may_share_pages(self, hopper: Any) -> None:
        call = mla_call(self.case)
        tables = call.arrays[2].copy()
        tables[0, :7], tables[2, 0] = tables[1, :7], tables[1, 3]
        hopper.check(with_arrays(call, tables=tables))

    @pytest.mark.parametrize("page_size", [16, 64, 128])
    def test_tables_and_caches_may_be_slices(self, hopper: Any, page_size: int) -> None:
        call = mla_call(replace(self.case, page_size=page_size))
        _, cache, tables, _ = call.arrays
        wide = np.full((len(tables), tables.shape[1] + 9), -7, np.int32)
        wide[:, 2 : 2 + tables.shape[1]] = tables
        pages, slots, dim = cache.shape
        whole = np.full((pages, 2, slots + 1, dim + 16), np.nan).astype(cache.dtype)
        whole[:, 1, :slots, 8:-8] = cache
        part = whole[:, 1, :slots, 8:-8]
        view = with_arrays(call, cache=part, tables=wide[:, 2 : 2 + tables.shape[1]])
        assert_same(hopper, call, view)

    def test_strides_of_axes_of_one_mean_nothing(self, hopper: Any) -> None:
        """Of a single page, and of the head axis, which no tensor map could hold."""
        call = mla_call(replace(self.case, lengths=ones(64), page_size=64))
        cache = call.arrays[1][call.arrays[2][0, :1]].copy()
        tables = np.zeros((1, 3), np.int32)
        call = with_arrays(call, cache=cache, tables=tables)
        odd = np.ndarray((1, 64, 1, 576), cache.dtype, cache, 0, (34, 1152, 6, 2))
        assert_same(hopper, call, with_arrays(call, cache=odd))
        hopper.check(call)

    def test_a_head_axis_changes_nothing(self, hopper: Any) -> None:
        call = mla_call(self.case)
        cache = call.arrays[1]
        assert_same(hopper, call, with_arrays(call, cache=cache[:, None]))
        assert_same(hopper, call, with_arrays(call, cache=cache[:, :, None]))


# --- refusals ------------------------------------------------------------------------------------


def good() -> dict[str, Any]:
    """Arguments with nothing wrong."""
    return {
        "q": np.ones((3, 16, 576), np.float16),
        "kv_cache": np.ones((5, 64, 576), np.float16),
        "block_tables": np.zeros((3, 2), np.int32),
        "seq_lens": np.full(3, 70, np.int32),
        "scale": 0.1,
    }


def refused(change: dict[str, Any], **options: Any) -> str:
    """What a changed call is told; nothing is launched."""
    arguments = {**good(), **change}
    names = ("q", "kv_cache", "block_tables", "seq_lens")
    arrays = [arguments.pop(name) for name in names]
    with (
        emulator.enabled(**options) as launches,
        pytest.raises((ValueError, TypeError, RuntimeError)) as caught,
    ):
        cuattn.mla_decode(*arrays, **arguments)
    assert not launches
    return str(caught.value)


def assert_refusal(said: str, name: str, words: str) -> None:
    """One sentence that begins with the argument and says what was wanted."""
    assert re.match(rf"{name}\b.*{words}", said), said
    assert "wanted" in said and "\n" not in said and not said.endswith("."), said


def with_cache(*shape: int) -> dict[str, Any]:
    return {"kv_cache": np.ones(shape, np.float16)}


def with_q(*shape: int) -> dict[str, Any]:
    return {"q": np.ones(shape, np.float16)}


CU = np.array([0, 1, 2, 3], np.int32)
# What is changed, the argument that is named, and words of the sentence in their order.
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (with_q(16, 576), "q", r"\(16, 576\)"),
    (with_q(1, 3, 4, 16, 576), "q", r"\(1, 3, 4, 16, 576\)"),
    ({**with_q(3, 1, 16, 576), "cu_seqlens_q": CU}, "q", r"\(3, 1, 16, 576\).*tokens"),
    (with_q(3, 16, 512), "q", "512.*576"),
    (with_q(3, 16, 584), "q", "584.*576"),
    (with_q(3, 0, 576), "q", "0.*128"),
    (with_q(3, 129, 576), "q", "129.*128"),
    (with_q(4, 16, 576), "q", "4.*3"),
    (with_q(2, 4, 16, 576), "q", "2.*3"),
    ({"q": np.ones((3, 16, 576), np.float32)}, "q", "float32.*bfloat16 or float16"),
    ({"q": np.ones((3, 16, 576), DTYPES["bfloat16"])}, "kv_cache", "float16.*bfloat16"),
    ({"q": np.ones((3, 16, 1152), np.float16)[..., ::2]}, "q", "stride"),
    ({"q": np.ones((3, 16, 580), np.float16)[..., :576]}, "q", "stride 580.*16 bytes"),
    ({"q": "words"}, "q", "str.*array"),
    (with_cache(64, 576), "kv_cache", r"\(64, 576\)"),
    (with_cache(5, 2, 64, 576), "kv_cache", r"\(5, 2, 64, 576\)"),
    (with_cache(5, 1, 1, 64, 576), "kv_cache", r"\(5, 1, 1, 64, 576\)"),
    (with_cache(5, 64, 512), "q", "576.*512"),
    (with_cache(5, 64, 656), "kv_cache", "656.*576"),
    *((with_cache(5, n, 576), "kv_cache", rf"{n}\b.*power of two") for n in (1, 4, 48, 0)),
    (with_cache(5, 48, 1, 576), "kv_cache", "48.*power of two"),
    ({"kv_cache": np.ones((5, 64, 576), np.int8)}, "kv_cache", "int8"),
    ({"kv_cache": np.ones((5, 64, 576), np.float32)}, "kv_cache", "float32"),
    ({"kv_cache": np.ones((5, 64, 1152), np.float16)[..., ::2]}, "kv_cache", "stride"),
    ({"kv_cache": np.ones((5, 64, 580), np.float16)[..., :576]}, "kv_cache", "580.*16 bytes"),
    ({"kv_cache": np.ones((5, 64, 584), np.float16)[..., 4:580]}, "kv_cache", "16"),
    ({"kv_cache": np.ones((5, 64, 576), np.float16)[::-1]}, "kv_cache", "strides.*below 0"),
    ({"kv_cache": (1, 2)}, "kv_cache", "tuple"),
    ({"block_tables": np.zeros((3, 2))}, "block_tables", "float64.*int32"),
    ({"block_tables": np.zeros(3, np.int32)}, "block_tables", r"\(3,\)"),
    ({"seq_lens": np.ones(3, np.int64)}, "seq_lens", "int64.*int32"),
    ({"seq_lens": np.ones(2, np.int32)}, "seq_lens", r"\(2,\).*3"),
    ({"cu_seqlens_q": CU[:3].copy()}, "cu_seqlens_q", "3 elements.*4"),
    ({"cu_seqlens_q": CU.astype(np.int64)}, "cu_seqlens_q", "int64.*int32"),
    *(({"scale": x}, "scale", "wanted") for x in (None, 0, -1.0, math.nan, math.inf, 1e-45)),
    *(({"scale": x}, "scale", "wanted") for x in ("1", True, np.ones(2, np.float32))),
    ({"scale": np.ones(1)}, "scale", "float64.*float32"),
    *(({"out_scale": x}, "out_scale", "wanted") for x in ("1", math.inf, np.ones(3, np.float32))),
    ({"sinks": np.ones(16)}, "sinks", "float64.*float32"),
    ({"sinks": np.ones(8, np.float32)}, "sinks", r"\(8,\).*\(16,\)"),
    ({"out_dtype": "int8"}, "out_dtype", "int8"),
    ({"out_dtype": "float64"}, "out_dtype", "float64"),
    ({"out": np.ones((3, 16, 576), np.float16)}, "out", r"576\).*512\)"),
    ({"out": np.ones((3, 16, 512), np.float32)}, "out", "float32.*float16"),
    ({"lse": np.ones((3, 16), np.float16)}, "lse", "float16.*float32"),
    ({"lse": np.ones((3, 1, 16), np.float32)}, "lse", r"\(3, 1, 16\).*\(3, 16\)"),
    ({"batch_invariant": 0}, "batch_invariant", "0.*True or False"),
    ({"return_lse": 1}, "return_lse", "1.*True or False"),
]


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("change", "name", "words"), REFUSED, ids=[f"{n}-{i}" for i, (_, n, _) in enumerate(REFUSED)]
)
def test_refusals(change: dict[str, Any], name: str, words: str) -> None:
    said = refused(change)
    assert_refusal(said, name, words)


@pytest.mark.emulator
@pytest.mark.parametrize("name", ["layout", "window_left", "soft_cap"])
def test_what_decode_has_and_this_has_not(name: str) -> None:
    said = refused({name: 1})
    assert f"unexpected keyword argument '{name}'" in said


@pytest.mark.emulator
def test_scale_has_no_default() -> None:
    given = list(good().values())[:4]
    with emulator.enabled(), pytest.raises(TypeError, match="'scale'"):
        cuattn.mla_decode(*given)


@pytest.mark.emulator
@pytest.mark.parametrize("name", ["out", "lse"])
@pytest.mark.parametrize("place", ["kv_cache", "q"])
def test_results_may_not_lie_in_inputs(name: str, place: str) -> None:
    room = {"out": ((3, 16, 512), np.float16), "lse": ((3, 16), np.float32)}
    shape, dtype = room[name]
    arguments = good()
    result = arguments[place].reshape(-1).view(dtype)[: math.prod(shape)].reshape(shape)
    said = refused({place: arguments[place], name: result})
    assert re.match(rf"{name} shares memory with {place}", said), said


def test_the_table_of_cases_holds_every_kind() -> None:
    assert {case.q_heads for case in MLA} >= {1, 16, 20, 64, 128}
    assert {case.page_size for case in MLA} == {16, 32, 64, 128}
    assert {len(case.lengths) for case in LENGTHS} >= {1, 2, 4, 33}
    forms = {(case.form, q_len) for case in MLA for q_len, _ in case.lengths}
    assert forms >= {("flat", 1), ("tokens", 1), ("tokens", 2), ("tokens", 4), ("ragged", 0)}
    assert len({case.id for case in MLA}) == len(MLA)


def test_cases_cost_the_emulator_little() -> None:
    """Few kernels, few tiles."""
    kernels = {(case.dtype, case.out_dtype, case.page_size) for case in MLA}
    assert len(kernels) <= 8  # ten seconds of g++ each
    assert sum(case.tiles for case in MLA) <= 600
