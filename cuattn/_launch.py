"""Plan → loaded kernel → launch, on the right device and in the right order of streams."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from typing import Any

from . import _compile, _tensor_map
from ._records import Device, Step, View

_MAX_DYNAMIC_SHARED_MEMORY = 8  # CUfunction_attribute
_PREFERRED_SHARED_MEMORY_CARVEOUT = 9
_ALL = 100  # percent
_MAP = _tensor_map.SIZE

_loading = threading.Lock()


# Pointers in the order of the parameter struct, handle of a stream of the current device.
Launch = Callable[[tuple[int, ...], int], None]


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


def prepare(
    steps: Sequence[Step],
    device: Device,
    pointers: struct.Struct,
    rest: bytes,
    maps: Sequence[tuple[int, _tensor_map.Map]] = (),
) -> Launch:
    """Load kernels on the current device, which is `device`; return what launches them in order.

    All have the same parameters: `pointers`, which change from call to call, before `rest`, before
    tensor maps, each of the array at one of the pointers.
    """
    steps = [step for step in steps if step.grid]
    if not steps:
        return _nothing
    with _loading:  # NVRTC and the driver would do the same work twice
        functions = [
            _function(kernel, config.define(), device.arch, shared_memory, device.ordinal)
            for kernel, config, _, _, shared_memory in steps
        ]
    from cupy.cuda import driver

    launch_kernel = driver.launchKernel

    shapes = [(step.grid, 1, 1, step.threads, 1, 1, step.shared_memory) for step in steps]
    (function, shape), *others = zip(functions, shapes, strict=True)
    pack_into = pointers.pack_into
    first_map = pointers.size + len(rest)
    encoders = [
        (slice(first_map + i * _MAP, first_map + (i + 1) * _MAP), index, _encoder(array))
        for i, (index, array) in enumerate(maps)
    ]
    slots: list[_Arguments] = []  # one belongs to one call at a time: pop and append are atomic
    take, give_back = slots.pop, slots.append

    # NOTE: the driver's call with parameters that stay in place: 2 µs less than CuPy's launch,
    # which is given them anew.
    def launch(places: tuple[int, ...], stream: int) -> None:
        try:
            arguments = take()
        except IndexError:
            arguments = _Arguments(pointers.size, rest + bytes(len(encoders) * _MAP))
        pack_into(arguments.memory, 0, *places)
        for place, index, encoded in encoders:
            arguments.memory[place] = encoded(places[index])
        launch_kernel(function.ptr, *shape, stream, arguments.address, 0)
        for later, later_shape in others:
            launch_kernel(later.ptr, *later_shape, stream, arguments.address, 0)
        give_back(arguments)

    return launch


def _encoder(array: _tensor_map.Map) -> Callable[[int], bytes]:
    """Return what makes an array's tensor map of its pointer; those of late are remembered."""
    return lru_cache(maxsize=256)(lambda pointer: _tensor_map.encode(pointer, array))


class _Arguments:
    """Memory for a parameter struct, and the address of its address, as cuLaunchKernel wants it."""

    __slots__ = ("_pointer", "address", "memory")

    def __init__(self, pointer_bytes: int, rest: bytes) -> None:
        self.memory = bytearray(pointer_bytes) + rest
        place = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._pointer = ctypes.c_void_p(place)
        self.address = ctypes.addressof(self._pointer)


def _nothing(places: tuple[int, ...], stream: int) -> None:
    """Launch no block."""


# --- streams --------------------------------------------------------------------------------------


def send(
    launches: Sequence[tuple[Launch, tuple[int, ...]]], views: Sequence[View], stream: int | None
) -> None:
    """Launch kernels, each with its pointers, in the right order with all who use `views`."""
    import cupy

    current = cupy.cuda.get_current_stream().ptr
    if stream is None and simple(views, current):
        for launch, places in launches:
            launch(places, current)
        return
    order = Order(stream, current, views)
    order.before()
    for launch, places in launches:
        launch(places, order.stream)
    order.after()
    hold(views, order.stream)


def simple(views: Sequence[View], current: int) -> bool:
    """Say whether CuPy's current stream is that of every producer, and no memory needs a guard."""
    for view in views:
        producer = view[5]
        if view[6] or (producer is not None and producer != current):
            return False
    return True


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
        elif producers and not (current and capturing(current)):
            self.stream = min(producers)
        else:
            self.stream = current
        self._others = (producers | {current}) - {self.stream}
        if self._others and self.stream and capturing(self.stream):
            self._others = set()

    def before(self) -> None:
        """Let the launch stream wait for the others."""
        for other in self._others:
            _wait(self.stream, other)

    def after(self) -> None:
        """Let the others wait for the launch stream."""
        for other in self._others:
            _wait(other, self.stream)


def capturing(stream: int) -> bool:
    """Say whether a stream is being captured in a graph; the null stream cannot be asked."""
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
    if not owners or (stream and capturing(stream)):
        return
    from cupy.cuda import Event, runtime

    while _held and _held[0][0].done:
        _held.popleft()
    event = Event(disable_timing=True)
    runtime.eventRecord(event.ptr, stream)
    _held.append((event, owners))
