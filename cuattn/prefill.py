"""Prefill attention: whole sequences, ragged batches, and chunks over a paged cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16

from . import _check, _device, _heuristics, _ingest, _launch, _params
from ._records import Problem, SkipMode, View
from .skip_softmax import SkipSoftmax

_DTYPES = {
    "bfloat16": np.dtype(bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


def prefill(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window_left: int = -1,
    scale: Any = None,
    out_scale: Any = None,
    soft_cap: float = 0.0,
    sinks: Any = None,
    skip_softmax: SkipSoftmax | None = None,
    return_lse: bool = False,
    out: Any = None,
    lse: Any = None,
    out_dtype: Any = None,
    stream: Any = None,
) -> Any:
    """Attention over whole sequences of equal length.

    Parameters
    ----------
    q : array, ``[batch, q_len, q_heads, head_dim]``
        bfloat16 or float16, with ``__dlpack__`` or ``__cuda_array_interface__``, on a CUDA device.
        The last stride is 1, the others are free multiples of 16 bytes.
    k : array, ``[batch, kv_len, kv_heads, head_dim]``
        `q_heads` is a multiple of `kv_heads`; `head_dim` a multiple of 8, up to 256.
    v : array, ``[batch, kv_len, kv_heads, head_dim_v]``
        `head_dim_v` may differ from `head_dim`.
    causal : bool
        Query i sees keys up to ``i + kv_len - q_len``: the last query sees the last key.
    window_left : int
        Query i sees no key before ``i + kv_len - q_len - window_left``; -1: no such bound.
    scale : float or array of one float32, optional
        Multiplies QKᵀ, above 0; ``head_dim ** -0.5`` by default. An array is read by the kernel.
    out_scale : float or array of one float32, optional
        Multiplies the output.
    soft_cap : float
        Scores become ``soft_cap * tanh(score / soft_cap)`` before the mask; 0: they do not.
    sinks : array, float32 ``[q_heads]``, optional
        A logit per head, after scaling, that enters the denominator only.
    skip_softmax : SkipSoftmax, optional
        Leave out tiles of keys whose weights would be negligible. Default: compute every tile.
    return_lse : bool
        Return ``(out, lse)``.
    out : array, ``[batch, q_len, q_heads, head_dim_v]``, optional
        Written in place and returned as it is.
    lse : array, float32 ``[batch, q_len, q_heads]``, optional
        Written in place; returned if `return_lse`.
    out_dtype : dtype, optional
        bfloat16, float16 or float32; q's by default.
    stream : int or object with ``__cuda_stream__`` or ``ptr``, optional
        Where to launch. Default: the producer's current stream if it can be asked, else CuPy's. The
        result is ordered on CuPy's current stream in any case.

    Returns
    -------
    cupy.ndarray, or a pair of them
        The output and, if asked for, the log-sum-exp of the scores (natural logarithm, sink
        included). A query that sees no key gives 0 and −∞.

    Raises
    ------
    ValueError, TypeError
        Before anything is launched, naming the argument, what came and what was wanted.

    References
    ----------
    FlashAttention-2, arXiv 2307.08691; skip-softmax: BLASST, arXiv 2512.12087.

    Examples
    --------
    >>> import cupy, cuattn, ml_dtypes                                      # doctest: +SKIP
    >>> q = cupy.random.rand(1, 64, 8, 128).astype(ml_dtypes.bfloat16)     # doctest: +SKIP
    >>> cuattn.prefill(q, q, q, causal=True).shape                         # doctest: +SKIP
    (1, 64, 8, 128)
    """
    launch = _ingest.stream_handle(stream)
    q_view = _ingest.view(q, "q", launch)
    views = (
        q_view,
        _ingest.view(k, "k", launch, q_view),
        _ingest.view(v, "v", launch, q_view),
    )
    pointers = (views[0].pointer, views[1].pointer, views[2].pointer, 0, 0, 0, 0)
    options = (causal, window_left, scale, out_scale, soft_cap, sinks, skip_softmax)
    results = (return_lse, out, lse, out_dtype)
    return _attend(_check.batched, views, (), pointers, options, results, launch)


def prefill_ragged(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_kv: Any,
    *,
    causal: bool = False,
    window_left: int = -1,
    scale: Any = None,
    out_scale: Any = None,
    soft_cap: float = 0.0,
    sinks: Any = None,
    skip_softmax: SkipSoftmax | None = None,
    return_lse: bool = False,
    out: Any = None,
    lse: Any = None,
    out_dtype: Any = None,
    stream: Any = None,
) -> Any:
    """Attention over sequences of unequal length that lie end to end.

    Parameters
    ----------
    q : array, ``[q_tokens, q_heads, head_dim]``
        As in `prefill`, all requests' tokens one behind the other.
    k : array, ``[kv_tokens, kv_heads, head_dim]``
    v : array, ``[kv_tokens, kv_heads, head_dim_v]``
    cu_seqlens_q, cu_seqlens_kv : array, int32 ``[batch + 1]``
        Prefix sums of the lengths in tokens, 0 first, on the device: they are read by the kernel
        only, so they may change between replays of a CUDA graph. Requests may be empty.
    causal, window_left, scale, out_scale, soft_cap, sinks, skip_softmax, return_lse, out_dtype, \
