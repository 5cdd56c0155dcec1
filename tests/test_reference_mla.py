"""The reference of MLA decode: against loops over single numbers, decode, and a whole layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import numpy_skip
from numpy.typing import NDArray

from cuattn import reference
from cuattn._records import MlaGeometry, SplitRule

Array = NDArray[Any]

PAGE = 8
LATENT, ROPE, HEADS = 16, 8, 3
SCALE = 0.3
LENGTHS = [(1, 40), (3, 61), (1, 0), (0, 9), (5, 3), (1, 1), (2, 33)]  # tokens, keys


@dataclass
class Requests:
    """Queries [token, head, d_qk] and rows [key, d_qk] of each request, in pages out of order."""

    q: list[Array]
    rows: list[Array]
    cache: Array = field(init=False)
    tables: Array = field(init=False)

    def __post_init__(self) -> None:
        needed = [-(-len(rows) // PAGE) for rows in self.rows]
        order = np.random.default_rng(1).permutation(sum(needed) + 2)
        self.tables = np.full((len(needed), max(needed) + 1), 999)
        dim, dtype = self.rows[0].shape[1], self.rows[0].dtype
        self.cache = np.full((len(order), PAGE, dim), np.nan, dtype)  # where no request has a key
        for request, rows in enumerate(self.rows):
            first = sum(needed[:request])
            self.tables[request, : needed[request]] = order[first : first + needed[request]]
            place = self.places(request)
            self.cache[place // PAGE, place % PAGE] = rows

    @classmethod
    def normal(cls, lengths: list[tuple[int, int]], dtype: Any = np.float64) -> Requests:
        draw = np.random.default_rng(0).standard_normal
        return cls(
            [draw((n, HEADS, LATENT + ROPE)).astype(dtype) for n, _ in lengths],
            [draw((n, LATENT + ROPE)).astype(dtype) for _, n in lengths],
        )

    def places(self, request: int) -> Array:
        """Positions of a request's keys in the cache."""
        key = np.arange(len(self.rows[request]))
        return np.asarray(self.tables[request, key // PAGE] * PAGE + key % PAGE)

    @property
    def lengths(self) -> Array:
        return np.array([len(rows) for rows in self.rows])

    @property
    def ends(self) -> Array:
        return np.cumsum([0, *map(len, self.q)])

    def decode(self, **options: Any) -> reference.Result:
        given = {"cu_seqlens_q": self.ends, "scale": SCALE, "latent_dim": LATENT, **options}
        cache = given.pop("kv_cache", self.cache)
        return reference.mla_decode(
            np.concatenate(self.q), cache, self.tables, self.lengths, **given
        )

    def all_indices(self) -> Array:
        """Sparse indices that name every key, in order."""
        shape = (len(self.q), max(map(len, self.q)), self.lengths.max())
        indices = np.full(shape, -1, np.int32)
        for request in range(len(self.q)):
            place = self.places(request)
            indices[request, :, : len(place)] = place
        return indices


def loops(
    q: Array, keys: list[Array], sink: float | None = None, scale: float = SCALE
) -> tuple[list[float], float]:
    """Output and LSE of one token and head."""
    scores = [scale * sum(float(x) * float(y) for x, y in zip(q, key, strict=True)) for key in keys]
    if not scores:
        return [0.0] * LATENT, -math.inf
    total = sum(map(math.exp, scores)) + (0.0 if sink is None else math.exp(sink))
    weights = [math.exp(score) / total for score in scores]
    out = [
        sum(weight * float(key[column]) for weight, key in zip(weights, keys, strict=True))
        for column in range(LATENT)
    ]
    return out, math.log(total)


def same(result: reference.Result, other: reference.Result) -> None:
    np.testing.assert_allclose(result.out, other.out, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(result.lse, other.lse, rtol=1e-12, atol=1e-13)


SINKS = np.array([0.5, -1.0, 2.0])


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_agrees_with_loops(sinks: Array | None, sparse: bool) -> None:
    requests = Requests.normal(LENGTHS)
    slots = requests.cache.reshape(-1, LATENT + ROPE)
    rng = np.random.default_rng(2)
    used = np.concatenate([requests.places(request) for request in range(len(LENGTHS))])
    indices = rng.choice([*used, -1, -(2**31), len(slots), 2**31 - 1], (len(LENGTHS), 5, 20))
    result = requests.decode(
        sinks=sinks, out_scale=2.0, sparse_indices=indices.astype(np.int32) if sparse else None
    )
    row = 0
    for request, (q, rows) in enumerate(zip(requests.q, requests.rows, strict=True)):
        for token in range(len(q)):
            seen = max(len(rows) - len(q) + token + 1, 0)
            keys = list(rows[:seen])
            if sparse:
                first = indices[request, token, :seen]
                keys = [slots[place] for place in first if 0 <= place < len(slots)]
            for head in range(HEADS):
                out, lse = loops(q[token, head], keys, None if sinks is None else sinks[head])
                np.testing.assert_allclose(result.out[row, head], 2 * np.array(out), atol=1e-12)
                np.testing.assert_allclose(result.lse[row, head], lse, rtol=1e-12)
            row += 1
    assert row == len(result.out)


def test_is_decode_with_keys_and_values_apart() -> None:
    requests = Requests.normal(LENGTHS)
    pair = (requests.cache[:, :, None], requests.cache[:, :, None, :LATENT].copy())
    q = np.concatenate(requests.q)
    apart = reference.decode(
        *(q, pair, requests.tables, requests.lengths),
        cu_seqlens_q=requests.ends,
        layout="NHD",
        scale=SCALE,
        sinks=SINKS,
    )
    same(requests.decode(sinks=SINKS), apart)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("q_len", [0, 1, 3])
def test_forms_of_q_and_of_the_cache(q_len: int, sparse: bool) -> None:
    requests = Requests.normal([(q_len, 20), (q_len, 9), (q_len, 2)])
    indices = requests.all_indices()[..., :7] if sparse else None
    ragged = requests.decode(sparse_indices=indices)
    q = np.stack(requests.q)
    forms = [q, q[:, 0]] if q_len == 1 else [q]
    for form in forms:
        for cache in (requests.cache, requests.cache[:, None], requests.cache[:, :, None]):
            result = reference.mla_decode(
                *(form, cache, requests.tables, requests.lengths[:, None]),
                scale=SCALE,
                sparse_indices=indices,
                latent_dim=LATENT,
            )
            assert result.out.shape == (*form.shape[:-1], LATENT)
            assert result.lse.shape == result.dropped_mass.shape == form.shape[:-1]
            assert result.visited.shape == result.skipped.shape == (3, HEADS)
            np.testing.assert_array_equal(result.out.ravel(), ragged.out.ravel())
            np.testing.assert_array_equal(result.lse.ravel(), ragged.lse.ravel())


def test_only_the_first_columns_are_values() -> None:
    requests = Requests.normal([(1, 30)])
    whole = requests.decode(latent_dim=LATENT + ROPE)
    np.testing.assert_allclose(whole.out[..., :LATENT], requests.decode().out, rtol=1e-12)


# --- sparse --------------------------------------------------------------------------------------


def test_all_indices_are_dense_attention() -> None:
    requests = Requests.normal(LENGTHS)
    same(requests.decode(sparse_indices=requests.all_indices()), requests.decode())


def test_the_order_of_all_indices_does_not_matter() -> None:
    requests = Requests.normal([(1, 40), (1, 33)])
    indices = requests.all_indices()
    for request, length in enumerate(requests.lengths):
        indices[request, 0, :length] = np.random.default_rng(3).permutation(
            indices[request, 0, :length]
        )
    same(requests.decode(sparse_indices=indices), requests.decode())


def test_few_indices_are_a_cut_of_the_cache() -> None:
    """The first ten keys by index, or by length."""
    requests = Requests.normal([(1, 40)])
    short = Requests([requests.q[0]], [requests.rows[0][:10]])
    same(requests.decode(sparse_indices=requests.all_indices()[..., :10]), short.decode())


def test_an_index_that_is_there_twice_counts_twice() -> None:
    requests = Requests.normal([(1, 40)])
    indices = np.full((1, 1, 4), requests.places(0)[5])
    result = requests.decode(sparse_indices=indices)
    score = SCALE * requests.q[0][0] @ requests.rows[0][5]
    np.testing.assert_allclose(result.lse[0], score + math.log(4))
    np.testing.assert_allclose(result.out[0], np.tile(requests.rows[0][5, :LATENT], (HEADS, 1)))


@pytest.mark.parametrize("top_k", [0, 4])
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
def test_rows_without_a_key(top_k: int, sinks: Array | None) -> None:
    requests = Requests.normal([(1, 40), (5, 3), (1, 0)])
    indices = np.full((3, 5, top_k), -1)
    for result, rows in (
        (requests.decode(sparse_indices=indices, sinks=sinks), slice(None)),
        (requests.decode(sinks=sinks), [1, 2, 6]),
    ):
        assert (result.out[rows] == 0).all() and (result.lse[rows] == -np.inf).all()


# Three splits of the request of 61 keys, at most two of the others; two votes to a block.
GEOMETRY = MlaGeometry(2, 4, 1, SplitRule(1 / 60, 20, True), votes=2)


@pytest.mark.parametrize(
    "rule",
    [{"threshold": 0.1}, {"threshold_scale_factor": 4.0}, {"max_dropped_mass": 0.3}],
    ids=str,
)
def test_lists_of_all_keys_skip_what_tables_do(rule: dict[str, float]) -> None:
    """One token each, so that no request's tokens are a block together."""
    requests = Requests.normal([(1, n) for n in (40, 61, 0, 9, 33)])
    replay = {"skip_softmax": numpy_skip(**rule), "geometry": GEOMETRY}
    dense = requests.decode(**replay)
    sparse = requests.decode(sparse_indices=requests.all_indices()[:, 0], **replay)
    same(sparse, dense)
    for name in ("visited", "skipped", "ineligible"):
        np.testing.assert_array_equal(getattr(sparse, name), getattr(dense, name))
    assert 0 < dense.skipped.sum() < dense.visited.sum()
    np.testing.assert_allclose(sparse.dropped_mass, dense.dropped_mass, rtol=1e-12)


def test_a_list_is_judged_by_the_length_of_its_request() -> None:
    """Counts of a request are those of its tokens; places that hold no key still are places."""
    requests = Requests.normal([(2, 61), (3, 50)])
    indices = requests.all_indices()[..., :32]
    indices[:, :, 8:12] = -1
    options = {"sparse_indices": np.concatenate([indices[0, :2], indices[1]]), "geometry": GEOMETRY}
    by_factor = requests.decode(skip_softmax=numpy_skip(threshold_scale_factor=6.1), **options)
    by_request = numpy_skip(threshold=np.array([6.1 / 61, 6.1 / 50]))
    by_threshold = requests.decode(skip_softmax=by_request, **options)
    np.testing.assert_array_equal(by_factor.skipped, by_threshold.skipped)
    np.testing.assert_array_equal(by_factor.visited, [[2 * 8] * HEADS, [3 * 8] * HEADS])
    assert (by_factor.skipped > 0).all() and (by_factor.skipped < by_factor.visited).all()


def test_votes_of_a_block_are_held_apart_and_dealt_together() -> None:
    """The rows of a block decide the splits and the tiles, those of a vote what goes."""
    requests = Requests.normal([(4, 61), (1, 40)])
    skip = numpy_skip(threshold=0.2)
    four = replace(GEOMETRY, splits=SplitRule(1 / 200, 8, False))
    two = replace(four, votes=1, splits=replace(four.splits, share=four.splits.share / 2))
    apart, usual = (
        requests.decode(skip_softmax=skip, geometry=geometry) for geometry in (four, two)
    )
    assert 0 < apart.skipped.sum() < apart.visited.sum()
    np.testing.assert_array_equal(apart.visited, usual.visited)
    np.testing.assert_array_equal(apart.skipped, usual.skipped)
    one = replace(four, rows_per_vote=4, votes=1)
    together = requests.decode(skip_softmax=skip, geometry=one)
    assert together.skipped.sum() / together.visited.sum() < (
        apart.skipped.sum() / apart.visited.sum()
    )


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_rows_of_no_request_are_nan(sparse: bool) -> None:
    requests = Requests.normal([(4, 40)])
    indices = requests.all_indices()[:, :2] if sparse else None
    result = requests.decode(cu_seqlens_q=np.array([1, 3]), sparse_indices=indices)
    assert np.isnan(result.lse[[0, 3]]).all() and np.isfinite(result.lse[1:3]).all()
    assert np.isnan(result.out[[0, 3]]).all() and np.isfinite(result.out[1:3]).all()


# --- a layer -------------------------------------------------------------------------------------


def rotated(x: Array, position: Array) -> Array:
    """Rotary embedding of [token, …, dim]: pairs of columns turned by the position."""
    half = x.shape[-1] // 2
    angle = position[:, None] * 100.0 ** (-np.arange(half) / half)
    angle = angle.reshape(len(x), *(1,) * (x.ndim - 2), half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("q_len", [1, 4])
def test_absorbed_is_the_layer_as_published(q_len: int, sparse: bool) -> None:
    """Keys and values projected up and attended per head, or the projections moved to q and out."""
    hidden, heads, nope, rope, latent, d_v, tokens = 40, 4, 12, 6, 20, 10, 45
    rng = np.random.default_rng(4)

    def weight(*shape: int) -> Array:
        return rng.standard_normal(shape) / math.sqrt(shape[-1])

    x, position = rng.standard_normal((tokens, hidden)), np.arange(tokens)
    queries = np.einsum("td,hcd->thc", x, weight(heads, nope + rope, hidden))
    q_nope, q_pe = queries[..., :nope], rotated(queries[..., nope:], position)
    c_kv = x @ weight(latent, hidden).T
    k_pe = rotated(x @ weight(rope, hidden).T, position)
    up_k, up_v = weight(heads, nope, latent), weight(heads, d_v, latent)
    scale = (nope + rope) ** -0.5

    shared = np.broadcast_to(k_pe[:, None], (tokens, heads, rope))
    q = np.concatenate([q_nope, q_pe], axis=-1)
    k = np.concatenate([np.einsum("tl,hnl->thn", c_kv, up_k), shared], axis=-1)
    v = np.einsum("tl,hvl->thv", c_kv, up_v)
    published = reference.attention(q[-q_len:], k, v, causal=True, scale=scale)

    absorbed_q = np.concatenate([np.einsum("thn,hnl->thl", q_nope, up_k), q_pe], axis=-1)
    requests = Requests([absorbed_q[-q_len:]], [np.concatenate([c_kv, k_pe], axis=-1)])
    indices = requests.all_indices() if sparse else None
    result = requests.decode(scale=scale, latent_dim=latent, sparse_indices=indices)
    out = np.einsum("thl,hvl->thv", result.out, up_v)
    np.testing.assert_allclose(out, published.out, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(result.lse, published.lse, rtol=1e-12)


# --- plain arithmetic, errors --------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_plain_arithmetic_is_the_textbook_in_float32(dtype: Any, sparse: bool) -> None:
    requests = Requests.normal([(1, 200)], dtype)
    indices = requests.all_indices() if sparse else None
    result = requests.decode(arithmetic="float32-plain", sparse_indices=indices)
    q, rows = (x.astype(np.float32) for x in (requests.q[0][0], requests.rows[0]))
    scores = q @ rows.T * np.float32(SCALE)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    rounded = weights.astype(dtype).astype(np.float32)
    wanted = rounded @ rows[:, :LATENT] / weights.sum(axis=1, keepdims=True)
    assert result.out.dtype == dtype and result.lse.dtype == np.float32
    step = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(result.out[0].astype(np.float32), wanted, rtol=step, atol=1e-6)
    exact = requests.decode(sparse_indices=indices)
    error = np.abs(result.out.astype(np.float64) - exact.out)
    assert 0 < error.max() < 4 * step * np.abs(exact.out).max()
    named = requests.decode(arithmetic="float32-plain", out_dtype="float32", sparse_indices=indices)
    np.testing.assert_allclose(named.out[0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"latent_dim": 25}, "q has d_qk 24 and latent_dim is 25; wanted d_qk 24"),
        ({"latent_dim": 0}, "latent_dim is 0"),
        (
            {"kv_cache": np.zeros((6, PAGE, 32))},
            "q has d_qk 24 and latent_dim is 16; wanted d_qk 32",
        ),
        ({"kv_cache": np.zeros((6, 2, PAGE, 24))}, r"kv_cache has shape \(6, 2, 8, 24\); wanted"),
        ({"kv_cache": np.zeros((6, 24))}, r"kv_cache has shape \(6, 24\); wanted \[pages, page_s"),
        ({"arithmetic": "float16"}, "arithmetic is 'float16'; wanted"),
    ],
)
def test_errors(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Requests.normal([(1, 9)]).decode(**change)
