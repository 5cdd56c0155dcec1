"""Inputs for honest figures, exact answers to compare with, and a stopwatch.

The demo and the benchmarks share them.  Inputs are made by one code for NumPy and CuPy: `xp` is the
array module, and small per-head choices (strengths, segments, positions) are drawn on the host, so
that they are the same in both.

    iid          W0   everything normal: comparable with published sweeps, the output means nothing
    structured   W1   sink, locality, topics, heavy hitters, noise: behaves like a trained model
    constructed  W2   a known set of tiles far below any threshold
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ._records import Plan, SkipMode

if TYPE_CHECKING:
    from collections.abc import Callable

Array = NDArray[Any]


class Inputs(NamedTuple):
    """``[batch, seq, heads, head_dim]`` each, of the array module asked for."""

    q: Any
    k: Any
    v: Any


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of one self-attention call."""

    batch: int
    seq: int
    q_heads: int
    kv_heads: int
    head_dim_qk: int = 128
    head_dim_v: int = 128

    def flops(self, causal: bool) -> float:
        """Work of the dense call; a causal one counts half."""
        pairs = self.batch * self.q_heads * self.seq**2 * (0.5 if causal else 1.0)
        return 2.0 * (self.head_dim_qk + self.head_dim_v) * pairs

    def __str__(self) -> str:
        dims = f"{self.head_dim_qk}/{self.head_dim_v}"
        return f"{self.batch}×{self.seq} {self.q_heads}/{self.kv_heads} {dims}"


@dataclass(frozen=True, slots=True)
class Mix:
    """Strengths of what W1 is made of, in natural-log units of the score."""

    sink: tuple[float, float]  # mean and deviation over heads
    locality: float  # an octave's; times U(0.3, 1.7) per head and octave
    topics: float
    noise: float  # deviation of every coordinate of Q and K


LOCAL = Mix(sink=(8.5, 2.5), locality=1.5, topics=1.0, noise=0.55)
SINK_HEAVY = Mix(sink=(14.0, 3.0), locality=0.6, topics=1.5, noise=0.8)

SINK_KEYS = 4
OCTAVES = 14  # periods 2, 4, … 16384 keys
TOPIC_DIMS = 24
SEGMENT_KEYS = 256  # mean length
HITTER_STRENGTH = (3.0, 9.0)
# Coordinates of a head: the sink, a cosine and a sine per octave, topics, heavy hitters.
SINK_AT = 0
LOCALITY_AT = slice(1, 1 + 2 * OCTAVES)
TOPICS_AT = slice(LOCALITY_AT.stop, LOCALITY_AT.stop + TOPIC_DIMS)
HITTERS_AT = TOPICS_AT.stop
STRUCTURED_DIMS = HITTERS_AT + 1

PUSHED_DOWN = 64.0  # how far W2's weak tiles lie below the others


def iid(size: Size, *, xp: Any = np, seed: int = 0, dtype: Any = ml_dtypes.bfloat16) -> Inputs:
    """W0: Q, K, V ~ N(0, 1).

    Parameters
    ----------
    size : Size
    xp : module
        NumPy or CuPy.
    seed : int
    dtype : dtype

    Returns
    -------
    Inputs

    Examples
    --------
    >>> iid(Size(1, 8, 4, 2, 64, 32)).v.shape
    (1, 8, 2, 32)
    """
    rng = xp.random.default_rng(seed)
    shapes = (
        (size.seq, size.q_heads, size.head_dim_qk),
        (size.seq, size.kv_heads, size.head_dim_qk),
        (size.seq, size.kv_heads, size.head_dim_v),
    )
    arrays = [xp.empty((size.batch, *shape), dtype=dtype) for shape in shapes]
    for array in arrays:
        for request in range(size.batch):
            array[request] = normal(xp, rng, array.shape[1:]).astype(dtype)
    return Inputs(*arrays)


def iid_skip_rate(tiles: int, rows: int) -> float:
    """Share of tiles that `rows` voting rows skip on W0 at λ = 1, for `tiles` tiles in sight.

    The j-th tile is skipped when it holds no row's maximum so far: (1 − 1/j) for each row.

    Examples
    --------
    >>> iid_skip_rate(2, 1)
    0.25
    """
    return sum((1.0 - 1.0 / j) ** rows for j in range(1, tiles + 1)) / tiles


