"""Faults that attention libraries have had, each a test of ours.

Those that the tables of `cases.py` cover on every shape have one plain example here, with the exact
numbers; capture in graphs is in `test_graphs_streams.py`, ignored thresholds in `test_skip.py`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import USUAL, Call, Case, batched, numpy_skip, paged, ragged
from compare import assert_close, assert_same_bits
from conftest import HUGE_BYTES


def words(array: Any) -> Any:
    """An array's bits as integers, which CuPy can copy whatever the dtype."""
    return array.view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_pages_beyond_32_bit_offsets_and_scattered(gpu: Any, huge: Any, layout: str) -> None:
    """Page number times stride passes 2^31 elements and 2^32 bytes; NaN everywhere else."""
    case = Case(lengths=((20, 500), (64, 333)), layout=layout)
    call = paged(case)
    q, cache, tables, seq_lens, cu_q = call.arrays
    small = gpu.to_device(cache)
    pages = (HUGE_BYTES // cache.dtype.itemsize) // cache[0].size
    pool = huge[: pages * cache[0].nbytes].view(small.dtype).reshape(pages, *cache.shape[1:])
    places = np.concatenate(
        [case.rng.permutation(pages - 60)[: len(cache) - 40], np.arange(pages - 40, pages)]
    )
    places = case.rng.permutation(places)
    assert places.max() * cache[0].size > 2**32 and len(places) == len(cache)
    for page, place in enumerate(places):
        words(pool[int(place)])[...] = words(small[page])
    used = (tables >= 0) & (tables < len(cache))
    far = np.where(used, places[np.where(used, tables, 0)], tables).astype(np.int32)
    wanted = gpu.check(call)

    import cuattn

    arrays = [gpu.to_device(x) for x in (q, far, seq_lens, cu_q)]
    out, lse = cuattn.prefill_paged(arrays[0], pool, *arrays[1:], **call.options, return_lse=True)
    assert_same_bits(gpu.to_host(out)[:84], wanted.out[:84], case)
    assert_same_bits(gpu.to_host(lse)[:84], wanted.lse[:84], case)


@pytest.mark.parametrize("far", ["q", "k", "v", "out"])
def test_rows_beyond_32_bit_offsets(gpu: Any, huge: Any, far: str) -> None:
    """One array has its 33 rows 2^27 elements apart: the last offset is 2^32 elements."""
    import cupy

    import cuattn

    call = batched(Case(lengths=((33, 33),), memory="packed"))
    wanted = gpu.check(call)
    arrays = dict(zip("qkv", gpu.arguments(call)[0], strict=True))
    like = arrays["q"] if far == "out" else arrays[far]
    strides = (like.nbytes, 2**28, *like.strides[2:])  # in bytes
    whole = cupy.ndarray(like.shape, like.dtype, huge.data + 4096, strides)
    assert 32 * 2**28 + like.nbytes + 4096 <= HUGE_BYTES
    if far != "out":
        words(whole)[...] = words(like)
        arrays[far] = whole
    out = whole if far == "out" else None
    result = cuattn.prefill(*arrays.values(), **call.options, out=out)
    assert_same_bits(gpu.to_host(result), wanted.out, f"{far} far apart")


def test_fully_masked_rows_give_zero_and_minus_infinity(device: Any) -> None:
    for sinks in (False, True):
        outcome = device.check(batched(Case(lengths=((100, 37),) * 2, sinks=sinks)))
        assert not outcome.out[:, :63].any() and np.isneginf(outcome.lse[:, :63]).all()
        assert outcome.out[:, 63:].any() and np.isfinite(outcome.lse[:, 63:]).all()


@pytest.mark.parametrize("logit", [-1e5, 1e5])
def test_large_logits_are_not_mistaken_for_masked(device: Any, logit: float) -> None:
    """Every logit is the same, so the result is the mean of V and LSE is logit + ln n."""
    call = batched(Case(lengths=((70, 150),), causal=False))
    ones = [np.ones_like(x) for x in call.arrays[:2]]
    if logit < 0:
        ones[1] = -ones[1]
    call = replace(call, arrays=(*ones, call.arrays[2]), options={"scale": abs(logit) / 64})
    outcome = device.check(call)
    np.testing.assert_allclose(outcome.lse, logit + math.log(150), rtol=2e-7)
    assert np.abs(outcome.out.astype(np.float32)).max() > 0.05


def test_bits_do_not_depend_on_room_to_spare(device: Any) -> None:
    """Wider tables, more rows than tokens, a larger cache: upper bounds change nothing."""
    call = paged(Case(lengths=((20, 100), (64, 333))))
    q, cache, tables, seq_lens, cu_q = call.arrays
    wide = np.concatenate([tables, np.full((2, 900), 3, np.int32)], axis=1)
    more_rows = np.concatenate([q, q, q])
    more_pages = np.concatenate([cache, cache[:5]])
    wanted = device.check(call)
    roomy = replace(call, arrays=(more_rows, more_pages, wide, seq_lens, cu_q))
    outcome = device.run(roomy)
    assert_same_bits(outcome.out[:84], wanted.out[:84], call.case)
    assert_same_bits(outcome.lse[:84], wanted.lse[:84], call.case)


def test_lse_is_the_natural_logarithm(device: Any) -> None:
    call = batched(Case(lengths=((5, 100),), causal=False))
    call = replace(call, arrays=(np.zeros_like(call.arrays[0]), *call.arrays[1:]))
    np.testing.assert_allclose(device.run(call).lse, math.log(100), rtol=1e-6)


def test_parts_merge_to_the_whole_by_lse(device: Any) -> None:
    case = Case(lengths=((70, 300),), causal=False, out_dtype="float32", memory="packed")
    call = batched(case)
    q, k, v = call.arrays
    outs, lses = [], []
    for keys in (slice(0, 37), slice(37, 180), slice(180, 300)):
        part = device.run(replace(call, arrays=(q, k[:, keys].copy(), v[:, keys].copy())))
        outs.append(part.out.astype(np.float64))
        lses.append(part.lse.astype(np.float64))
    lse = np.logaddexp.reduce(lses, axis=0)
    out = sum(np.exp(a - lse)[..., None] * b for a, b in zip(lses, outs, strict=True))
    expected, plain = call.reference(), call.plain()
    assert_close(lse.astype(np.float32), expected.lse, plain.lse, case, "lse")
    assert_close(out.astype(np.float32), expected.out, plain.out, case)


@pytest.mark.parametrize("build", [ragged, paged], ids=lambda f: f.__name__)
def test_empty_requests_in_any_position(device: Any, build: Any) -> None:
    """A request without rows or keys may stand first, between or last."""
    lengths = ((0, 40), (30, 0), (17, 65), (0, 0))
    for order in itertools.permutations(lengths):
        outcome = device.check(build(Case(lengths=order)))
        start = sum(q_len for q_len, _ in order[: order.index((30, 0))])
        assert not outcome.out[start : start + 30].any()
        assert np.isneginf(outcome.lse[start : start + 30]).all()


def test_two_streams_at_once_do_not_disturb_each_other(gpu: Any) -> None:
    """No workspace is shared, and none must be clean: results are those of each call alone."""
    import cupy

    import cuattn

    calls = [
        batched(Case(lengths=((256, 1024),) * 2, q_heads=8)),
        ragged(Case(lengths=((100, 700), (300, 300)), causal=False)),
    ]
    wanted = [gpu.run(call) for call in calls]
    given = [gpu.arguments(call) for call in calls]
    junk = cupy.full(1 << 22, 0x7F, "uint8")  # what the allocator hands out next is not clean
    del junk
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in calls]
    cupy.cuda.Device().synchronize()
    results: list[list[Any]] = [[], []]
    for _ in range(10):
        for which, (call, (arrays, options)) in enumerate(zip(calls, given, strict=True)):
            with streams[which]:
                results[which].append(getattr(cuattn, call.function)(*arrays, **options))
    cupy.cuda.Device().synchronize()
    for which, call in enumerate(calls):
        tokens = sum(q for q, _ in call.case.lengths)
        for result in results[which]:
            flat, right = (
                x.reshape(-1, *x.shape[-2:])[:tokens]
                for x in (gpu.to_host(result), wanted[which].out)
            )
            assert_same_bits(flat, right, call.case)


