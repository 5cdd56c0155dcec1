"""Time to the first result in a new process, with an empty kernel cache and with a filled one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .report import Options, Row, say

# What one process does: import, have a context and arrays as any caller would, then call.
PROCESS = """
import json, time
import numpy
start = time.perf_counter()
import cuattn
imported = time.perf_counter()
import cupy, ml_dtypes
q, k, v = (cupy.zeros((1, 256, 4, 128), dtype=ml_dtypes.bfloat16) for _ in "qkv")
cupy.cuda.runtime.deviceSynchronize()
options = {"skip_softmax": cuattn.SkipSoftmax(threshold=0.01)} if %(skip)r else {}
before = time.perf_counter()
cuattn.prefill(q, k, v, causal=True, **options)
cupy.cuda.runtime.deviceSynchronize()
first = time.perf_counter()
cuattn.prefill(q, k, v, causal=True, **options)
cupy.cuda.runtime.deviceSynchronize()
second = time.perf_counter()
print(json.dumps({"import cuattn": imported - start, "first": first - before,
                  "second": second - first}))
"""


def run(options: Options) -> list[Row]:
    """Start a process per case, each twice over one cache folder."""
    rows: list[Row] = []
    for name, skip in (("dense", False), ("skip", True)):
        if options.wants(name, ("dense",)):
            with tempfile.TemporaryDirectory(prefix="cuattn-cache-") as folder:
                for state in ("nothing cached", "cached on disk"):
                    rows += _process(f"{name}, {state}", skip, folder)
    return rows


def _process(name: str, skip: bool, folder: str) -> list[Row]:
    seconds = measure(skip, folder)
    say(
        f"{name:24}first call {1e3 * seconds['first']:9.1f} ms   "
        f"second {1e3 * seconds['second']:7.2f} ms   "
        f"import cuattn {1e3 * seconds['import cuattn']:6.1f} ms beyond numpy"
    )
    return [
        Row("first_call", f"{step}: {name}", "cuattn", ms=1e3 * seconds[step]) for step in seconds
    ]


def measure(skip: bool, cache: str) -> dict[str, float]:
    """Seconds of every step of one new process."""
    checkout = str(Path(__file__).resolve().parent.parent)
    paths = [checkout, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", PROCESS % {"skip": skip}],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "CUATTN_CACHE_DIR": cache,
            "CUDA_CACHE_PATH": cache,  # the driver and NVRTC have a cache of their own
            "PYTHONPATH": os.pathsep.join(paths),
        },
    )
    if done.returncode:
        raise RuntimeError(f"the measured process failed:\n{done.stderr.strip()}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
