"""Absorbed multi-head latent attention in NumPy, float64 inside; `cuattn.reference` has it too.

It is decode with one KV head whose values are the first columns of its keys.  A token with sparse
indices is a request of its own, over pages of one token each; its threshold is that of the request.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn._records import MlaGeometry
from cuattn._replay import Result, gather_pages, options_of
from cuattn.reference_decode import Keys, attend, decode, rules_of

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
        Of the kernel's plan; needed with `skip_softmax`. With `sparse_indices` each token deals the
        tiles of its list as a request does; λ and counts are those of its request.
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
    common = {"out_dtype": out_dtype, "geometry": geometry, "arithmetic": arithmetic}
    if sparse_indices is None:
        if block_tables is None:
            raise ValueError("block_tables is None; wanted pages where sparse_indices is None too")
        return decode(
            q,
            _keys_and_values(rows, latent),
            block_tables,
            seq_lens,
            cu_seqlens_q=cu_seqlens_q,
            layout="NHD",
            scale=scale,
            out_scale=out_scale,
            sinks=sinks,
            skip_softmax=skip_softmax,
            **common,
        )
    q_len = 1 if q.ndim == 3 else q.shape[1]
    kv_lens = np.maximum(np.asarray(seq_lens, np.int64).ravel(), 0)
    batch = len(kv_lens)
    cu_q = np.arange(batch + 1) * q_len if cu_seqlens_q is None else np.asarray(cu_seqlens_q)
    request = np.repeat(np.arange(batch), np.diff(cu_q))
    slots = rows.reshape(-1, 1, rows.shape[2])  # pages of one token
    rules = rules_of(skip_softmax, geometry, kv_lens, q.shape[-2])
    result = attend(
        q.reshape(-1, *q.shape[-2:]),
        _chosen(_keys_and_values(slots, latent), sparse_indices, cu_q, kv_lens),
        np.arange(cu_q[0], cu_q[-1] + 1),
        [rules[own] for own in request],
        options_of(q.shape[-1], scale, out_scale, 0.0, sinks),
        seeds=None if skip_softmax is None else skip_softmax.seeds,
        **common,
    )
    return _by_request(result, q.shape[:-1], request, batch)


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


def _chosen(
    caches: tuple[Array, Array], sparse_indices: Array, cu_q: Array, kv_lens: Array
) -> Keys:
    """The entries of every token's list that it uses, out of caches with pages of one token."""
    q_lens = np.diff(cu_q)
    request = np.repeat(np.arange(len(q_lens)), q_lens)
    place = np.arange(len(request)) - (cu_q[:-1] - cu_q[0])[request]  # in its request
    indices = np.asarray(sparse_indices)
    # Of each request, or of each token of all.
    entries = indices[request, place] if indices.ndim == 3 else indices[cu_q[0] : cu_q[-1]]
    lengths = np.clip((kv_lens - q_lens)[request] + place + 1, 0, entries.shape[1])
    k, v, ends = gather_pages(caches, entries, lengths, "NHD")
    positions = entries[np.arange(entries.shape[1]) < lengths[:, None]]
    return Keys(k, v, ends, (positions >= 0) & (positions < len(caches[0])))


def _by_request(result: Result, shape: tuple[int, ...], request: Array, batch: int) -> Result:
    """A result of single tokens as that of their requests; `shape` is q's without its last axis."""

    def summed(counts: Array) -> Array:
        total = np.zeros((batch, shape[-1]), np.int64)
        np.add.at(total, request, counts)
        return total

    return replace(
        result,
        out=result.out.reshape(*shape, result.out.shape[-1]),
        lse=result.lse.reshape(shape),
        dropped_mass=result.dropped_mass.reshape(shape),
        certificate=result.certificate.reshape(shape),
        visited=summed(result.visited),
        skipped=summed(result.skipped),
        ineligible=summed(result.ineligible),
    )