@pytest.mark.parametrize(
    ("dim", "words"),
    [(512, "to 256"), (264, "to 256"), (12, "multiple of 8"), (0, "multiple of 8")],
)
def test_unsupported_head_dims_name_the_supported_ones(device: Any, dim: int, words: str) -> None:
    import cuattn

    x = device.xp.zeros((2, 5, 4, 512), "float16")[..., :dim]
    with pytest.raises(ValueError, match=words):
        cuattn.prefill(x, x, x)


@pytest.mark.parametrize("page_size", [4, 24, 48])
def test_unsupported_page_sizes_name_the_supported_ones(device: Any, page_size: int) -> None:
    import cuattn

    cache = device.xp.zeros((4, 2, 2, page_size, 64), "float16")
    index = [device.xp.array(x, "int32") for x in ([[0, 1]], [page_size], [0, 3])]
    with pytest.raises(ValueError, match="power of two"):
        cuattn.prefill_paged(device.xp.zeros((3, 2, 64), "float16"), cache, *index)


def test_a_soft_cap_caps(device: Any) -> None:
    """Equal logits of 50 under a cap of 10: each counts as 10·tanh(5)."""
    for build in (batched, ragged, paged):
        call = build(Case(lengths=((5, 100),), causal=False, soft_cap=10.0, poison="huge"))
        q, k, *others = (np.ones_like(x) if x.dtype.kind != "i" else x for x in call.arrays)
        call = replace(call, arrays=(q, k, *others), options={**call.options, "scale": 50 / 64})
        lse = device.run(call).lse.reshape(-1, 4)[:5]
        np.testing.assert_allclose(lse, 10 * math.tanh(5) + math.log(100), rtol=1e-5)


