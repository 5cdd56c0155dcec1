"""Any array becomes the right view, at no copy, and nothing that cannot be used gets through.

No GPU is asked for: the producers here are NumPy memory that says it lies on a CUDA device.
"""

from __future__ import annotations

import ctypes
import gc
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuattn import _device, _ingest
from cuattn._ingest import number, stream_handle, view
from cuattn._records import Device, View

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


# --- producers -----------------------------------------------------------------------------------


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


# --- CuPy ----------------------------------------------------------------------------------------


def test_cupy_array_is_read_by_its_attributes() -> None:
    x = cupy_array((2, 3, 8), (96, 32, 2), ml_dtypes.bfloat16, ordinal=3)
    for _ in range(2):  # the second one from memory
        assert view(x, "q") == View(4096, (2, 3, 8), (48, 16, 1), "bfloat16", 3, None, False, x)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (np.float16, "float16"),
        (np.float32, "float32"),
        (np.int32, "int32"),
        (ml_dtypes.float8_e4m3fn, "float8_e4m3fn"),
        (np.bool_, "bool"),
    ],
)
def test_cupy_dtypes_have_names(dtype: Any, name: str) -> None:
    assert view(cupy_array((4,), (np.dtype(dtype).itemsize,), dtype), "q").dtype == name


def test_cupy_strides_between_elements_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"q has strides of \(3,\) bytes; wanted multiples of its 2"
    ):
        view(cupy_array((4,), (3,), np.float16), "q")


def test_real_cupy_array_without_a_gpu() -> None:
    cupy = pytest.importorskip("cupy")
    memory = cupy.cuda.UnownedMemory(1 << 20, 1 << 12, None, 0)
    at = cupy.cuda.MemoryPointer(memory, 64)
    x = cupy.ndarray((2, 8), ml_dtypes.bfloat16, at, strides=(64, 2))
    assert view(x, "q") == View((1 << 20) + 64, (2, 8), (32, 1), "bfloat16", 0, None, False, x)


# --- the C exchange API --------------------------------------------------------------------------


def test_exchange_gives_layout_and_current_stream() -> None:
    kind, asked = exchange_type(stream=0xABC0)
    x = kind(offset=64, place=(CUDA, 1))
    expected = View(4160, (2, 3, 8), (24, 8, 1), "bfloat16", 1, 0xABC0, False, x)
    assert view(x, "q") == expected
    assert view(x, "q") == expected
    assert asked == [(CUDA, 1), (CUDA, 1)]


def test_exchange_asks_the_stream_once_for_arrays_alike() -> None:
    kind, asked = exchange_type(stream=7)
    other, asked_other = exchange_type(stream=9)
    q = view(kind(), "q")
    assert view(kind(), "k", like=q).stream == 7
    assert len(asked) == 1
    assert view(kind(place=(CUDA, 1)), "k", like=q).stream == 7  # another device: asked again
    assert len(asked) == 2
    assert view(other(), "k", like=q).stream == 9
    assert len(asked_other) == 1


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((2, 3), None, (3, 1)),
        ((), None, ()),
        ((), (), ()),
        ((5,), (3,), (3,)),
        ((1, 4, 8), (999, 16, 1), (64, 16, 1)),
        ((4, 1, 8), (32, 999, 1), (32, 8, 1)),
        ((4, 1, 1), (32, 999, 77), (32, 1, 1)),
        ((2, 1), None, (1, 1)),
        ((0, 3, 8), (0, 0, 0), (24, 8, 1)),
        ((3, 0, 8), (5, 7, 9), (8, 8, 1)),
        ((3, 8), (0, 1), (0, 1)),
    ],
)
def test_strides_that_mean_nothing_become_packed(
    shape: tuple[int, ...], strides: tuple[int, ...] | None, expected: tuple[int, ...]
) -> None:
    kind, _ = exchange_type()
    seen = view(kind(shape=shape, strides=strides), "q")
    assert (seen.shape, seen.strides) == (shape, expected)


def test_exchange_managed_memory_is_on_the_device() -> None:
    kind, asked = exchange_type()
    assert view(kind(place=(MANAGED, 2)), "q").device == 2
    assert asked == [(MANAGED, 2)]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (CPU, r"k is on the CPU \(a test_ingest Tensor\); wanted an array on a CUDA device"),
        (PINNED, r"k is on the CPU \(in pinned memory\) .*wanted an array on a CUDA device"),
        (ROCM, r"k is on a device of DLPack type 10 .*wanted an array on a CUDA device"),
    ],
)
def test_exchange_refuses_other_devices(place: int, words: str) -> None:
    kind, _ = exchange_type()
    for _ in range(2):  # a refusal is never remembered as good
        with pytest.raises(TypeError, match=words):
            view(kind(place=(place, 0)), "k")


