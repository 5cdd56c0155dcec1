"""What a measurement leaves behind: a line on the terminal and a row of a JSON file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; None where a field has no meaning."""

    group: str
    name: str
    impl: str  # "cuattn" or the peer
    kernel: str | None = None
    ms: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    threshold: float | None = None
    skip_rate: float | None = None
    dropped_mass: float | None = None  # mean over rows
    rel_error: float | None = None
    worst_mass: float | None = None  # of any row
    max_dropped_mass: float | None = None  # ε, where it decides instead of a threshold


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asked for."""

    quick: bool = False
    only: tuple[str, ...] = ()  # parts of names
    peers: bool = True
    flashinfer: bool = False

    def wants(self, name: str, quick: tuple[str, ...] = ()) -> bool:
        """Whether a case of this name is to be measured; `quick` names those of a quick run."""
        if self.only:
            return any(part in name for part in self.only)
        return not self.quick or name in quick

    @property
    def complete(self) -> bool:
        """Whether a whole group is measured, so that it may replace the last full run."""
        return self.peers and not self.quick and not self.only


def environment(commit: str | None) -> dict[str, str | None]:
    """What the figures depend on, as `meta` of a results file."""
    import cupy

    from cuattn import _device

    return {
        "gpu": _device.describe(_device.current()).name,
        "driver": _driver(),
        "cupy": cupy.__version__,
        "nvrtc": ".".join(str(part) for part in cupy.cuda.nvrtc.getVersion()),
        "commit": commit or _output("git", "rev-parse", "--short=12", "HEAD"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
    }


def _driver() -> str | None:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _output(*command: str) -> str | None:
    """What a program says, None if it cannot be run or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=RESULTS.parent, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def write(path: Path, meta: dict[str, str | None], rows: list[Row]) -> None:
    """Replace a results file in one step; one row a line, so that differences read well."""
    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in rows]
    text = f'{{"meta": {json.dumps(meta, indent=2, ensure_ascii=False)},\n"rows": [\n'
    text += ",\n".join(lines) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    print(f"→ {path}", flush=True)


def cell(value: float | None, form: str, width: int) -> str:
    """A right-aligned number; a dash where there is none."""
    return f"{'–' if value is None else format(value, form):>{width}}"


def say(*parts: Any) -> None:
    """Print a line now: a run may be watched, or cut off."""
    print(*parts, flush=True)