stream
        As in `prefill`; `skip_softmax` may hold a threshold per request.
    out : array, ``[q_tokens, q_heads, head_dim_v]``, optional
    lse : array, float32 ``[q_tokens, q_heads]``, optional

    Returns
    -------
    cupy.ndarray, or a pair of them
        As in `prefill`. Tokens that belong to no request are not written.

    Examples
    --------
    >>> import cupy, cuattn                                                 # doctest: +SKIP
    >>> q = cupy.random.rand(300, 8, 64).astype("float16")                 # doctest: +SKIP
    >>> ends = cupy.array([0, 100, 300], "int32")                          # doctest: +SKIP
    >>> cuattn.prefill_ragged(q, q, q, ends, ends, causal=True).shape      # doctest: +SKIP
    (300, 8, 64)
    """
    launch = _ingest.stream_handle(stream)
    q_view = _ingest.view(q, "q", launch)
    views = (
        q_view,
        _ingest.view(k, "k", launch, q_view),
        _ingest.view(v, "v", launch, q_view),
    )
    tables = (
        _ingest.view(cu_seqlens_q, "cu_seqlens_q", launch, q_view),
        _ingest.view(cu_seqlens_kv, "cu_seqlens_kv", launch, q_view),
    )
    pointers = (
        views[0].pointer,
        views[1].pointer,
        views[2].pointer,
        tables[0].pointer,
        tables[1].pointer,
        0,
        0,
    )
    options = (causal, window_left, scale, out_scale, soft_cap, sinks, skip_softmax)
    results = (return_lse, out, lse, out_dtype)
    return _attend(_check.ragged, views, tables, pointers, options, results, launch)


def prefill_paged(
    q: Any,
    kv_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    cu_seqlens_q: Any,
    *,
    layout: str = "HND",
    causal: bool = True,
    window_left: int = -1,
    scale: Any = None,
    out_scale: Any = None,
    soft_cap: float = 0.0,
    sinks: Any = None,
    skip_softmax: SkipSoftmax | None = None,
    return_lse: bool = False,
    out: Any = None,
    lse: Any = None,
    out_dtype: Any = None,
    stream: Any = None,
) -> Any:
    """Attention of new tokens over a paged cache that holds them already: chunked prefill.

    Parameters
    ----------
    q : array, ``[q_tokens, q_heads, head_dim]``
        The new tokens of all requests, one behind the other.
    kv_cache : array or pair of arrays
        ``[pages, 2, kv_heads, page_size, head_dim]`` (HND), ``[pages, 2, page_size, kv_heads,
        head_dim]`` (NHD), or keys and values apart without the axis of 2. `page_size` is a power
        of two, at least 8.
    block_tables : array, int32 ``[batch, max_pages]``
        The pages of each request, in order. Entries past its length are never read; a page number
        outside the cache reads as zeros.
    seq_lens : array, int32 ``[batch]``
        Length of each request in the cache, new tokens included.
    cu_seqlens_q : array, int32 ``[batch + 1]``
        Prefix sums of the numbers of new tokens.
    layout : str
        ``"HND"`` or ``"NHD"``.
    causal : bool
        True by default, unlike in `prefill`: a chunk's tokens are the last of their request.
    window_left, scale, out_scale, soft_cap, sinks, skip_softmax, return_lse, out, lse, out_dtype, \
