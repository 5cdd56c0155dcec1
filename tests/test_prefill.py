"""Prefill on a GPU against the reference: whole sequences, ragged batches, paged caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import (
    BATCHED,
    DTYPES,
    PAGED_CASES,
    RAGGED,
    RAGGED_CASES,
    USUAL,
    Call,
    Case,
    batched,
    paged,
    ragged,
)
from compare import NAN_BITS, assert_same_bits, bits

pytestmark = pytest.mark.usefixtures("prefill_kernel")

BUILDERS = [batched, ragged, paged]


@pytest.mark.parametrize("case", BATCHED, ids=str)
def test_batched_matches_reference(device: Any, case: Case) -> None:
    device.check(batched(case))


@pytest.mark.parametrize("case", RAGGED_CASES, ids=str)
def test_ragged_matches_reference(device: Any, case: Case) -> None:
    device.check(ragged(case))


@pytest.mark.parametrize("case", PAGED_CASES, ids=str)
def test_paged_matches_reference(device: Any, case: Case) -> None:
    device.check(paged(case))


@pytest.mark.parametrize("build", BUILDERS, ids=lambda f: f.__name__)
def test_results_are_the_same_however_they_are_asked_for(device: Any, build: Any) -> None:
    """New arrays or given ones, with LSE or without: the same numbers."""
    import cuattn

    call = build(USUAL)
    wanted = device.run(call)
    arrays, options = device.arguments(call)
    function = getattr(cuattn, call.function)
    tokens = sum(q_len for q_len, _ in USUAL.lengths)

    def same(array: Any, expected: Any) -> None:
        assert isinstance(array, device.xp.ndarray)
        given = device.to_host(array)
        assert given.shape == expected.shape
        flat, right = (
            x.reshape(-1, *expected.shape[call.arrays[0].ndim - 2 :]) for x in (given, expected)
        )
        assert_same_bits(flat[:tokens], right[:tokens], call.case)

    out, lse = function(*arrays, **options, return_lse=True)
    same(out, wanted.out)
    same(lse, wanted.lse)
    same(function(*arrays, **options), wanted.out)
    room = device.guarded(wanted.lse.shape, np.float32)
    alone = function(*arrays, **options, lse=room.array)
    same(alone, wanted.out)
    same(room.array, wanted.lse)
    room = device.guarded(wanted.out.shape, wanted.out.dtype)
    assert function(*arrays, **options, out=room.array) is room.array
    same(room.array, wanted.out)


def test_out_may_have_any_strides(device: Any) -> None:
    """The result goes between other data of the caller, which stays as it was."""
    import cuattn

    call = batched(USUAL)
    batch, q_len, heads, dim = (*call.arrays[0].shape[:3], USUAL.d_v)
    whole = device.guarded((batch, heads + 1, q_len + 3, dim + 8), call.case.result_dtype)
    out = whole.array.transpose(0, 2, 1, 3)[:, :q_len, :heads, :dim]
    arrays, options = device.arguments(call)
    assert cuattn.prefill(*arrays, **options, out=out) is out
    assert_same_bits(device.to_host(out), device.run(call).out, USUAL)
    rest = bits(device.to_host(whole.array)).transpose(0, 2, 1, 3)
    untouched = np.ones(rest.shape, bool)
    untouched[:, :q_len, :heads, :dim] = False
    assert np.unique(rest[untouched]).tolist() == [NAN_BITS[2]]
    whole.check(USUAL)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_out_dtype_is_a_name_or_a_dtype(device: Any, dtype: str) -> None:
    import cuattn

    call = batched(USUAL)
    arrays, options = device.arguments(call)
    named = cuattn.prefill(*arrays, **options, out_dtype=dtype)
    assert named.dtype == DTYPES[dtype]
    typed = cuattn.prefill(*arrays, **options, out_dtype=np.dtype(dtype))
    assert_same_bits(device.to_host(typed), device.to_host(named), USUAL)


@pytest.mark.parametrize("build", BUILDERS, ids=lambda f: f.__name__)
def test_results_repeat_to_the_bit(gpu: Any, build: Any) -> None:
    call = build(replace(USUAL, lengths=((300, 1024),) * 2, q_heads=16))
    first = gpu.check(call)
    for _ in range(3):
        again = gpu.run(call)
        assert_same_bits(again.out, first.out, call.case)
        assert_same_bits(again.lse, first.lse, call.case)


def test_many_keys_that_every_row_sees(gpu: Any) -> None:
    """Hopper's kernel has tiles of its own for them."""
    case = Case(lengths=((500, 8300),), q_heads=2, d_qk=128, d_v=128, causal=False)
    gpu.check(batched(case))


