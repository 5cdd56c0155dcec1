"""Inputs for decode: few query tokens of each request, over a paged cache.

The same workloads as in `_workloads`, of which decode wants all keys but only the last queries.  A
cache may take most of a GPU's memory: it is filled in place, a few pages at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ._records import Plan, SkipMode
from ._workloads import (
    LOCAL,
    STRUCTURED_DIMS,
    TOPIC_DIMS,
    ExactRows,
    Mix,
    add_key_features,
    add_query_features,
    normal,
    on_host,
    segments_of,
    spread,
    waves_of,
)

Array = NDArray[Any]

AT_ONCE = 1 << 27  # random numbers made at a time


class PagedInputs(NamedTuple):
    """What `cuattn.decode` takes first: q, kv_cache (HND), block_tables, seq_lens."""

    q: Any
    cache: Any
    tables: Any
    lengths: Any


@dataclass(frozen=True, slots=True)
class PagedSize:
    """Sizes of one decode call."""

    lengths: tuple[int, ...]  # of the requests in the cache
    q_heads: int
    kv_heads: int
    page: int = 64
    q_len: int = 1
    head_dim: int = 128

    @property
    def batch(self) -> int:
        """Number of requests."""
        return len(self.lengths)

    @property
    def pages(self) -> tuple[int, ...]:
        """Pages of each request."""
        return tuple(-(-length // self.page) for length in self.lengths)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that a dense call reads."""
        return sum(self.lengths) * self.kv_heads * 2 * self.head_dim * 2

    @property
    def bytes(self) -> int:
        """Bytes that a dense call must move: keys, values, queries and output, each once."""
        return self.cache_bytes + 2 * self.batch * self.q_len * self.q_heads * self.head_dim * 2

    def __str__(self) -> str:
        shortest, longest = min(self.lengths), max(self.lengths)
        keys = f"{longest}" if shortest == longest else f"{shortest}…{longest}"
        tokens = "" if self.q_len == 1 else f"{self.q_len} tokens, "
        return f"{self.batch}×{keys} {self.q_heads}/{self.kv_heads} {tokens}page {self.page}"


def iid_paged(
    size: PagedSize, *, xp: Any = np, seed: int = 0, dtype: Any = ml_dtypes.bfloat16
) -> PagedInputs:
    """W0: everything normal, pages in random order.

    Parameters
    ----------
    size : PagedSize
    xp : module
        NumPy or CuPy.
    seed : int
    dtype : dtype

    Returns
    -------
    PagedInputs

    Examples
    --------
    >>> iid_paged(PagedSize((100, 20), 4, 2)).cache.shape
    (3, 2, 2, 64, 128)
    """
    rng = xp.random.default_rng(seed)
    inputs = _empty(size, xp, seed, dtype)
    inputs.q[...] = normal(xp, rng, inputs.q.shape).astype(dtype)
    fill_normal(inputs.cache, rng, xp)
    return inputs


