"""What skipping gains for what it leaves out: a picture of the last results, needs no GPU.

    python -m benchmarks.frontier [PICTURE]

Structured heads only, since of independent inputs nothing may be left out.  Marks apart from the
lines are bounds of the dropped mass, at the mean that they came to.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .decode_skip import BETWEEN, REPLAYED
from .report import RESULTS

Rows = list[dict[str, Any]]


def main(arguments: Sequence[str]) -> int:
    """Draw the picture; 2 if there is nothing to draw with."""
    path = Path(arguments[0]) if arguments else RESULTS / "frontier.png"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed; wanted cuattn[plot]", file=sys.stderr)
        return 2
    figure = Figure(figsize=(12, 4), layout="constrained")
    prefill, decode, tiles = figure.subplots(1, 3)
    _speed(prefill, "Prefill", sweeps("skip"))
    _speed(decode, "Decode", sweeps("decode_skip"))
    _tiles(tiles, sweeps("decode_skip"))
    for axes in (prefill, decode, tiles):
        axes.set_xscale("log")
        axes.set_xlabel("left out of a row's weight, mean")
        axes.axvline(0.01, color="0.8", zorder=0)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    print(f"→ {path}")
    return 0


def sweeps(group: str) -> dict[str, Rows]:
    """The rows of every sweep over structured heads in a results file."""
    rows: Rows = json.loads((RESULTS / f"{group}.json").read_text("utf-8"))["rows"]
    found: dict[str, Rows] = {}
    for row in rows:
        if row["name"].startswith("w1") and row["impl"] != BETWEEN:
            found.setdefault(row["name"], []).append(row)
    return found


def speed_ups(rows: Rows) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(mass left out, speed-up) by thresholds, and by bounds of the mass."""
    dense = next(r["ms"] for r in rows if r["threshold"] is None and not bound_of(r))
    timed = [r for r in rows if r["ms"] and r["dropped_mass"]]
    points = [(bound_of(r), (r["dropped_mass"], dense / r["ms"])) for r in timed]
    return [p for bound, p in points if bound is None], [p for bound, p in points if bound]


def rates(rows: Rows, replayed: bool) -> list[tuple[float, float]]:
    """(mass left out, share of tiles skipped) by thresholds, ours or of splits alone."""
    return [
        (r["dropped_mass"], r["skip_rate"])
        for r in rows
        if (r["impl"] == REPLAYED) == replayed and r["dropped_mass"] and bound_of(r) is None
    ]


def bound_of(row: dict[str, Any]) -> float | None:
    """ε, where it decided; older files have no such field."""
    bound: float | None = row.get("max_dropped_mass")
    return bound


def _speed(axes: Any, title: str, groups: dict[str, Rows]) -> None:
    for name, rows in groups.items():
        by_threshold, by_bound = speed_ups(rows)
        (line,) = axes.plot(*zip(*by_threshold, strict=True), ".-", label=name)
        if by_bound:
            axes.plot(*zip(*by_bound, strict=True), "*", color=line.get_color(), ms=9)
    if any(speed_ups(rows)[1] for rows in groups.values()):
        axes.plot([], [], "*", color="0.5", ms=9, label="ε = 0.1, 1 and 5 % promised")
    axes.set_title(title)
    axes.set_ylabel("speed-up over the dense kernel")


def _tiles(axes: Any, groups: dict[str, Rows]) -> None:
    for name, rows in groups.items():
        (line,) = axes.plot(*zip(*rates(rows, False), strict=True), ".-", label=name)
        alone = rates(rows, True)
        if alone:
            axes.plot(*zip(*alone, strict=True), ":", color=line.get_color())
    axes.plot([], [], ":", color="0.5", label="splits judging alone (replayed)")
    axes.set_title("Decode: seeds that splits share")
    axes.set_ylabel("tiles skipped")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
