"""Decode and its votes written from the definition, one number at a time.

`both` runs the reference on small requests and checks it against these loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn import reference
from cuattn._records import DecodeGeometry

Array = NDArray[Any]

PAGE = 8


@dataclass(frozen=True)
class Requests:
    """Queries, keys and values [token, head, dim] of each request, and how to ask for them."""

    q: list[Array]
    k: list[Array]
    v: list[Array]

    @classmethod
    def normal(
        cls, lengths: list[tuple[int, int]], q_heads: int = 4, kv_heads: int = 2, seed: int = 0
    ) -> Requests:
        rng = np.random.default_rng(seed)
        draw = rng.standard_normal
        return cls(
            [draw((n, q_heads, 6)) for n, _ in lengths],
            [draw((n, kv_heads, 6)) for _, n in lengths],
            [draw((n, kv_heads, 5)) for _, n in lengths],
        )

    def decode(self, **options: Any) -> reference.Result:
        """Through pages in a scrambled order, NaN wherever no request has a key."""
        needed = [-(-len(k) // PAGE) for k in self.k]
        order = np.random.default_rng(1).permutation(sum(needed) + 2)
        tables = np.full((len(needed), max(needed, default=0) + 1), 999)
        pools = [
            np.full((len(order), PAGE, *parts[0].shape[1:]), np.nan) for parts in (self.k, self.v)
        ]
        for request, parts in enumerate(zip(self.k, self.v, strict=True)):
            first = sum(needed[:request])
            own = order[first : first + needed[request]]
            tables[request, : len(own)] = own
            for pool, part in zip(pools, parts, strict=True):
                key = np.arange(len(part))
                pool[own[key // PAGE], key % PAGE] = part
        return reference.decode(
            np.concatenate(self.q),
            tuple(pools),
            tables,
            np.array([len(k) for k in self.k]),
            cu_seqlens_q=np.cumsum([0, *map(len, self.q)]),
            **{"layout": "NHD", "scale": 1.0, **options},
        )


def splits_by_hand(
    lengths: list[tuple[int, int]], group: int, window_left: int, geometry: DecodeGeometry
) -> list[int]:
    """As many parts as a request has keys beyond what a block of threads has to do on average."""
    keys, loads = [], []
    for q_len, kv_len in lengths:
        first = max(0, kv_len - q_len - window_left) if window_left >= 0 else 0
        keys.append(kv_len - first if q_len else 0)
        loads.append(keys[-1] * math.ceil(q_len * group / geometry.rows_per_vote))
    rule, splits = geometry.splits, []
    for seen, own in zip(keys, loads, strict=True):
        part = math.floor(np.float32(own if rule.alone else sum(loads)) * np.float32(rule.share))
        splits.append(max(1, math.floor(seen / max(part, rule.smallest))))
    return splits


@dataclass(frozen=True)
class _Block:
    """What a block of rows makes of its tiles."""

    best: dict[Any, float]  # largest score by row and tile
    weight: dict[Any, float]  # sum of exponentials
    seeds: set[int]
    tiles: int


@dataclass
class Loops:
    """Decode and its votes written from the definition, one number at a time, for one request."""

    q: Array
    k: Array
    v: Array
    geometry: DecodeGeometry
    splits: int
    window_left: int = -1
    soft_cap: float = 0.0
    sinks: Array | None = None
    thresholds: list[float] | None = None
    unsafe: bool = False
    mass: float | None = None
    seeds: Array | None = None  # [token, head]

    def __post_init__(self) -> None:
        self.q_len, self.heads = self.q.shape[:2]
        self.kv_len, self.kv_heads = self.k.shape[:2]
        self.group = self.heads // self.kv_heads
        self.visited, self.skipped, self.ineligible = ([0] * self.heads for _ in range(3))
        self.gone: set[tuple[int, int, int]] = set()  # token, head, key
        for kv_head in range(self.kv_heads):
            rows = [
                (t, kv_head * self.group + h) for t in range(self.q_len) for h in range(self.group)
            ]
            for first in range(0, len(rows), self.geometry.rows_per_vote):
                self.vote(rows[first : first + self.geometry.rows_per_vote])

    def begin(self, token: int) -> int:
        early = self.kv_len - self.q_len + token - self.window_left
        return max(0, early) if self.window_left >= 0 else 0

    def end(self, token: int) -> int:
        return min(self.kv_len, self.kv_len - self.q_len + token + 1)

    def score(self, token: int, head: int, key: int) -> float:
        pairs = zip(self.q[token, head], self.k[key, head // self.group], strict=True)
        s = sum(float(a * b) for a, b in pairs)
        return self.soft_cap * math.tanh(s / self.soft_cap) if self.soft_cap else s

    def scores(self, row: tuple[int, int], tile: int) -> list[float]:
        """Of the keys of a tile that the row sees."""
        width = self.geometry.block_kv
        keys = range(
            max(tile * width, self.begin(row[0])),
            min((tile + 1) * width, self.end(row[0])),
        )
        return [self.score(*row, key) for key in keys]

    def vote(self, rows: list[tuple[int, int]]) -> None:
        begin, end = self.begin(rows[0][0]), self.end(rows[-1][0])
        if begin >= end or self.kv_len <= 0:
            return
        width = self.geometry.block_kv
        tiles = list(range(begin // width, (end - 1) // width + 1))[::-1]
        seeds = {*tiles[: self.geometry.warps - 1], tiles[-1]}
        lanes = self.geometry.warps * self.splits
        best = {
            (row, tile): max(self.scores(row, tile), default=-math.inf)
            for row in rows
            for tile in tiles
        }
        weight = {
            (row, tile): sum(math.exp(s) for s in self.scores(row, tile))
            for row in rows
            for tile in tiles
        }
        for lane in range(lanes):
            self.visit(rows, tiles[lane::lanes], _Block(best, weight, seeds, len(tiles)))

    def visit(self, rows: list[tuple[int, int]], own: list[int], block: _Block) -> None:
        """One lane's tiles of a block of rows, in their order."""
        running = dict.fromkeys(rows, -math.inf)
        seen, lost = dict.fromkeys(rows, 0.0), dict.fromkeys(rows, 0.0)
        for tile in own:
            agreed = tile not in block.seeds
            for row in rows if tile not in block.seeds else ():
                top, mass = block.best[row, tile], block.weight[row, tile]
                above = max([running[row], *(block.best[row, seed] for seed in block.seeds)])
                known = -math.inf if self.seeds is None else float(self.seeds[row])
                seen[row] += mass
                seeds = sum(block.weight[row, seed] for seed in block.seeds)
                account = seen[row] + len(own) / block.tiles * seeds
                if self.mass is None:
                    agreed &= not self.objects(row[1], top, max(above, known))
                elif top > -math.inf:
                    bound = self.mass * (1 - 2**-10) * account
                    agreed &= top <= above and lost[row] + mass <= bound
            self.count(rows, agreed)
            for row in rows:
                if agreed:
                    lost[row] += block.weight[row, tile]
                    self.gone |= {(*row, key) for key in self.keys(tile)}
                else:
                    running[row] = max(running[row], block.best[row, tile])

    def keys(self, tile: int) -> range:
        return range(tile * self.geometry.block_kv, (tile + 1) * self.geometry.block_kv)

    def count(self, rows: list[tuple[int, int]], skipped: bool) -> None:
        """One vote, at every head that has a row in the block."""
        for head in {head for _, head in rows}:
            self.visited[head] += 1
            self.skipped[head] += skipped
            self.ineligible[head] += not self.eligible(head)

    def eligible(self, head: int) -> bool:
        level = self.thresholds[head] if self.thresholds else 0.0
        return level >= 0 and (level < 1 or self.unsafe)

    def objects(self, head: int, top: float, above: float) -> bool:
        level = self.thresholds[head] if self.thresholds else 0.0
        if not self.eligible(head) or level == 0:
            return True
        if top == -math.inf:
            return False
        return top - above >= math.log(level)

    def rows(self) -> Iterator[tuple[Array, float, float]]:
        """Output, LSE and dropped share of each token and head, in order."""
        for token in range(self.q_len):
            for head in range(self.heads):
                keys = range(self.begin(token), self.end(token))
                weights = {key: math.exp(self.score(token, head, key)) for key in keys}
                sink = math.exp(self.sinks[head]) if self.sinks is not None else 0.0
                kept = {x: w for x, w in weights.items() if (token, head, x) not in self.gone}
                if not kept:
                    yield np.zeros(self.v.shape[2]), -math.inf, 0.0
                    continue
                total, full = sum(kept.values()) + sink, sum(weights.values()) + sink
                out = sum(w * self.v[key, head // self.group] for key, w in kept.items()) / total
                yield np.asarray(out), math.log(total), (full - total) / full


def check(requests: Requests, result: reference.Result, each: list[Loops]) -> None:
    """Compare every row and count with the loops."""
    rows = [row for loops in each for row in loops.rows()]
    outs = np.array([row[0] for row in rows]).reshape(result.out.shape)
    np.testing.assert_allclose(result.out, outs, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(result.lse.ravel(), [row[1] for row in rows], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(result.dropped_mass.ravel(), [row[2] for row in rows], atol=1e-12)
    for name in ("visited", "skipped", "ineligible"):
        wanted = [getattr(loops, name) for loops in each]
        np.testing.assert_array_equal(getattr(result, name), wanted, name)


def both(
    requests: Requests, geometry: DecodeGeometry, skip: Any, options: dict[str, Any]
) -> reference.Result:
    """Run the reference, check it against loops, return it."""
    result = requests.decode(geometry=geometry, skip_softmax=skip, **options)
    each = []
    lengths = [(len(q), len(k)) for q, k in zip(requests.q, requests.k, strict=True)]
    group = requests.q[0].shape[1] // requests.k[0].shape[1]
    splits = splits_by_hand(lengths, group, options.get("window_left", -1), geometry)
    for request, parts in enumerate(zip(requests.q, requests.k, requests.v, strict=True)):
        loops_options: dict[str, Any] = dict(options)
        if skip is not None and skip.max_dropped_mass is not None:
            loops_options["mass"] = skip.max_dropped_mass
        elif skip is not None:
            heads = parts[0].shape[1]
            level: Any = skip.threshold
            if skip.threshold_scale_factor is not None:
                level = skip.threshold_scale_factor / max(len(parts[1]), 1)
            table = np.asarray(level)
            table = table[:, None] if table.ndim == 1 else table
            whole = np.broadcast_to(table, (len(requests.q), heads))
            loops_options |= {"thresholds": list(whole[request]), "unsafe": skip.unsafe}
            if skip.seeds is not None:
                first = sum(q_len for q_len, _ in lengths[:request])
                loops_options["seeds"] = skip.seeds[first : first + len(parts[0])]
        each.append(Loops(*parts, geometry, splits[request], **loops_options))
    check(requests, result, each)
    return result
