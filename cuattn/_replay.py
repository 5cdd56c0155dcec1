"""The steps of the reference, on one block of query rows: scores, votes, softmax, P·V.

Every array is over [head, row, key]; what skips and what is seen is a mask over it.  Dtype in, same
dtype out: float64 for the reference itself, float32 for plain arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn._records import Geometry

Array = NDArray[Any]

ARITHMETICS = ("float64", "float32-plain")
# Of a certificate of prefill; twins of kernels/attention/certificate.cuh.
CERTIFICATE_MARGIN = 1 + 2**-8
SMALLEST_SHARE = 2.0**-80


@dataclass(frozen=True, slots=True)
class Result:
    """What attention gives, and what skipping did.

    Shapes are those of one request, of `attention`.  The wrappers put a request axis in front of
    the counts and their own token axes in place of `q_len`; they join `statistics` over requests.

    Attributes
    ----------
    out : ndarray, ``[q_len, heads, head_dim_v]``
        float64, or the output dtype with ``arithmetic="float32-plain"``.
    lse : ndarray, ``[q_len, heads]``
        Natural log of the sum over kept keys, the sink included; -inf for a row that sees no key.
    visited, skipped, ineligible : ndarray of int64, ``[heads]``
        Votes held, votes that skipped their tile, votes that ran without skipping because the
        threshold was outside [0, 1). Zero when no geometry is given.
    dropped_mass : ndarray of float64, ``[q_len, heads]``
        Share of the full softmax denominator that lies in skipped tiles.
    certificate : ndarray of float64, ``[q_len, heads]``
        What is returned with ``certificate=True``: of prefill an upper bound of `dropped_mass`, of
        decode `dropped_mass` itself.
    margin : float
        Distance of the closest vote from turning out the other way, in natural-log units; inf when
        there was none. Counts can be compared exactly while float32 scores are closer than this.
    statistics : ndarray of float64, ``[votes, heads]``
        Per vote the largest ``tile_max - running_max`` of the head's rows; inf on a first tile,
        -inf if it has none. For thresholds up to 1 they do not depend on the threshold.
    """

    out: Array
    lse: Array
    visited: Array
    skipped: Array
    ineligible: Array
    dropped_mass: Array
    certificate: Array
    margin: float
    statistics: Array


@dataclass(frozen=True, slots=True)
class Votes:
    """The votes of one block of query rows."""

    dropped: Array  # [head, token, key] bool
    visited: Array  # [head]
    skipped: Array  # [head]
    margin: float
    statistics: Array  # [vote, head]


@dataclass(frozen=True, slots=True)
class Options:
    """Numbers that turn Q·Kᵀ into scores and P·V into the output."""

    scale: float
    out_scale: float
    soft_cap: float
    sinks: Array | None  # [head] float64


def options_of(
    head_dim: int, scale: Any, out_scale: Any, soft_cap: float, sinks: Array | None
) -> Options:
    """The numbers of a call, with their defaults."""
    return Options(
        scale=head_dim**-0.5 if scale is None else float(np.asarray(scale).item()),
        out_scale=1.0 if out_scale is None else float(np.asarray(out_scale).item()),
        soft_cap=float(soft_cap),
        sinks=None if sinks is None else np.asarray(sinks).astype(np.float64),
    )


def dtype_of(name: Any) -> np.dtype[Any]:
    """Dtype of a name or of a framework's dtype; NumPy alone does not know bfloat16."""
    text = str(name)
    if "bfloat16" in text:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name if isinstance(name, np.dtype | type) else text.rsplit(".", 1)[-1])


def visible_keys(q_len: int, kv_len: int, causal: bool, window_left: int) -> tuple[Array, Array]:
    """First key and end of the range that each query row sees; equal for a row that sees none."""
    position = np.arange(q_len, dtype=np.int64) + (kv_len - q_len)
    end = np.clip(position + 1, 0, kv_len) if causal else np.full(q_len, kv_len, np.int64)
    begin = np.maximum(position - window_left, 0) if window_left >= 0 else np.zeros_like(end)
    return np.minimum(begin, end), end


def tile_order(first: int, last: int) -> list[int]:
    """Tiles in the order in which a block of query rows visits them."""
    return [first, *range(last, first, -1)] if last >= first else []


