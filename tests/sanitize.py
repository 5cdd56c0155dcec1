"""A smoke set for compute-sanitizer: small calls that touch every edge, each checked.

    compute-sanitizer --tool memcheck python -m tests.sanitize        (also racecheck, initcheck)

On Hopper, `mla` behind it adds MLA decode, and `prefill` Hopper's kernel for prefill.  Of both
racecheck reports what warp-groups hand over by mbarriers and named barriers; the emulator's race
mode finds it in order.

CuPy's memory pool is off, so that an access past an array leaves its allocation.
"""

from __future__ import annotations

import sys
from typing import Any

import cupy
import ml_dtypes
import numpy as np

import cuattn
from cuattn import _call, _heuristics, reference

rng = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32).astype(ml_dtypes.bfloat16)


def to_device(x: np.ndarray) -> cupy.ndarray:
    if x.dtype == ml_dtypes.bfloat16:
        return cupy.asarray(x.view(np.uint16)).view(x.dtype)
    return cupy.asarray(x)


def check(name: str, out: cupy.ndarray, expected: np.ndarray) -> None:
    actual = out.view(np.uint16).get().view(ml_dtypes.bfloat16).astype(np.float64)
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error < 1e-2, f"{name}: relative error {error}"
    print(f"{name}: relative error {error:.1e}")


def batched(dim: int, dim_v: int, **options: object) -> None:
    q, k, v = random(1, 150, 2, dim), random(1, 203, 1, dim), random(1, 203, 1, dim_v)
    out = cuattn.prefill(*map(to_device, (q, k, v)), **options)
    check(f"batched {dim}/{dim_v} {options}", out, reference.prefill(q, k, v, **options).out)


def ragged() -> None:
    ends_q = np.array([0, 130, 130, 137], np.int32)
    ends_kv = np.array([0, 140, 150, 159], np.int32)
    q, k, v = random(137, 2, 64), random(159, 2, 64), random(159, 2, 64)
    arrays = (q, k, v, ends_q, ends_kv)
    out = cuattn.prefill_ragged(*map(to_device, arrays), causal=True)
    check("ragged", out, reference.prefill_ragged(*arrays, causal=True).out)


def paged() -> None:
    cache = random(12, 2, 2, 16, 128)
    tables = np.array([[7, 3, 11, 0, 2], [5, 1, -1, 99, 4]], np.int32)
    lengths, ends = np.array([77, 30], np.int32), np.array([0, 40, 49], np.int32)
    q = random(49, 4, 128)
    arrays = (q, cache, tables, lengths, ends)
    out = cuattn.prefill_paged(*map(to_device, arrays))
    check("paged", out, reference.prefill_paged(*arrays, causal=True).out)


def tools() -> None:
    """append_kv with tokens to drop, merge_states in two rounds, validate with an offender."""
    cache, new = to_device(random(12, 2, 2, 16, 128)), to_device(random(49, 2, 128))
    tables = cupy.array([[7, 3, 11, 0, 2], [5, 1, -1, 99, 4]], "i4")
    lengths, ends = cupy.array([77, 42], "i4"), cupy.array([0, 40, 47], "i4")
    cuattn.append_kv(cache, new, new, tables, lengths, ends)
    last = cache.view(np.uint16)[2, 0, :, 12]  # where token 39 goes: position 76 of request 0
    assert bool((last == new.view(np.uint16)[39]).all())
    outs, lses = random(35, 9, 2, 72), rng.standard_normal((35, 9, 2)).astype(np.float32)
    lses[3] = -np.inf
    out, _ = cuattn.merge_states(to_device(outs), cupy.asarray(lses))
    weights = np.exp(lses) / np.exp(lses).sum(0)
    check("merged", out, (weights[..., None] * outs.astype(np.float64)).sum(0))
    try:
        cuattn.validate(cache, tables, lengths, cu_seqlens_new=ends)
    except ValueError as error:
        print(f"validate: {error}")
    else:
        raise AssertionError("validate found nothing wrong")


def skipping() -> None:
    stats = cuattn.SkipStats()
    q, k, v = random(1, 300, 2, 128), random(1, 300, 2, 128), random(1, 300, 2, 128)
    k[:, 64:192] = 0  # scores of 0, against maxima of 2 and more
    skip = cuattn.SkipSoftmax(threshold=0.5, stats=stats, certificate=True)
    _, lost = cuattn.prefill(*map(to_device, (q, k, v)), causal=True, skip_softmax=skip)
    assert 0 < stats.skipped < stats.visited, (stats.skipped, stats.visited)
    assert 0 < float(lost.max()) < 1
    print(f"skipping: {stats.skipped} of {stats.visited} tiles")