@pytest.mark.parametrize(
    ("batch", "q_len", "kv_len"), [(0, 5, 5), (2, 0, 7), (2, 5, 0), (2, 0, 0), (0, 0, 0)]
)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_empty_problems_are_legal(
    device: Any, batch: int, q_len: int, kv_len: int, sinks: bool
) -> None:
    import cuattn

    q, k = (device.xp.ones((batch, n, 4, 64), "float16") for n in (q_len, kv_len))
    sink = device.xp.zeros(4, "float32") if sinks else None
    out, lse = cuattn.prefill(q, k, k, causal=True, sinks=sink, return_lse=True)
    assert out.shape == (batch, q_len, 4, 64) and lse.shape == (batch, q_len, 4)
    assert not device.to_host(out).any() and np.isneginf(device.to_host(lse)).all()


def test_an_empty_ragged_batch_is_legal(device: Any) -> None:
    import cuattn

    q = device.xp.ones((0, 4, 64), "float16")
    cu = device.xp.zeros(1, "int32")
    assert cuattn.prefill_ragged(q, q, q, cu, cu).shape == (0, 4, 64)
    cache = device.xp.ones((0, 2, 4, 16, 64), "float16")
    tables, lens = device.xp.zeros((0, 3), "int32"), device.xp.zeros(0, "int32")
    assert cuattn.prefill_paged(q, cache, tables, lens, cu).shape == (0, 4, 64)


def test_ragged_and_batched_agree_to_the_bit(device: Any) -> None:
    case = replace(USUAL, memory="packed", q_heads=8)
    whole = batched(case)
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in whole.arrays)
    cu_q, cu_kv = (np.arange(3, dtype=np.int32) * n for n in case.lengths[0])
    flat = Call(case, "prefill_ragged", (q, k, v, cu_q, cu_kv), whole.options)
    one, other = device.run(whole), device.run(flat)
    assert_same_bits(other.out, one.out.reshape(other.out.shape), case)
    assert_same_bits(other.lse, one.lse.reshape(other.lse.shape), case)


class TestPages:
    """What only a paged cache can get wrong."""

    case = Case(lengths=((20, 100), (64, 333), (3, 16)))

    def test_lengths_may_have_unit_axes(self, device: Any) -> None:
        call = paged(self.case)
        q, cache, tables, seq_lens, cu_q = call.arrays
        wanted = device.check(call)
        shaped = replace(call, arrays=(q, cache, tables, seq_lens.reshape(-1, 1, 1, 1), cu_q))
        assert_same_bits(device.run(shaped).out[:87], wanted.out[:87], self.case)

    def test_a_page_outside_the_cache_reads_as_zeros(self, device: Any) -> None:
        call = paged(self.case)
        tables = call.arrays[2].copy()
        tables[0, 2], tables[1, 0], tables[1, 20] = 10**6, -1, call.arrays[1].shape[0]
        arrays = (*call.arrays[:2], tables, *call.arrays[3:])
        device.check(replace(call, arrays=arrays))

    def test_lengths_end_where_the_table_ends(self, device: Any) -> None:
        call = paged(replace(self.case, lengths=((20, 96), (64, 96), (3, 96))))
        q, cache, tables, _, cu_q = call.arrays
        narrow = np.ascontiguousarray(tables[:, :6])
        wanted = device.check(call)
        longer = np.array([97, 2**31 - 1, 5000], np.int32)
        result = device.check(replace(call, arrays=(q, cache, narrow, longer, cu_q)))
        assert_same_bits(result.out[:87], wanted.out[:87], self.case)

    def test_negative_lengths_count_as_zero(self, device: Any) -> None:
        call = paged(self.case)
        seq_lens = np.array([100, -5, 16], np.int32)
        result = device.check(replace(call, arrays=(*call.arrays[:3], seq_lens, call.arrays[4])))
        assert np.isneginf(result.lse[20:84]).all() and not result.out[20:84].any()

    def test_requests_may_share_pages(self, device: Any) -> None:
        call = paged(self.case)
        tables = call.arrays[2].copy()
        tables[0, :4], tables[2, 0] = tables[1, :4], tables[1, 3]
        device.check(replace(call, arrays=(*call.arrays[:2], tables, *call.arrays[3:])))

    def test_tables_and_caches_may_be_slices(self, device: Any) -> None:
        call = paged(replace(self.case, kv_heads=2))
        q, cache, tables, seq_lens, cu_q = call.arrays
        wide = np.full((len(tables), tables.shape[1] + 9), -7, np.int32)
        wide[:, 2 : 2 + tables.shape[1]] = tables
        more_heads = np.full((*cache.shape[:2], 5, *cache.shape[3:]), np.nan).astype(cache.dtype)
        more_heads[:, :, 1:3] = cache
        view = (q, more_heads[:, :, 1:3], wide[:, 2 : 2 + tables.shape[1]], seq_lens, cu_q)
        wanted = device.check(call)
        assert_same_bits(
            device.run(replace(call, arrays=view)).out[:87], wanted.out[:87], self.case
        )


def test_the_table_of_ragged_lengths_holds_every_kind() -> None:
    """More keys than rows, fewer, as many, no rows, no keys."""
    kinds = {(q > kv) - (q < kv) for q, kv in RAGGED} | {
        f"q{min(q, 1)}k{min(k, 1)}" for q, k in RAGGED
    }
    assert kinds == {-1, 0, 1, "q1k1", "q0k1", "q1k0"}
