"""`python -m cuattn check`: does this machine compute what the NumPy reference computes?"""

from __future__ import annotations

import argparse
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from . import (
    SkipSoftmax,
    SkipStats,
    _check,
    _cli_compile,
    _cli_info,
    _heuristics,
    _workloads,
    prefill,
    prefill_paged,
    prefill_ragged,
    reference,
)
from ._records import SkipMode

Array = NDArray[Any]

# A step between neighbouring numbers, relative.
STEP = {"bfloat16": 2.0**-7, "float16": 2.0**-10}


@dataclass(frozen=True, slots=True)
class Case:
    """One call: an operation, its arrays in order, its options."""

    name: str
    operation: Callable[..., Any]  # its namesake in `reference` says what it should give
    arrays: tuple[Array, ...]
    options: dict[str, Any] = field(default_factory=dict)


def cases() -> list[Case]:
    """Small calls that between them pass through every branch of the kernel."""
    draw = np.random.default_rng(0)

    def normal(dtype: Any, *shape: int) -> Array:
        return draw.standard_normal(shape, np.float32).astype(dtype)

    def int32(*values: Any) -> Array:
        return np.array(values, np.int32)

    bf16, fp16 = ml_dtypes.bfloat16, np.float16
    lengths, tables = int32(0, 3, 80, 210), draw.permutation(24).astype(np.int32).reshape(2, 12)
    grouped = (normal(bf16, 2, 200, 8, 128), *(normal(bf16, 2, 200, 2, 128) for _ in "kv"))
    capped = (normal(fp16, 2, 130, 4, 64), *(normal(fp16, 2, 300, 4, 64) for _ in "kv"))
    apart = tuple(normal(bf16, 2, *rest) for rest in ((77, 4, 192), (150, 4, 192), (150, 4, 128)))
    ragged = tuple(normal(bf16, 210, heads, 128) for heads in (8, 2, 2))
    paged = (normal(bf16, 60, 8, 128), normal(bf16, 24, 2, 2, 16, 128))
    window = {"causal": True, "window_left": 90, "soft_cap": 5.0}
    sinks = {"sinks": draw.standard_normal(4, np.float32)}
    # The first 64 keys attract every query, so that the tiles after them are skipped.
    attracted = [normal(np.float32, 1, 400, heads, 128) for heads in (8, 2, 2)]
    attracted[0] += 1
    attracted[1][:, :64] += 1
    skipping = tuple(array.astype(bf16) for array in attracted)
    skip = {"causal": True, "skip_softmax": SkipSoftmax(threshold=0.05, stats=SkipStats())}
    return [
        Case("bfloat16, causal, 8 query heads and 2 kv heads", prefill, grouped, {"causal": True}),
        Case("float16, causal, window, soft cap", prefill, capped, window),
        Case("head dimensions 192 and 128, sinks", prefill, apart, sinks),
        Case("ragged", prefill_ragged, (*ragged, lengths, lengths), {"causal": True}),
        Case("paged", prefill_paged, (*paged, tables, int32(150, 192), int32(0, 20, 60))),
        Case("skip-softmax, and what it counts", prefill, skipping, skip),
    ]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """`check` has no options."""


def run(options: argparse.Namespace) -> int:
    """Check what can be checked here; 0 if all of it is well."""
    device = _cli_info.current_device()
    if device is None:
        return without_gpu()
    import cupy

    print(f"{device.name}, {device.arch}")
    return run_cases(cupy)


def run_cases(xp: Any) -> int:
    """Run all cases on arrays of CuPy, or in the emulator on those of NumPy."""
    good = [report(case.name, partial(compute, case, xp)) for case in cases()]
    wrong = good.count(False)
    print(f"{wrong} of {len(good)} wrong" if wrong else "all is well")
    return 1 if wrong else 0


def without_gpu() -> int:
    """Compile for the default architecture, and run the cases in the emulator if it can be."""
    failed = compile_all()
    if shutil.which("g++") is None:
        print("nothing is run: the emulator, which runs kernels on the CPU, wants g++ 12 or later")
        return failed
    from . import emulator

    print("the emulator runs the kernels on the CPU; times say nothing about a GPU")
    with emulator.enabled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "cuattn runs on its emulator")  # just said
        return max(failed, run_cases(np))


def compile_all() -> int:
    """Compile what is shipped for the default architecture; 0 if all of it is well."""
    arch = _cli_compile.DEFAULT_ARCH
    print(f"no CUDA device here: kernels are compiled for {arch}")
    jobs = _cli_compile.shipped([arch])
    outcomes = list(_cli_compile.build_all(jobs, len(os.sched_getaffinity(0))))
    for outcome in outcomes:
        print("fail" if outcome.error or outcome.spills else "ok  ", outcome.line)
        if outcome.error:
            print(outcome.error)
    return 1 if any(outcome.error or outcome.spills for outcome in outcomes) else 0


def report(name: str, compute: Callable[[], str]) -> bool:
    """Run one check and print its line; true if it passed."""
    start = time.perf_counter()
    try:
        wrong = compute()
    except Exception as error:  # whatever it is, it belongs on the check's line
        wrong = f"{type(error).__name__}: {error}"
    print(f"{'fail' if wrong else 'ok  '} {name} ({time.perf_counter() - start:.2f} s) {wrong}")
    return not wrong


def compute(case: Case, xp: Any) -> str:
    """Compare output, LSE and skip counts of one case; return what is wrong, or nothing."""
    arrays = [xp.asarray(array) for array in case.arrays]
    options = {
        name: xp.asarray(value) if isinstance(value, np.ndarray) else value
        for name, value in case.options.items()
    }
    results = case.operation(*arrays, **options, return_lse=True)
    exact, plain = expected(case)
    step = STEP[str(case.arrays[0].dtype)]
    for name, result, tolerance in (("out", results[0], step), ("lse", results[1], 2.0**-20)):
        wanted = getattr(exact, name)
        error = np.abs(_workloads.on_host(result).astype(np.float64) - wanted)
        allowed = 2 * np.abs(getattr(plain, name).astype(np.float64) - wanted).max() + tolerance * (
            np.abs(wanted) + (name == "lse")
        )
        if not (error <= allowed).all():  # so that NaN is wrong too
            worst = np.unravel_index(np.nanargmax(error), error.shape)
            return f"{name}{[int(i) for i in worst]} is off by {error[worst]:.3g}"
    if skip := case.options.get("skip_softmax"):
        seen = (skip.stats.visited, skip.stats.skipped)
        counts = (int(exact.visited.sum()), int(exact.skipped.sum()))
        if seen != counts:
            return f"{seen[1]} of {seen[0]} votes skipped, wanted {counts[1]} of {counts[0]}"
    return ""


def expected(case: Case) -> tuple[reference.Result, reference.Result]:
    """What a case should give, in float64 and in plain arithmetic."""
    operation = getattr(reference, case.operation.__name__)
    options = dict(case.options)
    device = _cli_info.current_device() or _cli_info.typical(_cli_compile.DEFAULT_ARCH)
    if "skip_softmax" in options:
        q, k, v = (_cli_info.packed(array.shape, str(array.dtype)) for array in case.arrays)
        mode = SkipMode(source="threshold", unsafe=False)
        problem = _check.batched(q, k, v, _check.Options(causal=options["causal"], skip=mode))
        options["geometry"] = _heuristics.prefill(problem, device).geometry
    exact = operation(*case.arrays, **options)
    return exact, operation(*case.arrays, **options, arithmetic="float32-plain")
