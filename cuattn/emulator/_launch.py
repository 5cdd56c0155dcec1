"""One planned call on CPU arrays: copies into the emulator's memory, the kernel, results back."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .._records import Step, View
from .._tensor_map import Map
from ._memory import Memory
from ._run import run
from ._settings import Settings
from ._tensor_map import tensor_map

Array = NDArray[Any]

_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}

# Where the kernel's name for an argument is not the caller's, or it has several.
_PARAMETERS = {
    "kv_cache": ("k", "v"),
    "kv_cache (k)": ("k",),
    "kv_cache (v)": ("v",),
    "sparse_indices": ("block_tables",),
    "scale": ("scale_array",),
    "out_scale": ("out_scale_array",),
}


def launch(
    steps: Sequence[Step],
    pointers: Sequence[str],
    rest: bytes,
    inputs: Mapping[str, View],
    results: Mapping[str, Array],
    settings: Settings,
    maps: Sequence[Map] = (),
) -> None:
    """Run kernels one after the other, all with the same parameters.

    Parameters
    ----------
    steps : sequence of Step
    pointers : sequence of str
        Names of the pointers with which the parameters begin; those not among inputs and results
        are null.
    rest : bytes
        The packed parameters behind the pointers.
    inputs : mapping
        Views in host memory by the caller's names.
    results : mapping
        Arrays that the kernel writes to, by the kernel's names; they start as they are.
    settings : Settings
    maps : sequence of Map
        What the tensor maps behind `rest` describe.
    """
    steps = [step for step in steps if step.grid]
    if not steps:
        return
    with Memory() as memory:
        places: dict[str, int] = {}
        for name, view in inputs.items():
            parameters = _PARAMETERS.get(name, (name,))
            place = memory.add(parameters[0], array_of(view))
            places |= dict.fromkeys(parameters, place)
        for name, array in results.items():
            places[name] = memory.add(name, array, writable=True)
        packed = struct.pack(f"={len(pointers)}Q", *(places.get(n, 0) for n in pointers)) + rest
        for name, sizes, strides, box in maps:
            packed += tensor_map(places[name], 2, sizes, strides, box, 128)
        for kernel, config, grid, threads, shared_memory in steps:
            counts = run(
                kernel,
                config.define(),
                grid,
                threads,
                packed,
                shared_bytes=shared_memory,
                schedule=settings.schedule,
                mode=settings.mode,
                race=settings.race,
                sources=settings.sources,
            )
            if settings.launches is not None:
                settings.launches.append(counts)
        for name, array in results.items():
            array[...] = memory[name]


def array_of(view: View) -> Array:
    """Return the NumPy array over a view's memory, which its owner keeps alive."""
    dtype = _DTYPES.get(view.dtype) or np.dtype(view.dtype)
    strides = tuple(step * dtype.itemsize for step in view.strides)
    if 0 in view.shape:
        return np.empty(view.shape, dtype)
    span = sum((n - 1) * step for n, step in zip(view.shape, strides, strict=True)) + dtype.itemsize
    raw = memoryview((ctypes.c_ubyte * span).from_address(view.pointer))
    return np.ndarray(view.shape, dtype, raw, 0, strides)
