"""Faults that attention libraries have had in paged decode, each a test of ours.

Graphs and streams are in `test_decode_graphs.py`, unsupported shapes in `test_check_decode.py`, the
wider table, sliced caches and batch invariance in `test_decode.py`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from call_checks import with_arrays
from compare import assert_close, assert_same_bits
from conftest import HUGE_BYTES
from decode_cases import LONG, USUAL, DecodeCase, alone, call_of, decode_call
from skip_checks import check_against_replay, threshold_for
from test_graphs_streams import Captured, words
from test_issues import repoison

TOKENS = DecodeCase(lengths=((4, 100), (4, 203)), form="tokens")
FORMS = [
    DecodeCase(lengths=((1, 100), (1, 1500))),
    TOKENS,
    DecodeCase(lengths=((1, 900), (5, 203), (3, 64)), form="ragged"),
]


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_pages_beyond_32_bit_offsets_and_scattered(gpu: Any, huge: Any, layout: str) -> None:
    """Page number times stride passes 2^31 elements and 2^32 bytes; NaN everywhere else."""
    import cuattn

    case = DecodeCase(lengths=((1, 500), (1, 2000)), layout=layout)
    call = decode_call(case)
    q, cache, tables, seq_lens = call.arrays
    small = gpu.to_device(cache)
    pages = (HUGE_BYTES // cache.dtype.itemsize) // cache[0].size
    pool = huge[: pages * cache[0].nbytes].view(small.dtype).reshape(pages, *cache.shape[1:])
    places = case.rng.permutation(np.linspace(7, pages - 1, len(cache)).astype(np.int64))
    assert places.max() * cache[0].size > 2**32
    for page, place in enumerate(places):
        words(pool[int(place)])[...] = words(small[page])
    used = (tables >= 0) & (tables < len(cache))
    far = np.where(used, places[np.where(used, tables, 0)], tables).astype(np.int32)
    wanted = gpu.check(call)
    arrays = [gpu.to_device(x) for x in (q, far, seq_lens)]
    out, lse = cuattn.decode(arrays[0], pool, *arrays[1:], **call.options, return_lse=True)
    assert_same_bits(gpu.to_host(out), wanted.out, case)
    assert_same_bits(gpu.to_host(lse), wanted.lse, case)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_without_keys_give_zero_and_minus_infinity(device: Any, sinks: bool) -> None:
    """More new tokens than keys, and a request of no keys; a sink alone is no weight."""
    call = decode_call(DecodeCase(lengths=((5, 3), (5, 0)), form="tokens", sinks=sinks))
    outcome = device.check(call)
    for request, first in ((0, 2), (1, 5)):
        assert not outcome.out[request, :first].any()
        assert np.isneginf(outcome.lse[request, :first]).all()
        assert np.isfinite(outcome.lse[request, first:]).all()
    assert outcome.out[0, 2:].any()


@pytest.mark.parametrize("logit", [-1e5, 1e5])
def test_large_logits_are_not_mistaken_for_masked(device: Any, logit: float) -> None:
    """Every logit is the same, so the result is the mean of V and LSE is logit + ln n."""
    case = DecodeCase(lengths=((1, 1000),), scale=abs(logit) / 64)
    values = case.rng.standard_normal((1000, 2, 64)) + 3
    ones = np.ones((1, 8, 64)), np.full((1000, 2, 64), np.sign(logit))
    outcome = device.check(call_of(case, [(*ones, values)]))
    np.testing.assert_allclose(outcome.lse, logit + math.log(1000), rtol=2e-7)
    means = np.repeat(values.mean(axis=0), 4, axis=0)
    np.testing.assert_allclose(outcome.out[0].astype(np.float64), means, rtol=0.01)


def test_lse_is_the_natural_logarithm(device: Any) -> None:
    call = decode_call(DecodeCase(lengths=((1, 1000), (1, 7))))
    call = with_arrays(call, q=np.zeros_like(call.arrays[0]))
    lse = device.run(call).lse
    np.testing.assert_allclose(lse, np.log([[1000.0], [7.0]]) * np.ones(8), rtol=1e-6)


def test_parts_merge_to_the_whole_by_lse(device: Any) -> None:
    """Pages of one request in three calls, then `merge_states`."""
    import cuattn

    case = DecodeCase(lengths=((1, 300), (1, 300)), out_dtype="float32", memory="packed")
    call = decode_call(case)
    tables = call.arrays[2]
    outs, lses = [], []
    for first, last in ((0, 2), (2, 12), (12, 19)):
        keys = np.full(2, min(16 * last, 300) - 16 * first, np.int32)
        part = device.run(with_arrays(call, tables=tables[:, first:last].copy(), seq_lens=keys))
        outs.append(device.to_device(part.out))
        lses.append(device.to_device(part.lse))
    out, lse = cuattn.merge_states(outs, lses)
    expected, plain = call.reference(), call.plain()
    assert_close(device.to_host(lse), expected.lse, plain.lse, case, "lse")
    assert_close(device.to_host(out), expected.out, plain.out, case)


def test_a_graph_of_a_wide_table_gives_the_bits_of_a_narrow_eager_call(gpu: Any) -> None:
    """What is known when a graph is captured is a bound; it must not decide the splits."""
    call = decode_call(FORMS[0])
    wanted = gpu.check(call)
    tables = call.arrays[2]
    wide = np.full((len(tables), 8192), 2147480000, np.int32)
    wide[:, : tables.shape[1]] = tables
    out, lse = Captured(gpu, with_arrays(call, tables=wide)).replay()
    assert_same_bits(out, wanted.out, call.case)
    assert_same_bits(lse, wanted.lse, call.case)


def test_empty_requests_in_any_position(device: Any) -> None:
    """A request without tokens or keys may stand first, between or last."""
    lengths = ((0, 40), (3, 0), (2, 65), (0, 0))
    for order in itertools.permutations(lengths):
        outcome = device.check(decode_call(DecodeCase(lengths=order, form="ragged", q_heads=4)))
        start = sum(q_len for q_len, _ in order[: order.index((3, 0))])
        assert not outcome.out[start : start + 3].any()
        assert np.isneginf(outcome.lse[start : start + 3]).all()


def test_an_early_token_does_not_see_the_later_ones(device: Any) -> None:
    """Speculative tokens: with other keys and values of the last three, the first has its bits."""
    call = decode_call(TOKENS)
    wanted = device.check(call)
    cache, tables = call.arrays[1].copy(), call.arrays[2]
    for request, (_, kv_len) in enumerate(TOKENS.lengths):
        for key in range(kv_len - 3, kv_len):
            cache[tables[request, key // 16], :, :, key % 16] = 50
    changed = device.run(with_arrays(call, cache=cache))
    assert_same_bits(changed.out[:, 0], wanted.out[:, 0], TOKENS)
    assert_same_bits(changed.lse[:, 0], wanted.lse[:, 0], TOKENS)
    assert (changed.lse[:, 1:] != wanted.lse[:, 1:]).all()


def test_splits_of_many_blocks_of_rows_are_merged_where_they_belong(device: Any) -> None:
    """Forty tokens: each block of rows has its own splits, and so its own count of arrivals."""
    case = DecodeCase(lengths=((40, 2600), (40, 300)), form="tokens", q_heads=4, kv_heads=1)
    device.check(decode_call(case))


def test_a_soft_cap_caps(device: Any) -> None:
    """Equal logits of 50 under a cap of 10: each counts as 10·tanh(5)."""
    case = DecodeCase(lengths=((1, 1000), (1, 9)), soft_cap=10.0, scale=50 / 64, poison="huge")
    ones = [(np.ones((1, 8, 64)), *[np.ones((n, 2, 64))] * 2) for _, n in case.lengths]
    lse = device.run(call_of(case, ones)).lse
    wanted = 10 * math.tanh(5) + np.log([[1000.0], [9.0]]) * np.ones(8)
    np.testing.assert_allclose(lse, wanted, rtol=1e-5)


def test_a_second_device_works_while_the_first_is_current(gpu: Any) -> None:
    """Its workspace is there, too."""
    import cupy

    import cuattn

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one CUDA device; two are wanted")
    call = decode_call(FORMS[0])
    wanted = gpu.run(call)
    with cupy.cuda.Device(1):
        arrays, options = gpu.arguments(call)
        cupy.cuda.Device(1).synchronize()
    out, lse = cuattn.decode(*arrays, **options, return_lse=True)
    assert cupy.cuda.Device().id == 0 and out.device.id == lse.device.id == 1
    with cupy.cuda.Device(1):
        cupy.cuda.Device(1).synchronize()
        assert_same_bits(gpu.to_host(out), wanted.out, call.case)
    near = gpu.arguments(call)[0]
    with pytest.raises(ValueError, match="device 1"):
        cuattn.decode(near[0], arrays[1], *near[2:], **options)


@pytest.mark.parametrize("case", FORMS, ids=str)
@pytest.mark.parametrize("window_left", [-1, 40])
def test_what_must_not_be_read_does_not_matter(
    device: Any, case: DecodeCase, window_left: int
) -> None:
    """NaN, large numbers or infinity in unused pages and around queries: the same bits."""
    call = decode_call(replace(case, window_left=window_left))
    wanted = device.check(call)
    tokens = sum(q_len for q_len, _ in case.lengths) if case.form == "ragged" else None
    for poison in (0.0, 30000.0, np.inf):
        changed = replace(call, arrays=tuple(repoison(x, poison) for x in call.arrays))
        outcome = device.run(changed)
        assert_same_bits(outcome.out[:tokens], wanted.out[:tokens], f"{case}, {poison} around")
        assert_same_bits(outcome.lse[:tokens], wanted.lse[:tokens], f"{case}, {poison} around")


@pytest.mark.parametrize("q_heads", [3, 5, 7, 17])
def test_rows_that_only_fill_a_tile_have_no_say(device: Any, q_heads: int) -> None:
    """Odd groups leave rows of a tile empty; what lies there has scores that would win."""
    case = DecodeCase(lengths=((1, 97), (1, 700)), q_heads=q_heads, kv_heads=1, poison="huge")
    device.check(decode_call(case))
    structured = replace(LONG, q_heads=q_heads, kv_heads=1, poison="huge")
    call = decode_call(structured)
    votes = call.votes(device.geometry(call)).statistics.max(axis=1)
    check_against_replay(device, call, threshold=threshold_for(votes, 0.4))


def test_a_request_gives_the_same_bits_alone_and_between_others(device: Any) -> None:
    """Whatever is beside it, if asked for; the middle one of three is cut into splits."""
    call = decode_call(DecodeCase(lengths=((1, 64), (1, 5000), (1, 700)), kv_heads=1, q_heads=4))
    together = device.check(call, batch_invariant=True)
    single = device.run(alone(call, 1), batch_invariant=True)
    assert_same_bits(single.out[0], together.out[1], call.case)
    assert_same_bits(single.lse[0], together.lse[1], call.case)


def test_a_skip_factor_is_never_ignored(device: Any) -> None:
    """Keys of two kinds, one 9 below: half of the tiles that are no seeds go, LSE says so."""
    import cuattn

    geometry = device.geometry(decode_call(USUAL), threshold=0.1)
    tiles = 4 * geometry.warps
    keys = tiles * geometry.block_kv
    low = np.arange(keys) // geometry.block_kv % 2 == 1
    case = DecodeCase(lengths=((1, keys),), scale=1.0, poison="huge")
    ones = np.ones((keys, 2, 64))
    k = np.where(low, -9 / 64, 0.0)[:, None, None] * ones
    stats = cuattn.SkipStats()
    factor = keys * math.exp(-5.0)
    skip = cuattn.SkipSoftmax(threshold_scale_factor=factor, stats=stats)
    outcome = device.run(call_of(case, [(np.ones((1, 8, 64)), k, ones)]), skip_softmax=skip)
    seeds = {0, *range(tiles - geometry.warps + 1, tiles)}
    gone = sum(tile % 2 for tile in set(range(tiles)) - seeds)
    assert (stats.visited, stats.skipped) == (8 * tiles, 8 * gone)
    left = geometry.block_kv * (tiles / 2 + (tiles / 2 - gone) * math.exp(-9))
    np.testing.assert_allclose(outcome.lse, math.log(left), rtol=1e-5)
