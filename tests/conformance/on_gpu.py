"""Run a case on the current GPU.  CuPy and the driver's tensor maps, nothing that is built."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from .case import Array, Case, Map

_ELEMENT = {1: 0, 2: 1, 4: 2}  # CU_TENSOR_MAP_DATA_TYPE_UINT8, UINT16, UINT32
_SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3}
SHARED_BYTES = 200 * 1024


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def tensor_map(pointer: int, array: Array, m: Map) -> bytes:
    """What the driver makes of a tensor and a box of it."""
    rank = array.ndim
    raw = ctypes.create_string_buffer(192)
    aligned = (ctypes.addressof(raw) + 63) // 64 * 64
    sizes = (ctypes.c_uint64 * rank)(*array.shape[::-1])
    strides = (ctypes.c_uint64 * max(rank - 1, 1))(*array.strides[-2::-1])
    box = (ctypes.c_uint32 * rank)(*m.box)
    steps = (ctypes.c_uint32 * rank)(*[1] * rank)
    failed = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        ctypes.c_int(_ELEMENT[array.itemsize]),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(pointer),
        sizes,
        strides,
        box,
        steps,
        ctypes.c_int(0),  # not interleaved
        ctypes.c_int(_SWIZZLE[m.swizzle]),
        ctypes.c_int(0),  # no promotion in L2
        ctypes.c_int(0),  # zeros outside
    )
    if failed:
        raise RuntimeError(f"cuTensorMapEncodeTiled gave error {failed} for {m}")
    return ctypes.string_at(aligned, 128)


def launch(
    source: str, entry: str, config: str, threads: int, params: bytes, sources: Mapping[str, str]
) -> None:
    """Compile a kernel of `sources`, run one block of it, and wait."""
    import cupy

    from cuattn import _compile, _device

    arch = _device.describe(_device.current()).arch
    cubin = _compile.cubin_path(source, config, arch, sources)
    function = cupy.RawModule(path=str(cubin)).get_function(entry)
    function.max_dynamic_shared_size_bytes = SHARED_BYTES
    function((1,), (threads,), (np.void(params),), shared_mem=SHARED_BYTES)
    cupy.cuda.runtime.deviceSynchronize()


def run(case: Case) -> dict[str, Array]:
    """The case's results."""
    import cupy

    arrays = {**case.inputs, **case.results}
    there = {n: cupy.asarray(np.ascontiguousarray(a).view(np.uint8)) for n, a in arrays.items()}
    maps = [tensor_map(there[m.buffer].data.ptr, arrays[m.buffer], m) for m in case.maps]
    params = case.params(maps, [array.data.ptr for array in there.values()])
    launch("conformance", "conformance", case.config, case.threads, params, case.sources())
    return {
        name: there[name].get().view(array.dtype).reshape(array.shape)
        for name, array in case.results.items()
    }


def about() -> dict[str, str]:
    """GPU, driver, compiler, commit of the sources and today's date."""
    import datetime
    import subprocess
    from pathlib import Path

    import cupy

    from cuattn import _compile, _device, _sources

    device = _device.describe(_device.current())
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        commit = "unknown"
    return {
        "gpu": device.name,
        "driver": str(cupy.cuda.runtime.driverGetVersion()),
        "nvrtc": ".".join(map(str, _compile.nvrtc_version())),
        "cupy": cupy.__version__,
        "commit": commit,
        "sources": _sources.fingerprint(),
        "date": datetime.date.today().isoformat(),
    }
