"""Dense paged decode on the named shapes, beside its peers.

GB/s count keys, values, queries and output once each.  One call of a single request is so short
that flushing the L2 cache before it shows in its time; so it is also timed in a CUDA graph
(`…_graph`), over copies of the cache that the L2 cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cuattn._workloads import ExactRows, Stopwatch
from cuattn._workloads_paged import PagedInputs, by_token, decode_plan_of, exact_tokens, iid_paged

from . import ceilings, decode_peers, peers
from .decode_peers import Run
from .report import Options, Row, cell, say
from .shapes import DECODE, QUICK_DECODE, Decode

TOLERANCE = 1e-2  # against float64; bfloat16 gives about 3e-3
POISON = 0x7FD5  # bits of a NaN that nothing computes
BEYOND_L2 = 256 << 20  # bytes of caches in a graph
GRAPH_CALLS = 128  # so that what a replay costs beside its calls does not show


def run(options: Options) -> list[Row]:
    """Measure every shape asked for."""
    import cupy

    watch = Stopwatch(cupy)
    ceiling, rows = ceilings.measure("decode", watch)
    say(f"{'case':53}{'implementation':26}{'µs':>9}{'GB/s':>8}{'ceiling':>9}")
    for shape in DECODE:
        if options.wants(shape.name, QUICK_DECODE):
            found = _case(shape, options, watch)
            rows += found
            _lines(shape, found, ceiling)
            cupy.get_default_memory_pool().free_all_blocks()
    return rows


@dataclass(frozen=True, slots=True)
class _Case:
    """What every implementation of a shape is given."""

    shape: Decode
    inputs: PagedInputs
    caches: list[Any]  # the first is that of the inputs
    exact: ExactRows
    watch: Stopwatch


def _case(shape: Decode, options: Options, watch: Stopwatch) -> list[Row]:
    """Rows of ours, then of the peers."""
    import cupy

    inputs = iid_paged(shape.size, xp=cupy)
    copies = max(-(-BEYOND_L2 // shape.size.cache_bytes), 2) if shape.size.batch == 1 else 1
    caches = [inputs.cache, *(inputs.cache.copy() for _ in range(copies - 1))]
    case = _Case(shape, inputs, caches, exact_tokens(inputs, xp=cupy), watch)
    rows = _measure(case, "cuattn", decode_plan_of(inputs).kernel, partial(_ours, case), _capture)
    makers = decode_peers.available(options.flashinfer, shape.size) if options.peers else {}
    for name, maker in makers.items():
        make = partial(maker, inputs, shape.size, caches)
        rows += _measure(case, name, None, make, decode_peers.capture)
    return rows


def _ours(case: _Case) -> list[Run]:
    """Our call on every cache; the first writes all of the output."""
    import cupy

    import cuattn

    q, _, tables, lengths = case.inputs
    out = cupy.empty(q.shape, dtype=q.dtype)
    runs = [partial(cuattn.decode, q, cache, tables, lengths, out=out) for cache in case.caches]
    bits = out.view(cupy.uint16)
    bits.fill(POISON)
    runs[0]()
    if bool((bits == POISON).any()):
        raise RuntimeError("it leaves parts of the output unwritten")
    return runs


def _capture(runs: list[Run]) -> Run:
    """Put the runs into a CUDA graph; return what replays it on the current stream."""
    import cupy

    cupy.cuda.runtime.deviceSynchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        runs[0]()
        stream.begin_capture()
        for run in runs:
            run()
        graph = stream.end_capture()
    stream.synchronize()
    return lambda: graph.launch()


def _measure(
    case: _Case,
    name: str,
    kernel: str | None,
    make: Callable[[], list[Run]],
    capture: Callable[[list[Run]], Run],
) -> list[Row]:
    """Check one implementation, then time it; no figure if it is wrong or cannot do the case."""
    row = partial(Row, "decode", case.shape.name, kernel=kernel)
    try:
        runs = make()
        out = peers.as_cupy(runs[0]()).reshape(case.inputs.q.shape)
        error = case.exact.error(by_token(case.inputs, out))
    except Exception as problem:  # a peer's refusal is of any type
        say(f"  {name} cannot do {case.shape.name}: {_reason(problem)}")
        return [row(name)]
    if not error < TOLERANCE:
        say(f"  {name} is wrong on {case.shape.name}: {error:.1e} from float64, not timed")
        return [row(name, rel_error=error)]
    case.watch.median_ms(runs[0], budget_ms=50)  # the first of a shape has come out slow
    ms = case.watch.median_ms(runs[0], budget_ms=400)
    rows = [row(name, ms=ms, gbps=case.shape.size.bytes / ms * 1e-6, rel_error=error)]
    if len(runs) == 1:
        return rows
    rounds = -(-GRAPH_CALLS // len(runs))
    try:
        replay = capture(runs * rounds)
    except Exception as problem:
        say(f"  {name} cannot be captured on {case.shape.name}: {_reason(problem)}")
        return rows
    ms = case.watch.median_ms(replay, budget_ms=400) / (len(runs) * rounds)
    return [*rows, row(f"{name}_graph", ms=ms, gbps=case.shape.size.bytes / ms * 1e-6)]


def _reason(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0][:120]


def _lines(shape: Decode, rows: list[Row], ceiling: ceilings.Ceilings) -> None:
    """One line each; ours with the fastest peer of this run and the fastest kernel known."""
    for row in rows:
        if row.ms is None:
            continue
        ours = row.impl.startswith("cuattn")
        case = f"{shape.name:22}{shape.size!s}" if row.impl == "cuattn" else ""
        say(
            f"{case:53}{row.impl:26}"
            + cell(1e3 * row.ms, ".1f", 9)
            + cell(row.gbps, ".0f", 8)
            + cell(ceiling.share_of_read(row.gbps), ".1%", 9)
            + (_compared(shape, row, rows) if ours else "")
        )


def _compared(shape: Decode, row: Row, rows: list[Row]) -> str:
    in_graph = row.impl.endswith("_graph")
    others = [
        (other.ms, other.impl)
        for other in rows
        if other.ms
        and not other.impl.startswith("cuattn")
        and other.impl.endswith("_graph") == in_graph
    ]
    text = ""
    if others and row.ms:
        ms, impl = min(others)
        text = f"  {ms / row.ms:.2f}x {impl}"
    if shape.best and row.gbps and not in_graph:
        text += f"  {row.gbps / shape.best:.2f}x best known"
    return text
