"""Skip-softmax prefill: time, skip rate and error over rising thresholds."""

from __future__ import annotations

from typing import Any

from cuattn import _workloads
from cuattn._workloads import ExactRows, Inputs, Stopwatch

from . import ceilings
from .report import Options, Row, cell, say
from .shapes import FMHA_V2, QUICK_SKIP, SKIP, Sweep

TOLERANCE = 1e-2  # of the dense output against float64, and of the error beyond the skip's bound
BUDGET_MS = 300.0


def run(options: Options) -> list[Row]:
    """Measure every sweep asked for."""
    import cupy

    watch = Stopwatch(cupy)
    ceiling, rows = ceilings.measure("skip", watch)
    for sweep in SKIP:
        if options.wants(sweep.name, QUICK_SKIP):
            rows += _sweep(sweep, watch, ceiling)
            cupy.get_default_memory_pool().free_all_blocks()
    return rows


def make(sweep: Sweep, xp: Any) -> Inputs:
    """Inputs of one sweep."""
    if sweep.workload == "w0":
        return _workloads.iid(sweep.size, xp=xp)
    mix = {"w1": _workloads.LOCAL, "w1_sink": _workloads.SINK_HEAVY}[sweep.workload]
    return _workloads.structured(sweep.size, mix=mix, xp=xp)


def _sweep(sweep: Sweep, watch: Stopwatch, ceiling: ceilings.Ceilings) -> list[Row]:
    import cupy

    import cuattn

    inputs = make(sweep, cupy)
    exact = _workloads.exact_rows(inputs, sweep.causal, heads=2, blocks=3)
    dense, lse = cuattn.prefill(*inputs, causal=sweep.causal, return_lse=True)
    error = exact.error(dense)
    kernel = _workloads.plan_of(inputs, sweep.causal).kernel
    say(f"{sweep.name}  {sweep}")
    if not error < TOLERANCE:
        say(f"  the dense output is wrong: {error:.1e} from float64, nothing timed")
        return [Row("skip", sweep.name, "cuattn", kernel, rel_error=error)]
    say(
        f"{'λ':>10}{'µs':>11}{'TFLOP/s':>9}{'ceiling':>9}{'skipped':>9}{'speed-up':>10}"
        f"{'at most':>9}{'left out':>10}{'error':>9}"
    )
    out = cupy.empty_like(dense)
    ms = watch.median_ms(
        lambda: cuattn.prefill(*inputs, causal=sweep.causal, out=out), budget_ms=BUDGET_MS
    )
    rows = [_row(sweep, kernel, None, ms, 0.0, 0.0, error)]
    _line(sweep, rows[0], rows[0], ceiling)
    for threshold in sweep.thresholds:
        rows.append(_point(sweep, inputs, threshold, (dense, lse, out), exact, watch))
        _line(sweep, rows[-1], rows[0], ceiling)
    _expected_rate(sweep, inputs, rows)
    return rows


def _point(
    sweep: Sweep,
    inputs: Inputs,
    threshold: float,
    dense: tuple[Any, Any, Any],
    exact: ExactRows,
    watch: Stopwatch,
) -> Row:
    """Check one threshold, then time it; `dense` is the dense output, its LSE, and a place."""
    import cupy

    import cuattn

    full, full_lse, out = dense
    unsafe = threshold >= 1
    stats = cuattn.SkipStats()
    counted = cuattn.SkipSoftmax(threshold=threshold, unsafe=unsafe, stats=stats)
    skip = cuattn.SkipSoftmax(threshold=threshold, unsafe=unsafe)
    _, lse = cuattn.prefill(
        *inputs, causal=sweep.causal, skip_softmax=counted, return_lse=True, out=out
    )
    dropped = _workloads.dropped_mass(lse, full_lse, xp=cupy)
    mass, rate, error = float(dropped.mean()), stats.rate, exact.error(out)
    kernel = _workloads.plan_of(inputs, sweep.causal, skip=True).kernel
    beyond = exact.beyond_bound(out, dropped)
    if threshold <= 1e-30 and not bool((out.view(cupy.uint16) == full.view(cupy.uint16)).all()):
        say(f"  λ = {threshold:g} does not give the dense output bit for bit: not timed")
        return _row(sweep, kernel, threshold, None, rate, mass, error)
    if not beyond < TOLERANCE:
        say(f"  λ = {threshold:g} is wrong: {beyond:.1e} beyond what it left out, not timed")
        return _row(sweep, kernel, threshold, None, rate, mass, error)
    ms = watch.median_ms(
        lambda: cuattn.prefill(*inputs, causal=sweep.causal, skip_softmax=skip, out=out),
        budget_ms=BUDGET_MS,
    )
    return _row(sweep, kernel, threshold, ms, rate, mass, error)


def _row(
    sweep: Sweep,
    kernel: str | None,
    threshold: float | None,
    ms: float | None,
    rate: float,
    mass: float,
    error: float,
) -> Row:
    tflops = None if ms is None else sweep.size.flops(sweep.causal) / ms * 1e-9
    return Row(
        "skip",
        sweep.name,
        "cuattn",
        kernel,
        ms=ms,
        tflops=tflops,
        threshold=threshold,
        skip_rate=rate,
        dropped_mass=mass,
        rel_error=error,
    )


def _line(sweep: Sweep, row: Row, dense: Row, ceiling: ceilings.Ceilings) -> None:
    label = "dense" if row.threshold is None else f"{row.threshold:g}"
    gain = dense.ms / row.ms if dense.ms and row.ms else None
    other = sweep.other_ms(row.threshold)
    compared = f"  {other / row.ms:.2f}x {FMHA_V2} of {other:g} ms" if other and row.ms else ""
    say(
        f"{label:>10}"
        + cell(None if row.ms is None else 1e3 * row.ms, ".1f", 11)
        + cell(row.tflops, ".1f", 9)
        + cell(ceiling.share(row.tflops), ".1%", 9)
        + cell(row.skip_rate, ".1%", 9)
        + cell(gain, ".3f", 10)
        + cell(1 / (1 - (row.skip_rate or 0.0) / 2), ".2f", 9)
        + cell(row.dropped_mass, ".2%", 10)
        + cell(row.rel_error, ".1e", 9)
        + compared
    )


def _expected_rate(sweep: Sweep, inputs: Inputs, rows: list[Row]) -> None:
    """Independent inputs at λ = 1 have a known skip rate: the counters' own check."""
    counted = [row.skip_rate for row in rows if row.threshold == 1]
    if sweep.workload != "w0" or sweep.causal or not counted or counted[0] is None:
        return
    votes = _workloads.plan_of(inputs, sweep.causal, skip=True).geometry
    tiles = -(-sweep.size.seq // votes.block_kv)
    expected = _workloads.iid_skip_rate(tiles, votes.rows_per_vote)
    say(f"  λ = 1 skipped {counted[0]:.2%}; independent rows would skip {expected:.2%}")
