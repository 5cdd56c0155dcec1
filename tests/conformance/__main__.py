"""Record what a GPU gives: `python -m tests.conformance OUT_DIR [NAME …]`.

Cases run in a process of their own, which starts anew behind a case that kills it or hangs: one
wrapper that fails is reported, and the others are still recorded.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from . import on_gpu
from .case import Array, Case, compare
from .cases import ALL, FAMILIES

SECONDS = 60  # for one case, its compilation included
GPU_FAULT = 3  # status of a process whose last case is reported and left the GPU unusable


def main(arguments: list[str]) -> int:
    """Record all cases, or those named, and say which failed."""
    if arguments and arguments[0] == "--child":
        return child(Path(arguments[1]), arguments[2:])
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    folder, names = Path(arguments[0]), arguments[1:]
    pending = [str(case) for case in ALL if not names or str(case) in names or case.family in names]
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    while pending:
        command = [sys.executable, "-m", __package__, "--child", str(parts), *pending]
        status = subprocess.run(command, cwd=Path(__file__).parents[2]).returncode
        done = [name for name in pending if (parts / f"{name}.npz").exists()]
        refused = [name for name in pending if (parts / f"{name}.txt").exists()]
        failed |= {name: (parts / f"{name}.txt").read_text() for name in refused}
        pending = [name for name in pending if name not in done and name not in refused]
        if pending and status == 0:
            raise RuntimeError(f"nothing became of {', '.join(pending)}")
        if pending and status != GPU_FAULT:
            failed[pending[0]] = f"the process ended with status {status}"
            print(f"{pending[0]}: {failed[pending[0]]}", flush=True)
            del pending[0]
    join(folder, parts)
    print(f"{len(failed)} failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def child(parts: Path, names: list[str]) -> int:
    """Run cases one after another; a fault of the GPU ends this process."""
    import cupy

    faults = (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError)
    by_name = {str(case): case for case in ALL}
    (parts / "about.json").write_text(json.dumps(on_gpu.about()))
    for name in names:
        signal.alarm(SECONDS)  # its default action works inside a call that hangs, too
        try:
            results = on_gpu.run(by_name[name])
        except Exception as error:
            (parts / f"{name}.txt").write_text(f"{type(error).__name__}: {error}"[:2000])
            print(f"{name}: failed: {type(error).__name__}: {error}"[:600], flush=True)
            if isinstance(error, faults):
                return GPU_FAULT  # nothing works in this process any more
            continue
        save(parts / f"{name}.npz", by_name[name], results)
        print(f"{name}: {verdict(by_name[name], results)}", flush=True)
    return 0


def verdict(case: Case, results: dict[str, Array]) -> str:
    """Say whether the GPU agrees with what NumPy says."""
    if case.expected is None:
        return "recorded"
    try:
        compare(case, results, case.expected(case.inputs))
    except AssertionError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return "recorded; DIFFERS FROM NUMPY: " + " | ".join(lines[:6])
    return "recorded, as NumPy has it"


def save(path: Path, case: Case, results: dict[str, Array]) -> None:
    """Write results as plain bytes, and of the inputs the hash."""
    raw = {name: np.ascontiguousarray(array).view(np.uint8) for name, array in results.items()}
    np.savez(path, inputs=np.array(case.digest()), **raw)


def join(folder: Path, parts: Path) -> None:
    """One file a family, with where it comes from."""
    for family in FAMILIES:
        content: dict[str, Array] = {}
        for case in ALL:
            path = parts / f"{case}.npz"
            if case.family == family and path.exists():
                with np.load(path) as part:
                    content |= {f"{case.name}/{key}": part[key] for key in part.files}
        if content:
            about = np.array((parts / "about.json").read_text())
            np.savez_compressed(folder / f"{family}.npz", about=about, **content)
            print(f"{folder / family}.npz: {(folder / f'{family}.npz').stat().st_size} bytes")
    shutil.rmtree(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
