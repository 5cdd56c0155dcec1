"""Paged decode against the reference: every shape and option, without skipping."""

from __future__ import annotations

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
from compare import assert_same_bits
from decode_cases import (
    DECODE,
    LENGTHS,
    RAGGED,
    SKIP_DECODE,
    UNEVEN,
    USUAL,
    DecodeCase,
    alone,
    decode_call,
    problem_of_decode,
)
from mla_cases import MlaCase, mla_call, problem_of_mla

from cuattn import _heuristics

TOKENS = DecodeCase(lengths=((4, 100), (4, 203)), form="tokens")
LONG = DecodeCase(lengths=((1, 1), (1, 1900), (1, 0), (1, 333), (1, 512)))
FORMS = [USUAL, TOKENS, UNEVEN]


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_matches_reference(device: Any, case: DecodeCase) -> None:
    device.check(decode_call(case))


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_results_are_the_same_however_they_are_asked_for(device: Any, case: DecodeCase) -> None:
    check_ways_to_ask(device, decode_call(case))


def test_out_may_have_any_strides(device: Any) -> None:
    check_strided_out(device, decode_call(TOKENS))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_out_dtype_is_a_name_or_a_dtype(device: Any, dtype: str) -> None:
    check_out_dtype(device, decode_call(USUAL), dtype)


@pytest.mark.parametrize("case", [LONG, UNEVEN], ids=str)
def test_results_repeat_to_the_bit(device: Any, case: DecodeCase) -> None:
    call = decode_call(case)
    for _ in range(2):
        assert_same(device, call, call)


@pytest.mark.parametrize("case", [LONG, TOKENS], ids=str)
@pytest.mark.parametrize("batch_invariant", [None, True])
def test_a_wider_table_changes_nothing(
    device: Any, case: DecodeCase, batch_invariant: bool | None
) -> None:
    """How long a request may become has no say in how it is split."""
    call = decode_call(case)
    tables = call.arrays[2]
    wide = np.full((len(tables), 40 * tables.shape[1]), 2147480000, np.int32)
    wide[:, : tables.shape[1]] = tables
    assert_same(device, call, with_arrays(call, tables=wide), batch_invariant=batch_invariant)


def test_one_token_with_and_without_its_axis(device: Any) -> None:
    call = decode_call(replace(LONG, memory="packed"))
    assert_same(device, call, with_arrays(call, q=call.arrays[0][:, None]))


@pytest.mark.parametrize("case", [LONG, TOKENS], ids=str)
def test_batch_invariant_results_do_not_know_their_batch(device: Any, case: DecodeCase) -> None:
    call = decode_call(case)
    together = device.check(call, batch_invariant=True)
    for request in range(len(case.lengths)):
        single = device.run(alone(call, request), batch_invariant=True)
        assert_same_bits(single.out[0], together.out[request], f"{case}, request {request}")
        assert_same_bits(single.lse[0], together.lse[request], f"{case}, request {request}")


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_any_split_gives_the_result(device: Any, batch_invariant: bool) -> None:
    device.check(decode_call(LONG), batch_invariant=batch_invariant)
    device.check(decode_call(UNEVEN), batch_invariant=batch_invariant)


@pytest.mark.parametrize("form", ["flat", "tokens", "no tokens", "ragged"])
def test_an_empty_batch_is_legal(device: Any, form: str) -> None:
    import cuattn

    xp = device.xp
    shape = {"flat": (0, 4, 64), "tokens": (0, 3, 4, 64), "ragged": (0, 4, 64)}.get(
        form, (2, 0, 4, 64)
    )
    batch = 2 if form == "no tokens" else 0
    cache = xp.ones((0, 2, 4, 16, 64), "float16")
    tables, lens = xp.zeros((batch, 3), "int32"), xp.zeros(batch, "int32")
    options = {"cu_seqlens_q": xp.zeros(1, "int32")} if form == "ragged" else {}
    out, lse = cuattn.decode(
        xp.ones(shape, "float16"), cache, tables, lens, **options, return_lse=True
    )
    assert out.shape == shape and lse.shape == shape[:-1]


def test_a_cache_without_pages_is_legal_for_requests_without_keys(device: Any) -> None:
    import cuattn

    xp = device.xp
    cache = xp.ones((0, 2, 4, 16, 64), "float16")
    tables, lens = xp.zeros((2, 3), "int32"), xp.zeros(2, "int32")
    q = xp.ones((2, 8, 64), "float16")
    out, lse = cuattn.decode(q, cache, tables, lens, return_lse=True)
    assert not device.to_host(out).any() and np.isneginf(device.to_host(lse)).all()


