"""Paged decode in NumPy, float64 inside; `cuattn.reference` has it too.

One request goes through
    scores → tile maxima and masses → votes of every block of rows → kept keys → softmax → P·V.
How keys are split decides who votes with what running maximum, and nothing else: in exact
arithmetic the merge of all splits is the softmax over all kept keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn._records import DecodeGeometry
from cuattn._replay import (
    ARITHMETICS,
    Options,
    Result,
    dropped_share,
    dtype_of,
    gather_pages,
    join,
    log_thresholds,
    options_of,
    score,
    thresholds_of,
    visible_keys,
    weigh,
)
from cuattn._replay_decode import Rule, Scores, load_of, no_votes, replay

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys and values of all requests, one behind the other."""

    k: Array  # [key, kv_head, d_qk]
    v: Array  # [key, kv_head, d_v]
    ends: Array  # [request + 1], prefix sums
    exist: Array  # [key] bool; one that does not has a place, and is seen by nobody


@dataclass(frozen=True, slots=True)
class _How:
    """What all requests of a call share."""

    options: Options
    window_left: int
    geometry: DecodeGeometry | None
    round_to: np.dtype[Any] | None  # of P, in plain arithmetic

    @property
    def inner(self) -> np.dtype[Any]:
        return np.dtype(np.float64 if self.round_to is None else np.float32)


def decode(
    q: Array,
    kv_cache: Array | tuple[Array, Array],
    block_tables: Array,
    seq_lens: Array,
    *,
    cu_seqlens_q: Array | None = None,
    layout: str = "HND",
    window_left: int = -1,
    scale: Any = None,
    out_scale: Any = None,
    soft_cap: float = 0.0,
    sinks: Array | None = None,
    skip_softmax: Any = None,
    out_dtype: Any = None,
    geometry: DecodeGeometry | None = None,
    arithmetic: str = "float64",
) -> Result:
    """What `cuattn.decode` computes.

    Parameters
    ----------
    q : ndarray, ``[batch, heads, d_qk]``, ``[batch, q_len, heads, d_qk]`` or ``[tokens, heads, …]``
        The newest tokens of every request; the last form with `cu_seqlens_q`.
    kv_cache : ndarray ``[pages, 2, …]``, or a pair of ``[pages, …]``
        As in `prefill_paged`.
    block_tables : ndarray of int, ``[batch, max_pages]``
        Page of each stretch of keys; a page outside the cache reads as zeros.
    seq_lens : ndarray of int, ``[batch]``
        Keys of every request, the new tokens included.
    cu_seqlens_q : ndarray of int, ``[batch + 1]``, optional
        Prefix sums of the new tokens.
    layout, window_left, scale, out_scale, soft_cap, sinks, skip_softmax, out_dtype
        As in `cuattn.decode`, with NumPy arrays.
    geometry : DecodeGeometry, optional
        Of the kernel's plan; needed with `skip_softmax`.
    arithmetic : {"float64", "float32-plain"}
        See `cuattn.reference.attention`.

    Returns
    -------
    Result
        `out` and `lse` as from `cuattn.decode`, NaN in rows of no request; counts ``[batch,
        heads]``.  `dropped_mass` has the shape of `lse`.  A vote has one entry in `statistics`, by
        query head of its rows, -inf at the others.  With `max_dropped_mass` statistic and margin
        are the larger of ``tile_max - reference`` and ln of (dropped mass / its bound), which for
        a close vote is their relative distance; they depend on the bound.

    Examples
    --------
    >>> import numpy as np
    >>> q = np.ones((1, 4, 8)); cache = np.ones((3, 2, 1, 16, 8))
    >>> decode(q, cache, np.array([[2, 0]]), np.array([20])).out.shape
    (1, 4, 8)
    """
    k, v, cu_kv = gather_pages(kv_cache, block_tables, seq_lens, layout)
    rules = rules_of(skip_softmax, geometry, np.diff(cu_kv), q.shape[-2])
    q_len = 1 if q.ndim == 3 else q.shape[1]
    return attend(
        q,
        Keys(k, v, cu_kv, np.ones(len(k), bool)),
        np.arange(len(cu_kv)) * q_len if cu_seqlens_q is None else np.asarray(cu_seqlens_q),
        rules,
        options_of(q.shape[-1], scale, out_scale, soft_cap, sinks),
        window_left=window_left,
        seeds=None if skip_softmax is None else skip_softmax.seeds,
        out_dtype=out_dtype,
        geometry=geometry,
        arithmetic=arithmetic,
    )


