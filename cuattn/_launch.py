"""Plan → loaded kernel → launch, on the right device and in the right order of streams."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np

from . import _compile
from ._records import Device, Plan, View

_MAX_DYNAMIC_SHARED_MEMORY = 8  # CUfunction_attribute
_PREFERRED_SHARED_MEMORY_CARVEOUT = 9
_ALL = 100  # percent

_loading = threading.Lock()


class _Stream:
    """What CuPy's launch wants of a stream: its handle."""

    __slots__ = ("ptr",)

    def __init__(self, handle: int) -> None:
        self.ptr = handle


class _Streams(dict[int, _Stream]):
    def __missing__(self, handle: int) -> _Stream:
        self[handle] = stream = _Stream(handle)
        return stream


_streams = _Streams()
Launch = Callable[[bytes, int], None]  # packed pointers, handle of a stream of the current device


@cache
def _function(kernel: str, config: str, arch: str, shared_memory: int, ordinal: int) -> Any:
    """Load a kernel on the current device, which is `ordinal`."""
    import cupy

    path = _compile.cubin_path(kernel, config, arch)
    function = cupy.RawModule(path=str(path)).get_function(kernel).kernel
    set_attribute = cupy.cuda.driver.funcSetAttribute
    set_attribute(function.ptr, _MAX_DYNAMIC_SHARED_MEMORY, shared_memory)
    set_attribute(function.ptr, _PREFERRED_SHARED_MEMORY_CARVEOUT, _ALL)
    return function


def prepare(plan: Plan, device: Device, rest: bytes) -> Launch:
    """Load a plan's kernel on the current device, which is `device`; return what launches it.

    `rest` is the packed parameter struct behind its pointers.
    """
    with _loading:  # NVRTC and the driver would do the same work twice
        function = _function(
            plan.kernel, plan.config.define(), device.arch, plan.shared_memory, device.ordinal
        )
    grid, block, shared_memory = plan.grid, (plan.threads, 1, 1), plan.shared_memory
    void, streams = np.void, _streams

    def launch(pointers: bytes, stream: int) -> None:
        function(grid, block, (void(pointers + rest),), shared_memory, streams[stream])

    return launch if grid[0] else _nothing


def _nothing(pointers: bytes, stream: int) -> None:
    """Launch no block."""


# --- streams --------------------------------------------------------------------------------------


class Order:
    """Who waits for whom around one launch.

    The launch goes to `stream=` if given, else to the producer's current stream if it can be asked,
    else to CuPy's current one; to the latter too while it is being captured.  Other producers and
    CuPy's current stream are waited for before, and wait after, so that memory may be used again
    in either order.  A stream that is being captured waits for nothing outside of its capture.
    """

    __slots__ = ("_others", "stream")

    def __init__(self, given: int | None, current: int, views: Iterable[View]) -> None:
        producers = {view.stream for view in views if view.stream is not None}
        if given is not None:
            self.stream = given
        elif producers and not (current and _capturing(current)):
            self.stream = min(producers) if len(producers) > 1 else next(iter(producers))
        else:
            self.stream = current
        self._others = (producers | {current}) - {self.stream}
        if self._others and self.stream and _capturing(self.stream):
            self._others = set()

    def before(self) -> None:
        """Let the launch stream wait for the others."""
        for other in self._others:
            _wait(self.stream, other)

    def after(self) -> None:
        """Let the others wait for the launch stream."""
        for other in self._others:
            _wait(other, self.stream)


def _capturing(stream: int) -> bool:
    from cupy.cuda import runtime

    return bool(runtime.streamIsCapturing(stream))


def _wait(waiting: int, awaited: int) -> None:
    from cupy.cuda import Event, runtime

    event = Event(disable_timing=True)
    runtime.eventRecord(event.ptr, awaited)
    runtime.streamWaitEvent(waiting, event.ptr)


# --- lifetimes ------------------------------------------------------------------------------------

_held: deque[tuple[Any, list[Any]]] = deque()  # (event after the launch, owners it still reads)


def hold(views: Iterable[View], stream: int) -> None:
    """Keep the owners of guarded views until the launch on `stream` is done."""
    owners = [view.owner for view in views if view.guarded]
    if not owners or (stream and _capturing(stream)):
        return
    from cupy.cuda import Event, runtime

    while _held and _held[0][0].done:
        _held.popleft()
    event = Event(disable_timing=True)
    runtime.eventRecord(event.ptr, stream)
    _held.append((event, owners))
