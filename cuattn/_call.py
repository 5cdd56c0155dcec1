"""One attention call from views to result: check and plan the first time, then only launch.

Calls that look alike (shapes, strides, dtypes, options; anything but pointers) share a `_Prepared`
record.  Finding it is all that a call in steady state does besides allocating and launching.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16

from . import _check, _device, _heuristics, _ingest, _launch, _overlap, _params
from ._records import Problem, SkipMode, View
from .skip_softmax import SkipSoftmax

_DTYPES = {
    "bfloat16": np.dtype(bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


class Arrays(NamedTuple):
    """The arrays of one call; which are there says which form it has."""

    q: View
    k: View
    v: View
    cu_seqlens_q: View | None = None
    cu_seqlens_kv: View | None = None
    seq_lens: View | None = None
    block_tables: View | None = None
    layout: str | None = None  # of a paged cache


class Keywords(NamedTuple):
    """The keyword arguments of one call, as they came."""

    causal: Any
    window_left: Any
    scale: Any
    out_scale: Any
    soft_cap: Any
    sinks: Any
    skip: SkipSoftmax | None
    out: Any
    lse: Any
    out_dtype: Any


class _Optional(NamedTuple):
    """Arrays that a call may do without."""

    sinks: View | None = None
    scale: View | None = None
    out_scale: View | None = None
    thresholds: View | None = None
    out: View | None = None
    lse: View | None = None


class _Prepared(NamedTuple):
    """All that calls alike share."""

    launch: _launch.Launch
    device: int
    out_shape: tuple[int, ...]
    out_dtype: np.dtype[Any]
    lse_shape: tuple[int, ...]
    batch: int
    q_heads: int


_NONE = _Optional()
_prepared: dict[Any, _Prepared] = {}
_PREPARED_LIMIT = 4096  # token counts vary without end in a server: then begin anew


def attend(arrays: Arrays, given: Keywords, return_lse: bool, stream: int | None) -> Any:
    """Return the output, or (output, LSE), of one call."""
    import cupy

    q, k, v = arrays[:3]
    causal, window_left, scale, out_scale, soft_cap, sinks, skip, out, lse, out_dtype = given
    optional = _NONE
    skip_key = None
    if not (scale is out_scale is sinks is skip is out is lse is None):
        optional = _optional(given, stream, q)
        skip_key = _skip_key(skip)
        if optional.scale is not None:
            scale = None
        if optional.out_scale is not None:
            out_scale = None
    layouts = [None if view is None else view[1:5] for view in arrays[:7] + optional]
    alignment = q.pointer | k.pointer | v.pointer
    if optional.out is not None:
        alignment |= optional.out.pointer
    key = (
        *layouts,
        arrays.layout,
        alignment & 15,
        causal,
        causal.__class__,  # 1 == True
        window_left,
        scale,
        out_scale,
        soft_cap,
        out_dtype,
        return_lse,
        skip_key,
    )
    prepared = _prepared.get(key)
    if prepared is None:
        prepared = _prepare(arrays, optional, given, skip_key, return_lse)
        if len(_prepared) >= _PREPARED_LIMIT:
            _prepared.clear()
        _prepared[key] = prepared

    if optional.out is not None or optional.lse is not None:
        named = {**arrays._asdict(), **optional._asdict()}
        outputs = {name: named.pop(name) for name in ("out", "lse")}
        _overlap.check_overlap(outputs, named)
    if q.device == cupy.cuda.runtime.getDevice():
        return _run(cupy, prepared, arrays, optional, given, return_lse, stream)
    with cupy.cuda.Device(q.device):
        return _run(cupy, prepared, arrays, optional, given, return_lse, stream)


def _run(
    cupy: Any,
    prepared: _Prepared,
    arrays: Arrays,
    optional: _Optional,
    given: Keywords,
    return_lse: bool,
    stream: int | None,
) -> Any:
    """Allocate and launch on the current device, which is the inputs'."""
    pointers = [0 if view is None else view.pointer for view in arrays[:7] + optional]
    q, k, v, cu_q, cu_kv, lengths, tables = pointers[:7]
    sinks, scale, out_scale, thresholds, out_at, lse_at = pointers[7:]
    out, lse, skip = given.out, given.lse, given.skip
    counts = 0
    if skip is not None and skip.stats is not None:
        counts = skip.stats.counts(prepared.batch, prepared.q_heads, prepared.device).data.ptr
    if out is None:
        out = cupy.ndarray(prepared.out_shape, prepared.out_dtype)
        out_at = out.data.ptr
    if lse is None and return_lse:
        lse = cupy.ndarray(prepared.lse_shape, np.float32)
        lse_at = lse.data.ptr
    packed = _params.pack_pointers(
        q,
        k,
        v,
        out_at,
        lse_at,
        cu_q,
        cu_kv,
        lengths,
        tables,
        sinks,
        scale,
        out_scale,
        thresholds,
        counts,
    )
    views = [view for view in arrays[:7] + optional if view is not None]
    order = _launch.Order(stream, cupy.cuda.get_current_stream().ptr, views)
    order.before()
    prepared.launch(packed, order.stream)
    order.after()
    _launch.hold(views, order.stream)
    return (out, lse) if return_lse else out