def decode(
    lengths: tuple[int, ...],
    heads: tuple[int, int] = (4, 2),
    page: int = 64,
    tokens: tuple[int, ...] | None = None,
    **options: Any,
) -> None:
    """One call over pages in random order, against paged prefill; `tokens` makes it ragged."""
    counts = [-(-length // page) for length in lengths]
    tables = np.full((len(lengths), max(counts)), 99999, np.int32)  # never read past a length
    order = rng.permutation(sum(counts))
    for row, count, end in zip(tables, counts, np.cumsum(counts), strict=True):
        row[:count] = order[end - count : end]
    each = tokens or (1,) * len(lengths)
    ends = np.concatenate([[0], np.cumsum(each)]).astype(np.int32)
    q, cache = random(sum(each), heads[0], 128), random(len(order), 2, heads[1], page, 128)
    arrays = (q, cache, tables, np.array(lengths, np.int32))
    more = {} if tokens is None else {"cu_seqlens_q": to_device(ends)}
    out = cuattn.decode(*map(to_device, arrays), **more, **options)
    loose = {"window_left": options.get("window_left", -1)}
    expected = reference.prefill_paged(*arrays, ends, causal=True, **loose).out
    check(f"decode {lengths} {heads} page {page} {tokens} {sorted(options)}", out, expected)


def decode_skipping(**rule: float) -> None:
    """Half the keys are zeros, far below the others: about half the tiles go, in every split."""
    q, cache = random(2, 8, 128), random(40, 2, 2, 64, 128)
    cache[::2, 0] = 0
    tables = np.arange(40, dtype=np.int32).reshape(2, 20)
    arrays = (8 * q, cache, tables, np.array([1280, 1000], np.int32))
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(**rule, stats=stats, certificate=True)
    _, lost = cuattn.decode(*map(to_device, arrays), skip_softmax=skip)
    assert 0 < stats.skipped < stats.visited, (stats.skipped, stats.visited)
    worst = float(lost.max())
    assert worst <= rule.get("max_dropped_mass", 0.1), worst
    print(f"decode, {rule}: {stats.skipped} of {stats.visited} tiles, at most {worst:.1e} lost")


def mla(page: int) -> None:
    """Absorbed MLA on Hopper: a request of several splits, one that ends inside a tile, none."""
    lengths = np.array([1300, 130, 0], np.int32)
    tables = np.full((3, 1300 // page + 1), 99999, np.int32)
    order = rng.permutation(200)
    for row, length in zip(tables, lengths, strict=True):
        count = -(-int(length) // page)
        row[:count], order = order[:count], order[count:]
    arrays = (random(3, 2, 20, 576), random(200, page, 576), tables, lengths)
    out = cuattn.mla_decode(*map(to_device, arrays), scale=192**-0.5)
    check(f"mla page {page}", out, reference.mla_decode(*arrays, scale=192**-0.5).out)


def mla_sparse(heads: int) -> None:
    """Lists in any order with places outside of the cache: several splits, a short one, none."""
    lengths = np.array([1300, 40, 0], np.int32)
    lists = rng.permutation(200 * 64)[: 3 * 1024].reshape(3, 1024).astype(np.int32)
    lists[:, 5::50] = [[-1], [200 * 64], [2**31 - 1]]
    q, cache = random(3, heads, 576), random(200, 64, 576)
    options = {"scale": 192**-0.5}
    arrays = [to_device(x) for x in (q, cache, lengths)]
    out = cuattn.mla_decode(
        *arrays[:2], None, arrays[2], sparse_indices=to_device(lists), **options
    )
    expected = reference.mla_decode(q, cache, None, lengths, sparse_indices=lists, **options).out
    check(f"mla of chosen keys, {heads} heads", out, expected)


def mla_skipping(**rule: float) -> None:
    """Every other page is zeros, far below the others; one row of splits is merged apart."""
    q, cache = random(1, 128, 576), random(64, 64, 576)
    cache[1::2] = 0
    tables, lengths = np.arange(64, dtype=np.int32)[None], np.array([4090], np.int32)
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(**rule, stats=stats, certificate=True)
    arrays = map(to_device, (8 * q, cache, tables, lengths))
    _, lost = cuattn.mla_decode(*arrays, scale=192**-0.5, skip_softmax=skip)
    assert 0 < stats.skipped < stats.visited, (stats.skipped, stats.visited)
    assert float(lost.max()) <= rule.get("max_dropped_mass", 0.1), float(lost.max())
    print(f"mla, {rule}: {stats.skipped} of {stats.visited} tiles")


def prefills() -> None:
    """What the prefill kernels have between them."""
    for dims in ((128, 128), (64, 64), (40, 72), (192, 128), (256, 256)):
        batched(*dims, causal=True)
    batched(128, 128)
    batched(96, 96, window_left=50, causal=True)
    batched(128, 128, soft_cap=20.0)
    ragged()
    paged()
    skipping()


if __name__ == "__main__":
    cupy.cuda.set_allocator(None)
    prefills()
    if "prefill" in sys.argv[1:]:
        chosen, _heuristics.HOPPER_PREFILL = _heuristics.HOPPER_PREFILL, True
        _call._prepared.clear()
        prefills()
        _heuristics.HOPPER_PREFILL = chosen
    tools()
    decode((1000, 77, 0))  # split, and the empty request
    decode((200,))  # not split
    decode((300, 41), page=16)
    decode((300, 200), heads=(32, 2), tokens=(3, 2))  # two blocks of rows
    decode((700, 30), window_left=100)
    decode((2100,) * 3, batch_invariant=True)
    decode((900,), skip_softmax=cuattn.SkipSoftmax(threshold=0.0))
    decode_skipping(threshold=0.01)
    decode_skipping(max_dropped_mass=0.01)
    if "mla" in sys.argv[1:]:
        mla(64)
        mla(16)
        mla_sparse(16)
        mla_sparse(64)
        mla_skipping(threshold=0.01)
        mla_skipping(max_dropped_mass=0.01)
