"""A call of MLA decode → `Problem`, or one clear error; see `_check`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import _check, _check_arrays
from ._check import Options
from ._records import Problem, View

PAIRS = ((512, 64), (256, 64), (512, 0))  # (latent, rope): columns of the cache's rows
LATENTS = (None, 512, 256)
MOST_HEADS = 128
MOST_CHOSEN = 4096  # keys of a token with sparse_indices
CHOSEN_STEP = 64
_ROWS = ", ".join(f"{latent + rope} (latent {latent}, rope {rope})" for latent, rope in PAIRS)


def latent_dim(value: Any) -> int | None:
    """Return a latent_dim that some cache may have."""
    if value not in LATENTS or isinstance(value, bool):
        raise ValueError(f"latent_dim is {value!r}; wanted 512, 256 or None (by kv_cache's rows)")
    return None if value is None else int(value)


def latent_of(row: int) -> int:
    """Return the columns of a value in rows of so many columns, 0 for rows of no kind."""
    return next((pair[0] for pair in PAIRS if sum(pair) == row), 0)


def mla_decode(
    latent: int | None,
    q: View,
    kv_cache: View,
    block_tables: View,
    seq_lens: View,
    cu_seqlens_q: View | None,
    layout: str,
    options: Options,
) -> Problem:
    """Check q of few tokens a request against a cache [pages, 1, page_size, row] and a table.

    Its rows are the keys, their latent columns the values; `layout` is of no use here.
    """
    values = _values(latent, q, kv_cache, cu_seqlens_q is not None, options)
    return _check.decode_problem(q, kv_cache, values, block_tables, seq_lens, cu_seqlens_q, options)


def mla_decode_sparse(
    latent: int | None,
    q: View,
    kv_cache: View,
    sparse_indices: View,
    seq_lens: View,
    cu_seqlens_q: View | None,
    layout: str,
    options: Options,
) -> Problem:
    """Check the same with positions in the cache, [batch, q_len, top_k] or as q, for a table."""
    values = _values(latent, q, kv_cache, cu_seqlens_q is not None, options)
    if cu_seqlens_q is None:
        batch = q.shape[0]
    else:
        batch = _check_arrays.prefix_sums("cu_seqlens_q", cu_seqlens_q, q)
    _check_arrays.lengths(seq_lens, q, batch)
    top_k = _positions(sparse_indices, q)
    problem = _check.decode_sizes(q, kv_cache, values, batch, top_k, cu_seqlens_q, options)
    return replace(problem, sparse=True)


def keys_given(block_tables: Any, sparse_indices: Any) -> None:
    """Raise TypeError unless one of the two says where keys lie."""
    if block_tables is None and sparse_indices is None:
        raise TypeError("block_tables is None without sparse_indices; wanted int32 arrays of pages")


def _values(latent: int | None, q: View, kv_cache: View, ragged: bool, options: Options) -> View:
    """Check q against the cache and return the latent part of it."""
    rank, wanted = _check.decode_rank(q, ragged)
    if len(q.shape) != rank:
        raise ValueError(f"q has shape {q.shape}; wanted {rank} axes {wanted}")
    for name, view in (("q", q), ("kv_cache", kv_cache)):
        _check_arrays.input_array(name, view, q)
    page_size, row = kv_cache.shape[2:]
    given = "" if latent is None else f" and latent_dim is {latent}"
    latent = latent or latent_of(row)
    if (latent, row - latent) not in PAIRS:
        raise ValueError(f"kv_cache has rows of {row}{given}; wanted {_ROWS}")
    if page_size < 8 or page_size & (page_size - 1):
        raise ValueError(f"kv_cache has page size {page_size}; wanted a power of two ≥ 8")
    heads, head_dim = q.shape[-2:]
    if head_dim != row:
        raise ValueError(f"q has head_dim {head_dim}; wanted kv_cache's {row}")
    if not 0 < heads <= MOST_HEADS:
        raise ValueError(f"q has {heads} heads; wanted 1 to {MOST_HEADS}")
    if options.scale is None:
        raise TypeError(
            "scale is None; wanted a positive number or one float32 on the device: that of the "
            "layer before absorption"
        )
    return kv_cache._replace(shape=(*kv_cache.shape[:3], latent))


def _positions(indices: View, q: View) -> int:
    """Check sparse_indices and return top_k."""
    tokens = q.shape[:-2]
    *leading, top_k = indices.shape or (0,)
    wanted = f"[{', '.join(map(str, tokens))}, top_k], positions of each token's keys"
    _check_arrays.index_array(
        "sparse_indices", indices, q, rank=max(len(indices.shape), 1), wanted=wanted
    )
    unit = len(q.shape) == 3 and tuple(leading) == (*tokens, 1)
    if tuple(leading) != tokens and not unit:
        raise ValueError(f"sparse_indices has shape {indices.shape}; wanted {wanted}")
    if top_k % CHOSEN_STEP or not CHOSEN_STEP <= top_k <= MOST_CHOSEN:
        raise ValueError(
            f"sparse_indices has top_k {top_k}; wanted a multiple of {CHOSEN_STEP} up to "
            f"{MOST_CHOSEN}"
        )
    if not _check_arrays.packed(indices):
        raise ValueError(f"sparse_indices has strides {indices.strides}; wanted a contiguous array")
    return top_k