def test_exchange_failure_names_the_argument() -> None:
    kind, _ = exchange_type()
    with pytest.raises(
        TypeError, match=r"v \(a test_ingest Tensor\) cannot be exported: .*failed;"
    ):
        view(kind(fails=True), "v")
    assert view(kind(), "v").dtype == "bfloat16"


def test_exchange_keeps_no_array_alive() -> None:
    kind, _ = exchange_type()
    freed: list[int] = []
    kind.__del__ = lambda self: freed.append(1)
    seen = view(kind(), "q")
    assert freed == []
    del seen
    assert freed == [1]
    with pytest.raises(TypeError):
        view(kind(place=(CPU, 0)), "q")
    gc.collect()
    assert freed == [1, 1]


def test_exchange_table_of_an_older_version_is_found_behind_a_newer_one() -> None:
    old, _ = exchange_type(stream=5)
    new, _ = exchange_type(stream=6, major=2, older=old.table)
    assert view(new(), "q").stream == 5
    alone, _ = exchange_type(major=2)
    with pytest.raises(TypeError, match="q is a test_ingest Tensor; wanted an array on a CUDA"):
        view(alone(), "q")


def test_memory_of_layouts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ingest, "_MEMO_LIMIT", 8)
    kind, _ = exchange_type()
    for length in range(1, 40):
        assert view(kind(shape=(length, 8), strides=(8, 1)), "q").shape == (length, 8)
        assert len(_ingest._memo) <= 8


def test_exchange_from_many_threads() -> None:
    kind, _ = exchange_type()
    arrays = [kind(shape=(n, 8), strides=(8, 1), pointer=n << 12) for n in range(1, 9)]
    wrong: list[View] = []

    def work(x: Exchange) -> None:
        for _ in range(300):
            seen = view(x, "q")
            if (seen.pointer, seen.shape) != (x.pointer, x.shape):
                wrong.append(seen)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(x,)) for x in arrays]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