def attend(
    q: Array,
    keys: Keys,
    cu_q: Array,
    rules: list[Rule],
    options: Options,
    *,
    window_left: int = -1,
    seeds: Array | None = None,
    out_dtype: Any,
    geometry: DecodeGeometry | None,
    arithmetic: str,
) -> Result:
    """Attention of q, of `decode`'s forms, to the keys of each request, by its rule.

    `seeds` are those of a SkipSoftmax.
    """
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic is {arithmetic!r}; wanted one of {', '.join(ARITHMETICS)}")
    heads, head_dim = q.shape[-2:]
    tokens = q.reshape(-1, heads, head_dim)
    plain = arithmetic == "float32-plain"
    how = _How(options, window_left, geometry, q.dtype if plain else None)
    out_type = (q.dtype if out_dtype is None else dtype_of(out_dtype)) if plain else how.inner

    out = np.full((len(tokens), heads, keys.v.shape[2]), np.nan, out_type)
    lse = np.full(out.shape[:2], np.nan, how.inner)
    dropped_mass = np.full(out.shape[:2], np.nan)
    group = heads // max(keys.k.shape[1], 1)
    splits = _splits(np.diff(cu_q), np.diff(keys.ends), group, how)
    results = []
    for request, rule in enumerate(rules):
        rows = slice(*(int(x) for x in cu_q[request : request + 2]))
        own = slice(*(int(x) for x in keys.ends[request : request + 2]))
        parts = keys.k[own], keys.v[own], keys.exist[own]
        if seeds is not None:
            rule = replace(rule, seeds=np.asarray(seeds).reshape(-1, heads)[rows])
        attended = _request(tokens[rows], *parts, splits[request], rule, how)
        out[rows], lse[rows] = attended.out.astype(out_type), attended.lse
        dropped_mass[rows] = attended.dropped_mass
        results.append(attended)
    return join(
        results,
        heads,
        out=out.reshape(*q.shape[:-1], keys.v.shape[2]),
        lse=lse.reshape(q.shape[:-1]),
        dropped_mass=dropped_mass.reshape(q.shape[:-1]),
        certificate=dropped_mass.reshape(q.shape[:-1]),
    )


def _check_geometry(geometry: DecodeGeometry | None, skip_softmax: Any) -> None:
    if skip_softmax is not None and geometry is None:
        raise ValueError("skip_softmax is given without geometry, on which its result depends")
    if geometry is None:
        return
    if geometry.order != type(geometry).__dataclass_fields__["order"].default:
        raise ValueError(f"geometry has the order {geometry.order!r}, which is not known here")


def rules_of(
    skip_softmax: Any, geometry: DecodeGeometry | None, kv_lens: Array, heads: int
) -> list[Rule]:
    """What lets a tile go, of every request."""
    _check_geometry(geometry, skip_softmax)
    nothing = Rule(*log_thresholds(None, heads, False))
    if skip_softmax is None:
        return [nothing] * len(kv_lens)
    if skip_softmax.max_dropped_mass is not None:
        bound = float(skip_softmax.max_dropped_mass)
        return [replace(nothing, max_dropped_mass=bound)] * len(kv_lens)
    thresholds = thresholds_of(skip_softmax, len(kv_lens), heads, kv_lens)
    if thresholds is None:
        return [nothing] * len(kv_lens)
    return [Rule(*log_thresholds(row, heads, bool(skip_softmax.unsafe))) for row in thresholds]


def _splits(q_lens: Array, kv_lens: Array, group: int, how: _How) -> list[int]:
    """Splits of every request, by the load of all."""
    if how.geometry is None:
        return [1] * len(kv_lens)
    rule = how.geometry.splits
    lengths = [(int(q_len), int(kv_len)) for q_len, kv_len in zip(q_lens, kv_lens, strict=True)]
    keys = [_keys_seen(*pair, how.window_left) for pair in lengths]
    loads = [
        load_of(q_len, seen, group, how.geometry)
        for (q_len, _), seen in zip(lengths, keys, strict=True)
    ]
    return [
        rule.splits(seen, own if rule.alone else sum(loads))
        for seen, own in zip(keys, loads, strict=True)
    ]


def _keys_seen(q_len: int, kv_len: int, window_left: int) -> int:
    """Keys that the tokens of a request see between them."""
    begin, _ = visible_keys(q_len, kv_len, True, window_left)
    return kv_len - int(begin.min(initial=kv_len))


def _request(
    q: Array, k: Array, v: Array, exist: Array, splits: int, rule: Rule, how: _How
) -> Result:
    """Attention of one request: q ``[q_len, heads, d]``, k and v ``[kv_len, kv_heads, d]``."""
    (q_len, heads, _), (kv_len, kv_heads, _) = q.shape, k.shape
    begin, end = visible_keys(q_len, kv_len, True, how.window_left)
    low = kv_len - _keys_seen(q_len, kv_len, how.window_left)
    if how.geometry is not None:
        low -= low % how.geometry.block_kv
    key = np.arange(low, kv_len)
    visible = (key >= begin[:, None]) & (key < end[:, None]) & exist[low:]
    kept: Array = np.broadcast_to(visible, (heads, *visible.shape))
    exact = score(q, k[low:], how.options, visible, np.dtype(np.float64))
    votes, dropped_mass = no_votes(kept), np.zeros((heads, q_len))
    if how.geometry is not None and kv_heads:
        seen = Scores(exact, begin - low, end - low, kv_heads)
        votes = replay(seen, splits, rule, how.geometry)
        dropped_mass = dropped_share(exact, votes.dropped & kept, how.options.sinks)
        kept = kept & ~votes.dropped
    plain = how.round_to is not None
    scores = score(q, k[low:], how.options, visible, how.inner) if plain else exact
    out, lse = weigh(scores, kept, v[low:], how.options, how.round_to)
    return Result(
        out=out.transpose(1, 0, 2),
        lse=lse.T,
        visited=votes.visited,
        skipped=votes.skipped,
        ineligible=np.where(rule.eligible, 0, votes.visited),
        dropped_mass=dropped_mass.T,
        certificate=dropped_mass.T,
        margin=votes.margin,
        statistics=votes.statistics,
    )
