"""Skip-softmax decode: time, skip rate and what rows lose, over rising thresholds and bounds.

GB/s are those of a dense call in the same time.  On structured heads three more things are worked
out: the figures at a mean dropped mass of 1 %, between the thresholds measured; the same sweep by
the rule published for Hopper, one running maximum a split (replayed, so without a time); and bounds
of the dropped mass instead of thresholds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cuattn import _workloads
from cuattn._records import Plan, SkipMode
from cuattn._workloads import ExactRows, Stopwatch
from cuattn._workloads_paged import (
    PagedInputs,
    TileSums,
    by_token,
    decode_plan_of,
    exact_tokens,
    iid_paged,
    structured_paged,
)

from . import ceilings
from .report import Options, Row, cell, say
from .shapes import DECODE_SKIP, QUICK_DECODE_SKIP, DecodeSweep

TOLERANCE = 1e-2  # of the dense output against float64, and of the error beyond the skip's bound
MASS_TOLERANCE = 2e-3  # of the certificate against LSE, and of a bound that must hold
BUDGET_MS = 300.0
AT_MASS = 0.01  # where figures are compared
REPLAYED, BETWEEN = "split_alone_replayed", "cuattn_at_1%"


def run(options: Options) -> list[Row]:
    """Measure every sweep asked for."""
    import cupy

    watch = Stopwatch(cupy)
    ceiling, rows = ceilings.measure("decode_skip", watch)
    for sweep in DECODE_SKIP:
        if options.wants(sweep.name, QUICK_DECODE_SKIP):
            rows += _sweep(sweep, watch, ceiling)
            cupy.get_default_memory_pool().free_all_blocks()
    return rows


@dataclass(frozen=True, slots=True)
class _Dense:
    """A sweep's inputs and dense results, which every point is compared with."""

    sweep: DecodeSweep
    inputs: PagedInputs
    exact: ExactRows
    out: Any
    lse: Any
    place: Any  # for outputs
    watch: Stopwatch


def _sweep(sweep: DecodeSweep, watch: Stopwatch, ceiling: ceilings.Ceilings) -> list[Row]:
    import cupy

    import cuattn

    make = iid_paged if sweep.workload == "w0" else structured_paged
    inputs = make(sweep.size, xp=cupy)
    exact = exact_tokens(inputs, xp=cupy)
    out, lse = cuattn.decode(*inputs, return_lse=True)
    dense = _Dense(sweep, inputs, exact, out, lse, cupy.empty_like(out), watch)
    error = exact.error(by_token(inputs, out))
    plan = decode_plan_of(inputs, SkipMode("threshold", unsafe=False))
    say(f"{sweep.name}  {sweep.size}  {plan.geometry.block_kv} keys a tile, {plan.reason}")
    row = partial(Row, "decode_skip", sweep.name, "cuattn", plan.kernel, rel_error=error)
    if not error < TOLERANCE:
        say(f"  the dense output is wrong: {error:.1e} from float64, nothing timed")
        return [row()]
    say(
        f"{'':>16}{'µs':>10}{'GB/s':>8}{'ceiling':>9}{'speed-up':>10}{'at most':>9}{'skipped':>9}"
        f"{'left out':>10}{'worst row':>11}{'error':>9}"
    )
    call = partial(cuattn.decode, *inputs, out=dense.place)
    watch.median_ms(call, budget_ms=50)  # the first of a shape has come out slow
    ms = watch.median_ms(call, budget_ms=BUDGET_MS)
    rows = [
        row(ms=ms, gbps=_rate(sweep, ms), skip_rate=0.0, dropped_mass=0.0, worst_mass=0.0),
    ]
    line = partial(_line, dense=rows[0], ceiling=ceiling)
    line("dense", rows[0])
    for threshold in sweep.thresholds:
        rows.append(_point(dense, _threshold(threshold), threshold=threshold))
        line(f"λ {threshold:g}", rows[-1])
    for bound in sweep.bounds:
        rows.append(_point(dense, _bound(bound), max_dropped_mass=bound))
        line(f"ε {bound:g}", rows[-1])
    if sweep.workload == "w1":
        rows += _compare(dense, plan, rows, line)
    return rows


def _threshold(value: float) -> Callable[..., Any]:
    import cuattn

    return partial(cuattn.SkipSoftmax, threshold=value, unsafe=value >= 1)


def _bound(value: float) -> Callable[..., Any]:
    import cuattn

    return partial(cuattn.SkipSoftmax, max_dropped_mass=value)


def _point(
    dense: _Dense,
    skip: Callable[..., Any],
    *,
    threshold: float | None = None,
    max_dropped_mass: float | None = None,
) -> Row:
    """Check one threshold or bound, then time it; no time for what is wrong."""
    import cupy

    import cuattn

    sweep, inputs, out = dense.sweep, dense.inputs, dense.place
    decode = partial(cuattn.decode, *inputs, out=out)
    _, certified = decode(skip_softmax=skip(certificate=True))
    stats = cuattn.SkipStats()
    _, lse = decode(skip_softmax=skip(stats=stats), return_lse=True)
    dropped = _workloads.dropped_mass(lse, dense.lse, xp=cupy)
    row = partial(
        Row,
        "decode_skip",
        sweep.name,
        "cuattn",
        "decode",
        threshold=threshold,
        max_dropped_mass=max_dropped_mass,
        skip_rate=stats.rate,
        dropped_mass=float(dropped.mean()),
        worst_mass=float(dropped.max()),
        rel_error=dense.exact.error(by_token(inputs, out)),
    )
    problem = _problem(dense, dropped, certified, threshold, max_dropped_mass)
    if problem:
        say(f"  {problem}: not timed")
        return row()
    ms = dense.watch.median_ms(lambda: decode(skip_softmax=skip()), budget_ms=BUDGET_MS)
    return row(ms=ms, gbps=_rate(sweep, ms))