def fill_normal(cache: Any, rng: Any, xp: Any) -> None:
    """Fill a cache with normal numbers, a few pages at a time."""
    step = max(AT_ONCE // max(cache[:1].size, 1), 1)
    for first in range(0, len(cache), step):
        part = cache[first : first + step]
        part[...] = normal(xp, rng, part.shape).astype(cache.dtype)


def structured_paged(
    size: PagedSize,
    *,
    mix: Mix = LOCAL,
    xp: Any = np,
    seed: int = 0,
    dtype: Any = ml_dtypes.bfloat16,
) -> PagedInputs:
    """W1: heads built of what trained heads show, see `_workloads.structured`; its last queries.

    Parameters
    ----------
    size : PagedSize
        Heads of at least 54 dims.
    mix : Mix
        `LOCAL` or `SINK_HEAVY`.
    xp, seed, dtype
        See `iid_paged`.

    Returns
    -------
    PagedInputs
    """
    if size.head_dim < STRUCTURED_DIMS:
        raise ValueError(
            f"size has a head_dim of {size.head_dim}; "
            f"a structured head takes at least {STRUCTURED_DIMS}"
        )
    rng, host = xp.random.default_rng(seed), np.random.default_rng((seed, 1))
    inputs = _empty(size, xp, seed, dtype)
    q = inputs.q.reshape(size.batch, size.q_len, size.q_heads, size.head_dim)
    group, grown = size.q_heads // size.kv_heads, size.head_dim**0.25
    waves = xp.asarray(waves_of(max(size.lengths)))
    for request, length in enumerate(size.lengths):
        segment = xp.asarray(segments_of(length, host))
        table = inputs.tables[request, : size.pages[request]]
        new = slice(length - size.q_len, length)
        for kv_head in range(size.kv_heads):
            topics = host.standard_normal((int(segment[-1]) + 1, TOPIC_DIMS), dtype=np.float32)
            topic = xp.asarray(topics * mix.topics * TOPIC_DIMS**-0.25)[segment]
            for head in range(kv_head * group, (kv_head + 1) * group):
                rows = normal(xp, rng, (size.q_len, size.head_dim)) * mix.noise
                add_query_features(rows, waves[new], topic[new], mix, host)
                q[request, :, head] = (rows * grown).astype(dtype)
            keys = normal(xp, rng, (length, size.head_dim)) * mix.noise
            add_key_features(xp, keys, waves[:length], topic, mix, host)
            _write(xp, inputs.cache[:, 0, kv_head], table, keys * grown)
            mean = host.standard_normal((len(topics), size.head_dim), dtype=np.float32)
            values = xp.asarray(mean)[segment] + normal(xp, rng, (length, size.head_dim))
            _write(xp, inputs.cache[:, 1, kv_head], table, values * 0.5**0.5)
    return inputs


def _empty(size: PagedSize, xp: Any, seed: int, dtype: Any) -> PagedInputs:
    """Lengths, and tables that name every page of the cache once; all else is yet to be filled."""
    total = sum(size.pages)
    order = np.random.default_rng((seed, 2)).permutation(total).astype(np.int32)
    tables = np.full((size.batch, max(size.pages)), -1, np.int32)
    first = 0
    for request, count in enumerate(size.pages):
        tables[request, :count] = order[first : first + count]
        first += count
    tokens = (size.batch,) if size.q_len == 1 else (size.batch, size.q_len)
    return PagedInputs(
        xp.empty((*tokens, size.q_heads, size.head_dim), dtype=dtype),
        xp.empty((total, 2, size.kv_heads, size.page, size.head_dim), dtype=dtype),
        xp.asarray(tables),
        xp.asarray(np.array(size.lengths, np.int32)),
    )


def _write(xp: Any, pages: Any, table: Any, rows: Any) -> None:
    """Put rows of one head, [key, dim], where its table says; zeros behind the last."""
    page, dim = pages.shape[1:]
    padded = xp.zeros((len(table) * page, dim), dtype=pages.dtype)
    padded[: len(rows)] = rows.astype(pages.dtype)
    # By their bits: CuPy only stores bfloat16.
    pages.view(xp.uint16)[table] = padded.view(xp.uint16).reshape(-1, page, dim)


def rows_of(inputs: PagedInputs, part: int, request: int, kv_head: int, xp: Any = np) -> Any:
    """Keys (`part` 0) or values (1) of one head of a request, ``[key, head_dim]``."""
    _, cache, tables, lengths = inputs
    length, page = int(lengths[request]), cache.shape[3]
    table = tables[request, : -(-length // page)]
    found = cache[:, part, kv_head].view(xp.uint16)[table].reshape(-1, cache.shape[4])
    return found[:length].view(cache.dtype)


def by_token(inputs: PagedInputs, x: Any) -> Any:
    """Something of q's shape, or of q's without head_dim, with an axis of tokens."""
    return x[:, None] if inputs.q.ndim == 3 else x


def exact_tokens(
    inputs: PagedInputs, *, xp: Any = np, requests: int = 2, heads: int = 2
) -> ExactRows:
    """Work out all tokens of `heads` heads of `requests` requests, spread evenly, on the host.

    Returns
    -------
    ExactRows
        Of results as `by_token` gives them.
    """
    from .reference import attention

    q = by_token(inputs, inputs.q)
    batch, q_len, q_heads, _ = q.shape
    group = q_heads // inputs.cache.shape[2]
    places: list[tuple[int, int, int, int]] = []
    out: list[Array] = []
    largest: list[float] = []
    for request in spread(batch, requests):
        for head in spread(q_heads, heads):
            keys, values = (
                on_host(rows_of(inputs, part, request, head // group, xp)).astype(np.float64)
                for part in (0, 1)
            )
            queries = on_host(q[request, :, head])[:, None]
            result = attention(queries, keys[:, None], values[:, None], causal=True)
            places.append((request, head, 0, q_len))
            out.append(result.out[:, 0])
            largest.append(float(np.linalg.norm(values, axis=-1).max()))
    return ExactRows(tuple(places), np.stack(out), np.array(largest))


def decode_plan_of(inputs: PagedInputs, mode: SkipMode | None = None) -> Plan:
    """The plan that `cuattn.decode` makes for this call."""
    from . import _check, _device, _heuristics, _ingest

    q, cache, tables, lengths = (
        _ingest.view(x, name) for x, name in zip(inputs, PagedInputs._fields, strict=True)
    )
    k, v = _check.split_cache(cache)
    options = _check.Options(causal=True, skip=mode)
    problem = _check.decode(q, k, v, tables, lengths, None, "HND", options)
    return _heuristics.decode(problem, _device.describe(q.device))


@dataclass(frozen=True, slots=True)
class TileSums:
    """Per row and tile of keys the largest score and the weight, ``[vote, row, tile]``.

    A vote is a kv head of a request; its rows are the query heads of the group.
    """

    maximum: Array
    mass: Array  # share of the row's softmax

    @classmethod
    def of(cls, inputs: PagedInputs, block_kv: int, *, xp: Any = np) -> TileSums:
        """Work them out in float32; one token and the same length for every request."""
        pieces = list(_tile_sums(inputs, block_kv, xp))
        shape = (-1, inputs.q.shape[1] // inputs.cache.shape[2], pieces[0][0].size)
        maximum, mass = (np.stack(part).reshape(shape) for part in zip(*pieces, strict=True))
        return cls(maximum, mass)

    def skip_alone(self, thresholds: Array, splits: int) -> tuple[Array, Array]:
        """Skip by a running maximum of each split's own, as published for Hopper.

        Splits are contiguous and visited from their first tile upwards; the first is kept.

        Returns
        -------
        tuple of ndarray
            Skip rate ``[threshold]`` and dropped mass ``[threshold, vote, row]``.
        """
        votes, rows, tiles = self.maximum.shape
        length = -(-tiles // splits)
        padding = ((0, 0), (0, 0), (0, splits * length - tiles))
        cut = (votes, rows, splits, length)
        maximum = np.pad(self.maximum, padding, constant_values=-np.inf).reshape(cut)
        mass = np.pad(self.mass, padding).reshape(cut)
        exists = np.pad(np.ones(tiles, bool), padding[2]).reshape(splits, length)
        with np.errstate(divide="ignore"):
            limit = np.log(np.asarray(thresholds, np.float32))[:, None, None, None]
        running = np.full((len(limit), votes, rows, splits), -np.inf, np.float32)
        dropped, skipped = np.zeros((len(limit), votes, rows)), np.zeros(len(limit))
        for step in range(length):
            here = maximum[..., step]
            with np.errstate(invalid="ignore"):
                objects = here - running >= limit  # [threshold, vote, row, split]
            skip = ~objects.any(axis=2, keepdims=True) & exists[:, step]
            running = np.where(skip, running, np.maximum(running, here))
            dropped += (mass[..., step] * skip).sum(axis=3)
            skipped += skip.sum(axis=(1, 2, 3))
        return skipped / (votes * tiles), dropped


def _tile_sums(inputs: PagedInputs, block_kv: int, xp: Any) -> Iterator[tuple[Array, Array]]:
    """Maximum and mass of every tile, for one query head after the other."""
    q, cache, _, lengths = inputs
    batch, q_heads, head_dim = q.shape
    kv_heads = cache.shape[2]
    group = q_heads // kv_heads
    for request in range(batch):
        tiles = -(-int(lengths[request]) // block_kv)
        for head in range(q_heads):
            if head % group == 0:
                keys = rows_of(inputs, 0, request, head // group, xp).astype(xp.float32)
            query = q[request, head].astype(xp.float32) * head_dim**-0.5
            scores = xp.full(tiles * block_kv, -xp.inf, dtype=xp.float32)
            scores[: len(keys)] = (keys * query).sum(axis=1)  # needs no cuBLAS
            scores = scores.reshape(tiles, block_kv)
            maximum = scores.max(axis=1)
            mass = xp.exp(scores - maximum.max()).sum(axis=1)
            yield on_host(maximum), on_host(mass / mass.sum())
