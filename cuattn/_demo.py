"""`python -m cuattn demo`: what skipping weak tiles buys on structured data, and what it costs.

One call of dense attention, then the same with rising thresholds.  Every line says how long it
took, how many tiles were skipped, which share of each row's softmax that left out, and how far the
output is from attention in float64.  Without a GPU the emulator runs the same kernels on a small
case, without times.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from . import _device, _workloads
from ._records import Geometry
from ._workloads import ExactRows, Inputs, Size

Array = NDArray[Any]

THRESHOLDS = (0.0, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
TOLERANCE = 1e-2  # of the dense output against float64; bfloat16 gives about 3e-3
NO_COMPILER = (
    "Without a GPU the demonstration wants g++ 12 or later, to compile the kernels for the CPU;\n"
    "neither is here, so there is nothing to show."
)
EMULATED = (
    "So this is the emulator: the GPU kernels' own sources, compiled by g++ for the CPU, on a\n"
    "small case.  Results and skip counts are those of the kernels; there are no times, as\n"
    "those of the emulator would say nothing about a GPU.\n"
)
WITHOUT_GPU = Size(1, 2048, 2, 2)
MAP_TOKENS = 4096  # of the picture of skipped tiles
WORKLOADS: dict[str, tuple[str, Callable[..., Inputs]]] = {
    "w1": ("W1, structured heads", _workloads.structured),
    "sink": (
        "W1 with heavy sinks",
        lambda size, **options: _workloads.structured(size, mix=_workloads.SINK_HEAVY, **options),
    ),
    "w0": ("W0, independent normal inputs (the output means nothing)", _workloads.iid),
}


@dataclass(frozen=True, slots=True)
class Point:
    """One line of the table."""

    threshold: float | None  # None: the dense kernel
    ms: float | None  # None: not timed
    skip_rate: float
    dropped_mean: float
    dropped_worst: float
    error: float


def main(arguments: Sequence[str]) -> int:
    """Run the demonstration and return an exit status."""
    options = parser().parse_args(arguments)
    reason = _why_no_gpu()
    if reason:
        print(f"{reason[0].upper()}{reason[1:]}.")
        if not shutil.which("g++"):
            print(NO_COMPILER)
            return 1
        print(EMULATED)
    size = _size(options, small=bool(reason))
    if size.q_heads % size.kv_heads:
        print(f"--kv-heads is {size.kv_heads}, which does not divide --heads {size.q_heads}")
        return 2
    return (_run_emulator if reason else _run_gpu)(size, options)


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    top = argparse.ArgumentParser(
        prog="python -m cuattn demo",
        description="Dense attention and a sweep of skip-softmax thresholds.",
    )
    top.add_argument("--workload", choices=WORKLOADS, default="w1")
    top.add_argument("--batch", type=_positive, metavar="N", help="default 1")
    top.add_argument("--seq", type=_positive, metavar="N", help="tokens; default 16384")
    top.add_argument("--heads", type=_positive, metavar="N", help="query heads; default 16")
    top.add_argument("--kv-heads", type=_positive, metavar="N", help="default: as many as --heads")
    top.add_argument("--head-dim", type=_positive, metavar="N", help="default 128")
    top.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    top.add_argument("--full", action="store_true", help="no causal mask")
    top.add_argument(
        "--thresholds", type=_thresholds, default=THRESHOLDS, metavar="λ,λ,…", help="to sweep"
    )
    top.add_argument("--seed", type=int, default=0)
    top.add_argument("--plot", type=Path, metavar="FILE", help="save a picture, e.g. demo.png")
    return top


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _thresholds(text: str) -> tuple[float, ...]:
    numbers = tuple(float(part) for part in text.split(","))
    if not all(0 <= number < float("inf") for number in numbers):
        raise argparse.ArgumentTypeError(f"{text} has a threshold that is not from 0 up")
    return numbers


def _size(options: argparse.Namespace, small: bool) -> Size:
    usual = WITHOUT_GPU if small else Size(1, 16384, 16, 16)
    heads = options.heads or usual.q_heads
    return Size(
        batch=options.batch or 1,
        seq=options.seq or usual.seq,
        q_heads=heads,
        kv_heads=options.kv_heads or heads,
        head_dim_qk=options.head_dim or 128,
        head_dim_v=options.head_dim or 128,
    )


def _why_no_gpu() -> str:
    """Why no GPU can be used here; empty when one can."""
    try:
        _device.count()
    except RuntimeError as error:
        return str(error)
    return ""


def _run_gpu(size: Size, options: argparse.Namespace) -> int:
    import cupy

    device = _device.describe(_device.current())
    where = f"{device.name}, {device.arch}"
    return _run(size, options, cupy, where, _workloads.Stopwatch(cupy).median_ms)


def _run_emulator(size: Size, options: argparse.Namespace) -> int:
    """The same kernels on a small case, without times, which would mean nothing."""
    import warnings

    from . import emulator

    with emulator.enabled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "cuattn runs on its emulator")  # said above
        try:
            return _run(size, options, np, "none, the emulator on the CPU", None)
        except emulator.EmulatorError as error:
            print(f"The emulator stopped the kernel: {error}")
            return 1


def _run(
    size: Size,
    options: argparse.Namespace,
    xp: Any,
    device: str,
    median_ms: Callable[[Callable[[], Any]], float] | None,
) -> int:
    """Dense attention and the sweep, on arrays of `xp`."""
    from . import SkipSoftmax, prefill

    name, make = WORKLOADS[options.workload]
    causal, timed = not options.full, median_ms is not None
    _header(device, name, size, options)
    inputs = make(size, xp=xp, seed=options.seed, dtype=DTYPES[options.dtype])
    exact = _workloads.exact_rows(inputs, causal, heads=8)

    dense, lse = prefill(*inputs, causal=causal, return_lse=True)
    error = exact.error(dense)
    if not error < TOLERANCE:
        print(f"The dense output is wrong: {error:.2e} from float64, at most {TOLERANCE} wanted.")
        return 1
    out = xp.empty_like(dense)
    ms = median_ms(partial(prefill, *inputs, causal=causal, out=out)) if median_ms else None
    points = [Point(None, ms, 0.0, 0.0, 0.0, error)]
    _table_head(timed)
    _line(points[0], points[0], size.flops(causal))
    identical = None
    for threshold in options.thresholds:
        kept, point = _skip_point(inputs, causal, threshold, lse, exact, xp)
        if threshold == 0:
            identical = bool((kept.view(xp.uint16) == dense.view(xp.uint16)).all())
        if median_ms:
            skip = SkipSoftmax(threshold=threshold, unsafe=threshold >= 1)
            run = partial(prefill, *inputs, causal=causal, skip_softmax=skip, out=out)
            point = replace(point, ms=median_ms(run))
        points.append(point)
        _line(points[-1], points[0], size.flops(causal))
    _footer(exact, identical, timed)
    geometry = _workloads.plan_of(inputs, causal, skip=True).geometry
    _picture(options, size, inputs, points, geometry)
    return int(identical is False)


def _skip_point(
    inputs: Inputs, causal: bool, threshold: float, dense_lse: Any, exact: ExactRows, xp: Any
) -> tuple[Any, Point]:
    """The output at one threshold, and what skipping did, not timed."""
    from . import SkipSoftmax, SkipStats, prefill

    stats = SkipStats()
    skip = SkipSoftmax(threshold=threshold, unsafe=threshold >= 1, stats=stats)
    out, lse = prefill(*inputs, causal=causal, skip_softmax=skip, return_lse=True)
    dropped = _workloads.dropped_mass(lse, dense_lse, xp=xp)
    mean, worst = float(dropped.mean()), float(dropped.max())
    return out, Point(threshold, None, stats.rate, mean, worst, exact.error(out))


def _header(device: str, name: str, size: Size, options: argparse.Namespace) -> None:
    mask = "full" if options.full else "causal"
    group = f"{size.q_heads} heads" + (
        f" over {size.kv_heads} KV heads" if size.kv_heads != size.q_heads else ""
    )
    print(f"device    {device}")
    print(f"workload  {name}, seed {options.seed}")
    print(
        f"shape     {size.batch} × {size.seq} tokens, {group}, head dim {size.head_dim_qk}, "
        f"{options.dtype}, {mask}\n"
    )


def _table_head(timed: bool) -> None:
    times = f"{'ms':>9}{'TFLOP/s':>9}{'speed-up':>10}{'at most':>9}" if timed else ""
    print(f"{'λ':>8}{times}{'skipped':>9}{'left out, mean':>16}{'worst row':>11}{'error':>10}")


def _line(point: Point, dense: Point, flops: float) -> None:
    label = "dense" if point.threshold is None else f"{point.threshold:g}"
    times = ""
    if point.ms is not None and dense.ms is not None:
        rate, gain = flops / point.ms * 1e-9, dense.ms / point.ms
        bound = 1 / (1 - point.skip_rate / 2)
        times = f"{point.ms:>9.3f}{rate:>9.0f}{gain:>9.2f}x{bound:>8.2f}x"
    print(
        f"{label:>8}{times}{point.skip_rate:>9.1%}{point.dropped_mean:>16.3%}"
        f"{point.dropped_worst:>11.2%}{point.error:>10.1e}",
        flush=True,
    )


def _footer(exact: ExactRows, identical: bool | None, timed: bool) -> None:
    rows = exact.out.shape[0] * exact.out.shape[1]
    print()
    if identical is not None:
        print(f"λ = 0 gives the dense kernel's output bit for bit: {'yes' if identical else 'NO'}.")
    if timed:
        print("TFLOP/s    of the dense call's work, skipped or not")
        print("at most    1 / (1 − skipped / 2): Q·Kᵀ is worked out for every tile")
    print("left out   share of a row's softmax in skipped tiles")
    print(f"error      ‖out − exact‖ / ‖exact‖ against dense attention in float64, {rows} rows")


def skipped_tiles(
    q: Array, k: Array, v: Array, causal: bool, geometry: Geometry, threshold: float
) -> Array:
    """Which tiles of one head are skipped, replayed in NumPy vote by vote.

    Parameters
    ----------
    q, k, v : ndarray, ``[seq, 1, head_dim]``
    causal : bool
    geometry : Geometry
    threshold : float
        At most 1: then a skipped tile never holds a maximum, and the votes stand whatever was
        skipped before them.

    Returns
    -------
    ndarray, ``[votes, tiles]``
        1 skipped, 0 kept, NaN not visited.
    """
    from .reference import attention

    seq, rows, keys = len(q), geometry.rows_per_vote, geometry.block_kv
    alone = replace(geometry, block_q=rows, pack_rows=0)
    tiles = np.full((-(-seq // rows), -(-seq // keys)), np.nan)
    for group, first in enumerate(range(0, seq, rows)):
        end = min(first + rows, seq)
        seen = end if causal else seq
        result = attention(q[first:end], k[:seen], v[:seen], causal=causal, geometry=alone)
        last = (seen - 1) // keys
        order = [0, *range(last, 0, -1)]
        floor = log(threshold) if threshold > 0 else -np.inf
        tiles[group, order] = result.statistics[:, 0] < floor
    return tiles


def _picture(
    options: argparse.Namespace,
    size: Size,
    inputs: Inputs,
    points: list[Point],
    geometry: Geometry,
) -> None:
    if options.plot is None:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No picture: matplotlib is not installed.")
        return
    figure = Figure(figsize=(12, 5), layout="constrained")
    curve, tiles = figure.subplots(1, 2)
    _draw_curve(curve, points)
    _draw_tiles(tiles, options, size, inputs, points, geometry)
    figure.savefig(options.plot, dpi=120)
    print(f"Picture: {options.plot}")


def _draw_curve(axes: Any, points: list[Point]) -> None:
    """Speed against error; the skip rate where nothing was timed."""
    dense = points[0]
    # In float64 the error at λ = 0 is nothing but rounding, ten decades away from the others.
    swept = [p for p in points[1:] if p.error > 1e-9]
    timed = dense.ms is not None
    height = [
        dense.ms / p.ms if dense.ms is not None and p.ms is not None else p.skip_rate for p in swept
    ]
    axes.plot([p.error for p in swept], height, "o-")
    for point, y in zip(swept, height, strict=True):
        axes.annotate(
            f"λ {point.threshold:g}",
            (point.error, y),
            (5, -10),
            fontsize=8,
            textcoords="offset points",
        )
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("relative error of the output against float64")
    axes.set_ylabel("speed over the dense kernel" if timed else "share of tiles skipped")
    axes.set_title("What skipping buys and costs")
    axes.grid(alpha=0.3)


def _draw_tiles(
    axes: Any,
    options: argparse.Namespace,
    size: Size,
    inputs: Inputs,
    points: list[Point],
    geometry: Geometry,
) -> None:
    """Skipped tiles of one head at the threshold whose mean dropped mass is nearest to 1 %."""
    swept = [p for p in points if p.threshold is not None and 0 < p.threshold <= 1]
    if not swept:
        axes.set_axis_off()
        return
    chosen = min(swept, key=lambda p: abs(p.dropped_mean - 0.01)).threshold
    head = size.q_heads // 2
    tokens = min(size.seq, MAP_TOKENS)
    causal = not options.full
    one = [
        _workloads.on_host(x[0, :tokens, h])[:, None]
        for x, h in zip(inputs, (head, *[head * size.kv_heads // size.q_heads] * 2), strict=True)
    ]
    tiles = skipped_tiles(one[0], one[1], one[2], causal, geometry, float(chosen or 0))
    axes.imshow(
        tiles,
        aspect="auto",
        cmap="viridis",
        interpolation="nearest",
        vmin=0,
        vmax=1,
        extent=(0, tokens, tokens, 0),
    )
    rate = np.nanmean(tiles)
    part = f"first {tokens} tokens" if tokens < size.seq else f"{tokens} tokens"
    alone = "" if causal or tokens == size.seq else " taken alone"
    axes.set_title(
        f"Tiles skipped in head {head}, {part}{alone}, λ = {chosen:g}: {rate:.0%}\n"
        f"replayed in NumPy, votes of {geometry.rows_per_vote} rows × {geometry.block_kv} keys; "
        "yellow: skipped",
        fontsize=10,
    )
    axes.set_xlabel("key")
    axes.set_ylabel("query")
