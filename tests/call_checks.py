"""What must hold for every way to ask for the results of one call of decode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from cases import DTYPES, Call
from compare import NAN_BITS, assert_same_bits, bits

import cuattn


def with_arrays(call: Call, **arrays: Any) -> Call:
    """The call with other `q`, `cache`, `tables` or `seq_lens`."""
    names = ("q", "cache", "tables", "seq_lens")
    usual = dict(zip(names, call.arrays, strict=True))
    return replace(call, arrays=tuple({**usual, **arrays}[name] for name in names))


def assert_same(device: Any, one: Call, other: Call, **more: Any) -> None:
    """Demand the same bits of two calls."""
    first, second = device.run(one, **more), device.run(other, **more)
    assert_same_bits(second.out.reshape(first.out.shape), first.out, one.case)
    assert_same_bits(second.lse.reshape(first.lse.shape), first.lse, one.case)


def check_ways_to_ask(device: Any, call: Call) -> None:
    """New arrays or given ones, with LSE or without: the same numbers."""
    function = getattr(cuattn, call.function)
    wanted = device.run(call)
    arrays, options = device.arguments(call)
    rows = ~np.isnan(wanted.lse)  # not those of no request

    def same(array: Any, expected: Any) -> None:
        assert isinstance(array, device.xp.ndarray)
        given = device.to_host(array)
        assert given.shape == expected.shape
        assert_same_bits(given[rows], expected[rows], call.case)

    out, lse = function(*arrays, **options, return_lse=True)
    same(out, wanted.out)
    same(lse, wanted.lse)
    same(function(*arrays, **options), wanted.out)
    room = device.guarded(wanted.lse.shape, np.float32)
    same(function(*arrays, **options, lse=room.array), wanted.out)
    same(room.array, wanted.lse)
    room = device.guarded(wanted.out.shape, wanted.out.dtype)
    assert function(*arrays, **options, out=room.array) is room.array
    same(room.array, wanted.out)


def check_strided_out(device: Any, call: Call) -> None:
    """The result goes between other data of the caller, which stays as it was."""
    case = call.case
    batch, q_len, heads, dim = (*call.arrays[0].shape[:3], case.d_v)
    whole = device.guarded((batch, heads + 1, q_len + 3, dim + 8), case.result_dtype)
    out = whole.array.transpose(0, 2, 1, 3)[:, :q_len, :heads, :dim]
    arrays, options = device.arguments(call)
    assert getattr(cuattn, call.function)(*arrays, **options, out=out) is out
    assert_same_bits(device.to_host(out), device.run(call).out, case)
    rest = bits(device.to_host(whole.array)).transpose(0, 2, 1, 3)
    untouched = np.ones(rest.shape, bool)
    untouched[:, :q_len, :heads, :dim] = False
    assert np.unique(rest[untouched]).tolist() == [NAN_BITS[case.result_dtype.itemsize]]
    whole.check(case)


def check_out_dtype(device: Any, call: Call, dtype: str) -> None:
    """It is a name or a dtype."""
    function = getattr(cuattn, call.function)
    arrays, options = device.arguments(call)
    named = function(*arrays, **options, out_dtype=dtype)
    assert named.dtype == DTYPES[dtype]
    typed = function(*arrays, **options, out_dtype=np.dtype(dtype))
    assert_same_bits(device.to_host(typed), device.to_host(named), call.case)