# --- torch ---------------------------------------------------------------------------------------


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PyTorch, with its CPU tensors let through."""
    module = pytest.importorskip("torch")
    if not hasattr(module.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this PyTorch has no C exchange API")
    monkeypatch.setattr(_ingest, "_ON_CUDA", {CPU, CUDA})
    return module


@pytest.mark.parametrize(
    "name", ["bfloat16", "float16", "float32", "int32", "int64", "bool", "float8_e4m3fn"]
)
def test_torch_dtypes(torch: Any, name: str) -> None:
    x = torch.zeros(3, 8, dtype=getattr(torch, name))
    seen = view(x, "q")
    assert seen == View(x.data_ptr(), (3, 8), (8, 1), name, 0, 0, False, x)


def test_torch_layouts(torch: Any) -> None:
    packed = torch.zeros(2, 5, 6, 8, dtype=torch.bfloat16)
    cases = [
        packed[:, 1:, 2:4],
        packed.transpose(1, 2),
        packed[:, :, :1].expand(2, 5, 6, 8),
        packed[0],
        torch.zeros((), dtype=torch.float32),
    ]
    for x in cases:
        seen = view(x, "q")
        assert (seen.pointer, seen.shape) == (x.data_ptr(), tuple(x.shape))
        for size, step, expected in zip(seen.shape, seen.strides, x.stride(), strict=True):
            assert size == 1 or step == expected


def test_torch_tensor_that_requires_grad_is_taken_as_detached(torch: Any) -> None:
    for x in (torch.zeros(2, 8, requires_grad=True), torch.nn.Parameter(torch.zeros(2, 8))):
        assert view(x, "q").pointer == x.data_ptr()


def test_torch_tensor_without_memory_is_refused(torch: Any) -> None:
    with pytest.raises(TypeError, match=r"q \(a torch Tensor\) cannot be exported: [^\n]*$"):
        view(torch.zeros(2, device="meta"), "q")


def test_torch_cpu_tensor_is_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"q is on the CPU \(a torch Tensor\); wanted an array on"):
        view(torch.zeros(2), "q")


# --- capsules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("versions", [True, False])
def test_capsule_gives_layout_and_is_deleted_once(versions: bool) -> None:
    array = np.zeros((4, 6, 8), np.uint16)[:, 1:4]
    x = Capsules(array, ordinal=1, code=4, versions=versions)
    seen = view(x, "q", 77)
    pointer = array.__array_interface__["data"][0]
    assert seen[:-1] == (pointer, (4, 3, 8), (48, 8, 1), "bfloat16", 1, None, True)
    assert x.streams == [77]
    gc.collect()
    assert x.deleted == 0
    copy = seen._replace(shape=(96,))
    del seen
    gc.collect()
    assert x.deleted == 0
    del copy
    gc.collect()
    assert x.deleted == 1


@pytest.mark.parametrize("versions", [True, False])
def test_refused_capsule_is_deleted_once(versions: bool) -> None:
    x = Capsules(np.zeros(4, np.uint16), lanes=2, versions=versions)
    with pytest.raises(TypeError, match="q has elements of 2 lanes; wanted one value per element"):
        view(x, "q", 0)
    gc.collect()
    assert x.deleted == 1


def test_null_stream_is_passed_as_one() -> None:
    x = Capsules(np.zeros(4, np.float32))
    view(x, "q", 0)
    assert x.streams == [1]


def test_unnamed_stream_stands_for_cupys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ingest, "_cupy_stream", lambda: 0x5000)
    x = Capsules(np.zeros(4, np.float32))
    view(x, "q")
    assert x.streams == [0x5000]


def test_capsule_without_strides_and_with_an_offset() -> None:
    array = np.zeros((2, 1, 8), np.float16)
    seen = view(Capsules(array, no_strides=True, offset=32), "q", 0)
    assert seen.pointer == array.__array_interface__["data"][0] + 32
    assert (seen.shape, seen.strides) == ((2, 1, 8), (8, 8, 1))


def test_scalar_and_empty_capsules() -> None:
    assert view(Capsules(np.zeros((), np.float32)), "scale", 0)[1:4] == ((), (), "float32")
    assert view(Capsules(np.zeros((0, 8), np.float32)), "q", 0)[1:3] == ((0, 8), (8, 1))


@pytest.mark.parametrize(
    ("code", "carrier", "name"),
    [
        (4, np.uint16, "bfloat16"),
        (2, np.float16, "float16"),
        (0, np.int32, "int32"),
        (1, np.uint8, "uint8"),
        (5, np.complex64, "complex64"),
        (6, np.uint8, "bool"),
        (10, np.uint8, "float8_e4m3fn"),
        (12, np.uint8, "float8_e5m2"),
        (14, np.uint8, "float8_e8m0fnu"),
    ],
)
def test_capsule_dtypes_have_names(code: int, carrier: Any, name: str) -> None:
    assert view(Capsules(np.zeros(4, carrier), code=code), "q", 0).dtype == name


def test_unknown_dtype_code_is_refused() -> None:
    with pytest.raises(TypeError, match=r"q has an unknown dtype \(DLPack code 99, 16 bits\)"):
        view(Capsules(np.zeros(4, np.uint16), code=99), "q", 0)


def test_capsule_of_a_later_major_version_is_refused() -> None:
    with pytest.raises(TypeError, match=r"q came as DLPack 2\.x .* wanted version 0 or 1"):
        view(Capsules(np.zeros(4, np.float32), major=2), "q", 0)


@pytest.mark.parametrize("flags", [1, 2, 3])
def test_read_only_and_copied_capsules_are_no_outputs(flags: int) -> None:
    x = Capsules(np.zeros(4, np.float32), flags=flags)
    assert view(x, "q", 0).shape == (4,)
    with pytest.raises(TypeError, match=r"out is read-only .* wanted an array that can be written"):
        view(x, "out", 0, writable=True)


def test_jax_arrays_are_inputs_but_no_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    jax = pytest.importorskip("jax")
    cpu = jax.devices("cpu")[0]
    with pytest.raises(TypeError, match=r"q is on the CPU \(a jaxlib ArrayImpl\)"):
        view(jax.numpy.zeros(4, device=cpu), "q", 0)
    monkeypatch.setattr(_ingest, "_ON_CUDA", {CPU, CUDA})
    monkeypatch.setattr(
        _ingest, "_ask_capsule", lambda x, name, stream: x.__dlpack__()
    )  # the CPU client refuses a stream
    x = jax.numpy.zeros((2, 8), jax.numpy.bfloat16, device=cpu)
    seen = view(x, "q", 0)
    assert seen[1:-1] == ((2, 8), (8, 1), "bfloat16", 0, None, True)
    assert seen.pointer == x.unsafe_buffer_pointer()
    with pytest.raises(TypeError, match=r"out is read-only .*jaxlib"):
        view(x, "out", 0, writable=True)


def test_producers_refusal_names_the_argument() -> None:
    class Sharded(Capsules):
        def __dlpack__(self, *, stream: Any = None, **more: Any) -> Any:
            raise BufferError("lies on two devices\nand more")

    with pytest.raises(TypeError, match=r"k \(a test_ingest Sharded\) cannot be exported: lies on"):
        view(Sharded(np.zeros(4)), "k", 0)


# --- __cuda_array_interface__ --------------------------------------------------------------------


@pytest.fixture
def on_device_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ingest, "_pointer_device", lambda pointer, name, x: 1)


@pytest.mark.usefixtures("on_device_1")
@pytest.mark.parametrize(
    ("said", "layout"),
    [
        ({}, ((2, 8), (8, 1), "float16")),
        ({"strides": None}, ((2, 8), (8, 1), "float16")),
        ({"strides": (64, 2)}, ((2, 8), (32, 1), "float16")),
        ({"typestr": "<i4"}, ((2, 8), (8, 1), "int32")),
        ({"typestr": "|b1"}, ((2, 8), (8, 1), "bool")),
        ({"typestr": "|u1"}, ((2, 8), (8, 1), "uint8")),
        ({"shape": (0, 8), "data": (0, False)}, ((0, 8), (8, 1), "float16")),
        ({"shape": ()}, ((), (), "float16")),
    ],
)
def test_interface_layouts(said: dict[str, Any], layout: Any) -> None:
    x = Interface(**said)
    seen = view(x, "q", 0)
    assert seen[1:4] == layout
    assert seen[4:] == (1, None, True, x)


@pytest.mark.usefixtures("on_device_1")
@pytest.mark.parametrize(("said", "stream"), [(None, None), (1, 0), (2, 2), (0x70, 0x70)])
def test_interface_stream_is_handed_on(said: Any, stream: Any) -> None:
    assert view(Interface(stream=said), "q", 0).stream == stream


@pytest.mark.usefixtures("on_device_1")
@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"typestr": "<V2"}, r"q has dtype '<V2' .* cannot tell bfloat16 .*with __dlpack__"),
        ({"typestr": ">f4"}, "q has dtype '>f4'; wanted little-endian"),
        ({"mask": object()}, "q is a masked array .* wanted one without a mask"),
        ({"strides": (17, 2)}, r"q has strides of \(17, 2\) bytes; wanted multiples of its 2"),
    ],
)
def test_interface_refusals(said: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        view(Interface(**said), "q", 0)


@pytest.mark.usefixtures("on_device_1")
def test_read_only_interface_is_no_output() -> None:
    x = Interface(data=(4096, True))
    assert view(x, "q", 0).pointer == 4096
    with pytest.raises(TypeError, match="out is read-only"):
        view(x, "out", 0, writable=True)


# --- what is no device array ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros(3), r"q is on the CPU \(a numpy ndarray\); wanted an array on a CUDA device"),
        (np.float32(1), r"q is on the CPU \(a numpy float32\); wanted an array on a CUDA device"),
        ([[1.0]], "q is a list; wanted an array on a CUDA device, with __dlpack__ or __cuda_array"),
        (None, "q is None; wanted an array on a CUDA device"),
        (1.5, "q is a float; wanted an array on a CUDA device"),
        (Capsules(np.zeros(3), kind=CPU), "q is on the CPU"),
        (Capsules(np.zeros(3), kind=PINNED), "q is on the CPU .in pinned memory."),
        (Capsules(np.zeros(3), kind=ROCM), "q is on a device of DLPack type 10"),
    ],
)
def test_other_objects_are_refused_by_name(x: Any, words: str) -> None:
    for _ in range(2):
        with pytest.raises(TypeError, match=words):
            view(x, "q", 0)


def test_numbers_pass_and_arrays_are_viewed() -> None:
    assert number(None, "scale") is None
    assert number(0.5, "scale") == 0.5
    assert number(np.float32(2), "scale") == 2
    x = cupy_array((), (), np.float32)
    assert number(x, "scale").owner is x
    with pytest.raises(TypeError, match="scale is a str; wanted an array"):
        number("0.5", "scale")


# --- streams -------------------------------------------------------------------------------------


class Protocol:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 11


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (None, None),
        (0, 0),
        (7, 7),
        (np.int64(8), 8),
        (Protocol(), 11),
        (SimpleNamespace(ptr=12), 12),
        (SimpleNamespace(cuda_stream=13), 13),
    ],
)
def test_stream_handle(stream: Any, handle: int | None) -> None:
    assert stream_handle(stream) == handle


@pytest.mark.parametrize(
    "stream", ["0", True, -1, 1.0, object(), SimpleNamespace(ptr=None), SimpleNamespace(ptr="x")]
)
def test_stream_handle_refuses_the_rest(stream: Any) -> None:
    with pytest.raises(TypeError, match=r"stream is .*; wanted None, a stream handle .*\.ptr"):
        stream_handle(stream)


# --- devices -------------------------------------------------------------------------------------

NVRTC_13 = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)


@pytest.mark.parametrize(
    ("capability", "compilable", "target"),
    [
        ((8, 0), NVRTC_13, "sm_80"),
        ((8, 6), NVRTC_13, "sm_86"),
        ((8, 7), NVRTC_13, "sm_87"),
        ((9, 0), NVRTC_13, "sm_90a"),
        ((10, 3), NVRTC_13, "sm_103"),
        ((12, 1), NVRTC_13, "sm_121"),
        ((10, 3), (80, 90, 100), "sm_100"),
        ((12, 5), NVRTC_13, "sm_121"),
    ],
)
def test_architecture(
    capability: tuple[int, int], compilable: tuple[int, ...], target: str
) -> None:
    assert _device.arch(capability, compilable) == target


def test_architectures_that_cannot_be_served() -> None:
    with pytest.raises(RuntimeError, match=r"compute capability 7\.5; cuattn wants 8\.0 or later"):
        _device.arch((7, 5), NVRTC_13)
    with pytest.raises(RuntimeError, match=r"NVRTC cannot compile for compute capability 12\.0"):
        _device.arch((12, 0), (80, 90))


def test_device_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "name": b"NVIDIA H200",
        "major": 9,
        "minor": 0,
        "multiProcessorCount": 132,
        "sharedMemPerBlockOptin": 232448,
    }
    monkeypatch.setattr(_device, "_ask", lambda question, *arguments: said)
    monkeypatch.setattr(_device, "_compilable", lambda: NVRTC_13)
    assert _device.describe.__wrapped__(2) == Device(
        2, "NVIDIA H200", (9, 0), "sm_90a", 132, 232448
    )


def test_missing_driver_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failure(RuntimeError):
        pass

    def fail() -> int:
        raise Failure("cudaErrorNoDevice: no CUDA-capable device is detected")

    runtime = SimpleNamespace(CUDARuntimeError=Failure, getDevice=fail)
    monkeypatch.setattr(_device, "_runtime", lambda: runtime)
    with pytest.raises(RuntimeError, match=r"no CUDA device can be used .*wants an NVIDIA GPU"):
        _device.current()


def test_missing_cupy_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(
        RuntimeError, match=r"CuPy cannot be imported .* wants cupy-cuda12x or cupy"
    ):
        _device._runtime.__wrapped__()


# --- real producers on a real device -------------------------------------------------------------


@pytest.mark.gpu
def test_cupy_on_a_gpu() -> None:
    cupy = pytest.importorskip("cupy")
    x = cupy.zeros((3, 4, 8), ml_dtypes.bfloat16)[1:]
    seen = view(x, "q")
    assert seen == View(x.data.ptr, (2, 4, 8), (32, 8, 1), "bfloat16", 0, None, False, x)
    empty = view(cupy.zeros((0, 8), cupy.float32), "q")
    assert (empty.shape, empty.strides, empty.device) == ((0, 8), (8, 1), 0)
    through_capsule = _ingest._from_capsule(x, "q", 0, None, True)
    assert through_capsule[:5] == seen[:5]
    through_interface = _ingest._from_interface(
        cupy.zeros((2, 8), cupy.float32), "q", 0, None, True
    )
    assert through_interface[1:5] == ((2, 8), (8, 1), "float32", 0)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        assert stream_handle(stream) == _ingest._cupy_stream() == stream.ptr
    described = _device.describe(_device.current())
    assert described.multiprocessors > 0
    assert _device.count() >= 1


@pytest.mark.gpu
def test_torch_on_a_gpu() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    x = torch.zeros(3, 4, 8, dtype=torch.bfloat16, device="cuda").requires_grad_()
    assert view(x, "q")[:5] == (x.data_ptr(), (3, 4, 8), (32, 8, 1), "bfloat16", 0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert view(x, "q").stream == stream.cuda_stream == stream_handle(stream)
    assert view(x, "q").stream == torch.cuda.current_stream().cuda_stream


@pytest.mark.gpu
def test_jax_on_a_gpu() -> None:
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no CUDA")
    x = jax.numpy.ones((3, 8), jax.numpy.bfloat16)
    seen = view(x, "q", 0)
    assert seen[:-1] == (x.unsafe_buffer_pointer(), (3, 8), (8, 1), "bfloat16", 0, None, True)
