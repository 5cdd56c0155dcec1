"""Producers for the tests of `_ingest`: NumPy memory that says it lies on a CUDA device."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuattn import _ingest

CPU, CUDA, PINNED, ROCM, MANAGED = 1, 2, 3, 10, 13
_NAMED = {"dltensor": 0, "dltensor_versioned": 32}  # where the DLTensor begins

_api = ctypes.pythonapi
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", _api)
)
_new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", _api))
_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@pytest.fixture(autouse=True)
def fresh_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees what another one made the module remember."""
    monkeypatch.setattr(_ingest, "_roads", {})
    _ingest._memo.clear()
    yield
    _ingest._memo.clear()


@dataclass
class Capsules:
    """NumPy memory behind `__dlpack__`, retagged; notes streams asked for and deleters called."""

    array: np.ndarray
    kind: int = CUDA
    ordinal: int = 0
    code: int | None = None  # DLPack type code to write over NumPy's
    lanes: int = 1
    offset: int = 0
    no_strides: bool = False
    flags: int = 0
    major: int = 1
    versions: bool = True  # understands max_version
    streams: list[Any] = field(default_factory=list)
    deleted: int = 0
    _kept: list[Any] = field(default_factory=list)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, self.ordinal

    def __dlpack__(self, *, stream: Any = None, **more: Any) -> Any:
        if more and not self.versions:
            raise TypeError("unexpected keyword argument 'max_version'")
        self.streams.append(stream)
        capsule = self.array.__dlpack__(**more)
        name = "dltensor_versioned" if more else "dltensor"
        base = _get_pointer(capsule, name.encode())
        self._retag(base + _NAMED[name])
        self._count(base + (16 if more else 56))
        if more:
            ctypes.c_uint32.from_address(base).value = self.major
            ctypes.c_uint64.from_address(base + 24).value = self.flags
        return capsule

    def _retag(self, tensor: int) -> None:
        ctypes.c_int32.from_address(tensor + 8).value = self.kind
        ctypes.c_int32.from_address(tensor + 12).value = self.ordinal
        if self.code is not None:
            ctypes.c_uint8.from_address(tensor + 20).value = self.code
        ctypes.c_uint16.from_address(tensor + 22).value = self.lanes
        if self.no_strides:
            ctypes.c_uint64.from_address(tensor + 32).value = 0
        ctypes.c_uint64.from_address(tensor + 40).value = self.offset

    def _count(self, where: int) -> None:
        slot = ctypes.c_void_p.from_address(where)
        numpys = _Deleter(slot.value or 0)

        def delete(managed: int) -> None:
            self.deleted += 1
            numpys(managed)

        counted = _Deleter(delete)
        self._kept.append(counted)
        slot.value = ctypes.cast(counted, ctypes.c_void_p).value


class Interface:
    """An object with nothing but `__cuda_array_interface__`."""

    def __init__(self, **said: Any) -> None:
        defaults = {"shape": (2, 8), "typestr": "<f2", "data": (4096, False), "version": 3}
        self.__cuda_array_interface__ = {**defaults, **said}


@dataclass
class Exchange:
    """An array that its type's C exchange API describes, as PyTorch's does."""

    shape: tuple[int, ...] = (2, 3, 8)
    strides: tuple[int, ...] | None = (24, 8, 1)
    pointer: int = 4096
    place: tuple[int, int] = (CUDA, 0)
    element: tuple[int, int, int] = (4, 16, 1)
    offset: int = 0
    fails: bool = False

    def __post_init__(self) -> None:
        self.dims = (ctypes.c_int64 * len(self.shape))(*self.shape)
        self.steps = (ctypes.c_int64 * len(self.shape))(*(self.strides or ()))


def exchange_type(stream: int = 0, *, major: int = 1, older: int = 0) -> tuple[type, list[Any]]:
    """Return a new array type with an exchange table, and the list of its stream questions."""
    asked: list[tuple[int, int]] = []

    def fill(x: Exchange, tensor: int) -> int:
        if x.fails:
            return -1
        described = struct.pack(
            "=QiiiBBHQQQ",
            x.pointer,
            *x.place,
            len(x.shape),
            *x.element,
            ctypes.addressof(x.dims),
            0 if x.strides is None else ctypes.addressof(x.steps),
            x.offset,
        )
        ctypes.memmove(tensor, described, len(described))
        return 0

    def current_stream(kind: int, ordinal: int, handle: int) -> int:
        asked.append((kind, ordinal))
        ctypes.c_uint64.from_address(handle).value = stream
        return 0

    functions = (
        ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)(fill),
        ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)(
            current_stream
        ),
    )
    pointers = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    table = ctypes.create_string_buffer(
        struct.pack("=IIQQQQQQ", major, 3, older, 0, 0, 0, *pointers), 56
    )
    kind = type(
        "Tensor",
        (Exchange,),
        {
            "__dlpack_c_exchange_api__": _new_capsule(
                ctypes.addressof(table), b"dlpack_exchange_api", None
            ),
            "kept": (functions, table),
            "table": ctypes.addressof(table),
        },
    )
    return kind, asked


def cupy_array(
    shape: tuple[int, ...], byte_strides: tuple[int, ...], dtype: Any, ordinal: int = 0
) -> Any:
    """An object with CuPy's name and attributes."""
    kind = type("ndarray", (SimpleNamespace,), {"__module__": "cupy"})
    data = SimpleNamespace(ptr=4096, device_id=ordinal)
    return kind(shape=shape, strides=byte_strides, dtype=np.dtype(dtype), data=data)
