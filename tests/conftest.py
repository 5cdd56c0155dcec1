"""The GPU behind the tests: found once, or the reason why GPU tests are left out.

A test that needs a GPU says `pytestmark = pytest.mark.gpu` or asks for the fixture `gpu`, which
moves a `Call`'s NumPy arrays over, runs it into guarded memory and brings the results back.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cases import Call, Case, problem_of
from compare import NAN_BITS, assert_close, bits
from numpy.typing import NDArray

from cuattn._records import Geometry, SkipMode

Array = NDArray[Any]

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


def pytest_configure(config: pytest.Config) -> None:
    # JAX would take three quarters of the GPU for itself, and tests run in several processes.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    reason = missing_gpu() if on_gpu else None
    if reason:
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))


@dataclass(frozen=True)
class Outcome:
    """What a call gave, on the host."""

    out: Array
    lse: Array


@dataclass(frozen=True)
class Guarded:
    """An array on the device between two guards, all of it filled with NaN."""

    array: Any
    whole: Any

    def check(self, case: Case) -> None:
        """Demand that the guards are as they were."""
        whole = bits(to_host(self.whole))
        for name, part in (("before", whole[:GUARD]), ("behind", whole[-GUARD:])):
            wrong = np.flatnonzero(part != NAN_BITS[whole.dtype.itemsize])
            assert not len(wrong), f"{case}: {len(wrong)} elements {name} the result were written"


def to_device(array: Array) -> Any:
    """A CuPy array with the same strides in a copy of the same memory, poison included."""
    import cupy

    whole = array
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    start = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    raw = cupy.asarray(np.ascontiguousarray(whole).reshape(-1).view(np.uint8))
    assert whole.flags.c_contiguous, "the memory of a test's array must be one piece"
    return cupy.ndarray(array.shape, array.dtype, raw.data + start, array.strides)


def to_host(array: Any) -> Array:
    """A NumPy copy of a CuPy array; by its bits, for dtypes that CuPy cannot copy itself."""
    import cupy

    packed = cupy.ascontiguousarray(array.view(f"u{array.dtype.itemsize}"))
    host: Array = packed.get().view(array.dtype)
    return host


def guarded(shape: tuple[int, ...], dtype: Any) -> Guarded:
    """Room for a result that shows what was and what was not written."""
    import cupy

    dtype = np.dtype(dtype)
    size = int(np.prod(shape))
    pattern = np.full(size + 2 * GUARD, NAN_BITS[dtype.itemsize], f"u{dtype.itemsize}")
    whole = cupy.asarray(pattern).view(dtype)
    return Guarded(whole[GUARD : GUARD + size].reshape(shape), whole)


class Gpu:
    """Runs calls on the current device."""

    to_device = staticmethod(to_device)
    to_host = staticmethod(to_host)
    guarded = staticmethod(guarded)

    def arguments(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments with every NumPy array on the device."""

        def moved(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(moved(part) for part in x)
            return to_device(x) if isinstance(x, np.ndarray) else x

        options = {name: moved(value) for name, value in call.options.items()}
        return tuple(moved(x) for x in call.arrays), options

    def run(self, call: Call, **more: Any) -> Outcome:
        """Run the call with `out=` and `lse=` between guards and bring both back."""
        import cuattn

        arrays, options = self.arguments(call)
        q = call.arrays[0]
        out = guarded((*q.shape[:-1], call.case.d_v), call.case.result_dtype)
        lse = guarded(q.shape[:-1], np.float32)
        returned = getattr(cuattn, call.function)(
            *arrays, **{**options, **more}, out=out.array, lse=lse.array, return_lse=True
        )
        assert returned[0] is out.array and returned[1] is lse.array
        out.check(call.case)
        lse.check(call.case)
        return Outcome(to_host(out.array), to_host(lse.array))

    def check(self, call: Call, **more: Any) -> Outcome:
        """Run the call and compare it with the reference."""
        outcome = self.run(call, **more)
        self.compare(call, outcome)
        return outcome

    def compare(self, call: Call, outcome: Outcome, **replay: Any) -> None:
        """Compare results with the reference; `replay` holds its geometry and skip_softmax."""
        expected, plain = call.reference(**replay), call.plain(**replay)
        assert_close(outcome.lse, expected.lse, plain.lse, call.case, "lse")
        logits = np.abs(expected.lse[np.isfinite(expected.lse)]).max(initial=0.0)
        assert_close(outcome.out, expected.out, plain.out, call.case, "out", float(logits))

    def geometry(self, call: Call) -> Geometry:
        """Who votes on what in the kernel that this call gets when it skips."""
        from cuattn import _device, _heuristics

        device = _device.describe(_device.current())
        return _heuristics.prefill(problem_of(call, SkipMode("threshold", False)), device).geometry


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    return Gpu()
