"""Dense paged decode on the named shapes, beside its peers.

GB/s count keys, values, queries and output once each.  One call of a single request is so short
that flushing the L2 cache before it shows in its time; so it is also timed in a CUDA graph
(`…_graph`), over copies of the cache that the L2 cannot hold.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from cuattn._workloads import Stopwatch
from cuattn._workloads_paged import PagedInputs, by_token, decode_plan_of, exact_tokens, iid_paged

from . import ceilings, decode_peers, timing
from .report import Options, Row
from .shapes import DECODE, QUICK_DECODE, Decode
from .timing import Run


def run(options: Options) -> list[Row]:
    """Measure every shape asked for."""
    import cupy

    watch = Stopwatch(cupy)
    ceiling, rows = ceilings.measure("decode", watch)
    timing.heading()
    for shape in DECODE:
        if options.wants(shape.name, QUICK_DECODE):
            rows += _rows(shape, options, watch, ceiling)
            cupy.get_default_memory_pool().free_all_blocks()
    return rows


def _rows(
    shape: Decode, options: Options, watch: Stopwatch, ceiling: ceilings.Ceilings
) -> list[Row]:
    """Rows of ours, then of the peers."""
    import cupy

    size = shape.size
    inputs = iid_paged(size, xp=cupy)
    exact = exact_tokens(inputs, xp=cupy)

    def error(out: Any) -> float:
        return exact.error(by_token(inputs, out.reshape(inputs.q.shape)))

    case = timing.Case("decode", shape.name, str(size), size.bytes, None, shape.best, error, watch)
    copies = case.copies(size.cache_bytes, size.batch)
    caches = [inputs.cache, *(inputs.cache.copy() for _ in range(copies - 1))]
    kernel = decode_plan_of(inputs).kernel
    ours = partial(_ours, inputs, caches)
    rows = timing.measure(case, "cuattn", ours, timing.capture, kernel=kernel)
    makers = decode_peers.available(options.flashinfer, size) if options.peers else {}
    for name, maker in makers.items():
        make = partial(maker, inputs, size, caches)
        rows += timing.measure(case, name, make, decode_peers.capture)
    timing.lines(case, rows, ceiling)
    return rows


def _ours(inputs: PagedInputs, caches: list[Any]) -> list[Run]:
    """Our call on every cache; the first writes all of the output."""
    import cupy

    import cuattn

    q, _, tables, lengths = inputs
    out = cupy.empty(q.shape, dtype=q.dtype)
    runs = [partial(cuattn.decode, q, cache, tables, lengths, out=out) for cache in caches]
    timing.must_write(runs[0], out)
    return runs