def _problem(
    dense: _Dense, dropped: Any, certified: Any, threshold: float | None, bound: float | None
) -> str | None:
    """What is wrong with the results of a point, if anything is."""
    import cupy

    inputs, out = dense.inputs, dense.place
    bits = [x.view(cupy.uint16) for x in (out, dense.out)]
    if threshold == 0 and not bool((bits[0] == bits[1]).all()):
        return "λ = 0 does not give the dense output bit for bit"
    beyond = dense.exact.beyond_bound(by_token(inputs, out), by_token(inputs, dropped))
    if not beyond < TOLERANCE:
        return f"{beyond:.1e} beyond what was left out"
    apart = float(abs(certified - dropped).max())
    if not apart < MASS_TOLERANCE:
        return f"the certificate is {apart:.1e} from the mass by LSE"
    if bound is not None and not float(certified.max()) < bound * (1 + MASS_TOLERANCE):
        return f"a row lost {float(certified.max()):.3%}"
    return None


def _rate(sweep: DecodeSweep, ms: float) -> float:
    return sweep.size.bytes / ms * 1e-6


# --- Beside the published rule, at the same mean dropped mass.


def _compare(
    dense: _Dense, plan: Plan, rows: list[Row], line: Callable[[str, Row], None]
) -> list[Row]:
    """Replay the published rule on the same scores, and compare at `AT_MASS`."""
    alone = _replay(dense, plan)
    for row in alone:
        line(f"alone {row.threshold:g}", row)
    swept = [row for row in rows if row.threshold is not None]
    ms, skipped = at_mass(swept, "ms"), at_mass(swept, "skip_rate")
    other = at_mass(alone, "skip_rate")
    if ms is None or skipped is None:
        say(f"  the thresholds do not reach a mean of {AT_MASS:.0%} left out from both sides")
        return alone
    between = Row(
        "decode_skip",
        dense.sweep.name,
        BETWEEN,
        plan.kernel,
        ms=ms,
        gbps=_rate(dense.sweep, ms),
        skip_rate=skipped,
        dropped_mass=AT_MASS,
    )
    line(f"at {AT_MASS:.0%}", between)
    if other is not None:
        say(f"  at {AT_MASS:.0%} on average: {skipped:.1%} skipped; by split alone {other:.1%}")
    return [*alone, between]


def _replay(dense: _Dense, plan: Plan) -> list[Row]:
    """Skip rates and masses of the rule with one running maximum a split."""
    import cupy

    inputs, geometry = dense.inputs, plan.geometry
    lengths, group = dense.sweep.size.lengths, inputs.q.shape[-2] // inputs.cache.shape[2]
    row_blocks = -(-group * dense.sweep.size.q_len // geometry.rows_per_vote)
    splits = geometry.splits.splits(lengths[0], sum(lengths) * row_blocks)
    sums = TileSums.of(inputs, geometry.block_kv, xp=cupy)
    thresholds = [x for x in dense.sweep.thresholds if x]
    rates, dropped = sums.skip_alone(np.array(thresholds), splits)
    return [
        Row(
            "decode_skip",
            dense.sweep.name,
            REPLAYED,
            threshold=threshold,
            skip_rate=float(rate),
            dropped_mass=float(mass.mean()),
            worst_mass=float(mass.max()),
        )
        for threshold, rate, mass in zip(thresholds, rates, dropped, strict=True)
    ]


def at_mass(rows: list[Row], name: str, mass: float = AT_MASS) -> float | None:
    """A figure at a mean dropped mass, linear in its logarithm between the rows around it."""
    points = sorted(
        (row.dropped_mass, getattr(row, name))
        for row in rows
        if row.dropped_mass and getattr(row, name) is not None
    )
    if not points or not points[0][0] <= mass <= points[-1][0]:
        return None
    masses, values = zip(*points, strict=True)
    return float(np.interp(np.log(mass), np.log(masses), values))


def _line(label: str, row: Row, dense: Row, ceiling: ceilings.Ceilings) -> None:
    gain = dense.ms / row.ms if dense.ms and row.ms else None
    say(
        f"{label:>16}"
        + cell(None if row.ms is None else 1e3 * row.ms, ".1f", 10)
        + cell(row.gbps, ".0f", 8)
        + cell(ceiling.share_of_read(row.gbps), ".1%", 9)
        + cell(gain, ".3f", 10)
        + cell(1 / (1 - (row.skip_rate or 0.0) / 2), ".2f", 9)
        + cell(row.skip_rate, ".1%", 9)
        + cell(row.dropped_mass, ".3%", 10)
        + cell(row.worst_mass, ".2%", 11)
        + cell(row.rel_error, ".1e", 9)
    )