def thresholds_of(skip_softmax: Any, batch: int, heads: int, kv_lens: Array) -> Array | None:
    """λ of every request and head, [batch, heads], from a `SkipSoftmax`; None for no skipping."""
    if skip_softmax is None:
        return None
    factor = skip_softmax.threshold_scale_factor
    if factor is not None:
        if factor == 0:
            return None
        with np.errstate(divide="ignore"):
            per_request = np.float64(factor) / np.asarray(kv_lens, np.float64)
        return np.broadcast_to(per_request[:, None], (batch, heads))
    threshold = skip_softmax.threshold
    if threshold is None:
        raise ValueError("skip_softmax has no threshold; wanted one or a threshold_scale_factor")
    threshold = np.asarray(threshold.get() if hasattr(threshold, "get") else threshold, np.float64)
    if threshold.ndim == 1:
        threshold = threshold[:, None]
    return np.broadcast_to(threshold, (batch, heads))


def log_thresholds(skip: Any, heads: int, unsafe: bool) -> tuple[Array, Array]:
    """ln λ per head, -inf where nothing may be skipped, and whether λ was eligible."""
    if skip is None:
        return np.full(heads, -np.inf), np.ones(heads, bool)
    threshold = np.broadcast_to(np.asarray(skip).astype(np.float64), (heads,))
    eligible = (threshold >= 0) & ((threshold < 1) | unsafe)  # NaN fails every comparison
    with np.errstate(divide="ignore"):
        return np.log(np.where(eligible, threshold, 0.0)), eligible


