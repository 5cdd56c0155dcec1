"""One call of a kernel that is no attention: planned the first time, then only launched."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

from . import _device, _launch
from ._records import HOST, Step, View
from ._tool_params import Parameters

T = TypeVar("T")

layout_of = itemgetter(slice(1, 5))  # of a View: shape, strides, dtype, device

_kept: dict[Any, Any] = {}
_LIMIT = 4096  # token counts vary without end in a server: then begin anew
_stay: AbstractContextManager[Any] = nullcontext()


class Job(NamedTuple):
    """A kernel with all that it is told, but for the pointers."""

    step: Step
    parameters: Parameters
    rest: bytes

    def prepare(self, pointers: struct.Struct | None = None) -> _launch.Launch:
        """Load the kernel on the current device; return what launches it.

        `pointers` packs those of all pointers that such calls have; the others are null.
        """
        device = _device.describe(_device.current())
        packer = pointers or self.parameters.pointer_bytes
        return _launch.prepare([self.step], device, packer, self.rest)

    def emulate(self, inputs: Mapping[str, View], results: Mapping[str, Any]) -> None:
        """Run it on CPU arrays, by the kernel's names; `results` are NumPy arrays."""
        from .emulator import _launch, _settings

        settings = _settings.current()
        pointers = self.parameters.pointers
        _launch.launch([self.step], pointers, self.rest, inputs, results, settings)


def kept(key: Any, make: Callable[[], T]) -> T:
    """Return what `make()` gave when the key was new.

    A key is all that `make` depends on: layouts of views, options, alignment of pointers.
    """
    try:
        found = _kept.get(key)
    except TypeError:  # an option of a type that has no hash: the checks say which
        return make()
    if found is None:
        found = make()
        if len(_kept) >= _LIMIT:
            _kept.clear()
        _kept[key] = found
    made: T = found
    return made


def on(ordinal: int) -> AbstractContextManager[Any]:
    """Make a device the current one."""
    import cupy

    return _stay if ordinal == cupy.cuda.runtime.getDevice() else cupy.cuda.Device(ordinal)


def on_host(view: View) -> bool:
    """Say whether a call is the emulator's."""
    return view[4] == HOST


def alignment(views: Sequence[View]) -> int:
    """Return the low bits that any of the pointers has set."""
    bits = 0
    for view in views:
        bits |= view[0]
    return bits & 15


def captured(stream: int | None, views: Sequence[View]) -> bool:
    """Say whether a call is part of a graph that is being captured."""
    import cupy

    current = cupy.cuda.get_current_stream().ptr
    handles = {current, _launch.Order(stream, current, views).stream} - {0}
    return any(_launch.capturing(handle) for handle in handles)