stream
        As in `prefill_ragged`.

    Returns
    -------
    cupy.ndarray, or a pair of them
        As in `prefill_ragged`.

    Examples
    --------
    >>> import cupy, cuattn                                                 # doctest: +SKIP
    >>> cache = cupy.zeros((10, 2, 8, 64, 128), "float16")                 # doctest: +SKIP
    >>> q = cupy.ones((5, 8, 128), "float16")                              # doctest: +SKIP
    >>> tables, lengths = cupy.array([[3, 7]], "int32"), cupy.array([100], "int32")  # doctest: +SKIP
    >>> cuattn.prefill_paged(q, cache, tables, lengths, cupy.array([0, 5], "int32")).shape
    (5, 8, 128)
    """
    launch = _ingest.stream_handle(stream)
    q_view = _ingest.view(q, "q", launch)
    parts = _check.cache_parts(kv_cache)
    if len(parts) == 1:
        k_view, v_view = _check.split_cache(_ingest.view(parts[0], "kv_cache", launch, q_view))
    else:
        k_view = _ingest.view(parts[0], "kv_cache (k)", launch, q_view)
        v_view = _ingest.view(parts[1], "kv_cache (v)", launch, q_view)
    views = (q_view, k_view, v_view)
    tables = (
        _ingest.view(block_tables, "block_tables", launch, q_view),
        _ingest.view(seq_lens, "seq_lens", launch, q_view),
        _ingest.view(cu_seqlens_q, "cu_seqlens_q", launch, q_view),
    )
    pointers = (
        q_view.pointer,
        k_view.pointer,
        v_view.pointer,
        tables[2].pointer,
        0,
        tables[1].pointer,
        tables[0].pointer,
    )
    options = (causal, window_left, scale, out_scale, soft_cap, sinks, skip_softmax)
    results = (return_lse, out, lse, out_dtype)

    def check(*arguments: Any) -> Problem:
        return _check.paged(*arguments[:-1], layout, arguments[-1])

    return _attend(check, views, tables, pointers, options, results, launch, layout)


# --- the common road -------------------------------------------------------------------------------


class _Prepared(NamedTuple):
    """All that calls alike share: made by the first, looked up by the others."""

    launch: _launch.Launch
    device: int
    out_shape: tuple[int, ...]
    out_dtype: np.dtype[Any]
    lse_shape: tuple[int, ...]
    batch: int
    q_heads: int


_prepared: dict[Any, _Prepared] = {}
_PREPARED_LIMIT = 4096


def _attend(
    check: Callable[..., Problem],
    views: tuple[View, View, View],
    tables: tuple[View, ...],
    pointers: tuple[int, ...],
    options: tuple[Any, ...],
    results: tuple[Any, ...],
    launch_stream: int | None,
    layout: str | None = None,
) -> Any:
    """Check, plan (once for calls that look alike), allocate, launch.

    `pointers` are those of q, k, v, cu_seqlens_q, cu_seqlens_kv, seq_lens and block_tables.
    """
    import cupy

    causal, window_left, scale, out_scale, soft_cap, sinks, skip = options
    return_lse, out, lse, out_dtype = results
    q = views[0]

    extras: tuple[View | None, ...] = ()  # sinks, scale, out_scale, thresholds, out, lse
    if not (
        sinks is None
        and scale is None
        and out_scale is None
        and skip is None
        and out is None
        and lse is None
    ):
        extras = _extras(scale, out_scale, sinks, skip, out, lse, launch_stream, q)
    arrays = (*views, *tables, *(view for view in extras if view is not None))

    skip_key = None
    if skip is not None:
        skip_key = _skip_key(skip)
    key = (
        check if layout is None else layout,
        tuple([view[1:5] for view in arrays]),
        tuple([view is not None for view in extras]),
        (pointers[0] | pointers[1] | pointers[2] | (extras[4].pointer if out is not None else 0))  # type: ignore[union-attr]
        & 15,
        causal,
        window_left,
        None if extras and extras[1] is not None else scale,
        None if extras and extras[2] is not None else out_scale,
        soft_cap,
        out_dtype,
        return_lse,
        skip_key,
    )
    prepared = _prepared.get(key)
    if prepared is None:
        prepared = _prepare(check, key, views, tables, extras, options, results)

    if q.device != cupy.cuda.runtime.getDevice():
        with cupy.cuda.Device(q.device):
            return _run(cupy, prepared, arrays, extras, pointers, skip, results, launch_stream)
    return _run(cupy, prepared, arrays, extras, pointers, skip, results, launch_stream)


def _run(
    cupy: Any,
    prepared: _Prepared,
    arrays: tuple[View, ...],
    extras: tuple[View | None, ...],
    pointers: tuple[int, ...],
    skip: SkipSoftmax | None,
    results: tuple[Any, ...],
    launch_stream: int | None,
) -> Any:
    """Allocate and launch on the current device, which is the inputs'."""
    return_lse, out, lse, _ = results
    sinks_at = scale_at = out_scale_at = thresholds_at = counts_at = 0
    if extras:
        if out is not None or lse is not None:
            _check.check_overlap(
                {"out": extras[4], "lse": extras[5]},
                {f"input {i}": view for i, view in enumerate(arrays) if view not in extras[4:]},
            )
        sinks_at, scale_at, out_scale_at, thresholds_at, out_at, lse_at = (
            0 if view is None else view.pointer for view in extras
        )
    if skip is not None and skip.stats is not None:
        counts_at = skip.stats.counts(prepared.batch, prepared.q_heads, prepared.device).data.ptr
    if out is None:
        out = cupy.empty(prepared.out_shape, prepared.out_dtype)
        out_at = out.data.ptr
    if lse is None:
        lse_at = 0
        if return_lse:
            lse = cupy.empty(prepared.lse_shape, np.float32)
            lse_at = lse.data.ptr

    q_at, k_at, v_at, cu_q_at, cu_kv_at, lengths_at, tables_at = pointers
    packed = _params.pack_pointers(
        q_at,
        k_at,
        v_at,
        out_at,
        lse_at,
        cu_q_at,
        cu_kv_at,
        lengths_at,
        tables_at,
        sinks_at,
        scale_at,
        out_scale_at,
        thresholds_at,
        counts_at,
    )
    current = cupy.cuda.get_current_stream().ptr
    order = _launch.Order(launch_stream, current, arrays)
    order.before()
    prepared.launch(packed, order.stream)
    order.after()
    _launch.hold(arrays, order.stream)
    return (out, lse) if return_lse else out


