"""The votes of decode, replayed on one request: who visits which tile, and which tiles go.

A row is (token, query head inside its group), token first.  A block of rows deals its tiles, from
the last one down, round-robin to the warps of all splits.  Every such lane has its own running
maximum and its own account of mass; the block's first and last tiles, the seeds, always stay.  All
judge by the seeds of all, so it is no matter when a lane visits its own.  The rows of a block are
one vote or several.

Masses are kept as logarithms, which no distance between scores can underflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn._records import DecodeGeometry

Array = NDArray[Any]

# The kernel's sums are float32: it aims this far below the bound, so as to stay within it.
MASS_ROOM = 1 - 2.0**-10


@dataclass(frozen=True, slots=True)
class Rule:
    """What lets a tile go: a threshold of each query head, or a bound on the mass dropped."""

    log_threshold: Array  # [head], -inf where nothing may go
    eligible: Array  # [head], whether λ lay in [0, 1)
    max_dropped_mass: float | None = None  # instead of thresholds
    seeds: Array | None = None  # [token, head], what no row's largest score is below


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one request with their mask; the first key is the first one of a tile."""

    scores: Array  # [head, token, key], -inf where the token does not see the key
    begin: Array  # [token], first key seen, counted from the first key here
    end: Array  # [token]
    kv_heads: int


@dataclass(frozen=True, slots=True)
class Votes:
    """The votes of one request."""

    dropped: Array  # [head, token, key] bool
    visited: Array  # [head]
    skipped: Array  # [head]
    margin: float
    statistics: Array  # [vote, head]


def no_votes(kept: Array) -> Votes:
    """What a request [head, token, key] that nobody votes on comes to."""
    heads = len(kept)
    none = np.zeros(heads, np.int64)
    return Votes(np.zeros_like(kept), none, none, np.inf, np.zeros((0, heads)))


@dataclass(frozen=True, slots=True)
class _Tiles:
    """The tiles of a block as lanes visit them for a vote, padded with some that do not exist."""

    largest: Array  # [kv_head, row, visit, lane], of the scores
    log_mass: Array  # the same shape
    seed: Array  # [visit, lane] bool
    exists: Array  # [visit, lane] bool

    @property
    def seed_max(self) -> Array:
        """Largest score in the seeds, [kv_head, row, 1]."""
        return self.largest[..., self.seed].max(axis=-1, keepdims=True)

    @property
    def log_seed_mass(self) -> Array:
        return np.logaddexp.reduce(self.log_mass[..., self.seed], axis=-1, keepdims=True)


@dataclass(frozen=True, slots=True)
class _Ballot:
    """One vote's outcome, by tile as in `_Tiles`."""

    dropped: Array  # [kv_head, visit, lane] bool
    statistics: Array  # [kv_head, row, visit, lane]; inf in seeds
    gaps: Array  # the same shape: how far above what would let the row agree


