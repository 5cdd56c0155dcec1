"""Device memory of the emulator: named buffers with nothing valid between them."""

from __future__ import annotations

import ctypes
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _build


class Memory:
    """Buffers that kernels may access, each a copy of an array.

    Examples
    --------
    >>> with Memory() as memory:
    ...     pointer = memory.add("x", np.arange(4))
    ...     int(memory["x"][2])
    2
    """

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}
        self._pointers: list[int] = []

    def add(self, name: str, array: NDArray[Any], *, writable: bool = False) -> int:
        """Copy an array to a new buffer and return the address of its first element.

        The copy has the array's strides; bytes between its elements are 0xff. A kernel that writes
        to a buffer that is not `writable`, or outside of one, is stopped.
        """
        if any(stride < 0 for stride in array.strides):
            raise ValueError(f"{name} has strides {array.strides}; wanted none below zero")
        steps = zip(array.shape, array.strides, strict=True)
        span = sum((n - 1) * stride for n, stride in steps) + array.itemsize if array.size else 0
        core = _build.core()
        with _build.lock:
            pointer = core.emulator_allocate(name.encode(), span)
        if pointer is None:
            raise MemoryError(f"{name} needs {span} bytes, which the emulator does not have left")
        self._pointers.append(pointer)
        raw = memoryview((ctypes.c_ubyte * max(span, 1)).from_address(pointer))
        copy = np.ndarray(array.shape, array.dtype, raw, 0, array.strides)
        copy[...] = array
        if not writable:
            copy.flags.writeable = False
            with _build.lock:
                core.emulator_protect(pointer)
        self._arrays[name] = copy
        return pointer

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return the buffer as an array, valid as long as this memory is."""
        return self._arrays[name]

    def release(self) -> None:
        """Give all buffers back; arrays of them must not be used any more."""
        self._arrays.clear()
        while self._pointers:
            with _build.lock:
                _build.core().emulator_release(self._pointers.pop())

    def __enter__(self) -> Memory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