def _extras(
    scale: Any,
    out_scale: Any,
    sinks: Any,
    skip: SkipSoftmax | None,
    out: Any,
    lse: Any,
    stream: int | None,
    q: View,
) -> tuple[View | None, ...]:
    """Return the views of the optional arrays: sinks, scale, out_scale, thresholds, out, lse."""
    numbers = [
        _ingest.number(value, name, stream, q)
        for value, name in ((scale, "scale"), (out_scale, "out_scale"))
    ]
    thresholds = None
    if skip is not None:
        if not isinstance(skip, SkipSoftmax):
            raise TypeError(
                f"skip_softmax is a {type(skip).__name__}; wanted a SkipSoftmax or None"
            )
        _check.refuse_decode_only(skip.max_dropped_mass, skip.certificate)
        thresholds = _ingest.number(skip.threshold, "skip_softmax.threshold", stream, q)
    return (
        None if sinks is None else _ingest.view(sinks, "sinks", stream, q),
        *(value if isinstance(value, View) else None for value in numbers),
        thresholds if isinstance(thresholds, View) else None,
        None if out is None else _ingest.view(out, "out", stream, q, True),
        None if lse is None else _ingest.view(lse, "lse", stream, q, True),
    )


def _skip_key(skip: SkipSoftmax) -> Any:
    """Return what of a SkipSoftmax decides the launch; None for the dense kernel."""
    counted = skip.stats is not None
    if skip.threshold_scale_factor is not None:
        if skip.threshold_scale_factor == 0 and not counted:
            return None
        return ("scale_factor", skip.unsafe, float(skip.threshold_scale_factor), counted)
    if isinstance(skip.threshold, (int, float, np.number)):
        return ("threshold", skip.unsafe, float(skip.threshold), counted)
    return ("thresholds", skip.unsafe, 0.0, counted)


