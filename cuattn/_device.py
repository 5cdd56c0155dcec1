"""What this machine's GPUs are, asked once each through CuPy."""

from __future__ import annotations

from functools import cache
from typing import Any

from ._records import HOST, Device

_OLDEST = (8, 0)

# What the emulator stands for, so that plans are those of an H200.
EMULATOR = Device(HOST, "emulator", (9, 0), "sm_90a", multiprocessors=16, shared_memory=232_448)


def current() -> int:
    """Return the ordinal of the current CUDA device."""
    return _ask("getDevice")


def count() -> int:
    """Return the number of CUDA devices, at least 1."""
    return _ask("getDeviceCount")


@cache
def describe(ordinal: int) -> Device:
    """Return what a plan may know of one device."""
    if ordinal == HOST:
        return EMULATOR
    found = _ask("getDeviceProperties", ordinal)
    capability = (found["major"], found["minor"])
    return Device(
        ordinal=ordinal,
        name=found["name"].decode(),
        capability=capability,
        arch=arch(capability, _compilable()),
        multiprocessors=found["multiProcessorCount"],
        shared_memory=found["sharedMemPerBlockOptin"],
    )


def arch(capability: tuple[int, int], compilable: tuple[int, ...]) -> str:
    """Return the NVRTC target for a device, of those (as major·10 + minor) NVRTC can compile for.

    Code runs on every later minor version of its major one, so a device newer than NVRTC gets
    the nearest one below. Hopper's is exact: ``sm_90a`` has instructions that ``sm_90`` lacks.
    """
    major, minor = capability
    if capability < _OLDEST:
        raise RuntimeError(
            f"the CUDA device has compute capability {major}.{minor}; cuattn wants 8.0 or later"
        )
    number = 10 * major + minor
    usable = [n for n in compilable if n // 10 == major and n <= number]
    if not usable:
        raise RuntimeError(
            f"the installed NVRTC cannot compile for compute capability {major}.{minor}; "
            "cuattn wants a newer CUDA toolkit"
        )
    return "sm_90a" if max(usable) == 90 else f"sm_{max(usable)}"


def _ask(question: str, *arguments: int) -> Any:
    """Call CuPy's runtime; no CuPy, no driver and no device are one clear error."""
    runtime = _runtime()
    try:
        return getattr(runtime, question)(*arguments)
    except runtime.CUDARuntimeError as error:
        raise RuntimeError(
            f"no CUDA device can be used ({error}); cuattn wants an NVIDIA GPU and its driver"
        ) from error


@cache
def _runtime() -> Any:
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        raise RuntimeError(
            f"CuPy cannot be imported ({error}); cuattn wants cupy-cuda12x or cupy-cuda13x"
        ) from error
    return runtime


def _compilable() -> tuple[int, ...]:
    from cupy.cuda import nvrtc

    return tuple(nvrtc.getSupportedArchs())