def test_a_second_device_works_while_the_first_is_current(gpu: Any) -> None:
    import cupy

    import cuattn

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one CUDA device; two are wanted")
    call = batched(USUAL)
    wanted = gpu.run(call)
    with cupy.cuda.Device(1):
        arrays, options = gpu.arguments(call)
        cupy.cuda.Device(1).synchronize()
    assert cupy.cuda.Device().id == 0
    out, lse = cuattn.prefill(*arrays, **options, return_lse=True)
    assert cupy.cuda.Device().id == 0 and out.device.id == lse.device.id == 1
    with cupy.cuda.Device(1):
        cupy.cuda.Device(1).synchronize()
        assert_same_bits(gpu.to_host(out), wanted.out, call.case)
    near = gpu.arguments(call)[0]
    with pytest.raises(ValueError, match="device 1"):
        cuattn.prefill(near[0], arrays[1], near[2], **options)


@pytest.mark.parametrize("build", [batched, ragged, paged], ids=lambda f: f.__name__)
@pytest.mark.parametrize("window_left", [-1, 40])
def test_what_must_not_be_read_does_not_matter(device: Any, build: Any, window_left: int) -> None:
    """NaN, large numbers or infinity around the data: the same bits."""
    case = Case(lengths=((113, 203),) * 2, window_left=window_left, q_heads=10)
    call = build(case)
    wanted = device.check(call)
    tokens = sum(q for q, _ in case.lengths)
    for poison in (0.0, 30000.0, np.inf):
        changed = replace(call, arrays=tuple(repoison(x, poison) for x in call.arrays))
        outcome = device.run(changed)
        for seen, right in ((outcome.out, wanted.out), (outcome.lse, wanted.lse)):
            flat, straight = (
                x.reshape(-1, *x.shape[call.arrays[0].ndim - 2 :]) for x in (seen, right)
            )
            assert_same_bits(flat[:tokens], straight[:tokens], f"{case} with {poison} around")


def repoison(array: np.ndarray[Any, Any], poison: float) -> np.ndarray[Any, Any]:
    """The array in a copy of its memory with another poison in place of NaN."""
    if array.dtype.kind == "i":
        return array
    whole: Any = array
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    start = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    copy = whole.copy()
    copy[np.isnan(copy.astype(np.float32))] = poison
    return np.ndarray(
        array.shape, array.dtype, copy.reshape(-1).view(np.uint8), start, array.strides
    )


def test_partial_tiles_and_odd_groups_ignore_padding(device: Any) -> None:
    """97 of 128 keys, 3 heads to a group: what fills the tile has scores that would win."""
    for heads, kv_heads in ((3, 1), (5, 1), (6, 2), (14, 2)):
        case = Case(
            lengths=((41, 97),) * 2, q_heads=heads, kv_heads=kv_heads, causal=False, poison="huge"
        )
        device.check(batched(case))
        device.check(paged(case))


