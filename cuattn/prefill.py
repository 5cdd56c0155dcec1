"""Prefill attention: whole sequences, ragged batches, and chunks over a paged cache."""

from __future__ import annotations

from typing import Any

from . import _call, _check, _ingest
from .skip_softmax import SkipSoftmax


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
    cupy.ndarray, or a tuple of them
        The output; if asked for, the log-sum-exp of the scores (natural logarithm, sink included);
        and with ``SkipSoftmax(certificate=True)`` an upper bound of the share of its weight that
        each row lost, float32 ``[batch, q_len, q_heads]``. A query that sees no key gives 0, −∞ and
        0.

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
    launch = None if stream is None else _ingest.stream_handle(stream)
    q_view, k_view, v_view = _ingest.query_key_value(q, k, v, launch)
    views = (q_view, k_view, v_view)
    pointers = (q_view.pointer, k_view.pointer, v_view.pointer, 0, 0, 0, 0)
    given = (
        causal,
        window_left,
        scale,
        out_scale,
        soft_cap,
        sinks,
        skip_softmax,
        out,
        lse,
        out_dtype,
        None,
    )
    return _call.attend(_call.BATCHED, views, pointers, given, return_lse, launch)


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
    cupy.ndarray, or a tuple of them
        As in `prefill`. Tokens that belong to no request are not written.

    Examples
    --------
    >>> import cupy, cuattn                                                 # doctest: +SKIP
    >>> q = cupy.random.rand(300, 8, 64).astype("float16")                 # doctest: +SKIP
    >>> ends = cupy.array([0, 100, 300], "int32")                          # doctest: +SKIP
    >>> cuattn.prefill_ragged(q, q, q, ends, ends, causal=True).shape      # doctest: +SKIP
    (300, 8, 64)
    """
    launch = None if stream is None else _ingest.stream_handle(stream)
    q_view, k_view, v_view = _ingest.query_key_value(q, k, v, launch)
    ends_q = _ingest.view(cu_seqlens_q, "cu_seqlens_q", launch, q_view)
    ends_kv = _ingest.view(cu_seqlens_kv, "cu_seqlens_kv", launch, q_view)
    views = (q_view, k_view, v_view, ends_q, ends_kv)
    pointers = (*[view.pointer for view in views], 0, 0)
    given = (
        causal,
        window_left,
        scale,
        out_scale,
        soft_cap,
        sinks,
        skip_softmax,
        out,
        lse,
        out_dtype,
        None,
    )
    return _call.attend(_call.RAGGED, views, pointers, given, return_lse, launch)


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
    cupy.ndarray, or a tuple of them
        As in `prefill_ragged`.

    Examples
    --------
    >>> import cupy, cuattn                                                 # doctest: +SKIP
    >>> cache = cupy.zeros((10, 2, 8, 64, 128), "float16")                 # doctest: +SKIP
    >>> q = cupy.ones((5, 8, 128), "float16")                              # doctest: +SKIP
    >>> tables, lengths = cupy.array([[3, 7]], "i4"), cupy.array([100], "i4")  # doctest: +SKIP
    >>> ends = cupy.array([0, 5], "i4")                                    # doctest: +SKIP
    >>> cuattn.prefill_paged(q, cache, tables, lengths, ends).shape        # doctest: +SKIP
    (5, 8, 128)
    """
    launch = None if stream is None else _ingest.stream_handle(stream)
    q_view = _ingest.view(q, "q", launch)
    parts = _check.cache_parts(kv_cache)
    if len(parts) == 1:
        k_view, v_view = _check.split_cache(_ingest.view(parts[0], "kv_cache", launch, q_view))
    else:
        k_view = _ingest.view(parts[0], "kv_cache (k)", launch, q_view)
        v_view = _ingest.view(parts[1], "kv_cache (v)", launch, q_view)
    tables = _ingest.view(block_tables, "block_tables", launch, q_view)
    lengths = _ingest.view(seq_lens, "seq_lens", launch, q_view)
    ends_q = _ingest.view(cu_seqlens_q, "cu_seqlens_q", launch, q_view)
    views = (q_view, k_view, v_view, tables, lengths, ends_q)
    pointers = (
        q_view.pointer,
        k_view.pointer,
        v_view.pointer,
        ends_q.pointer,
        0,
        lengths.pointer,
        tables.pointer,
    )
    given = (
        causal,
        window_left,
        scale,
        out_scale,
        soft_cap,
        sinks,
        skip_softmax,
        out,
        lse,
        out_dtype,
        None,
    )
    return _call.attend(_call.PAGED, views, pointers, given, return_lse, launch, layout)
