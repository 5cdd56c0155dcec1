"""Absorbed MLA decode on the named shapes, dense, sparse and with skipping, beside FlashInfer.

TFLOP/s count 2 · (576 + 512) for each pair of query and key; GB/s count rows of the cache, queries
and output once each.  A single request is also timed in a CUDA graph, as in `decode`.  Skipping
saves products and no bytes; on i.i.d. inputs its output means nothing, its time does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from cuattn import _workloads
from cuattn._workloads import Stopwatch, on_host, spread

from . import ceilings, decode_peers, timing
from .report import Options, Row, say
from .shapes import LATENT, MLA, MLA_SKIP, QUICK_MLA, ROPE, Mla
from .timing import Run

PAGE = 64
SCALE = 192**-0.5  # of DeepSeek's layers before absorption
AT_ONCE = 1 << 27  # random numbers made at a time


def run(options: Options) -> list[Row]:
    """Measure every shape asked for."""
    import cupy

    watch = Stopwatch(cupy)
    ceiling, rows = ceilings.measure("mla", watch)
    timing.heading()
    for shape in MLA:
        if options.wants(shape.name, QUICK_MLA):
            rows += _rows(shape, options, watch, ceiling)
            cupy.get_default_memory_pool().free_all_blocks()
    return rows


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What `cuattn.mla_decode` takes; `sparse` are positions, if only those count."""

    q: Any
    cache: Any
    tables: Any
    lengths: Any
    sparse: Any


