"""Arrays that are read without asking for a capsule: CuPy's, and those of a C exchange API.

No GPU is asked for: see `producers.py`.
"""

from __future__ import annotations

import gc
import sys
import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from producers import (
    CPU,
    CUDA,
    MANAGED,
    PINNED,
    ROCM,
    Exchange,
    cupy_array,
    exchange_type,
    fresh_memory,
)

from cuattn import _ingest
from cuattn._ingest import view
from cuattn._records import View

__all__ = ["fresh_memory"]  # a fixture that every test here uses


# --- CuPy ----------------------------------------------------------------------------------------


def test_cupy_array_is_read_by_its_attributes() -> None:
    x = cupy_array((2, 3, 8), (96, 32, 2), ml_dtypes.bfloat16, ordinal=3)
    for _ in range(2):  # the second one from memory
        assert view(x, "q")[:8] == (4096, (2, 3, 8), (48, 16, 1), "bfloat16", 3, None, False, x)


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


def test_arrays_alike_have_one_token() -> None:
    def token(*layout: Any, ordinal: int = 0) -> int:
        return view(cupy_array(*layout, ordinal=ordinal), "q").token

    packed = ((2, 3, 8), (48, 16, 2), ml_dtypes.bfloat16)
    first = token(*packed)
    assert token(*packed) == first > 0
    others = [
        token((2, 3, 8), (96, 32, 2), ml_dtypes.bfloat16),
        token((2, 3, 8), (48, 16, 2), np.float16),
        token((3, 2, 8), (32, 16, 2), ml_dtypes.bfloat16),
        token(*packed, ordinal=1),
    ]
    assert len({first, *others}) == 5


def test_real_cupy_array_without_a_gpu() -> None:
    cupy = pytest.importorskip("cupy")
    memory = cupy.cuda.UnownedMemory(1 << 20, 1 << 12, None, 0)
    at = cupy.cuda.MemoryPointer(memory, 64)
    x = cupy.ndarray((2, 8), ml_dtypes.bfloat16, at, strides=(64, 2))
    assert view(x, "q")[:8] == ((1 << 20) + 64, (2, 8), (32, 1), "bfloat16", 0, None, False, x)


# --- the C exchange API --------------------------------------------------------------------------


def test_exchange_gives_layout_and_current_stream() -> None:
    kind, asked = exchange_type(stream=0xABC0)
    x = kind(offset=64, place=(CUDA, 1))
    expected = (4160, (2, 3, 8), (24, 8, 1), "bfloat16", 1, 0xABC0, False, x)
    assert view(x, "q")[:8] == expected
    assert view(x, "q")[:8] == expected
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
        (CPU, r"k is on the CPU \(a producers Tensor\); wanted an array on a CUDA device"),
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
    with pytest.raises(TypeError, match=r"v \(a producers Tensor\) cannot be exported: .*failed;"):
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
    with pytest.raises(TypeError, match="q is a producers Tensor; wanted an array on a CUDA"):
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
    assert seen[:8] == (x.data_ptr(), (3, 8), (8, 1), name, 0, 0, False, x)


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
