"""One launch: compile if need be, run every block, raise what went wrong."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from .. import _sources
from . import _build
from ._report import EmulatorError, differing, explain

_SCHEDULES = ("forward", "reverse")
_MODES = ("late", "early", "random")


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("schedule", ctypes.c_int),
        ("landing", ctypes.c_int),
        ("race", ctypes.c_int),
        ("seconds", ctypes.c_int),
        ("seed", ctypes.c_uint64),
    )


class _Counts(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("switches", "rows", "wavefronts", "matrices", "shared_bytes")
    )


@dataclass(frozen=True, slots=True)
class Counts:
    """What a launch did.

    `bank_conflicts` counts what ldmatrix needs beyond one wavefront for each 8 × 8 matrix;
    `shared_bytes` is the most that a block took.
    """

    switches: int
    bank_conflicts: int
    shared_bytes: int


def run(
    kernel: str,
    config: str,
    grid: int,
    threads: int,
    params: bytes | Sequence[bytes],
    *,
    shared_bytes: int | None = None,
    schedule: str | int = "forward",
    mode: str = "late",
    race: bool = False,
    seconds: int = 60,
    sources: _sources.Sources | None = None,
) -> Counts:
    """Run a kernel over its grid.

    Parameters
    ----------
    kernel : str
        Name of the source file without `.cu`, followed by `:` and the kernel where that has
        another name.
    config : str
        What NVRTC gets as `CUATTN_CONFIG`.
    grid, threads : int
        Blocks, and threads to a block: a multiple of 32 up to 1024.
    params : bytes or sequence of bytes
        The parameters by value; pointers in them come from a `Memory`.
    shared_bytes : int, optional
        Dynamic shared memory of the launch. Default: as much as the kernel takes.
    schedule : {"forward", "reverse"} or int
        Order of blocks, warps and lanes; a number is the seed of a random one.
    mode : {"late", "early", "random"}
        When asynchronous copies and wgmma land: when they are waited for, at once, or either.
    race : bool
        Check that every access to shared memory is ordered after the writes it depends on, that no
        shared memory is read before it was written, and all bounds to the byte.
    seconds : int
        Processor time after which the launch is stopped.
    sources : mapping, optional
        Other CUDA sources than the package's.

    Returns
    -------
    Counts

    Raises
    ------
    EmulatorError
        If the kernel breaks a rule.
    """
    if not 0 < threads <= 1024 or threads % 32:
        raise ValueError(f"threads is {threads}; wanted a multiple of 32 up to 1024")
    if mode not in _MODES:
        raise ValueError(f"mode is {mode!r}; wanted one of {', '.join(_MODES)}")
    if isinstance(schedule, str) and schedule not in _SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; wanted forward, reverse or a seed")
    launch = _Launch(
        grid=grid,
        threads=threads,
        shared_bytes=-1 if shared_bytes is None else shared_bytes,
        schedule=_SCHEDULES.index(schedule) if isinstance(schedule, str) else 2,
        landing=_MODES.index(mode),
        race=race,
        seconds=seconds,
        seed=0 if isinstance(schedule, str) else schedule,
    )
    entry = _entry(str(_build.kernel_path(kernel, config, race, sources)))
    values = [params] if isinstance(params, bytes) else list(params)
    held = [ctypes.create_string_buffer(value, len(value)) for value in values]
    arguments = (ctypes.c_void_p * len(held))(*(ctypes.addressof(value) for value in held))
    core = _build.core()
    core.emulator_counts.restype = _Counts
    with _build.lock, _usual_arithmetic():
        failed = core.emulator_launch(entry, arguments, ctypes.byref(launch))
        message = core.emulator_message().decode()
        suspicion = differing(core.emulator_suspicions().decode())
        counts = core.emulator_counts()
    if failed:
        raise EmulatorError("\n".join(filter(None, [explain(message), suspicion])))
    if suspicion is not None:
        raise EmulatorError(suspicion)
    return Counts(counts.switches, counts.wavefronts - counts.matrices, counts.shared_bytes)


@contextmanager
def _usual_arithmetic() -> Iterator[None]:
    """Round as C does at its start: XLA calls back with subnormal numbers flushed to zero."""
    library = ctypes.CDLL("libm.so.6")
    before = ctypes.create_string_buffer(64)  # room for a fenv_t
    library.fegetenv(before)
    library.fesetenv(ctypes.c_void_p(-1))  # FE_DFL_ENV
    try:
        yield
    finally:
        library.fesetenv(before)


@cache
def _entry(path: str) -> Any:
    return ctypes.CDLL(path).emulator_entry