def _inputs(shape: Mla, xp: Any) -> _Inputs:
    """Everything normal, pages in random order, sparse positions without repeats."""
    rng = xp.random.default_rng(0)
    pages = -(-shape.kv_len // PAGE)
    cache = xp.empty((shape.batch * pages, PAGE, LATENT + ROPE), dtype=ml_dtypes.bfloat16)
    step = max(AT_ONCE // cache[0].size, 1)
    for first in range(0, len(cache), step):
        part = cache[first : first + step]
        part[...] = _workloads.normal(xp, rng, part.shape).astype(cache.dtype)
    q = _workloads.normal(xp, rng, (shape.batch, shape.q_len, shape.heads, LATENT + ROPE))
    order = np.random.default_rng(0).permutation(len(cache)).astype(np.int32)
    tables = order.reshape(shape.batch, pages)
    lengths = np.full(shape.batch, shape.kv_len, np.int32)
    sparse = None
    if shape.top_k:
        sparse = xp.asarray(_positions(shape, tables))
    q = q.astype(ml_dtypes.bfloat16)
    return _Inputs(q, cache, xp.asarray(tables), xp.asarray(lengths), sparse)


def _positions(shape: Mla, tables: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Positions in the cache, ``[batch, q_len, top_k]``: `top_k` keys of each request."""
    rng = np.random.default_rng(1)
    keys = np.stack(
        [
            rng.choice(shape.kv_len, shape.top_k, replace=False)
            for _ in range(shape.batch * shape.q_len)
        ]
    ).reshape(shape.batch, shape.q_len, shape.top_k)
    requests = np.arange(shape.batch)[:, None, None]
    return (tables[requests, keys // PAGE] * PAGE + keys % PAGE).astype(np.int32)


def _exact(shape: Mla, inputs: _Inputs) -> Callable[[Any], float]:
    """Return what measures an output against float64: two requests, the last token, two heads."""
    requests, heads = spread(shape.batch, 2), spread(shape.heads, 2)
    expected = []
    for request in requests:
        if inputs.sparse is None:
            keys = inputs.cache[inputs.tables[request]].reshape(-1, LATENT + ROPE)[: shape.kv_len]
        else:
            keys = inputs.cache.reshape(-1, LATENT + ROPE)[inputs.sparse[request, -1]]
        rows = on_host(keys).astype(np.float64)
        scores = on_host(inputs.q[request, -1])[heads].astype(np.float64) @ rows.T * SCALE
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected.append(weights @ rows[:, :LATENT] / weights.sum(-1, keepdims=True))
    exact = np.stack(expected)

    def error(out: Any) -> float:
        out = out.reshape(shape.batch, shape.q_len, shape.heads, LATENT)
        found = np.stack([on_host(out[b, -1])[heads].astype(np.float64) for b in requests])
        return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    return error


def _rows(shape: Mla, options: Options, watch: Stopwatch, ceiling: ceilings.Ceilings) -> list[Row]:
    """Rows of ours, then of the peer, then with skipping."""
    import cupy

    inputs = _inputs(shape, cupy)
    error = _exact(shape, inputs)
    case = timing.Case(
        "mla", shape.name, str(shape), shape.bytes, shape.flops, shape.best, error, watch
    )
    copies = case.copies(shape.cache_bytes, shape.batch)
    caches = [inputs.cache, *(inputs.cache.copy() for _ in range(copies - 1))]
    ours = partial(_ours, inputs, caches)
    rows = timing.measure(case, "cuattn", ours, timing.capture, kernel=_kernel(inputs))
    if options.peers and options.flashinfer and _has_peer(shape):
        make = partial(_flashinfer, shape, inputs, caches)
        rows += timing.measure(case, "flashinfer_fa3", make, decode_peers.capture)
    timing.lines(case, rows, ceiling)
    if shape.name in MLA_SKIP and rows[0].ms:
        rows += _skips(case, inputs, MLA_SKIP[shape.name], rows[0].ms)
    return rows


def _call(inputs: _Inputs, cache: Any, **more: Any) -> Any:
    import cuattn

    if inputs.sparse is not None:
        more["sparse_indices"] = inputs.sparse
    arrays = (inputs.q, cache, inputs.tables, inputs.lengths)
    return cuattn.mla_decode(*arrays, scale=SCALE, **more)


def _kernel(inputs: _Inputs) -> str:
    """The kernel that `cuattn.mla_decode` chooses for this call."""
    from cuattn import _call, _check_tools, _device, _heuristics, _ingest

    chosen = inputs.tables if inputs.sparse is None else inputs.sparse
    q, cache, *rest = (
        _ingest.view(x, "inputs") for x in (inputs.q, inputs.cache, chosen, inputs.lengths)
    )
    form = _call.mla(None, inputs.sparse is not None)
    given = (True, -1, SCALE, None, 0.0, None, None, None, None, None, None)
    views = (q, _check_tools.mla_cache(cache), *rest)
    problem = _call.problem_of(form, views, given, {}, False, "HND")
    return _heuristics.mla_decode(problem, _device.describe(q.device)).kernel


def _ours(inputs: _Inputs, caches: list[Any]) -> list[Run]:
    """Our call on every cache; the first writes all of the output."""
    import cupy

    out = cupy.empty((*inputs.q.shape[:-1], LATENT), dtype=inputs.q.dtype)
    runs = [partial(_call, inputs, cache, out=out) for cache in caches]
    timing.must_write(runs[0], out)
    return runs


def _skips(
    case: timing.Case, inputs: _Inputs, thresholds: tuple[float, ...], dense_ms: float
) -> list[Row]:
    """Time, skip rate and mean dropped mass over rising thresholds."""
    import cupy

    import cuattn

    out = cupy.empty((*inputs.q.shape[:-1], LATENT), dtype=inputs.q.dtype)
    dense_out, dense_lse = _call(inputs, inputs.cache, return_lse=True)
    rows = []
    for threshold in thresholds:
        stats = cuattn.SkipStats()
        options = {"threshold": threshold, "unsafe": threshold >= 1}
        counting = cuattn.SkipSoftmax(**options, stats=stats)
        _, lse = _call(inputs, inputs.cache, out=out, return_lse=True, skip_softmax=counting)
        rate = stats.rate
        mass = float(_workloads.dropped_mass(lse, dense_lse, xp=cupy).mean())
        same = bool((out.view(cupy.uint16) == dense_out.view(cupy.uint16)).all())
        if rate == 0 and not same:
            say(f"  λ {threshold:g} skips nothing and is not the dense result bit for bit")
            rows.append(case.row("cuattn", None, threshold=threshold))
            continue
        skip = cuattn.SkipSoftmax(**options)
        call = partial(_call, inputs, inputs.cache, out=out, skip_softmax=skip)
        ms = case.watch.median_ms(call, budget_ms=300)
        rows.append(case.row("cuattn", ms, threshold=threshold, skip_rate=rate, dropped_mass=mass))
        say(f"  λ {threshold:<8g}{1e3 * ms:9.1f} µs{dense_ms / ms:8.2f}x{rate:9.1%} skipped")
    return rows


def _has_peer(shape: Mla) -> bool:
    return importlib.util.find_spec("flashinfer") is not None and not shape.top_k


def _flashinfer(shape: Mla, inputs: _Inputs, caches: list[Any]) -> list[Run]:
    import torch
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    q = torch.from_dlpack(inputs.q).flatten(0, 1)  # [token, head, dim]
    tokens, pages = shape.batch * shape.q_len, inputs.tables.shape[1]
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda")
    workspace = torch.empty(decode_peers.WORKSPACE, dtype=torch.uint8, device="cuda")
    wrapper = BatchMLAPagedAttentionWrapper(workspace, backend="fa3")
    wrapper.plan(
        qo_indptr=starts * shape.q_len,
        kv_indptr=starts * pages,
        kv_indices=torch.from_dlpack(inputs.tables).flatten(),
        kv_len_arr=torch.from_dlpack(inputs.lengths),
        num_heads=shape.heads,
        head_dim_ckv=LATENT,
        head_dim_kpe=ROPE,
        page_size=PAGE,
        causal=shape.q_len > 1,
        sm_scale=SCALE,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    out = torch.empty(tokens, shape.heads, LATENT, dtype=q.dtype, device="cuda")
    q_nope, q_pe = q[..., :LATENT].contiguous(), q[..., LATENT:].contiguous()

    def on(cache: Any) -> Run:
        latent, rope = cache[..., :LATENT], cache[..., LATENT:]
        return lambda: wrapper.run(q_nope, q_pe, latent, rope, out=out)

    return [on(torch.from_dlpack(cache)) for cache in caches]