class TestPages:
    """What only a paged cache can get wrong."""

    case = DecodeCase(lengths=((1, 100), (1, 333), (1, 16)))

    def test_lengths_may_have_unit_axes(self, device: Any) -> None:
        call = decode_call(self.case)
        lengths = call.arrays[3].reshape(-1, 1, 1, 1)
        assert_same(device, call, with_arrays(call, seq_lens=lengths))

    def test_a_page_outside_the_cache_reads_as_zeros(self, device: Any) -> None:
        call = decode_call(self.case)
        tables = call.arrays[2].copy()
        tables[0, 2], tables[1, 0], tables[1, 20] = 10**6, -1, call.arrays[1].shape[0]
        device.check(with_arrays(call, tables=tables))

    def test_lengths_end_where_the_table_ends(self, device: Any) -> None:
        call = decode_call(replace(self.case, lengths=((1, 96),) * 3))
        narrow = np.ascontiguousarray(call.arrays[2][:, :6])
        longer = np.array([97, 2**31 - 1, 5000], np.int32)
        assert_same(device, call, with_arrays(call, tables=narrow, seq_lens=longer))

    def test_negative_lengths_count_as_zero(self, device: Any) -> None:
        call = decode_call(self.case)
        seq_lens = np.array([100, -5, 16], np.int32)
        result = device.check(with_arrays(call, seq_lens=seq_lens))
        assert np.isneginf(result.lse[1]).all() and not result.out[1].any()

    def test_requests_may_share_pages(self, device: Any) -> None:
        call = decode_call(self.case)
        tables = call.arrays[2].copy()
        tables[0, :7], tables[2, 0] = tables[1, :7], tables[1, 3]
        device.check(with_arrays(call, tables=tables))

    def test_tables_and_caches_may_be_slices(self, device: Any) -> None:
        call = decode_call(self.case)
        _, cache, tables, _ = call.arrays
        wide = np.full((len(tables), tables.shape[1] + 9), -7, np.int32)
        wide[:, 2 : 2 + tables.shape[1]] = tables
        more_heads = np.full((*cache.shape[:2], 5, *cache.shape[3:]), np.nan).astype(cache.dtype)
        more_heads[:, :, 1:3] = cache
        view = with_arrays(
            call, cache=more_heads[:, :, 1:3], tables=wide[:, 2 : 2 + tables.shape[1]]
        )
        assert_same(device, call, view)

    def test_layouts_are_strides(self, device: Any) -> None:
        """The same pages in the other layout, or as two arrays, are the same problem."""
        call = decode_call(self.case)
        cache = call.arrays[1]
        pair = with_arrays(call, cache=(cache[:, 0].copy(), cache[:, 1].copy()))
        assert_same(device, call, pair)
        turned = with_arrays(call, cache=np.ascontiguousarray(cache.swapaxes(2, 3)))
        assert_same(device, call, replace(turned, options={**call.options, "layout": "NHD"}))


def test_the_table_of_cases_holds_every_kind() -> None:
    """More keys than tokens, fewer, as many, none of either; every group; long requests."""
    kinds = {(q > kv) - (q < kv) for q, kv in RAGGED} | {
        f"q{min(q, 1)}k{min(k, 1)}" for q, k in RAGGED
    }
    assert kinds == {-1, 0, 1, "q0k0", "q1k1", "q0k1", "q1k0"}
    groups = {case.q_heads // case.kv_heads for case in DECODE}
    assert groups >= {1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 64}
    assert {len(case.lengths) for case in LENGTHS} >= {1, 2, 5, 33}
    assert max(kv for case in DECODE for _, kv in case.lengths) > 3000


def test_cases_share_their_kernels() -> None:
    """What is compiled in differs little, and the emulator has little to do."""
    cases = [*DECODE, *SKIP_DECODE]
    kernels = {
        (case.dtype, case.out_dtype, case.d_qk, case.d_v, case.soft_cap, skip)
        for skip, table in enumerate((DECODE, SKIP_DECODE))
        for case in table
    }
    assert len(kernels) * 4 <= len(cases)
    assert max(case.kv_heads * sum(kv for _, kv in case.lengths) for case in cases) <= 6000


MANY = tuple((1, n % 150) for n in range(700))


@pytest.mark.usefixtures("short_lines")
@pytest.mark.parametrize(
    "case",
    [DecodeCase(lengths=MANY), MlaCase(d_qk=320, d_v=256, lengths=MANY)],
    ids=lambda case: type(case).__name__,
)
def test_blocks_do_one_item_after_the_other(gpu: Any, case: DecodeCase) -> None:
    """As they do where there are more items than blocks in line."""
    mla = isinstance(case, MlaCase)
    call = mla_call(case) if mla else decode_call(case)
    problem = problem_of_mla(call) if mla else problem_of_decode(call)
    plan = getattr(_heuristics, call.function)(problem, gpu.current())
    assert plan.items > plan.grid[0] >= gpu.current().multiprocessors
    gpu.check(call)