def _prepare(
    check: Callable[..., Problem],
    key: Any,
    views: tuple[View, View, View],
    tables: tuple[View, ...],
    extras: tuple[View | None, ...],
    options: tuple[Any, ...],
    results: tuple[Any, ...],
) -> _Prepared:
    """Check a call of a new kind, plan it, and load its kernel."""
    import cupy

    causal, window_left, scale, out_scale, soft_cap, _, _ = options
    return_lse, _, _, out_dtype = results
    _check.flag("return_lse", return_lse)
    sinks, scale_view, out_scale_view, thresholds, out, lse = extras or (None,) * 6
    skip_key = key[-1]
    skip = SkipMode(skip_key[0], skip_key[1], stats=skip_key[3]) if skip_key else None
    problem = check(
        *views,
        *tables,
        _check.Options(
            causal=causal,
            window_left=window_left,
            scale=scale if scale_view is None else scale_view,
            out_scale=out_scale if out_scale_view is None else out_scale_view,
            soft_cap=soft_cap,
            sinks=sinks,
            skip=skip,
            thresholds=thresholds,
            out=out,
            lse=lse,
            out_dtype=out_dtype,
        ),
    )
    device = _device.describe(views[0].device)
    plan = _heuristics.prefill(problem, device)
    if scale_view is not None:
        scale = 0.0
    elif scale is None:
        scale = problem.head_dim_qk**-0.5
    if out_scale_view is not None:
        out_scale = 0.0
    elif out_scale is None:
        out_scale = 1.0
    rest = _params.pack_rest(
        problem,
        plan,
        out=_packed(problem.out_shape) if out is None else out.strides,
        lse=_packed(problem.lse_shape) if lse is None else lse.strides,
        tables=tables[0].strides[0] if problem.form == "paged" else 0,
        scale=float(scale),
        out_scale=float(out_scale),
        threshold=skip_key[2] if skip_key else 0.0,
    )
    with cupy.cuda.Device(device.ordinal):
        launch = _launch.Launch(plan, device, rest)
    prepared = _Prepared(
        launch,
        device.ordinal,
        problem.out_shape,
        _DTYPES[problem.out_dtype],
        problem.lse_shape,
        problem.batch,
        problem.q_heads,
    )
    if len(_prepared) >= _PREPARED_LIMIT:  # token counts vary without end in a server
        _prepared.clear()
    _prepared[key] = prepared
    return prepared


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))
