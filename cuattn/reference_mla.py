"""Absorbed multi-head latent attention in NumPy, float64 inside; `cuattn.reference` has it too.

It is decode with one KV head whose values are the first columns of its keys.  A token with sparse
indices is a request of its own, over pages of one token each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn._records import MlaGeometry
from cuattn._replay import Result
from cuattn.reference_decode import decode

Array = NDArray[Any]

LATENTS = {576: 512, 512: 512, 320: 256}  # by the columns of a row


def mla_decode(
    q: Array,
    kv_cache: Array,
    block_tables: Array | None,
    seq_lens: Array,
    *,
    cu_seqlens_q: Array | None = None,
    scale: Any,
    out_scale: Any = None,
    sinks: Array | None = None,
    skip_softmax: Any = None,
    sparse_indices: Array | None = None,
    latent_dim: int | None = None,
    out_dtype: Any = None,
    geometry: MlaGeometry | None = None,
    arithmetic: str = "float64",
) -> Result:
    """Absorbed multi-head latent attention over a paged cache, causal inside each request.

    Parameters
    ----------
    q : ndarray, ``[batch, heads, d_qk]``, ``[batch, q_len, heads, d_qk]`` or ``[tokens, heads, …]``
        The newest tokens of every request; the last form with `cu_seqlens_q`. Columns are those of
        a row of the cache.
    kv_cache : ndarray, ``[pages, page_size, d_qk]``
        A row is a key; its first `latent_dim` columns are the value. Also with a head axis of 1
        before or behind that of `page_size`.
    block_tables : ndarray of int, ``[batch, max_pages]``
        Page of each stretch of keys; a page outside the cache reads as zeros.
    seq_lens : ndarray of int, ``[batch]``
        Keys of every request, the new tokens included.
    cu_seqlens_q : ndarray of int, ``[batch + 1]``, optional
        Prefix sums of the new tokens.
    scale : float
        Multiplies Q·Kᵀ. It has no default: that of a layer is of the head dim before absorption.
    out_scale, sinks, skip_softmax, out_dtype
        As in `cuattn.mla_decode`, with NumPy arrays.
    sparse_indices : ndarray of int, ``[batch, q_len, top_k]``, optional
        Also ``[batch, top_k]``, and ``[tokens, top_k]`` with `cu_seqlens_q`; block_tables may then
        be None.
        Keys of each token as positions in the cache, page · page_size + slot. Token i of a request
        uses the first min(kv_len - q_len + i + 1, top_k); of these, positions outside the cache are
        ignored, and one that is there twice counts twice. Default: all keys of `block_tables`.
    latent_dim : int, optional
        Columns of a value. Default: what `cuattn.mla_decode` takes for such rows.
    geometry : MlaGeometry, optional
        Of the kernel's plan; needed with `skip_softmax`. Not with `sparse_indices`, so far.
    arithmetic : {"float64", "float32-plain"}
        See `cuattn.reference.attention`.

    Returns
    -------
    Result
        `out` ``[…, heads, latent]`` and `lse` ``[…, heads]``, NaN in rows of no request; votes and
        counts as in `reference_decode.decode`.

    Examples
    --------
    >>> import numpy as np
    >>> q = np.ones((1, 4, 24)); cache = np.ones((3, 16, 24))
    >>> tables, lengths = np.array([[2, 0]]), np.array([20])
    >>> mla_decode(q, cache, tables, lengths, scale=0.25, latent_dim=16).out.shape
    (1, 4, 16)
    """
    rows = _rows(kv_cache)
    latent = LATENTS.get(rows.shape[2], 0) if latent_dim is None else latent_dim
    if not 0 < latent <= rows.shape[2] or q.shape[-1] != rows.shape[2]:
        raise ValueError(
            f"q has d_qk {q.shape[-1]} and latent_dim is {latent}; wanted d_qk {rows.shape[2]}, a "
            "row of kv_cache, and latent_dim no more than that"
        )
    options = {
        "layout": "NHD",
        "scale": scale,
        "out_scale": out_scale,
        "sinks": sinks,
        "out_dtype": out_dtype,
        "arithmetic": arithmetic,
    }
    if sparse_indices is None:
        if block_tables is None:
            raise ValueError("block_tables is None; wanted pages where sparse_indices is None too")
        caches = _keys_and_values(rows, latent)
        skipping = {"skip_softmax": skip_softmax, "geometry": geometry}
        return decode(
            q, caches, block_tables, seq_lens, cu_seqlens_q=cu_seqlens_q, **skipping, **options
        )
    if skip_softmax is not None or geometry is not None:
        raise ValueError("skip_softmax and geometry cannot be replayed with sparse_indices, so far")
    q_len = 1 if q.ndim == 3 else q.shape[1]
    kv_lens = np.maximum(np.asarray(seq_lens, np.int64).ravel(), 0)
    batch = len(kv_lens)
    cu_q = np.arange(batch + 1) * q_len if cu_seqlens_q is None else np.asarray(cu_seqlens_q)
    slots = rows.reshape(-1, 1, rows.shape[2])  # pages of one token
    tables, lengths = _chosen(sparse_indices, cu_q, kv_lens, len(slots))
    result = decode(
        q.reshape(-1, *q.shape[-2:]),
        _keys_and_values(slots, latent),
        tables,
        lengths,
        cu_seqlens_q=np.arange(cu_q[0], cu_q[-1] + 1),
        **options,
    )
    return _by_request(result, q.shape[:-1], batch)


def _rows(kv_cache: Array) -> Array:
    """The cache as [pages, page_size, d_qk]."""
    shape = kv_cache.shape
    if kv_cache.ndim == 4 and 1 in shape[1:3]:
        return kv_cache[:, 0] if shape[1] == 1 else kv_cache[:, :, 0]
    if kv_cache.ndim != 3:
        raise ValueError(
            f"kv_cache has shape {shape}; wanted [pages, page_size, d_qk], or that with a head "
            "axis of 1"
        )
    return kv_cache


def _keys_and_values(rows: Array, latent: int) -> tuple[Array, Array]:
    """Caches of one KV head, layout "NHD"."""
    return rows[:, :, None], rows[:, :, None, :latent]


def _chosen(sparse_indices: Array, cu_q: Array, kv_lens: Array, slots: int) -> tuple[Array, Array]:
    """Positions of every token's keys, [token, top_k], and how many of them are valid."""
    q_lens = np.diff(cu_q)
    request = np.repeat(np.arange(len(q_lens)), q_lens)
    place = np.arange(len(request)) - (cu_q[:-1] - cu_q[0])[request]  # in its request
    indices = np.asarray(sparse_indices)
    # Of each request, or of each token of all.
    entries = indices[request, place] if indices.ndim == 3 else indices[cu_q[0] : cu_q[-1]]
    seen = (kv_lens - q_lens)[request] + place + 1
    valid = (entries >= 0) & (entries < slots)
    valid &= np.arange(entries.shape[1]) < seen[:, None]
    order = np.argsort(~valid, axis=1, kind="stable")  # valid ones first, in their order
    return np.take_along_axis(entries, order, axis=1), valid.sum(axis=1)


def _by_request(result: Result, shape: tuple[int, ...], batch: int) -> Result:
    """A result of single tokens as that of their requests; `shape` is q's without its last axis."""
    none = np.zeros((batch, shape[-1]), np.int64)
    return replace(
        result,
        out=result.out.reshape(*shape, result.out.shape[-1]),
        lse=result.lse.reshape(shape),
        dropped_mass=result.dropped_mass.reshape(shape),
        visited=none,
        skipped=none,
        ineligible=none,
    )
