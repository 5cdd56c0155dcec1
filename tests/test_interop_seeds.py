"""Ranks share what they know of the largest scores: which tiles each skips, to the count.

Ranks are threads, as in `test_interop_distributed`.  The first keys draw all attention and lie on
rank 0, so that the other rank learns of them from rank 0 alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cases import Call, numpy_skip
from conftest import Executor
from decode_cases import DecodeCase
from mla_cases import MlaCase
from skip_checks import SAFE_MARGIN
from test_interop_distributed import PAGE, Array, Ranks, normal, shard

import cuattn
from cuattn._replay import Result
from cuattn.interop.distributed import ContextParallel, visible_keys

RANKS, HEADS = 2, 4
LENGTHS = (2000, 700, 9, 0)
LESS = 0.006  # that a seed may be below the largest score


@dataclass(frozen=True)
class Shared:
    """A call whose keys lie on two ranks, some pages dealt at a time."""

    q_len: int = 1
    page: int = 16
    pages: int = 1
    soft_cap: float = 0.0
    mla: bool = False
    live: bool = False  # scale and thresholds are arrays
    level: float = 0.004

    def __str__(self) -> str:
        words = f"{'mla' if self.mla else 'gqa'}-{self.q_len}tokens-page{self.page}x{self.pages}"
        return words + "-cap" * bool(self.soft_cap) + "-live" * self.live

    @property
    def scale(self) -> float:
        return 0.02 if self.mla else 0.05

    @property
    def options(self) -> dict[str, Any]:
        """Of the call, with NumPy arrays."""
        scale = np.array([self.scale], np.float32) if self.live else self.scale
        own = {} if self.mla else {"soft_cap": self.soft_cap, "layout": "HND"}
        return {"scale": scale, "sinks": np.array([1.0, -1.0, 0.0, 2.0], np.float32), **own}

    @property
    def threshold(self) -> Any:
        """λ, or an array of it by request and head."""
        if not self.live:
            return self.level
        by_request = self.level * np.array([[1.0], [0.5], [1.0], [0.0]], np.float32)
        return np.repeat(by_request, HEADS, axis=1)

    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """q, the whole cache, its tables, and how many keys each token sees."""
        rng = np.random.default_rng(0)
        width, columns = 2048 // self.page, 576 if self.mla else 64
        form = (self.page, columns) if self.mla else (2, 2, self.page, columns)
        whole = rng.standard_normal((4 * width, *form)).astype(np.float16)
        tables = rng.permutation(4 * width).astype(np.int32).reshape(4, width)
        q = rng.standard_normal((4, self.q_len, HEADS, columns)).astype(np.float16)
        q[..., 0] = 30.0 if self.mla else 12.0
        keys = whole if self.mla else whole[:, 0]
        keys[tables[:, 0], ..., :4, 0] = 13.0
        seen = np.array(LENGTHS)[:, None] - self.q_len + 1 + np.arange(self.q_len)
        return q[:, 0] if self.q_len == 1 else q, whole, tables, np.maximum(seen, 0).astype("i4")

    def of(self, rank: int) -> tuple[Array, Array, Array, Array]:
        """Rank `rank`'s arguments."""
        q, whole, tables, seen = self.arrays()
        held = visible_keys(seen, rank, RANKS, self.pages * self.page)
        return q, *shard(whole, tables, rank, RANKS, self.pages), held.reshape(q.shape[:-2])


def rows_of(case: Shared, rank: int) -> Call:
    """The call that a rank makes, every token being a request of its own; no sinks."""
    q, cache, tables, held = case.of(rank)
    options = {**case.options, "sinks": None}
    rows = q.reshape(-1, *q.shape[-2:])
    arrays = (rows, cache, np.repeat(tables, case.q_len, axis=0), held.ravel())
    if case.mla:
        return Call(MlaCase(scale=case.scale), "mla_decode", arrays, options)
    return Call(DecodeCase(scale=case.scale), "decode", arrays, options)


