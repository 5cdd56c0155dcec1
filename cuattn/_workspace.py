"""Memory for partial results, shared by the calls on one stream, which run one after the other.

A CUDA graph may run at any time beside its stream: what is captured gets memory of its own, shared
by the calls of one capture, which is never given back.  The capture may forbid to allocate, as
those of PyTorch and XLA do; here it is allowed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_GRANULE = 1 << 20  # bytes
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class _Arena:
    """Room that grows: `scratch` for anything, `zeros` for what every call leaves zero."""

    __slots__ = ("_kept", "scratch", "zeros")

    def __init__(self) -> None:
        self.scratch: Any = None
        self.zeros: Any = None
        self._kept: list[Any] = []  # what was outgrown: launches may still use it

    def grow(self, name: str, size: int, stream: int) -> Any:
        import cupy

        old = getattr(self, name)
        if old is not None:
            self._kept.append(old)
            size = max(size, 2 * old.size)
        with _allocating():
            array = cupy.empty(-(-size // _GRANULE) * _GRANULE, "u1")
        if name == "zeros":
            cupy.cuda.runtime.memsetAsync(array.data.ptr, 0, array.size, stream)
        setattr(self, name, array)
        return array


_arenas: dict[tuple[int, int, int], _Arena] = {}


def array(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return a new CuPy array in a capture of whatever mode; no value is set."""
    import cupy

    with _allocating():
        return cupy.ndarray(shape, dtype)


def partials(sizes: tuple[int, int, int], device: int, stream: int) -> tuple[int, int, int]:
    """Return pointers to partial_out, partial_rows and arrivals for a launch on `stream`.

    `sizes` are their bytes; `device` is the current one.
    """
    out, rows, arrivals = sizes
    key = (device, stream, _capture(stream) if stream else 0)
    arena = _arenas.get(key)
    if arena is None:
        arena = _arenas.setdefault(key, _Arena())
    scratch, zeros = arena.scratch, arena.zeros
    if scratch is None or scratch.size < out + rows:
        scratch = arena.grow("scratch", out + rows, stream)
    if arrivals and (zeros is None or zeros.size < arrivals):
        zeros = arena.grow("zeros", arrivals, stream)
    start = scratch.data.ptr
    return start + rows, start, zeros.data.ptr if arrivals else 0


def _capture(stream: int) -> int:
    """Return the number of the capture that a stream takes part in, 0 for none."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    failed = _driver().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    if failed:
        raise RuntimeError(f"cuStreamGetCaptureInfo failed with CUDA error {failed}")
    return number.value if status.value else 0


@contextmanager
def _allocating() -> Iterator[None]:
    """Allow memory to be allocated while a stream is being captured, in whatever mode."""
    mode = ctypes.c_int(_RELAXED)
    _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