def structured(
    size: Size,
    *,
    mix: Mix = LOCAL,
    xp: Any = np,
    seed: int = 0,
    dtype: Any = ml_dtypes.bfloat16,
) -> Inputs:
    """W1: heads built of what trained heads show.

    A head's coordinates are orthogonal groups: an attention sink (the first keys), locality (cosine
    and sine per octave of distance), topics (segments of text that attend to themselves), heavy
    hitters (a few keys that every row likes); noise lies over all of them.  V is its segment's mean
    plus as much noise.

    Parameters
    ----------
    size : Size
        Heads of at least 54 dims.
    mix : Mix
        `LOCAL` or `SINK_HEAVY`.
    xp, seed, dtype
        See `iid`.

    Returns
    -------
    Inputs
    """
    if size.head_dim_qk < STRUCTURED_DIMS:
        raise ValueError(
            f"size has a head_dim_qk of {size.head_dim_qk}; "
            f"a structured head takes at least {STRUCTURED_DIMS}"
        )
    rng, host = xp.random.default_rng(seed), np.random.default_rng((seed, 1))
    group = size.q_heads // size.kv_heads
    shape = (size.batch, size.seq)
    q = xp.empty((*shape, size.q_heads, size.head_dim_qk), dtype=dtype)
    k = xp.empty((*shape, size.kv_heads, size.head_dim_qk), dtype=dtype)
    v = xp.empty((*shape, size.kv_heads, size.head_dim_v), dtype=dtype)
    waves = xp.asarray(waves_of(size.seq))
    for request in range(size.batch):
        segment = xp.asarray(segments_of(size.seq, host))
        for kv_head in range(size.kv_heads):
            topics = host.standard_normal((int(segment[-1]) + 1, TOPIC_DIMS), dtype=np.float32)
            topic = xp.asarray(topics * mix.topics * TOPIC_DIMS**-0.25)[segment]
            for head in range(kv_head * group, (kv_head + 1) * group):
                rows = normal(xp, rng, (size.seq, size.head_dim_qk)) * mix.noise
                add_query_features(rows, waves, topic, mix, host)
                q[request, :, head] = (rows * size.head_dim_qk**0.25).astype(dtype)
            keys = normal(xp, rng, (size.seq, size.head_dim_qk)) * mix.noise
            add_key_features(xp, keys, waves, topic, mix, host)
            k[request, :, kv_head] = (keys * size.head_dim_qk**0.25).astype(dtype)
            mean = host.standard_normal((len(topics), size.head_dim_v), dtype=np.float32)
            values = xp.asarray(mean)[segment] + normal(xp, rng, (size.seq, size.head_dim_v))
            v[request, :, kv_head] = (values * 0.5**0.5).astype(dtype)
    return Inputs(q, k, v)


def normal(xp: Any, rng: Any, shape: tuple[int, ...]) -> Any:
    return rng.standard_normal(shape, dtype=xp.float32)


def waves_of(seq: int) -> Array:
    """Cosine and sine of every position per octave, [seq, 2 * octaves]."""
    period = 2.0 ** np.arange(1, OCTAVES + 1)
    angle = 2.0 * np.pi * np.remainder(np.arange(seq)[:, None], period) / period
    return np.stack([np.cos(angle), np.sin(angle)], axis=2).reshape(seq, -1).astype(np.float32)