def outermost(call: Call, soft_cap: float) -> Array:
    """Each row's largest score among a rank's first 64 keys or page, and in its last pages."""
    q, cache, tables, held = call.arrays
    scale, page = float(np.asarray(call.options["scale"]).item()), cache.shape[-2]
    largest = np.full(q.shape[:2], -np.inf)
    for row, (table, length) in enumerate(zip(tables, held, strict=True)):
        if length == 0:
            continue
        keys = cache[table][:, None] if call.function == "mla_decode" else cache[table][:, 0]
        keys = keys.swapaxes(0, 1).reshape(keys.shape[1], -1, keys.shape[-1])[:, :length]
        first = max(64 // page, 1)
        last = max(-(-length // page) - first - 1, first)
        keys = np.concatenate([keys[:, : first * page], keys[:, last * page :]], axis=1)
        keys = np.repeat(keys, HEADS // len(keys), axis=0).astype(np.float64)
        scores = scale * np.einsum("hd,hkd->hk", q[row].astype(np.float64), keys)
        scores = soft_cap * np.tanh(scores / soft_cap) if soft_cap else scores
        largest[row] = scores.max(axis=1)
    return largest


def replayed(case: Shared, device: Executor, shared: bool) -> list[Result]:
    """What each rank comes to, with or without what the other knows."""
    calls = [rows_of(case, rank) for rank in range(RANKS)]
    seeds = np.maximum(*(outermost(call, case.soft_cap) for call in calls)) if shared else None
    threshold = case.threshold
    if case.live:
        threshold = np.repeat(threshold, case.q_len, axis=0)
    skip = numpy_skip(threshold=threshold, seeds=seeds)
    return [call.reference(geometry=device.geometry(call), skip_softmax=skip) for call in calls]


CASES = [
    Shared(level=0.003),
    Shared(q_len=2, pages=64, live=True, level=0.005),
    Shared(page=128, soft_cap=30.0),
    Shared(mla=True, page=64),
    Shared(mla=True, page=64, pages=16, q_len=2, live=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_skip_by_what_all_of_them_know(case: Shared, device: Executor) -> None:
    sinks = case.options["sinks"]

    def work(rank: int, group: ContextParallel) -> Any:
        def moved(x: Any) -> Any:
            return device.to_device(x) if isinstance(x, np.ndarray) else x

        stats = cuattn.SkipStats()
        options = {name: moved(x) for name, x in case.options.items()}
        options["skip_softmax"] = cuattn.SkipSoftmax(threshold=moved(case.threshold), stats=stats)
        call = group.mla_decode if case.mla else group.decode
        results = call(*map(moved, case.of(rank)), **options, return_lse=True)
        return *map(device.to_host, results), stats.per_head()

    parts, alone = (replayed(case, device, shared) for shared in (True, False))
    assert min(part.margin for part in parts) > LESS + SAFE_MARGIN
    assert parts[1].skipped.sum() > alone[1].skipped.sum() + 20
    assert parts[0].skipped.sum() == alone[0].skipped.sum() > 0, "rank 0 knows it all by itself"
    lses = np.stack([*(part.lse for part in parts), np.broadcast_to(sinks, parts[0].lse.shape)])
    lses[2, np.isinf(lses[:2]).all(axis=0)] = -np.inf  # a row without keys
    lse = np.logaddexp.reduce(lses)
    with np.errstate(invalid="ignore"):
        weights = np.nan_to_num(np.exp(lses - lse))
    out = sum(w[..., None] * part.out for w, part in zip(weights, parts, strict=False))
    for rank, (own_out, own_lse, seen) in enumerate(Ranks(RANKS).run(work)):
        for name, counts in seen.items():
            np.testing.assert_array_equal(counts, getattr(parts[rank], name), f"{rank}: {name}")
        np.testing.assert_allclose(own_lse.reshape(lse.shape), lse, atol=1e-5)
        np.testing.assert_allclose(own_out.reshape(out.shape), out, rtol=1e-3, atol=3e-3)


class Alone:
    """A communicator of one rank."""

    rank, size = 0, 1
    met = 0

    def all_gather(self, mine: Any, everyone: Any, count: int) -> None:
        self.met += 1
        everyone[...] = mine.reshape(1, -1)


@pytest.mark.parametrize(
    ("skip", "meetings"),
    [
        (None, 1),
        (cuattn.SkipSoftmax(threshold=0.01), 2),
        (cuattn.SkipSoftmax(max_dropped_mass=0.01), 1),
    ],
)
def test_only_a_threshold_costs_an_exchange_more(
    skip: cuattn.SkipSoftmax | None, meetings: int, device: Executor
) -> None:
    place = Alone()
    q, whole, tables, seen = (device.to_device(x) for x in Shared().arrays())
    out = ContextParallel(place).decode(
        q, whole, tables, seen.ravel(), skip_softmax=skip, check=False
    )
    assert place.met == meetings and out.shape == q.shape


def test_nothing_to_decode(device: Executor) -> None:
    """No requests, no tokens of them, and a rank that has no pages of any."""
    cache = normal(8, 2, 2, PAGE, 64)
    skip = cuattn.SkipSoftmax(threshold=0.1)

    def work(rank: int, group: ContextParallel) -> Any:
        results = []
        for q, width, keys in (
            (normal(0, 4, 64), 16, 0),
            (normal(2, 0, 4, 64), 16, 0),
            (normal(2, 4, 64), 4 * (1 - rank), 50 * (1 - rank)),
        ):
            tables, held = np.zeros((len(q), width), np.int32), np.full(q.shape[:-2], keys, "i4")
            arrays = [device.to_device(x) for x in (q, cache, tables, held)]
            results.append(group.decode(*arrays, skip_softmax=skip, return_lse=True))
        return results

    for none, nobody, some in Ranks(2).run(work):
        assert (none[0].shape, none[1].shape) == ((0, 4, 64), (0, 4))
        assert (nobody[0].shape, nobody[1].shape) == ((2, 0, 4, 64), (2, 0, 4))
        assert np.isfinite(device.to_host(some[0])).all()
        assert np.isfinite(device.to_host(some[1])).all()


def test_mistakes_are_refused_before_anything_is_launched() -> None:
    x, lengths = normal(1, 2, 64), np.array([8], np.int32)
    cache, tables, latent = (
        normal(1, 2, 2, PAGE, 64),
        np.zeros((1, 1), np.int32),
        normal(2, PAGE, 576),
    )
    group = ContextParallel(Alone())
    with cuattn.emulator.enabled() as launches:
        seeded = cuattn.SkipSoftmax(threshold=0.1, seeds=np.zeros((1, 2), np.float32))
        with pytest.raises(ValueError, match="skip_softmax has seeds, which ranks find out togeth"):
            group.decode(x, cache, tables, lengths, skip_softmax=seeded)
        with pytest.raises(ValueError, match=r"block_tables has shape \(1,\); wanted \[batch, "):
            group.decode(x, cache, tables[0], lengths)
        skip = cuattn.SkipSoftmax(threshold=0.1)
        for wrong, words in (
            ({"scale": "large"}, "scale is a str; wanted an array"),
            ({"soft_cap": None}, "soft_cap is None; wanted a number"),
            ({"layout": "DNH"}, "layout is 'DNH'; wanted 'HND' or 'NHD'"),
        ):
            with pytest.raises((TypeError, ValueError), match=words):
                group.decode(x, cache, tables, lengths, skip_softmax=skip, **wrong)
        for wrong, words in (
            ({"latent_dim": 500}, "latent_dim is 500; wanted 512, 256 or None"),
            ({"scale": None}, "scale is None; wanted a positive number"),
            ({"kv_cache": latent[..., :504].copy()}, "kv_cache has rows of 504; wanted"),
        ):
            given = {"kv_cache": latent, "scale": 0.1, **wrong}
            with pytest.raises((TypeError, ValueError), match=words):
                group.mla_decode(normal(1, 4, 576), block_tables=tables, seq_lens=lengths, **given)
    assert not launches