def score(q: Array, k: Array, options: Options, visible: Array, inner: np.dtype[Any]) -> Array:
    """Scaled, capped and masked scores, [head, row, key]."""
    rows, heads, head_dim = q.shape
    keys, kv_heads = k.shape[:2]
    grouped = q.astype(inner).reshape(rows, kv_heads, heads // kv_heads, head_dim)
    with np.errstate(invalid="ignore", over="ignore"):
        products = np.matmul(
            grouped.transpose(1, 2, 0, 3), k.astype(inner).transpose(1, 2, 0)[:, None]
        ).reshape(heads, rows, keys)
        scaled = products * inner.type(options.scale)
        if options.soft_cap:
            cap = inner.type(options.soft_cap)
            scaled = cap * np.tanh(scaled / cap)
    return np.where(visible, scaled, inner.type(-np.inf))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Which rows of a block are whose: row r of a unit is of token r // pack, of head r % pack."""

    unit: int  # rows that begin with a token
    pack: int  # heads that share them
    votes: int  # of a unit

    @classmethod
    def of(cls, geometry: Geometry, pack: int) -> _Rows:
        unit = geometry.pack_rows or geometry.block_q
        return cls(unit, pack, -(-unit // geometry.rows_per_vote))

    def cut(self, x: Array, rows_per_vote: int, absent: Any) -> Array:
        """From [head, token, …] to [sharing heads, vote, row, …]; rows of no token are `absent`."""
        heads, tokens, *rest = x.shape
        here = self.unit // self.pack  # tokens of a unit
        units = -(-tokens // here)
        shared = np.full((heads // self.pack, self.pack, units * here, *rest), absent, x.dtype)
        shared[:, :, :tokens] = x.reshape(-1, self.pack, tokens, *rest)
        by_token = np.moveaxis(shared, 1, 2).reshape(-1, units, here * self.pack, *rest)
        rows = np.full((len(by_token), units, self.votes * rows_per_vote, *rest), absent, x.dtype)
        rows[:, :, : here * self.pack] = by_token
        return rows.reshape(len(rows), units * self.votes, rows_per_vote, *rest)

    def join(self, rows: Array, tokens: int) -> Array:
        """The way back, from [sharing heads, vote, row, …] to [head, token, …]."""
        shares, votes, _, *rest = rows.shape
        here = self.unit // self.pack
        units = rows.reshape(shares, votes // self.votes, -1, *rest)[:, :, : here * self.pack]
        by_token = units.reshape(shares, -1, self.pack, *rest)[:, :tokens]
        return np.moveaxis(by_token, 2, 1).reshape(shares * self.pack, tokens, *rest)


def vote(
    scores: Array, visible: Array, log_threshold: Array, geometry: Geometry, pack: int
) -> Votes:
    """Replay the votes of one block, whose rows `pack` heads share.

    `scores` [head, token, key] and `visible` [token, key] begin with a tile's first key.
    """
    heads, tokens, keys = scores.shape
    tile_keys = geometry.block_kv
    starts = np.arange(0, keys, tile_keys)
    rows = _Rows.of(geometry, pack)

    def by_vote(x: Array, absent: Any) -> Array:  # [sharing heads, vote, row, …]
        return rows.cut(x, geometry.rows_per_vote, absent)

    largest = np.fmax.reduceat(scores, starts, axis=2)
    tile_max = by_vote(np.where(np.isnan(largest), -np.inf, largest), -np.inf)
    sees = np.broadcast_to(np.logical_or.reduceat(visible, starts, axis=1), largest.shape)
    seen: Array = np.logical_or.reduce(by_vote(sees, False), axis=(0, 2))  # [vote, tile]
    sharing = np.broadcast_to(np.arange(pack)[:, None], (pack, tokens))
    sharer = by_vote(sharing, -1)[0]  # [vote, row]: which of the heads it is of
    of_sharer = sharer == np.arange(pack)[:, None, None]
    limit = np.where(sharer < 0, 0.0, log_threshold.reshape(-1, pack)[:, sharer])

    running_max = np.full(limit.shape, -np.inf)  # [sharing heads, vote, row]
    dropped = np.zeros((*limit.shape[:2], len(starts)), bool)
    margin, statistics = np.inf, [np.zeros((0, heads))]
    for tile in tile_order(0, len(starts) - 1):
        candidate = tile_max[..., tile]
        with np.errstate(invalid="ignore"):
            distance = candidate - running_max
            objects = distance >= limit  # NaN, of a row that has seen no key, does not
            gap = distance - limit
        dropped[..., tile] = seen[:, tile] & ~objects.any(axis=2)
        grown = np.maximum(running_max, candidate)
        running_max = np.where(dropped[..., tile, None], running_max, grown)
        distance, gap = (np.where(np.isnan(x), -np.inf, x) for x in (distance, gap))
        closest = np.abs(gap.max(axis=2))[:, seen[:, tile]]
        margin = min(margin, closest[np.isfinite(closest)].min(initial=np.inf))
        by_head = np.where(of_sharer[:, None], distance, -np.inf).max(axis=3)  # [sharer, share, …]
        statistics.append(by_head.transpose(2, 1, 0).reshape(-1, heads)[seen[:, tile]])
    has_row = of_sharer.any(axis=2)  # [sharer, vote]
    by_row = np.repeat(dropped[:, :, None], geometry.rows_per_vote, axis=2)
    return Votes(
        dropped=np.repeat(rows.join(by_row, tokens), tile_keys, axis=2)[..., :keys],
        visited=np.tile(has_row @ seen.sum(axis=1), heads // pack),
        skipped=(dropped.sum(axis=2) @ has_row.T).reshape(heads),
        margin=float(margin),
        statistics=np.concatenate(statistics),
    )


def _log_sum(scores: Array, chosen: Array, sinks: Array | None) -> Array:
    """Log of the sum of exp over the chosen keys and the sink, [head, row]."""
    terms = np.where(chosen, scores, -np.inf)
    if sinks is not None:
        column = np.broadcast_to(sinks[:, None, None], (*terms.shape[:2], 1))
        terms = np.concatenate([terms, column], axis=2)
    top = terms.max(axis=2, initial=-np.inf)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return safe + np.log(np.exp(terms - safe[..., None]).sum(axis=2))


def dropped_share(scores: Array, lost: Array, sinks: Array | None) -> Array:
    """Share of the denominator that lies in dropped tiles, [head, row]."""
    everything = _log_sum(scores, scores > -np.inf, sinks)
    with np.errstate(invalid="ignore"):
        mass = np.exp(_log_sum(scores, lost, None) - everything)
    return np.where(lost.any(axis=2), mass, 0.0)


def largest_share(
    scores: Array, lost: Array, kept: Array, sinks: Array | None, tile_keys: int
) -> Array:
    """Certificate of each row, [head, row]; the keys begin with those of a tile."""
    starts = np.arange(0, scores.shape[2], tile_keys)
    maxima = np.maximum.reduceat(np.where(lost, scores, -np.inf), starts, axis=2)
    with np.errstate(divide="ignore"):
        counts = np.log(np.add.reduceat(lost, starts, axis=2, dtype=np.float64))
    everything = np.concatenate([np.where(kept, scores, -np.inf), maxima + counts], axis=2)
    of_lost = np.arange(everything.shape[2]) >= scores.shape[2]
    share = dropped_share(everything, np.broadcast_to(of_lost, everything.shape), sinks)
    certified = np.clip(share * CERTIFICATE_MARGIN, SMALLEST_SHARE, 1.0)
    return np.where(lost.any(axis=2), certified, 0.0)


def weigh(
    scores: Array, kept: Array, v: Array, options: Options, round_to: np.dtype[Any] | None
) -> tuple[Array, Array]:
    """Softmax over kept keys times V: [head, row, dim] and LSE [head, row]."""
    inner = scores.dtype.type
    row_max = np.where(kept, scores, inner(-np.inf)).max(axis=2, initial=inner(-np.inf))
    sees_none: Array = ~np.logical_or.reduce(kept, axis=2)
    if options.sinks is not None:
        row_max = np.maximum(row_max, options.sinks.astype(inner)[:, None])
    row_max = np.where(sees_none | (row_max == -np.inf), inner(0), row_max)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        weights = np.where(kept, np.exp(scores - row_max[..., None]), inner(0))
        total = weights.sum(axis=2)
        if options.sinks is not None:
            total = total + np.exp(options.sinks.astype(inner)[:, None] - row_max)
        lse = np.where(sees_none, inner(-np.inf), row_max + np.log(total))
        if round_to is not None:
            weights = weights.astype(round_to).astype(inner)
        out = _times_values(weights, kept, v.astype(inner))
        out = out / total[..., None] * inner(options.out_scale)
    return np.where(sees_none[..., None], inner(0), out), lse


def _times_values(weights: Array, kept: Array, v: Array) -> Array:
    """P·V in which a key that is not kept adds nothing, whatever its value, NaN included."""
    heads, rows, keys = weights.shape
    kv_heads, head_dim = v.shape[1:]
    values = v.transpose(1, 0, 2)  # [kv head, key, dim]
    grouped = weights.reshape(kv_heads, heads // kv_heads, rows, keys)
    finite = np.where(np.isfinite(values), values, values.dtype.type(0))
    out = np.matmul(grouped, finite[:, None]).reshape(heads, rows, head_dim)
    for key in np.flatnonzero(~np.isfinite(v).all(axis=(1, 2))):
        odd = np.repeat(values[:, key] - finite[:, key], heads // kv_heads, axis=0)  # [head, dim]
        odd = np.where(np.isfinite(odd), 0, odd)
        out += np.where(kept[..., key, None], weights[..., key, None] * odd[:, None], 0)
    return out


def gather_pages(
    kv_cache: Array | tuple[Array, Array], block_tables: Array, seq_lens: Array, layout: str
) -> tuple[Array, Array, Array]:
    """Keys, values [kv tokens, kv_heads, d] and cu_seqlens_kv of all requests, out of a cache."""
    if layout not in ("HND", "NHD"):
        raise ValueError(f"layout is {layout!r}; wanted 'HND' or 'NHD'")
    pair = kv_cache if isinstance(kv_cache, tuple) else (kv_cache[:, 0], kv_cache[:, 1])
    k, v = ((x if layout == "NHD" else x.transpose(0, 2, 1, 3)) for x in pair)
    pages, page_size = k.shape[:2]
    lengths = np.clip(np.asarray(seq_lens).ravel(), 0, block_tables.shape[1] * page_size)
    cu_kv = np.concatenate([[0], np.cumsum(lengths)])
    key = np.concatenate([np.zeros(0, np.int64), *(np.arange(n) for n in lengths)])
    request = np.repeat(np.arange(len(lengths)), lengths)
    page = np.asarray(block_tables)[request, key // page_size] if len(key) else key
    exists = (page >= 0) & (page < pages)

    def gathered(x: Array) -> Array:
        if not pages:
            return np.zeros((len(key), *x.shape[2:]), x.dtype)
        rows = x[np.where(exists, page, 0), key % page_size]
        return np.where(exists[:, None, None], rows, rows.dtype.type(0))

    return gathered(k), gathered(v), cu_kv


def join(results: list[Result], heads: int, **places: Array) -> Result:
    """One result of many requests: token fields as already placed, counts stacked."""
    none = np.zeros((0, heads), np.int64)

    def stacked(name: str) -> Array:
        return np.stack([getattr(r, name) for r in results]) if results else none

    return Result(
        **places,
        visited=stacked("visited"),
        skipped=stacked("skipped"),
        ineligible=stacked("ineligible"),
        margin=min((r.margin for r in results), default=np.inf),
        statistics=np.concatenate([np.zeros((0, heads)), *(r.statistics for r in results)]),
    )
