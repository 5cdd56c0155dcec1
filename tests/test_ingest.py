"""Any array becomes the right view, at no copy, and nothing that cannot be used gets through.

No GPU is asked for: the producers here are NumPy memory that says it lies on a CUDA device.
"""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from producers import (
    CPU,
    CUDA,
    PINNED,
    ROCM,
    Capsules,
    Interface,
    cupy_array,
    fresh_memory,
)

from cuattn import _device, _ingest
from cuattn._ingest import number, stream_handle, view

__all__ = ["fresh_memory"]  # a fixture that every test here uses


# --- capsules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("versions", [True, False])
def test_capsule_gives_layout_and_is_deleted_once(versions: bool) -> None:
    array = np.zeros((4, 6, 8), np.uint16)[:, 1:4]
    x = Capsules(array, ordinal=1, code=4, versions=versions)
    seen = view(x, "q", 77)
    pointer = array.__array_interface__["data"][0]
    assert seen[:7] == (pointer, (4, 3, 8), (48, 8, 1), "bfloat16", 1, None, True)
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
    assert seen[1:7] == ((2, 8), (8, 1), "bfloat16", 0, None, True)
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
    assert seen[4:8] == (1, None, True, x)


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


# --- real producers on a real device -------------------------------------------------------------


@pytest.mark.gpu
def test_cupy_on_a_gpu() -> None:
    cupy = pytest.importorskip("cupy")
    x = cupy.zeros((3, 4, 8), ml_dtypes.bfloat16)[1:]
    seen = view(x, "q")
    assert seen[:8] == (x.data.ptr, (2, 4, 8), (32, 8, 1), "bfloat16", 0, None, False, x)
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
    assert seen[:7] == (x.unsafe_buffer_pointer(), (3, 8), (8, 1), "bfloat16", 0, None, True)
