"""What a GPU is, and one clear error where there is none."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from cuattn import _device
from cuattn._records import Device

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
