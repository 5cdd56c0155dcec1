"""Prefill written from the definition, one number at a time, for tests of the reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn._records import Geometry
from cuattn._replay import CERTIFICATE_MARGIN

Array = NDArray[Any]

SMALL = Geometry(block_q=8, block_kv=4, rows_per_vote=2)


def loops(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window_left: int = -1,
    scale: float = 1.0,
    out_scale: float = 1.0,
    soft_cap: float = 0.0,
    sinks: Array | None = None,
    skip: float = 0.0,
    geometry: Geometry = SMALL,
) -> dict[str, Any]:
    """Attention and votes written from the definition, one number at a time."""
    q_len, heads, _ = q.shape
    kv_len, kv_heads, head_dim_v = v.shape
    out = np.zeros((q_len, heads, head_dim_v))
    lse = np.full((q_len, heads), -math.inf)
    mass, certificate = np.zeros((2, q_len, heads))
    visited, skipped = [0] * heads, [0] * heads

    def sees(row: int, key: int) -> bool:
        position = row + kv_len - q_len
        late = causal and key > position
        early = window_left >= 0 and key < position - window_left
        return not late and not early

    for head in range(heads):
        score: dict[tuple[int, int], float] = {}
        for row in range(q_len):
            for key in range(kv_len):
                if sees(row, key):
                    s = scale * sum(
                        float(a * b)
                        for a, b in zip(q[row, head], k[key, head * kv_heads // heads], strict=True)
                    )
                    score[row, key] = soft_cap * math.tanh(s / soft_cap) if soft_cap else s
        kept: set[tuple[int, int]] = set()
        for top in range(0, q_len, geometry.block_q):
            rows = range(top, min(top + geometry.block_q, q_len))
            tiles = sorted({key // geometry.block_kv for row, key in score if row in rows})
            running = dict.fromkeys(rows, -math.inf)
            for tile in [*tiles[:1], *reversed(tiles[1:])]:
                keys = range(tile * geometry.block_kv, (tile + 1) * geometry.block_kv)
                for start in range(top, rows.stop, geometry.rows_per_vote):
                    group = range(start, min(start + geometry.rows_per_vote, rows.stop))
                    best = {
                        row: max(score[row, key] for key in keys if (row, key) in score)
                        for row in group
                        if any((row, key) in score for key in keys)
                    }
                    if not best:
                        continue
                    visited[head] += 1
                    if skip > 0 and all(best[row] - running[row] < math.log(skip) for row in best):
                        skipped[head] += 1
                        continue
                    for row, value in best.items():
                        running[row] = max(running[row], value)
                        kept |= {(row, key) for key in keys if (row, key) in score}
        for row in range(q_len):
            everything = {key: math.exp(score[row, key]) for key in range(kv_len) if sees(row, key)}
            if not everything:
                continue
            sink = math.exp(sinks[head]) if sinks is not None else 0.0
            weights = {key: w for key, w in everything.items() if (row, key) in kept}
            total = sum(weights.values()) + sink
            lse[row, head] = math.log(total)
            for key, weight in weights.items():
                out[row, head] += out_scale * weight / total * v[key, head * kv_heads // heads]
            full = sum(everything.values()) + sink
            mass[row, head] = (sum(everything.values()) - sum(weights.values())) / full
            gone: dict[int, list[float]] = {}
            for key in everything.keys() - weights.keys():
                gone.setdefault(key // geometry.block_kv, []).append(everything[key])
            most = sum(len(tile) * max(tile) for tile in gone.values())
            certificate[row, head] = min(CERTIFICATE_MARGIN * most / (most + total), 1)
    counts = {"visited": visited, "skipped": skipped}
    return {"out": out, "lse": lse, "mass": mass, "certificate": certificate, **counts}
