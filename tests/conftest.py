"""What runs the calls of the tests: a GPU, or the emulator where there is none.

A test that asks for the fixture `device` runs on either: it moves a `Call`'s NumPy arrays over,
runs the call into guarded memory and brings the results back. A test that only a GPU can pass says
`pytestmark = pytest.mark.gpu` or asks for the fixture `gpu`; one of the emulator itself says
`pytest.mark.emulator`, and is left out where there is no g++.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cases import Call, Case, problem_of
from compare import NAN_BITS, assert_bounds, assert_close, assert_same_share, bits
from decode_cases import problem_of_decode
from mla_cases import problem_of_mla
from numpy.typing import NDArray

import cuattn
from cuattn import _call, _device, _heuristics
from cuattn._records import DecodeGeometry, Device, Geometry, SkipMode

Array = NDArray[Any]

HUGE_BYTES = 9 << 30
GUARD = 256  # elements before and behind a result that must stay as they are


@functools.cache
def missing_gpu() -> str | None:
    """Why GPU tests cannot run here, None if they can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA device: {error}"
    return None if count else "no CUDA device"


@functools.cache
def missing_compiler() -> str | None:
    """Why the emulator cannot run here, None if it can."""
    return None if shutil.which("g++") else "no g++, which the emulator needs"


