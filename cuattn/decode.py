"""Decode attention: few new tokens of each request over its paged cache."""

from __future__ import annotations

from typing import Any

from . import _call, _check, _ingest
from .skip_softmax import SkipSoftmax


def decode(
    q: Any,
    kv_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    *,
    cu_seqlens_q: Any = None,
    layout: str = "HND",
    window_left: int = -1,
    scale: Any = None,
    out_scale: Any = None,
    soft_cap: float = 0.0,
    sinks: Any = None,
    skip_softmax: SkipSoftmax | None = None,
    batch_invariant: bool | None = None,
    return_lse: bool = False,
    out: Any = None,
    lse: Any = None,
    out_dtype: Any = None,
    stream: Any = None,
) -> Any:
    """Attention of each request's newest tokens over a paged cache that holds them already.

    Token i of a request that has n of them sees its keys up to ``seq_len - n + i``.

    Parameters
    ----------
    q : array, ``[batch, q_heads, head_dim]`` or ``[batch, q_len, q_heads, head_dim]``
        One token of each request, or `q_len` of them; bfloat16 or float16. With `cu_seqlens_q`:
        ``[q_tokens, q_heads, head_dim]``.
    kv_cache : array or pair of arrays
        ``[pages, 2, kv_heads, page_size, head_dim]`` (HND), ``[pages, 2, page_size, kv_heads,
        head_dim]`` (NHD), or keys and values apart without the axis of 2. `page_size` is a power
        of two, at least 8.
    block_tables : array, int32 ``[batch, max_pages]``
        The pages of each request, in order. Entries past its length are never read; a page number
        outside the cache reads as zeros.
    seq_lens : array, int32 ``[batch]``
        Length of each request in the cache, new tokens included. Read on the device: it may change
        between replays of a CUDA graph, up to ``max_pages * page_size``.
    cu_seqlens_q : array, int32 ``[batch + 1]``, optional
        Prefix sums of the numbers of new tokens, where they differ.
    layout : str
        ``"HND"`` or ``"NHD"``.
    window_left : int
        A token sees no key more than `window_left` before it; pages before are not read. -1: no
        such bound.
    scale : float or array of one float32, optional
        Multiplies QKᵀ, above 0; ``head_dim ** -0.5`` by default. An array is read by the kernel.
    out_scale : float or array of one float32, optional
        Multiplies the output.
    soft_cap : float
        Scores become ``soft_cap * tanh(score / soft_cap)`` before the mask; 0: they do not.
    sinks : array, float32 ``[q_heads]``, optional
        A logit per head, after scaling, that enters the denominator only.
    skip_softmax : SkipSoftmax, optional
        Leave out tiles of keys whose weights would be negligible; their values are not loaded.
    batch_invariant : bool, optional
        Cut a request's keys into splits by its own length alone, so that its result has the same
        bits in every batch. By default the splits also depend on the size of the batch.
    return_lse : bool
        Return ``(out, lse)``.
    out : array, q's shape with the values' head_dim, optional
        Written in place and returned as it is.
    lse : array, float32, q's shape without head_dim, optional
        Written in place; returned if `return_lse`.
    out_dtype : dtype, optional
        bfloat16, float16 or float32; q's by default.
    stream : int or object with ``__cuda_stream__`` or ``ptr``, optional
        Where to launch. Default: the producer's current stream if it can be asked, else CuPy's. The
        result is ordered on CuPy's current stream in any case.

    Returns
    -------
    cupy.ndarray, or a tuple of them
        The output; if asked for, the log-sum-exp of the kept scores (natural logarithm, sink
        included); and with ``SkipSoftmax(certificate=True)`` the share of its weight that each row
        lost, float32 of LSE's shape. A row that sees no key gives 0, −∞ and 0.

    Raises
    ------
    ValueError, TypeError
        Before anything is launched, naming the argument, what came and what was wanted.

    Notes
    -----
    Results are the same to the bit from run to run and for every width of `block_tables`.

    References
    ----------
    Flash-Decoding (https://pytorch.org/blog/flash-decoding); skip-softmax: BLASST, arXiv
    2512.12087, with seeds shared by all splits.

    Examples
    --------
    >>> import cupy, cuattn                                                 # doctest: +SKIP
    >>> cache = cupy.zeros((10, 2, 8, 64, 128), "float16")                 # doctest: +SKIP
    >>> q = cupy.ones((1, 32, 128), "float16")                             # doctest: +SKIP
    >>> tables, lengths = cupy.array([[3, 7]], "i4"), cupy.array([100], "i4")  # doctest: +SKIP
    >>> cuattn.decode(q, cache, tables, lengths).shape                     # doctest: +SKIP
    (1, 32, 128)
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
    views: tuple[Any, ...] = (q_view, k_view, v_view, tables, lengths)
    ends_at = 0
    if cu_seqlens_q is not None:
        ends = _ingest.view(cu_seqlens_q, "cu_seqlens_q", launch, q_view)
        views, ends_at = (*views, ends), ends.pointer
    pointers = (
        q_view.pointer,
        k_view.pointer,
        v_view.pointer,
        ends_at,
        0,
        lengths.pointer,
        tables.pointer,
    )
    given = (
        True,
        window_left,
        scale,
        out_scale,
        soft_cap,
        sinks,
        skip_softmax,
        out,
        lse,
        out_dtype,
        batch_invariant,
    )
    return _call.attend(_call.DECODE, views, pointers, given, return_lse, launch, layout)
