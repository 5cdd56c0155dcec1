"""The picture of what skipping gains for what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import frontier, report
from benchmarks.decode_skip import BETWEEN, REPLAYED


def row(name: str, impl: str = "cuattn", **fields: Any) -> dict[str, Any]:
    usual = {"ms": None, "threshold": None, "skip_rate": 0.0, "dropped_mass": 0.0}
    return {"name": name, "impl": impl, **usual, **fields}


SWEEP = [
    row("w1_a", ms=3.0),
    row("w1_a", ms=3.0, threshold=0.0),
    row("w1_a", ms=2.0, threshold=0.1, skip_rate=0.6, dropped_mass=0.01),
    row("w1_a", ms=2.5, skip_rate=0.5, dropped_mass=0.002, max_dropped_mass=0.01),
    row("w1_a", REPLAYED, threshold=0.1, skip_rate=0.4, dropped_mass=0.01),
]
OTHERS = [row("w0_b", ms=1.0), row("w1_a", BETWEEN, ms=9.0, dropped_mass=0.01)]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for group in ("skip", "decode_skip"):
        (tmp_path / f"{group}.json").write_text(json.dumps({"rows": SWEEP + OTHERS}), "utf-8")
    monkeypatch.setattr(frontier, "RESULTS", tmp_path)
    return tmp_path


def test_points(results: Path) -> None:
    assert frontier.sweeps("skip") == {"w1_a": SWEEP}
    assert frontier.speed_ups(SWEEP) == ([(0.01, 1.5)], [(0.002, 1.2)])
    assert frontier.rates(SWEEP, False) == [(0.01, 0.6)]
    assert frontier.rates(SWEEP, True) == [(0.01, 0.4)]


def test_the_picture_is_written(results: Path) -> None:
    pytest.importorskip("matplotlib")
    assert frontier.main([]) == 0
    assert (results / "frontier.png").stat().st_size > 10_000


@pytest.mark.parametrize("group", ["skip", "decode_skip"])
def test_measured_results_have_what_is_drawn(group: str) -> None:
    assert report.RESULTS == frontier.RESULTS
    sweeps = frontier.sweeps(group)
    assert len(sweeps) == 3
    for rows in sweeps.values():
        assert len(frontier.speed_ups(rows)[0]) >= 4
