"""Dense prefill on the named shapes, beside its peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from cuattn import _call, _heuristics
from cuattn._workloads import ExactRows, Stopwatch, exact_rows, iid, plan_of

from . import ceilings, peers
from .report import Options, Row, cell, say
from .shapes import PREFILL, QUICK_PREFILL, Shape

TOLERANCE = 1e-2  # against float64; bfloat16 gives about 3e-3
POISON = 0x7FD5  # bits of a NaN that nothing computes


def run(options: Options) -> list[Row]:
    """Measure every shape asked for."""
    import cupy

    watch = Stopwatch(cupy)
    ceiling, rows = ceilings.measure("prefill", watch)
    makers = peers.available(options.flashinfer) if options.peers else {}
    say(f"{'case':52}{'implementation':20}{'µs':>9}{'TFLOP/s':>9}{'ceiling':>9}{'skipped':>9}")
    for shape in PREFILL:
        if options.wants(shape.name, QUICK_PREFILL):
            rows += _case(shape, makers, watch, ceiling)
            cupy.get_default_memory_pool().free_all_blocks()
    return rows


def _case(
    shape: Shape,
    makers: dict[str, peers.Maker],
    watch: Stopwatch,
    ceiling: ceilings.Ceilings,
) -> list[Row]:
    import cupy

    import cuattn

    inputs = iid(shape.size, xp=cupy)
    exact = exact_rows(inputs, shape.causal)
    out = cupy.empty((*inputs.q.shape[:3], shape.size.head_dim_v), dtype=inputs.q.dtype)
    rows = []
    for name, maker in makers.items():
        row = _time(shape, name, None, partial(maker, inputs, shape.causal), exact, watch)
        rows.append(row)
        if row.ms:
            say(f"{'':52}{row.impl:20}{_figures(row, ceiling)}")

    def ours() -> Any:
        return cuattn.prefill(*inputs, causal=shape.causal, out=out)

    def all_written() -> peers.Run:
        bits = out.view(cupy.uint16)
        bits.fill(POISON)
        ours()
        if bool((bits == POISON).any()):
            raise RuntimeError("it leaves parts of the output unwritten")
        return ours

    kernel = plan_of(inputs, shape.causal).kernel
    row = _time(shape, "cuattn", kernel, all_written, exact, watch)
    _our_line(shape, row, ceiling, rows)
    with _other_kernel():
        other = plan_of(inputs, shape.causal).kernel
        if other != kernel:
            name = "cuattn (portable)" if other == "fmha_sm80" else "cuattn (Hopper)"
            rows.append(_time(shape, name, other, all_written, exact, watch))
            if rows[-1].ms:
                say(f"{'':52}{name:20}{_figures(rows[-1], ceiling)}")
    return [row, *rows]


@contextmanager
def _other_kernel() -> Iterator[None]:
    """Let our calls take the portable kernel where they usually take Hopper's, or the reverse."""
    usual = _heuristics.HOPPER_PREFILL
    _heuristics.HOPPER_PREFILL = not usual
    _call._prepared.clear()
    yield
    _heuristics.HOPPER_PREFILL = usual
    _call._prepared.clear()


def _time(
    shape: Shape,
    name: str,
    kernel: str | None,
    make: Callable[[], peers.Run],
    exact: ExactRows,
    watch: Stopwatch,
) -> Row:
    """Check one implementation, then time it; no figure if it is wrong or cannot do the case."""
    try:
        run = make()
        error = exact.error(peers.as_cupy(run()))
    except Exception as problem:  # a peer's refusal is of any type
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        say(f"  {name} cannot do {shape.name}: {reason[:120]}")
        return Row("prefill", shape.name, name, kernel)
    if not error < TOLERANCE:
        say(f"  {name} is wrong on {shape.name}: {error:.1e} from float64, not timed")
        return Row("prefill", shape.name, name, kernel, rel_error=error)
    ms = watch.median_ms(run, budget_ms=400)
    tflops = shape.size.flops(shape.causal) / ms * 1e-9
    return Row("prefill", shape.name, name, kernel, ms=ms, tflops=tflops, rel_error=error)


def _figures(row: Row, ceiling: ceilings.Ceilings) -> str:
    microseconds = None if row.ms is None else 1e3 * row.ms
    return (
        cell(microseconds, ".1f", 9)
        + cell(row.tflops, ".1f", 9)
        + cell(ceiling.share(row.tflops), ".1%", 9)
        + cell(row.skip_rate, ".1%", 9)
    )


def _our_line(shape: Shape, row: Row, ceiling: ceilings.Ceilings, others: list[Row]) -> None:
    """Our figures, the fastest peer of this run and the fastest kernel known."""
    best = min((r for r in others if r.ms), key=lambda r: r.ms or 0.0, default=None)
    compared = ""
    if row.ms and best and best.ms:
        compared = f"  {best.ms / row.ms:.2f}x {best.impl}"
    if row.tflops:
        compared += f"  {row.tflops / shape.best:.2f}x best known"
    case = f"{shape.name:23}{shape!s}"
    say(f"{case:52}{row.impl:20}{_figures(row, ceiling)}{compared}")