def _optional(given: Keywords, stream: int | None, q: View) -> _Optional:
    """Return the views of the arrays among the keyword arguments."""
    skip = given.skip
    threshold = None
    if skip is not None:
        if not isinstance(skip, SkipSoftmax):
            raise TypeError(f"skip_softmax is a {type(skip).__name__}; wanted a SkipSoftmax")
        _check.refuse_decode_only(skip.max_dropped_mass, skip.certificate)
        threshold = _ingest.number(skip.threshold, "skip_softmax.threshold", stream, q)
    scale = _ingest.number(given.scale, "scale", stream, q)
    out_scale = _ingest.number(given.out_scale, "out_scale", stream, q)
    return _Optional(
        None if given.sinks is None else _ingest.view(given.sinks, "sinks", stream, q),
        scale if isinstance(scale, View) else None,
        out_scale if isinstance(out_scale, View) else None,
        threshold if isinstance(threshold, View) else None,
        None if given.out is None else _ingest.view(given.out, "out", stream, q, True),
        None if given.lse is None else _ingest.view(given.lse, "lse", stream, q, True),
    )


def _skip_key(skip: SkipSoftmax | None) -> tuple[str, bool, float, bool] | None:
    """Return (source, unsafe, λ or λ·kv_len, counted) of a skip option; None: the dense kernel."""
    if skip is None:
        return None
    counted = skip.stats is not None
    if skip.threshold_scale_factor is not None:
        if skip.threshold_scale_factor == 0 and not counted:
            return None
        return "scale_factor", skip.unsafe, float(skip.threshold_scale_factor), counted
    if isinstance(skip.threshold, (int, float, np.number)):
        return "threshold", skip.unsafe, float(skip.threshold), counted
    return "thresholds", skip.unsafe, 0.0, counted


def _prepare(
    arrays: Arrays,
    optional: _Optional,
    given: Keywords,
    skip_key: tuple[str, bool, float, bool] | None,
    return_lse: bool,
) -> _Prepared:
    """Check a call of a new kind, plan it, and load its kernel."""
    import cupy

    _check.flag("return_lse", return_lse)
    problem = _problem(arrays, optional, given, skip_key)
    device = _device.describe(arrays.q.device)
    plan = _heuristics.prefill(problem, device)
    out, lse, tables = optional.out, optional.lse, arrays.block_tables
    scale = problem.head_dim_qk**-0.5 if given.scale is None else given.scale
    out_scale = 1.0 if given.out_scale is None else given.out_scale
    rest = _params.pack_rest(
        problem,
        plan,
        out=_packed(problem.out_shape) if out is None else out.strides,
        lse=_packed(problem.lse_shape) if lse is None else lse.strides,
        tables=0 if tables is None else tables.strides[0],
        scale=float(scale) if optional.scale is None else 0.0,
        out_scale=float(out_scale) if optional.out_scale is None else 0.0,
        threshold=skip_key[2] if skip_key else 0.0,
    )
    with cupy.cuda.Device(device.ordinal):
        launch = _launch.Launch(plan, device, rest)
    return _Prepared(
        launch,
        device.ordinal,
        problem.out_shape,
        _DTYPES[problem.out_dtype],
        problem.lse_shape,
        problem.batch,
        problem.q_heads,
    )


def _problem(
    arrays: Arrays,
    optional: _Optional,
    given: Keywords,
    skip_key: tuple[str, bool, float, bool] | None,
) -> Problem:
    q, k, v, cu_seqlens_q, cu_seqlens_kv, seq_lens, block_tables, layout = arrays
    options = _check.Options(
        causal=given.causal,
        window_left=given.window_left,
        scale=given.scale if optional.scale is None else optional.scale,
        out_scale=given.out_scale if optional.out_scale is None else optional.out_scale,
        soft_cap=given.soft_cap,
        sinks=optional.sinks,
        skip=None if skip_key is None else SkipMode(skip_key[0], skip_key[1], stats=skip_key[3]),
        thresholds=optional.thresholds,
        out=optional.out,
        lse=optional.lse,
        out_dtype=given.out_dtype,
    )
    if block_tables is not None:
        assert layout is not None and seq_lens is not None and cu_seqlens_q is not None
        return _check.paged(q, k, v, block_tables, seq_lens, cu_seqlens_q, layout, options)
    if cu_seqlens_kv is not None:
        assert cu_seqlens_q is not None
        return _check.ragged(q, k, v, cu_seqlens_q, cu_seqlens_kv, options)
    return _check.batched(q, k, v, options)


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))