def pytest_configure(config: pytest.Config) -> None:
    # JAX would take three quarters of the GPU for itself, and tests run in several processes.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "emulator: needs g++, for the emulator")
    config.addinivalue_line("markers", "slow: only when asked for, by -m slow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = getattr(item, "fixturenames", ())
        if "gpu" in names:
            item.add_marker(pytest.mark.gpu)
        elif "device" in names and missing_gpu():
            item.add_marker(pytest.mark.emulator)
    for name, missing in (("gpu", missing_gpu), ("emulator", missing_compiler)):
        marked = [item for item in items if item.get_closest_marker(name)]
        reason = missing() if marked else None
        for item in marked if reason else ():
            item.add_marker(pytest.mark.skip(reason=reason))


failed: set[str] = set()  # tests of this process


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        failed.add(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """Leave a process whose GPU answers with errors from now on; xdist starts another one."""
    if nodeid in failed and "PYTEST_XDIST_WORKER" in os.environ and gpu_is_lost():
        os._exit(1)


def gpu_is_lost() -> bool:
    """Whether a kernel broke the CUDA context of this process, in which nothing can run then."""
    if "cupy" not in sys.modules or missing_gpu():
        return False
    runtime = sys.modules["cupy"].cuda.runtime
    try:
        runtime.deviceSynchronize()
    except runtime.CUDARuntimeError:
        return True
    return False


@dataclass(frozen=True)
class Outcome:
    """What a call gave, on the host."""

    out: Array
    lse: Array
    dropped_mass: Array | None = None  # what a certificate says


@dataclass(frozen=True)
class Guarded:
    """An array on the device between two guards, all of it filled with NaN."""

    array: Any
    whole: Any
    device: Any

    def check(self, case: Case) -> None:
        """Demand that the guards are as they were."""
        whole = bits(self.device.to_host(self.whole))
        for name, part in (("before", whole[:GUARD]), ("behind", whole[-GUARD:])):
            wrong = np.flatnonzero(part != NAN_BITS[whole.dtype.itemsize])
            assert not len(wrong), f"{case}: {len(wrong)} elements {name} the result were written"


class Executor(ABC):
    """Runs calls, on what `xp` says: CuPy on the current device, or NumPy in the emulator."""

    xp: Any

    def to_device(self, array: Array) -> Any:
        """An array with the same strides in a copy of the same memory, poison included."""
        whole = array
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        start = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
        raw = self.xp.array(np.ascontiguousarray(whole).reshape(-1).view(np.uint8))
        assert whole.flags.c_contiguous, "the memory of a test's array must be one piece"
        return self.at(raw, start, array)

    @abstractmethod
    def at(self, raw: Any, start: int, like: Array) -> Any:
        """An array like another in given bytes."""

    @abstractmethod
    def to_host(self, array: Any) -> Array:
        """A NumPy copy of an array."""

    @abstractmethod
    def current(self) -> Device:
        """What plans are made for."""

    def guarded(self, shape: tuple[int, ...], dtype: Any) -> Guarded:
        """Room for a result that shows what was and what was not written."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape))
        pattern = np.full(size + 2 * GUARD, NAN_BITS[dtype.itemsize], f"u{dtype.itemsize}")
        whole = self.xp.asarray(pattern).view(dtype)
        return Guarded(whole[GUARD : GUARD + size].reshape(shape), whole, self)

    def arguments(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments with every NumPy array on the device."""

        def moved(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(moved(part) for part in x)
            return self.to_device(x) if isinstance(x, np.ndarray) else x

        options = {name: moved(value) for name, value in call.options.items()}
        return tuple(moved(x) for x in call.arrays), options

    def run(self, call: Call, **more: Any) -> Outcome:
        """Run the call with `out=` and `lse=` between guards and bring both back."""
        arrays, options = self.arguments(call)
        q = call.arrays[0]
        out = self.guarded((*q.shape[:-1], call.case.d_v), call.case.result_dtype)
        lse = self.guarded(q.shape[:-1], np.float32)
        returned = getattr(cuattn, call.function)(
            *arrays, **{**options, **more}, out=out.array, lse=lse.array, return_lse=True
        )
        assert returned[0] is out.array and returned[1] is lse.array
        out.check(call.case)
        lse.check(call.case)
        skip = more.get("skip_softmax")
        asked = skip is not None and skip.certificate
        assert len(returned) == 2 + asked
        return Outcome(*(self.to_host(array) for array in returned))

    def check(self, call: Call, **more: Any) -> Outcome:
        """Run the call and compare it with the reference."""
        outcome = self.run(call, **more)
        self.compare(call, outcome)
        return outcome

    def compare(self, call: Call, outcome: Outcome, **replay: Any) -> None:
        """Compare results with the reference; `replay` holds its geometry and skip_softmax."""
        expected, plain = call.reference(**replay), call.plain(**replay)
        # A tensor core cuts off what is below one step of the sum so far, once for 16 columns.
        cuts = call.case.d_qk / 16
        assert_close(outcome.lse, expected.lse, plain.lse, call.case, "lse", cuts)
        logits = np.abs(expected.lse[np.isfinite(expected.lse)]).max(initial=0.0)
        assert_close(outcome.out, expected.out, plain.out, call.case, "out", float(logits))
        if outcome.dropped_mass is not None:
            rows = np.isfinite(expected.lse)
            error = np.abs(plain.lse[rows] - expected.lse[rows]).max(initial=0.0)
            share = (outcome.dropped_mass, expected.certificate)
            assert_same_share(*share, float(error), call.case, float(logits))
            if call.function.startswith("prefill"):
                assert_bounds(outcome.dropped_mass, expected.dropped_mass, call.case)

    def geometry(self, call: Call, **fields: Any) -> Geometry | DecodeGeometry:
        """Who votes on what in the kernel that this call gets with such a `SkipSoftmax`."""
        by_mass = "max_dropped_mass" in fields
        skip = SkipMode("dropped_mass" if by_mass else "threshold", False)
        if call.function == "decode":
            plan = _heuristics.decode(problem_of_decode(call, skip), self.current())
        elif call.function == "mla_decode":
            plan = _heuristics.mla_decode(problem_of_mla(call, skip), self.current())
        else:
            plan = _heuristics.prefill(problem_of(call, skip), self.current())
        return plan.geometry


class Gpu(Executor):
    """The current CUDA device."""

    @property
    def xp(self) -> Any:  # type: ignore[override]
        import cupy

        return cupy

    def at(self, raw: Any, start: int, like: Array) -> Any:
        return self.xp.ndarray(like.shape, like.dtype, raw.data + start, like.strides)

    def to_host(self, array: Any) -> Array:
        """By its bits, for dtypes that CuPy cannot copy itself."""
        packed = self.xp.ascontiguousarray(array.view(f"u{array.dtype.itemsize}"))
        host: Array = packed.get().view(array.dtype)
        return host

    def current(self) -> Device:
        return _device.describe(_device.current())


class Emulated(Executor):
    """The emulator, which must be enabled."""

    xp = np

    def at(self, raw: Any, start: int, like: Array) -> Any:
        return np.ndarray(like.shape, like.dtype, raw, start, like.strides)

    def to_host(self, array: Any) -> Array:
        return np.array(array)

    def current(self) -> Device:
        return _device.EMULATOR


# Tests take turns, so that a table of cases sees every order of threads and of landing copies.
TURNS: tuple[dict[str, Any], ...] = (
    {"schedule": "forward", "mode": "late"},
    {"schedule": "reverse", "mode": "early"},
    {"schedule": 1, "mode": "random"},
    {"schedule": "reverse", "mode": "late"},
)


@pytest.fixture
def short_lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let decode's blocks do several items where there are more than places for blocks."""
    monkeypatch.setattr(_heuristics, "LINE", 1)
    forget_plans()
    yield
    forget_plans()


def forget_plans() -> None:
    """Let calls of decode be planned anew, those that a GPU has prepared, too."""
    for plan in (_heuristics.decode, _heuristics.mla_decode):
        plan.cache_clear()
    _call._prepared.clear()


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture
def huge(gpu: Any) -> Any:
    """9 GiB of the device, every byte of it NaN; given back after the test."""
    import cupy

    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    free = cupy.cuda.runtime.memGetInfo()[0]
    if free < HUGE_BYTES + (1 << 30):
        pytest.skip(f"the device has {free >> 20} MiB free; 10 GiB are wanted")
    try:
        memory = cupy.empty(HUGE_BYTES, "uint8")
    except cupy.cuda.memory.OutOfMemoryError:  # another process of the tests was quicker
        pytest.skip("10 GiB of the device are wanted")
    memory.fill(0xFF)
    yield memory
    del memory
    pool.free_all_blocks()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """A GPU, or the emulator."""
    if missing_gpu() is None:
        yield Gpu()
        return
    turn = TURNS[zlib.crc32(request.node.name.encode()) % len(TURNS)]
    with cuattn.emulator.enabled(**turn) as launches:
        yield Emulated()
    assert not any(launch.bank_conflicts for launch in launches), "ldmatrix meets bank conflicts"


def has_hopper() -> bool:
    """Whether there is a GPU with Hopper's instructions."""
    return missing_gpu() is None and _device.describe(_device.current()).capability == (9, 0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # In the emulator the tables would take minutes; `test_emulator_prefill_hopper.py` has its own.
    marks = metafunc.definition.iter_markers("parametrize")
    chosen = any("prefill_kernel" in mark.args[0] for mark in marks)
    if "prefill_kernel" in metafunc.fixturenames and not chosen and has_hopper():
        metafunc.parametrize("prefill_kernel", ["portable", "hopper"], indirect=True)


@pytest.fixture
def prefill_kernel(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Which kernel the prefill functions choose where there is a choice."""
    kernel = getattr(request, "param", "portable")
    monkeypatch.setattr(_heuristics, "HOPPER_PREFILL", kernel == "hopper")
    _call._prepared.clear()
    yield kernel
    _call._prepared.clear()


@pytest.fixture
def hopper(device: Executor) -> Executor:
    """A GPU that has Hopper's instructions, or the emulator."""
    capability = device.current().capability
    if capability != (9, 0):
        pytest.skip(f"the device has compute capability {capability}; (9, 0) is wanted")
    return device