@pytest.mark.parametrize("memory", ["padded", "qkv", "bhsd"])
def test_strided_inputs_give_the_bits_of_packed_ones(device: Any, memory: str) -> None:
    call = batched(Case(lengths=((113, 113),) * 2, memory=memory))
    packed = replace(call, arrays=tuple(np.ascontiguousarray(x) for x in call.arrays))
    assert any(not x.flags.c_contiguous for x in call.arrays)
    one, other = device.check(call), device.run(packed)
    assert_same_bits(one.out, other.out, call.case)
    assert_same_bits(one.lse, other.lse, call.case)


@pytest.mark.parametrize("skipping", [False, True], ids=["dense", "skipping"])
@pytest.mark.parametrize("build", [batched, ragged, paged], ids=lambda f: f.__name__)
def test_a_request_gives_the_same_bits_alone_and_in_a_batch(
    device: Any, build: Any, skipping: bool
) -> None:
    import cuattn

    lengths = ((113, 203),) * 5 if build is batched else ((113, 203), (1, 700), (300, 300), (64, 5))
    call = build(Case(lengths=lengths, q_heads=8))
    more = {"skip_softmax": cuattn.SkipSoftmax(threshold=0.3)} if skipping else {}
    together = device.run(call, **more)
    first = 0
    for request, (q_len, _) in enumerate(lengths):
        rows = slice(first, first + q_len)
        first += q_len
        outcome = device.run(alone(call, request, rows), **more)
        inside = request if build is batched else rows
        assert_same_bits(outcome.out.reshape(-1, 8, 64)[:q_len], together.out[inside], call.case)
        assert_same_bits(outcome.lse.reshape(-1, 8)[:q_len], together.lse[inside], call.case)


def alone(call: Call, request: int, rows: slice) -> Call:
    """One request of a call, as a call of its own."""
    if call.function == "prefill":
        return replace(call, arrays=tuple(x[request : request + 1].copy() for x in call.arrays))
    q, *others = call.arrays
    cu_q = np.array([0, rows.stop - rows.start], np.int32)
    if call.function == "prefill_ragged":
        k, v, _, cu_kv = others
        keys = slice(cu_kv[request], cu_kv[request + 1])
        cu = np.array([0, keys.stop - keys.start], np.int32)
        return replace(call, arrays=(q[rows].copy(), k[keys].copy(), v[keys].copy(), cu_q, cu))
    cache, tables, seq_lens, _ = others
    one = slice(request, request + 1)
    return replace(
        call, arrays=(q[rows].copy(), cache, tables[one].copy(), seq_lens[one].copy(), cu_q)
    )


@pytest.mark.parametrize("build", [batched, ragged, paged], ids=lambda f: f.__name__)
def test_a_skip_factor_is_never_ignored(device: Any, build: Any) -> None:
    """Keys of two kinds, one 9 below: a factor must drop those, whichever function is called."""
    import cuattn

    geometry = device.geometry(build(Case(lengths=((64, 512),), causal=False)))
    call = build(Case(lengths=((64, 512),), causal=False, poison="huge"))
    clean = replace(call, options={**call.options, "scale": 1.0})
    key = np.arange(512)
    level = np.where(key // geometry.block_kv % 2, -9.0 / 64, 0.0)
    arrays = [np.ones_like(x) if x.dtype.kind != "i" else x for x in clean.arrays]
    if build is paged:
        pages = clean.arrays[2][0, : 512 // 16]
        arrays[1][pages, 0] = level.reshape(-1, 1, 16, 1)
    else:
        shape = (512, 1, 1)
        arrays[1][..., :512, :, :] = level.reshape(shape)
    clean = replace(clean, arrays=tuple(arrays))
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(threshold_scale_factor=512 * math.exp(-5.0), stats=stats)
    outcome = device.run(clean, skip_softmax=skip)
    expected = clean.reference(
        geometry=geometry, skip_softmax=numpy_skip(threshold_scale_factor=512 * math.exp(-5.0))
    )
    assert stats.skipped * 2 == stats.visited > 0
    assert (stats.visited, stats.skipped) == (expected.visited.sum(), expected.skipped.sum())
    lse = outcome.lse.reshape(-1, 4)[:64]
    np.testing.assert_allclose(lse, math.log(256), rtol=1e-6)