def load_of(q_len: int, keys: int, group: int, geometry: DecodeGeometry) -> int:
    """A request's part in what all blocks of threads have to do: keys times blocks of rows."""
    return keys * -(-q_len * group // geometry.block_rows)


def replay(seen: Scores, splits: int, rule: Rule, geometry: DecodeGeometry) -> Votes:
    """Hold all votes of a request whose keys are dealt to so many splits."""
    heads, tokens, length = seen.scores.shape
    group = heads // seen.kv_heads
    rows = tokens * group
    scores = seen.scores.reshape(seen.kv_heads, group, tokens, length).transpose(0, 2, 1, 3)
    largest, log_mass = _tile_sums(scores.reshape(seen.kv_heads, rows, length), geometry.block_kv)

    dropped = np.zeros((seen.kv_heads, rows, largest.shape[2]), bool)
    visited, skipped = np.zeros((2, seen.kv_heads, group), np.int64)
    statistics, margin = [np.zeros((0, heads))], np.inf
    for first in range(0, rows, geometry.rows_per_vote):
        voters = np.arange(first, min(first + geometry.rows_per_vote, rows))
        head = voters % group
        span = _tiles_seen(seen, first - first % geometry.block_rows, rows, geometry)
        if span.start >= span.stop:
            continue
        tiles = _dealt(largest[:, voters, span], log_mass[:, voters, span], splits, geometry)
        if rule.max_dropped_mass is None:
            log_threshold = rule.log_threshold.reshape(seen.kv_heads, group)[:, head]
            ballot = _by_threshold(tiles, log_threshold, _known(rule, seen)[:, voters])
        else:
            ballot = _by_mass(tiles, rule.max_dropped_mass)
        gone = _undealt(ballot.dropped, span.stop - span.start)  # [kv_head, tile]
        dropped[:, voters, span] = gone[:, None]
        present = np.unique(head)
        visited[:, present] += gone.shape[1]
        skipped[:, present] += gone.sum(axis=1)[:, None]
        statistics.append(_by_head(ballot.statistics[..., tiles.exists], head, group))
        margin = min(margin, _margin(ballot.gaps[..., tiles.exists & ~tiles.seed]))
    by_key = np.repeat(dropped, geometry.block_kv, axis=2)[..., :length]
    by_token = by_key.reshape(seen.kv_heads, tokens, group, length).transpose(0, 2, 1, 3)
    return Votes(
        dropped=by_token.reshape(heads, tokens, length),
        visited=visited.reshape(heads),
        skipped=skipped.reshape(heads),
        margin=margin,
        statistics=np.concatenate(statistics),
    )


def _known(rule: Rule, seen: Scores) -> Array:
    """What a rule knows of every row's largest score, [kv_head, row]."""
    heads, tokens, _ = seen.scores.shape
    seeds = np.full((tokens, heads), -np.inf) if rule.seeds is None else rule.seeds
    by_head = np.asarray(seeds, np.float64).reshape(tokens, seen.kv_heads, heads // seen.kv_heads)
    return by_head.transpose(1, 0, 2).reshape(seen.kv_heads, -1)


def _tiles_seen(seen: Scores, first: int, rows: int, geometry: DecodeGeometry) -> slice:
    """The tiles that some row sees of the block that begins with row `first`."""
    group = seen.scores.shape[0] // seen.kv_heads
    last = min(first + geometry.block_rows, rows) - 1
    low, high = seen.begin[first // group], seen.end[last // group]
    return slice(low // geometry.block_kv, -(-high // geometry.block_kv) if low < high else 0)


def _tile_sums(scores: Array, block_kv: int) -> tuple[Array, Array]:
    """Largest score and log of the mass of every tile, [kv_head, row, tile]."""
    starts = np.arange(0, scores.shape[2], block_kv)
    if not len(starts):
        return (np.zeros((*scores.shape[:2], 0)),) * 2
    scores = np.where(np.isnan(scores), -np.inf, scores)
    largest = np.maximum.reduceat(scores, starts, axis=2)
    shift = np.where(largest == -np.inf, 0.0, largest)
    by_key = np.repeat(shift, block_kv, axis=2)[..., : scores.shape[2]]
    with np.errstate(divide="ignore"):
        return largest, shift + np.log(np.add.reduceat(np.exp(scores - by_key), starts, axis=2))


def _dealt(largest: Array, log_mass: Array, splits: int, geometry: DecodeGeometry) -> _Tiles:
    """Deal tiles [kv_head, row, tile] to the warps of all splits, from the last one down."""
    count, lanes = largest.shape[2], splits * geometry.warps
    visits = -(-count // lanes)

    def deal(x: Array, absent: Any) -> Array:
        padding = np.full((*x.shape[:-1], visits * lanes - count), absent)
        padded = np.concatenate([x[..., ::-1], padding], axis=-1)
        return padded.reshape(*x.shape[:-1], visits, lanes)

    place = np.arange(count)
    seed = (place == 0) | (place >= count - geometry.last_seeds)
    return _Tiles(
        largest=deal(largest, -np.inf),
        log_mass=deal(log_mass, -np.inf),
        seed=deal(seed, False),
        exists=deal(np.ones(count, bool), False),
    )


def _undealt(x: Array, count: int) -> Array:
    """From [..., visit, lane] back to [..., tile]."""
    return x.reshape(*x.shape[:-2], -1)[..., :count][..., ::-1]


def _by_threshold(tiles: _Tiles, log_threshold: Array, known: Array) -> _Ballot:
    """Drop a tile when every row's largest score is below its reference by more than -ln λ.

    The reference is the largest of the lane's running maximum, the seeds' and what is `known`.
    ln λ is -inf where λ is 0 or ineligible: every row that sees the tile then objects, and every
    head of the block has one that does, since a key that only its last or first token sees lies in
    a seed.
    """
    kv_heads, _, visits, lanes = tiles.largest.shape
    free = tiles.exists & ~tiles.seed
    limit = log_threshold[..., None]  # [kv_head, row, 1]
    running_max = np.broadcast_to(-np.inf, tiles.largest[:, :, 0].shape)
    seed_max = np.maximum(tiles.seed_max, known[..., None])
    dropped = np.zeros((kv_heads, visits, lanes), bool)
    statistics, gaps = (np.full(tiles.largest.shape, np.inf) for _ in range(2))
    for visit in range(visits):
        candidate = tiles.largest[:, :, visit]
        with np.errstate(invalid="ignore"):
            distance = candidate - np.maximum(running_max, seed_max)
            objects = (distance >= limit).any(axis=1)  # NaN, of a row that has seen none, does not
            gap = distance - limit
        dropped[:, visit] = free[visit] & ~objects
        grown = np.maximum(running_max, candidate)
        running_max = np.where(dropped[:, None, visit], running_max, grown)
        statistics[:, :, visit] = np.where(np.isnan(distance), -np.inf, distance)
        gaps[:, :, visit] = np.where(np.isnan(gap), -np.inf, gap)
    statistics[..., tiles.seed] = np.inf
    return _Ballot(dropped, statistics, gaps)


def _by_mass(tiles: _Tiles, bound: float) -> _Ballot:
    """Drop a tile while every row's dropped mass stays within its share of the mass seen.

    A row agrees when the tile has no score above its reference and
        D + mass ≤ ε' (T + mass + share · M),
    T and D the masses that its lane has seen outside seeds and dropped, M that of the seeds.
    """
    kv_heads, _, visits, lanes = tiles.largest.shape
    free = tiles.exists & ~tiles.seed
    running_max = np.broadcast_to(-np.inf, tiles.largest[:, :, 0].shape)
    lost = running_max  # log D
    dropped = np.zeros((kv_heads, visits, lanes), bool)
    statistics = np.full(tiles.largest.shape, np.inf)
    with np.errstate(divide="ignore"):
        log_share = np.log(tiles.exists.sum(axis=0) / tiles.exists.sum())  # [lane]
        log_bound = np.log(bound * MASS_ROOM)
    seen = log_share + tiles.log_seed_mass  # log (T + share · M), [kv_head, row, lane]
    for visit in range(visits):
        candidate = tiles.largest[:, :, visit]
        mass = np.where(free[visit], tiles.log_mass[:, :, visit], -np.inf)
        seen, more_lost = np.logaddexp(seen, mass), np.logaddexp(lost, mass)
        with np.errstate(invalid="ignore"):
            rise = candidate - np.maximum(running_max, tiles.seed_max)
            excess = np.maximum(rise, more_lost - (log_bound + seen))
        excess = np.where(candidate == -np.inf, -np.inf, excess)
        dropped[:, visit] = free[visit] & ~(excess > 0).any(axis=1)
        goes = dropped[:, None, visit]
        running_max = np.where(goes, running_max, np.maximum(running_max, candidate))
        lost = np.where(goes, more_lost, lost)
        statistics[:, :, visit] = excess
    statistics[..., tiles.seed] = np.inf
    return _Ballot(dropped, statistics, statistics)


def _by_head(statistics: Array, head: Array, group: int) -> Array:
    """Largest of each query head's rows: [kv_head, row, tile] to [vote, q head]."""
    kv_heads, _, count = statistics.shape
    votes = np.full((kv_heads, count, kv_heads, group), -np.inf)
    for own in range(kv_heads):
        np.maximum.at(votes[own, :, own].T, head, statistics[own])
    return votes.reshape(kv_heads * count, kv_heads * group)


def _margin(gaps: Array) -> float:
    """Distance from its turn of the closest vote, of gaps [kv_head, row, tile]."""
    votes = np.abs(gaps.max(axis=1))
    return float(votes[np.isfinite(votes)].min(initial=np.inf))
