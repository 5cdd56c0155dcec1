"""Prefill by every form of its inputs: what ragged and paged ones cost, and short queries.

`…_ragged` and `…_paged_64` are the same arrays as `cuattn`, end to end and in pages of 64 tokens in
random order.  A chunk is a few new tokens of each request over a long cache, as in chunked prefill.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from cuattn import _call, _device, _heuristics, _ingest
from cuattn._workloads import Inputs, Stopwatch, exact_rows, iid
from cuattn._workloads_paged import PagedInputs, by_token, exact_tokens, iid_paged

from . import ceilings, decode_peers, timing
from .report import Options, Row
from .shapes import CHUNKS, FORMS, QUICK_FORMS, Chunk, Shape
from .timing import Run

PAGES = (16, 64)  # tokens


def run(options: Options) -> list[Row]:
    """Measure every case asked for."""
    import cupy

    watch = Stopwatch(cupy)
    ceiling, rows = ceilings.measure("forms", watch)
    timing.heading()
    for shape in FORMS:
        if options.wants(shape.name, QUICK_FORMS):
            rows += _shape(shape, watch, ceiling)
            cupy.get_default_memory_pool().free_all_blocks()
    for chunk in CHUNKS:
        if options.wants(chunk.name, QUICK_FORMS):
            rows += _chunk(chunk, options, watch, ceiling)
            cupy.get_default_memory_pool().free_all_blocks()
    return rows


def _shape(shape: Shape, watch: Stopwatch, ceiling: ceilings.Ceilings) -> list[Row]:
    """Batched, ragged and paged: the same requests."""
    import cupy

    size = shape.size
    inputs = iid(size, xp=cupy)
    exact = exact_rows(inputs, shape.causal)
    moved = sum(x.nbytes for x in inputs) + inputs.q.nbytes

    def error(out: Any) -> float:
        return exact.error(out.reshape(inputs.q.shape))

    flops = int(size.flops(shape.causal))
    case = timing.Case("forms", shape.name, str(shape), moved, flops, shape.best, error, watch)
    rows = []
    for name, form, arrays in forms_of(inputs, cupy):
        ours = partial(_ours, form, arrays, shape.causal)
        kernel = _kernel(form, arrays, shape.causal)
        rows += timing.measure(case, f"cuattn{name}", ours, timing.capture, kernel=kernel)
    timing.lines(case, rows, ceiling)
    return rows


def _chunk(
    chunk: Chunk, options: Options, watch: Stopwatch, ceiling: ceilings.Ceilings
) -> list[Row]:
    import cupy

    size = chunk.size
    inputs = iid_paged(size, xp=cupy)
    exact = exact_tokens(inputs, xp=cupy)

    def error(out: Any) -> float:
        return exact.error(by_token(inputs, out.reshape(inputs.q.shape)))

    case = timing.Case("forms", chunk.name, str(size), size.bytes, chunk.flops, None, error, watch)
    arrays = chunk_arrays(inputs, cupy)
    ours = partial(_ours, _call.PAGED, arrays, True)
    kernel = _kernel(_call.PAGED, arrays, True)
    rows = timing.measure(case, "cuattn", ours, timing.capture, kernel=kernel)
    makers = decode_peers.available(options.flashinfer, size) if options.peers else {}
    for name, maker in makers.items():
        make = partial(maker, inputs, size, [inputs.cache])
        rows += timing.measure(case, name, make, decode_peers.capture)
    timing.lines(case, rows, ceiling)
    return rows


def forms_of(inputs: Inputs, xp: Any) -> list[tuple[str, _call.Form, tuple[Any, ...]]]:
    """Name, form and arrays of every form; requests are of one length."""
    batch, seq = inputs.q.shape[:2]
    ends = xp.arange(batch + 1, dtype=xp.int32) * seq
    flat = [x.reshape(-1, *x.shape[2:]) for x in inputs]
    found: list[tuple[str, _call.Form, tuple[Any, ...]]] = [
        ("", _call.BATCHED, tuple(inputs)),
        ("_ragged", _call.RAGGED, (*flat, ends, ends)),
    ]
    for page in PAGES:
        cache, tables = paged(inputs, page, xp)
        lengths = xp.full(batch, seq, dtype=xp.int32)
        found.append((f"_paged_{page}", _call.PAGED, (flat[0], cache, tables, lengths, ends)))
    return found


def paged(inputs: Inputs, page: int, xp: Any) -> tuple[Any, Any]:
    """Keys and values in pages in random order, and the table that says which is where."""
    _, k, v = inputs
    batch, seq, heads, dim = k.shape
    count = seq // page
    order = xp.random.default_rng(3).permutation(batch * count).astype(xp.int32)
    cache = xp.empty((batch * count, 2, heads, page, dim), dtype=k.dtype)
    for part, x in enumerate((k, v)):
        # By their bits: CuPy only stores bfloat16.
        rows = x.view(xp.uint16).reshape(batch * count, page, heads, dim)
        cache.view(xp.uint16)[order, part] = rows.swapaxes(1, 2)
    return cache, order.reshape(batch, count)


def chunk_arrays(inputs: PagedInputs, xp: Any) -> tuple[Any, ...]:
    """What `cuattn.prefill_paged` takes, of the inputs of decode."""
    q, cache, tables, lengths = inputs
    batch, q_len = by_token(inputs, q).shape[:2]
    ends = xp.arange(batch + 1, dtype=xp.int32) * q_len
    return q.reshape(-1, *q.shape[-2:]), cache, tables, lengths, ends


def _ours(form: _call.Form, arrays: tuple[Any, ...], causal: bool) -> list[Run]:
    """Our call; it writes all of its output."""
    import cupy

    import cuattn

    calls = {
        _call.BATCHED: cuattn.prefill,
        _call.RAGGED: cuattn.prefill_ragged,
        _call.PAGED: cuattn.prefill_paged,
    }
    out = cupy.empty(arrays[0].shape, dtype=arrays[0].dtype)
    run = partial(calls[form], *arrays, causal=causal, out=out)
    timing.must_write(run, out)
    return [run]


def _kernel(form: _call.Form, arrays: tuple[Any, ...], causal: bool) -> str:
    """The kernel that a call of these arrays runs."""
    from cuattn import _check

    views = [_ingest.view(x, "array") for x in arrays]
    layout = None
    if form is _call.PAGED:
        layout = "HND"
        views[1:2] = _check.split_cache(views[1])
    given = (causal, -1, None, None, 0.0, None, None, None, None, None, None)
    problem = _call.problem_of(form, tuple(views), given, {}, False, layout)
    return _heuristics.prefill(problem, _device.describe(views[0].device)).kernel
