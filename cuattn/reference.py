"""Attention in NumPy, float64 inside: what every kernel is measured against.

The functions take the public functions' argument names and NumPy arrays (`ml_dtypes` ones too).
Given a `Geometry` they replay skip-softmax vote by vote, in the kernel's order and with its groups
of rows and tiles of keys, so that counts and LSE can be compared exactly.

One block of query rows goes through
    scores → tile maxima → votes → kept keys → softmax → P·V
and every step is the plain formula over [head, row, key].
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn._records import Geometry
from cuattn._replay import (
    ARITHMETICS,
    Result,
    dropped_share,
    dtype_of,
    gather_pages,
    join,
    largest_share,
    log_thresholds,
    options_of,
    score,
    thresholds_of,
    visible_keys,
    vote,
    weigh,
)
from cuattn.reference_decode import decode as decode
from cuattn.reference_mla import mla_decode as mla_decode

Array = NDArray[Any]

ROWS_AT_ONCE = 128  # when no geometry says otherwise; bounds memory only


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window_left: int = -1,
    scale: Any = None,
    out_scale: Any = None,
    soft_cap: float = 0.0,
    sinks: Array | None = None,
    skip: Any = None,
    unsafe: bool = False,
    geometry: Geometry | None = None,
    out_dtype: Any = None,
    arithmetic: str = "float64",
) -> Result:
    """Attention of one request.

    Parameters
    ----------
    q, k, v : ndarray, ``[q_len, heads, d_qk]``, ``[kv_len, kv_heads, d_qk]``, ``[…, d_v]``
        Any float dtype.
    causal, window_left, scale, out_scale, soft_cap, sinks
        As in `cuattn.prefill`.
    skip : float or ndarray ``[heads]``, optional
        The threshold λ itself. Default: every tile is kept.
    unsafe : bool
        Let a threshold of 1 or more skip; otherwise its votes count as ineligible.
    geometry : Geometry, optional
        Who votes on what; needed for skipping. Without `skip` its votes are only counted.
    out_dtype : dtype or name, optional
        Of the output in plain arithmetic. Default: q's dtype.
    arithmetic : {"float64", "float32-plain"}
        The second is the untiled textbook formula as a careful user would write it in the inputs'
        dtype: float32 scores and softmax, P rounded to the input dtype, float32 P·V, one rounding
        at the end. Its error against float64 says what error a kernel may have. Which tiles are
        dropped is always decided in float64.

    Returns
    -------
    Result

    Examples
    --------
    >>> import numpy as np
    >>> q = np.zeros((1, 2, 8)); k = np.zeros((4, 1, 8)); v = np.ones((4, 1, 8))
    >>> result = attention(q, k, v)
    >>> float(result.out[0, 0, 0]), round(float(result.lse[0, 0]), 4)
    (1.0, 1.3863)
    """
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic is {arithmetic!r}; wanted one of {', '.join(ARITHMETICS)}")
    if skip is not None and geometry is None:
        raise ValueError("skip is given without geometry, on which its result depends")
    if geometry is not None and geometry.order != Geometry.__dataclass_fields__["order"].default:
        raise ValueError(f"geometry has the order {geometry.order!r}, which is not known here")
    q_len, heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[:2]
    options = options_of(head_dim, scale, out_scale, soft_cap, sinks)
    plain = arithmetic == "float32-plain"
    inner = np.dtype(np.float32 if plain else np.float64)
    out_type = (dtype_of(out_dtype) if out_dtype is not None else q.dtype) if plain else inner
    log_threshold, eligible = log_thresholds(skip, heads, unsafe)

    out = np.zeros((heads, q_len, v.shape[2]), inner)
    lse = np.full((heads, q_len), -np.inf, inner)
    dropped_mass, certificate = np.zeros((2, heads, q_len))
    visited, skipped = np.zeros((2, heads), np.int64)
    statistics: list[Array] = []
    margin = np.inf
    begin, end = visible_keys(q_len, kv_len, causal, window_left)
    pack = geometry.pack(q_len, heads // max(kv_heads, 1)) if geometry is not None else 1
    step = geometry.tokens(pack) if geometry is not None else ROWS_AT_ONCE
    for row in range(0, q_len, step):
        rows = slice(row, min(row + step, q_len))
        # Keys any row of the block sees; with a geometry from the first key of a tile on.
        low, high = int(begin[rows].min()), int(end[rows].max())
        if geometry is not None:
            low -= low % geometry.block_kv
        if high <= low or kv_heads == 0:
            continue
        key = np.arange(low, high)
        visible = (key >= begin[rows, None]) & (key < end[rows, None])  # [row, key]
        kept = np.broadcast_to(visible, (heads, *visible.shape))
        lost = np.zeros_like(kept)
        if geometry is not None:
            exact = score(q[rows], k[low:high], options, visible, np.dtype(np.float64))
            votes = vote(exact, visible, log_threshold, geometry, pack)
            lost = votes.dropped & kept
            kept = kept & ~votes.dropped
            dropped_mass[:, rows] = dropped_share(exact, lost, options.sinks)
            certificate[:, rows] = largest_share(
                exact, lost, kept, options.sinks, geometry.block_kv
            )
            visited += votes.visited
            skipped += votes.skipped
            margin = min(margin, votes.margin)
            statistics.append(votes.statistics)
        scores = score(q[rows], k[low:high], options, visible, inner)
        out[:, rows], lse[:, rows] = weigh(
            scores, kept, v[low:high], options, q.dtype if plain else None
        )
    return Result(
        out=out.transpose(1, 0, 2).astype(out_type),
        lse=lse.T.copy(),
        visited=visited,
        skipped=skipped,
        ineligible=np.where(eligible, 0, visited),
        dropped_mass=dropped_mass.T.copy(),
        certificate=certificate.T.copy(),
        margin=float(margin),
        statistics=np.concatenate([np.zeros((0, heads)), *statistics]),
    )


def _requests(
    requests: list[tuple[Array, Array, Array]],
    heads: int,
    skip_softmax: Any,
    options: dict[str, Any],
) -> list[Result]:
    """Attention of every request with its own threshold."""
    if skip_softmax is not None and skip_softmax.seeds is not None:
        raise ValueError("skip_softmax has seeds, which prefill cannot use; wanted None")
    kv_lens = np.array([k.shape[0] for _, k, _ in requests])
    thresholds = thresholds_of(skip_softmax, len(requests), heads, kv_lens)
    unsafe = skip_softmax is not None and bool(skip_softmax.unsafe)
    return [
        attention(
            q, k, v, skip=None if thresholds is None else thresholds[i], unsafe=unsafe, **options
        )
        for i, (q, k, v) in enumerate(requests)
    ]


def prefill(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window_left: int = -1,
    scale: Any = None,
    out_scale: Any = None,
    soft_cap: float = 0.0,
    sinks: Array | None = None,
    skip_softmax: Any = None,
    out_dtype: Any = None,
    geometry: Geometry | None = None,
    arithmetic: str = "float64",
) -> Result:
    """What `cuattn.prefill` computes.

    Parameters
    ----------
    q, k, v : ndarray, ``[batch, q_len, heads, d_qk]``, ``[batch, kv_len, kv_heads, …]``
        Any float dtype.
    causal, window_left, scale, out_scale, soft_cap, sinks, skip_softmax, out_dtype
        As in `cuattn.prefill`, with NumPy arrays.
    geometry : Geometry, optional
        Of the kernel's plan; needed with `skip_softmax`.
    arithmetic : {"float64", "float32-plain"}
        See `attention`.

    Returns
    -------
    Result
        `out` ``[batch, q_len, heads, d_v]``, `lse` ``[batch, q_len, heads]``, counts
        ``[batch, heads]``.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((2, 3, 4, 8))
    >>> prefill(x, x, x, causal=True).out.shape
    (2, 3, 4, 8)
    """
    batch, q_len, heads, _ = q.shape
    cu_q = np.arange(batch + 1) * q_len
    cu_kv = np.arange(batch + 1) * k.shape[1]
    flat_q, flat_k, flat_v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    result = prefill_ragged(
        flat_q,
        flat_k,
        flat_v,
        cu_q,
        cu_kv,
        causal=causal,
        window_left=window_left,
        scale=scale,
        out_scale=out_scale,
        soft_cap=soft_cap,
        sinks=sinks,
        skip_softmax=skip_softmax,
        out_dtype=out_dtype,
        geometry=geometry,
        arithmetic=arithmetic,
    )
    return replace(
        result,
        out=result.out.reshape(batch, q_len, heads, v.shape[3]),
        lse=result.lse.reshape(batch, q_len, heads),
        dropped_mass=result.dropped_mass.reshape(batch, q_len, heads),
        certificate=result.certificate.reshape(batch, q_len, heads),
    )


def prefill_ragged(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_kv: Array,
    *,
    causal: bool = False,
    window_left: int = -1,
    scale: Any = None,
    out_scale: Any = None,
    soft_cap: float = 0.0,
    sinks: Array | None = None,
    skip_softmax: Any = None,
    out_dtype: Any = None,
    geometry: Geometry | None = None,
    arithmetic: str = "float64",
) -> Result:
    """What `cuattn.prefill_ragged` computes.

    Parameters
    ----------
    q, k, v : ndarray, ``[tokens, heads, d_qk]``, ``[kv tokens, kv_heads, …]``
        Requests one behind the other.
    cu_seqlens_q, cu_seqlens_kv : ndarray, ``[batch + 1]``
        Prefix sums of lengths.
    causal, window_left, scale, out_scale, soft_cap, sinks, skip_softmax, out_dtype
        As in `cuattn.prefill_ragged`, with NumPy arrays.
    geometry, arithmetic
        See `prefill`.

    Returns
    -------
    Result
        `out` ``[tokens, heads, d_v]``, `lse` ``[tokens, heads]``; NaN in rows of no request, which
        the kernel leaves as they were. Counts ``[batch, heads]``.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((5, 4, 8))
    >>> prefill_ragged(x, x, x, [0, 2, 5], [0, 2, 5]).lse.shape
    (5, 4)
    """
    cu_q, cu_kv = ([int(x) for x in np.asarray(c)] for c in (cu_seqlens_q, cu_seqlens_kv))
    spans = list(zip(pairwise(cu_q), pairwise(cu_kv), strict=True))
    requests = [(q[a:b], k[c:d], v[c:d]) for (a, b), (c, d) in spans]
    options = {
        "causal": causal,
        "window_left": window_left,
        "scale": scale,
        "out_scale": out_scale,
        "soft_cap": soft_cap,
        "sinks": sinks,
        "out_dtype": out_dtype,
        "geometry": geometry,
        "arithmetic": arithmetic,
    }
    heads = q.shape[1]
    results = _requests(requests, heads, skip_softmax, options)
    plain = arithmetic == "float32-plain"
    out_type = (q.dtype if out_dtype is None else dtype_of(out_dtype)) if plain else np.float64
    out = np.full((q.shape[0], heads, v.shape[2]), np.nan, out_type)
    lse = np.full(out.shape[:2], np.nan, np.float32 if plain else np.float64)
    dropped_mass, certificate = np.full((2, *out.shape[:2]), np.nan)
    for ((first, end), _), result in zip(spans, results, strict=True):
        out[first:end] = result.out
        lse[first:end] = result.lse
        dropped_mass[first:end] = result.dropped_mass
        certificate[first:end] = result.certificate
    masses = {"dropped_mass": dropped_mass, "certificate": certificate}
    return join(results, heads, out=out, lse=lse, **masses)


def prefill_paged(
    q: Array,
    kv_cache: Array | tuple[Array, Array],
    block_tables: Array,
    seq_lens: Array,
    cu_seqlens_q: Array,
    *,
    layout: str = "HND",
    causal: bool = True,
    window_left: int = -1,
    scale: Any = None,
    out_scale: Any = None,
    soft_cap: float = 0.0,
    sinks: Array | None = None,
    skip_softmax: Any = None,
    out_dtype: Any = None,
    geometry: Geometry | None = None,
    arithmetic: str = "float64",
) -> Result:
    """What `cuattn.prefill_paged` computes.

    Parameters
    ----------
    q : ndarray, ``[tokens, heads, d_qk]``
        The new tokens of every request, one request behind the other.
    kv_cache : ndarray ``[pages, 2, …]``, or a pair of ``[pages, …]``
        A page is ``[heads, page_size, d]`` with layout "HND", ``[page_size, heads, d]`` with "NHD".
    block_tables : ndarray of int, ``[batch, max_pages]``
        Page of each stretch of keys; a page outside the cache reads as zeros.
    seq_lens : ndarray of int, ``[batch]``
        Keys of every request, the new tokens included.
    cu_seqlens_q : ndarray of int, ``[batch + 1]``
        Prefix sums of the new tokens.
    layout : {"HND", "NHD"}
        Of a page.
    causal, window_left, scale, out_scale, soft_cap, sinks, skip_softmax, out_dtype
        As in `cuattn.prefill_paged`, with NumPy arrays.
    geometry, arithmetic
        See `prefill`.

    Returns
    -------
    Result
        As from `prefill_ragged`.

    Examples
    --------
    >>> import numpy as np
    >>> q = np.ones((2, 4, 8)); cache = np.ones((3, 2, 1, 16, 8))
    >>> prefill_paged(q, cache, np.array([[2, 0]]), np.array([20]), np.array([0, 2])).out.shape
    (2, 4, 8)
    """
    k, v, cu_kv = gather_pages(kv_cache, block_tables, seq_lens, layout)
    return prefill_ragged(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_kv,
        causal=causal,
        window_left=window_left,
        scale=scale,
        out_scale=out_scale,
        soft_cap=soft_cap,
        sinks=sinks,
        skip_softmax=skip_softmax,
        out_dtype=out_dtype,
        geometry=geometry,
        arithmetic=arithmetic,
    )