def segments_of(seq: int, host: np.random.Generator) -> Array:
    """Number of the segment that each position lies in, [seq]."""
    lengths = np.maximum(1, host.exponential(SEGMENT_KEYS, seq // 16 + 16).astype(np.int64))
    return np.searchsorted(np.cumsum(lengths), np.arange(seq), side="right")


# A strength is a product of q's coordinate and k's.  K carries the square root of its mean, so that
# query heads of one group may differ, and noise weighs the same on both sides.


def add_query_features(
    rows: Any, waves: Any, topic: Any, mix: Mix, host: np.random.Generator
) -> None:
    rows[:, SINK_AT] += max(0.0, host.normal(*mix.sink)) / mix.sink[0] ** 0.5
    octave = mix.locality**0.5 * host.uniform(0.3, 1.7, OCTAVES)
    for i in range(OCTAVES):
        first = LOCALITY_AT.start + 2 * i
        rows[:, first : first + 2] += waves[:, 2 * i : 2 * i + 2] * float(octave[i])
    rows[:, TOPICS_AT] += topic
    rows[:, HITTERS_AT] += (sum(HITTER_STRENGTH) / 2) ** 0.5


def add_key_features(
    xp: Any, keys: Any, waves: Any, topic: Any, mix: Mix, host: np.random.Generator
) -> None:
    seq = len(keys)
    keys[:SINK_KEYS, SINK_AT] += mix.sink[0] ** 0.5
    keys[:, LOCALITY_AT] += waves * mix.locality**0.5
    keys[:, TOPICS_AT] += topic
    count = min(seq, max(4, seq // 2048))
    position = host.choice(seq, count, replace=False)
    strength = np.zeros(seq, np.float32)
    strength[position] = host.uniform(*HITTER_STRENGTH, count)
    keys[:, HITTERS_AT] += xp.asarray(strength) * (sum(HITTER_STRENGTH) / 2) ** -0.5


def constructed(
    size: Size,
    *,
    tile_keys: int,
    fraction: float,
    placement: str = "spread",
    xp: Any = np,
    seed: int = 0,
    dtype: Any = ml_dtypes.bfloat16,
) -> tuple[Inputs, Array]:
    """W2: every threshold between e⁻⁵⁰ and e⁻⁵ skips the same known tiles.

    Scores of strong tiles lie within ±3 of zero, those of weak ones 64 lower.  The first tile is
    strong, as it is never skipped.

    Parameters
    ----------
    size : Size
        `seq` a multiple of `tile_keys`.
    tile_keys : int
        Keys a tile, as the kernel's geometry has them.
    fraction : float
        Weak share of the tiles of a KV head, on average over heads; rounded to whole tiles.
    placement : {"spread", "clustered", "uneven"}
        Evenly over the sequence, in one run in its middle, or evenly with a share that grows from
        head to head.
    xp, seed, dtype
        See `iid`.

    Returns
    -------
    tuple of Inputs and ndarray of bool, ``[kv_heads, tiles]``
        The second says which tiles are weak.
    """
    if size.seq % tile_keys:
        raise ValueError(f"size has a seq of {size.seq}, no multiple of {tile_keys} keys a tile")
    weak = _weak_tiles(size.kv_heads, size.seq // tile_keys, fraction, placement)
    q, k, v = (x.astype(xp.float32) for x in iid(size, xp=xp, seed=seed, dtype=dtype))
    q, k = q * 0.5, k * 0.5  # scores of deviation 1/4
    height = (PUSHED_DOWN * size.head_dim_qk**0.5) ** 0.5
    by_key = np.repeat(weak, tile_keys, axis=1).T  # [key, kv head]
    q[..., 0] = height
    k[..., 0] = xp.asarray(np.where(by_key, -height, 0.0).astype(np.float32))
    return Inputs(q.astype(dtype), k.astype(dtype), v.astype(dtype)), weak


def _weak_tiles(heads: int, tiles: int, fraction: float, placement: str) -> Array:
    """Which tiles of which KV head are weak, [head, tile]; never the first."""
    if not 0 <= fraction <= (tiles - 1) / tiles:
        raise ValueError(
            f"fraction is {fraction}; wanted one from 0 to {tiles - 1}/{tiles}, "
            "as the first tile is never weak"
        )
    weak = np.zeros((heads, tiles), bool)
    total = round(fraction * tiles * heads)
    counts = np.full(heads, total // heads)
    counts[: total % heads] += 1
    if placement == "uneven":
        # Move tiles from the first half of the heads to the second, in pairs: the sum stays.
        for head in range(heads // 2):
            other = heads - 1 - head
            share = 1.0 - 2 * head / max(heads - 1, 1)
            moved = int(share * min(counts[head], tiles - 1 - counts[other]))
            counts[head] -= moved
            counts[other] += moved
    elif placement not in ("spread", "clustered"):
        raise ValueError(f"placement is {placement!r}; wanted one of spread, clustered, uneven")
    for head, count in enumerate(counts):
        if placement == "clustered":
            first = 1 + (tiles - 1 - count) // 2
            chosen = np.arange(first, first + count)
        else:
            chosen = 1 + np.arange(count) * (tiles - 1) // max(count, 1)
        weak[head, chosen] = True
    return weak


@dataclass(frozen=True, slots=True)
class ExactRows:
    """Attention of a few rows in float64, by the NumPy reference: dense, whatever is skipped."""

    places: tuple[tuple[int, int, int, int], ...]  # (request, head, first row, end)
    out: Array  # [place, row, head_dim_v]
    largest_value: Array  # [place]: max ‖v‖ over the keys of that head

    def error(self, out: Any) -> float:
        """‖out − exact‖ / ‖exact‖ over these rows of ``[batch, seq, heads, head_dim_v]``."""
        return float(np.linalg.norm(self._rows(out) - self.out) / np.linalg.norm(self.out))

    def beyond_bound(self, out: Any, dropped: Any) -> float:
        """Largest ‖out − exact‖ / max‖v‖ above twice the row's dropped mass; 0 for none above.

        `dropped` is the mass of every row, ``[batch, seq, heads]``.
        """
        distance = np.linalg.norm(self._rows(out) - self.out, axis=-1) / self.largest_value[:, None]
        return float(np.maximum(distance - 2.0 * self._rows(dropped), 0.0).max())

    def _rows(self, x: Any) -> Array:
        return np.stack(
            [on_host(x[b, first:end, h]).astype(np.float64) for b, h, first, end in self.places]
        )


def exact_rows(
    inputs: Inputs, causal: bool, *, heads: int = 4, blocks: int = 4, rows: int = 8
) -> ExactRows:
    """Work out `blocks` × `rows` rows of `heads` heads, spread evenly, on the host.

    Parameters
    ----------
    inputs : Inputs
        Of NumPy or CuPy.
    causal : bool
    heads, blocks, rows : int
        Sizes of the sample; less where there is less.

    Returns
    -------
    ExactRows
    """
    from .reference import attention

    q, k, v = inputs
    batch, seq, q_heads, _ = q.shape
    rows = min(rows, seq)
    places: list[tuple[int, int, int, int]] = []
    out: list[Array] = []
    largest: list[float] = []
    for i, head in enumerate(spread(q_heads, heads)):
        request = i % batch
        kv_head = head // (q_heads // k.shape[2])
        keys = on_host(k[request, :, kv_head])[:, None].astype(np.float64)
        values = on_host(v[request, :, kv_head])[:, None].astype(np.float64)
        norm = float(np.linalg.norm(values, axis=-1).max())
        for first in spread(seq - rows + 1, blocks):
            end = first + rows
            seen = end if causal else seq
            queries = on_host(q[request, first:end, head])[:, None]
            result = attention(queries, keys[:seen], values[:seen], causal=causal)
            places.append((request, head, first, end))
            out.append(result.out[:, 0])
            largest.append(norm)
    return ExactRows(tuple(places), np.stack(out), np.array(largest))


def spread(length: int, count: int) -> list[int]:
    """At most `count` places from 0 to length − 1, both ends among them."""
    return sorted({int(x) for x in np.linspace(0, length - 1, min(count, length)).round()})


def on_host(x: Any) -> Array:
    """A NumPy array of what may be a CuPy one; by its bits, for dtypes that CuPy only stores."""
    if not hasattr(x, "get"):
        return np.asarray(x)
    bits: Array = x.view(f"u{x.dtype.itemsize}").get()
    return bits.view(x.dtype)


def dropped_mass(lse_skip: Any, lse_dense: Any, *, xp: Any) -> Any:
    """Share of each row's softmax that skipping left out: δ = 1 − exp(lse_skip − lse_dense)."""
    return xp.maximum(-xp.expm1(lse_skip - lse_dense), 0.0)


def plan_of(inputs: Inputs, causal: bool, skip: bool = False) -> Plan:
    """The plan that `cuattn.prefill` makes for this call."""
    from . import _check, _device, _heuristics, _ingest

    q, k, v = (_ingest.view(x, name) for x, name in zip(inputs, "qkv", strict=True))
    mode = SkipMode(source="threshold", unsafe=True) if skip else None
    problem = _check.batched(q, k, v, _check.Options(causal=causal, skip=mode))
    return _heuristics.prefill(problem, _device.describe(q.device))


class Stopwatch:
    """Times of GPU work by events, the L2 cache flushed before each run; `xp` is CuPy."""

    def __init__(self, xp: Any, flush_bytes: int = 256 << 20) -> None:
        self._cuda = xp.cuda
        self._flush = xp.empty(flush_bytes, dtype=xp.uint8)

    def median_ms(
        self, run: Callable[[], object], *, repeats: int = 20, budget_ms: float = 1500.0
    ) -> float:
        """Median milliseconds of `run`; fewer repeats, three at least, when it is slow."""
        run()  # compiles, loads, allocates
        times = self._batch(run, 1)
        affordable = int(budget_ms / max(times[0], 1e-3))
        times += self._batch(run, max(3, min(repeats, affordable)) - 1)
        return median(times)

    def _batch(self, run: Callable[[], object], count: int) -> list[float]:
        pairs = []
        for _ in range(count):
            start, end = self._cuda.Event(), self._cuda.Event()
            # The host queues `run` while the device is still busy with the flush.
            self._flush.data.memset_async(0, self._flush.nbytes)
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        for _, end in pairs:
            end.synchronize()
        return [self._cuda.get_elapsed_time(start, end) for start, end in pairs]
