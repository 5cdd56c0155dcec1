"""Single arrays against what is wanted of them: dtype, rank, shape, strides, alignment, device."""

from __future__ import annotations

import math
from typing import Any

from ._overlap import ITEMSIZE, distinct
from ._records import View

INPUT_DTYPES = ("bfloat16", "float16")
OUTPUT_DTYPES = ("bfloat16", "float16", "float32")
ALIGNMENT = 16  # bytes; one vector load


def inputs(q: View, k: View, v: View, *, rank: int, wanted: str, cache: bool = False) -> None:
    """Check dtype, rank, device, strides and alignment of q, k and v."""
    k_name, v_name = cache_names(cache)
    if len(q.shape) != rank:
        raise ValueError(f"q has shape {q.shape}; wanted {rank} axes {wanted}")
    for name, view in ((k_name, k), (v_name, v)):
        if not cache and len(view.shape) != rank:
            raise ValueError(f"{name} has shape {view.shape}; wanted {rank} axes {wanted}")
    for name, view in (("q", q), (k_name, k), (v_name, v)):
        input_array(name, view, q)


def input_array(name: str, view: View, q: View) -> None:
    """Check dtype, device, strides and alignment of q, or of what goes with it."""
    if view.dtype.startswith("float8"):
        raise TypeError(
            f"{name} is {view.dtype}, not supported yet; wanted {' or '.join(INPUT_DTYPES)}"
        )
    if view.dtype not in INPUT_DTYPES:
        raise TypeError(f"{name} is {view.dtype}; wanted {' or '.join(INPUT_DTYPES)}")
    if view.dtype != q.dtype:
        raise TypeError(f"{name} is {view.dtype}; wanted q's {q.dtype}")
    same_device(name, view, q)
    strides(name, view)


def same(what: str, k: View, v: View, axis: int, *, cache: bool = False) -> None:
    if v.shape[axis] != k.shape[axis]:
        k_name, v_name = cache_names(cache)
        raise ValueError(f"{v_name} has {v.shape[axis]} {what}; wanted {k_name}'s {k.shape[axis]}")


def same_device(name: str, view: View, q: View) -> None:
    if view.device != q.device:
        raise ValueError(f"{name} is on {view.place}; wanted q's, {q.place}")


def strides(name: str, view: View, *, aligned: bool = True) -> None:
    """Check that the last axis is packed, nothing runs backwards, and rows start on 16 bytes."""
    shape, strides = view.shape, view.strides
    if 0 in shape:
        return
    if min(strides) < 0:
        raise ValueError(f"{name} has strides {strides}; wanted none below 0")
    if strides[-1] != 1:
        raise ValueError(f"{name} has stride {strides[-1]} on its last axis; wanted 1")
    if not aligned:
        return
    itemsize = ITEMSIZE[view.dtype]
    if view.pointer % ALIGNMENT:
        raise ValueError(
            f"{name} starts {view.pointer % ALIGNMENT} bytes past a multiple of {ALIGNMENT}; "
            f"wanted rows aligned to {ALIGNMENT} bytes"
        )
    for axis, step in enumerate(strides[:-1]):
        if shape[axis] > 1 and step * itemsize % ALIGNMENT:
            raise ValueError(
                f"{name} has stride {step} ({step * itemsize} bytes) on axis {axis}; wanted a "
                f"multiple of {ALIGNMENT} bytes"
            )


def packed(view: View) -> bool:
    if 0 in view.shape:
        return True
    step = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def index_array(name: str, view: View, q: View, *, rank: int, wanted: str) -> None:
    if view.dtype != "int32":
        raise TypeError(f"{name} is {view.dtype}; wanted int32")
    if len(view.shape) != rank:
        raise ValueError(f"{name} has shape {view.shape}; wanted int32 {wanted}")
    same_device(name, view, q)


def prefix_sums(name: str, view: View, q: View) -> int:
    """Check a ``[batch + 1]`` array and return batch."""
    index_array(name, view, q, rank=1, wanted="[batch + 1]")
    if view.shape[0] == 0:
        raise ValueError(f"{name} is empty; wanted batch + 1 elements, the first of them 0")
    if not packed(view):
        raise ValueError(f"{name} has stride {view.strides[0]}; wanted a contiguous array")
    return view.shape[0] - 1


def lengths(seq_lens: View, q: View, batch: int) -> None:
    shape = seq_lens.shape
    index_array("seq_lens", seq_lens, q, rank=max(len(shape), 1), wanted="[batch]")
    if math.prod(shape) != batch or (batch and max(shape) != batch):
        raise ValueError(
            f"seq_lens has shape {shape}; wanted [{batch}], one length per row of block_tables"
        )
    if not packed(seq_lens):
        raise ValueError(f"seq_lens has strides {seq_lens.strides}; wanted a contiguous array")


def float_array(name: str, view: View, q: View, shape: tuple[int, ...], wanted: str) -> None:
    """Check a packed float32 array of the given shape."""
    if view.dtype != "float32":
        raise TypeError(f"{name} is {view.dtype}; wanted float32")
    if view.shape != shape:
        raise ValueError(f"{name} has shape {view.shape}; wanted {shape}, {wanted}")
    if not packed(view):
        raise ValueError(f"{name} has strides {view.strides}; wanted a contiguous array")
    same_device(name, view, q)


def outputs(
    out: View | None, lse: View | None, asked: Any, q: View, dtype: str, shape: tuple[int, ...]
) -> None:
    if dtype not in OUTPUT_DTYPES:
        raise TypeError(f"out_dtype is {dtype}; wanted {', '.join(OUTPUT_DTYPES)}")
    if out is not None:
        if out.dtype != dtype:
            source = "q's dtype" if asked is None else "out_dtype"
            raise TypeError(f"out is {out.dtype}; wanted {dtype} ({source})")
        if out.shape != shape:
            raise ValueError(f"out has shape {out.shape}; wanted {shape}")
        same_device("out", out, q)
        strides("out", out)
        if not distinct(out):
            raise ValueError(
                f"out has strides {out.strides} for shape {shape}, so elements share memory; "
                "wanted each element to have its own"
            )
    if lse is not None:
        float_array("lse", lse, q, shape[:-1], "that of the output but for its last axis")


def cache_names(cache: bool) -> tuple[str, str]:
    return ("kv_cache (k)", "kv_cache (v)") if cache else ("k", "v")
