"""One implementation of one case: checked, timed, and timed again in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cuattn._workloads import Stopwatch

from . import ceilings, peers
from .report import Row, cell, say

Run = Callable[[], Any]

TOLERANCE = 1e-2  # against float64; bfloat16 gives about 3e-3
POISON = 0x7FD5  # bits of a NaN that nothing computes
BEYOND_L2 = 256 << 20  # bytes of caches in a graph
GRAPH_CALLS = 128  # so that what a replay costs beside its calls does not show


@dataclass(frozen=True, slots=True)
class Case:
    """What every implementation of a case is held to."""

    group: str
    name: str
    text: str  # its sizes
    bytes: int  # that must be moved
    flops: int | None  # counted where they are the limit
    best: float | None  # of the fastest kernel known: TFLOP/s if there are flops, else GB/s
    error: Callable[[Any], float]  # of an output, a CuPy array, against float64
    watch: Stopwatch

    def copies(self, cache_bytes: int, batch: int) -> int:
        """How many caches a graph takes turns with; 1: the case is timed without one."""
        return max(-(-BEYOND_L2 // cache_bytes), 2) if batch == 1 else 1

    def row(self, impl: str, ms: float | None, **more: Any) -> Row:
        """A row of the group with the rates that belong to a time."""
        rate = partial(Row, self.group, self.name, impl, ms=ms, **more)
        if ms is None:
            return rate()
        tflops = self.flops / ms * 1e-9 if self.flops else None
        return rate(gbps=self.bytes / ms * 1e-6, tflops=tflops)


def measure(
    case: Case,
    impl: str,
    make: Callable[[], list[Run]],
    capture: Callable[[list[Run]], Run],
    **more: Any,
) -> list[Row]:
    """Check an implementation, then time it; no figure if it is wrong or cannot do the case.

    `make` returns its call on one cache or several; with several they are also timed in a graph.
    `more` are fields of the rows.
    """
    try:
        runs = make()
        error = case.error(peers.as_cupy(runs[0]()))
    except Exception as problem:  # a peer's refusal is of any type
        say(f"  {impl} cannot do {case.name}: {_reason(problem)}")
        return [case.row(impl, None, **more)]
    if not error < TOLERANCE:
        say(f"  {impl} is wrong on {case.name}: {error:.1e} from float64, not timed")
        return [case.row(impl, None, rel_error=error, **more)]
    case.watch.median_ms(runs[0], budget_ms=50)  # the first of a shape has come out slow
    ms = case.watch.median_ms(runs[0], budget_ms=400)
    rows = [case.row(impl, ms, rel_error=error, **more)]
    if len(runs) == 1:
        return rows
    rounds = -(-GRAPH_CALLS // len(runs))
    try:
        replay = capture(runs * rounds)
    except Exception as problem:
        say(f"  {impl} cannot be captured on {case.name}: {_reason(problem)}")
        return rows
    ms = case.watch.median_ms(replay, budget_ms=400) / (len(runs) * rounds)
    return [*rows, case.row(f"{impl}_graph", ms, **more)]


def must_write(run: Run, out: Any) -> None:
    """Run what must write all of `out`, a CuPy array of 2-byte elements."""
    import cupy

    bits = out.view(cupy.uint16)
    bits.fill(POISON)
    run()
    if bool((bits == POISON).any()):
        raise RuntimeError("it leaves parts of the output unwritten")


def capture(runs: list[Run]) -> Run:
    """Put runs of ours into a CUDA graph; return what replays it on the current stream."""
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


def _reason(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0][:120]


def heading() -> None:
    """Name the columns of `lines`."""
    say(f"{'case':53}{'implementation':26}{'µs':>9}{'TFLOP/s':>9}{'GB/s':>8}{'ceiling':>9}")


def lines(case: Case, rows: list[Row], ceiling: ceilings.Ceilings) -> None:
    """One line each; ours with the fastest peer of this run and the fastest kernel known."""
    for row in rows:
        if row.ms is None:
            continue
        share = ceiling.share(row.tflops) if case.flops else ceiling.share_of_read(row.gbps)
        say(
            f"{f'{case.name:22}{case.text}' if row is rows[0] else '':53}{row.impl:26}"
            + cell(1e3 * row.ms, ".1f", 9)
            + cell(row.tflops, ".0f", 9)
            + cell(row.gbps, ".0f", 8)
            + cell(share, ".1%", 9)
            + (_compared(case, row, rows) if row.impl.startswith("cuattn") else "")
        )


def _compared(case: Case, row: Row, rows: list[Row]) -> str:
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
    rate = row.tflops if case.flops else row.gbps
    if case.best and rate and not in_graph:
        text += f"  {rate / case.best:.2f}x best known"
    return text
