"""What the GPU tests run: a `Case` says it, a `Call` holds its arrays, tables list the cases.

Compiled kernels differ only in dtypes, head dims (rounded up to 32), paged or not, soft cap or not,
skipping or not; masks, windows, sinks, scales, lengths and strides are numbers.  So cases keep to
one pair of head dims unless they are about dims, and the tables together need few compilations
(`test_twins.py` counts them).

Memory around everything a kernel may read is poisoned: rows past the end of a request, keys that no
row sees because of a window, unused pages and slots, table entries past the last page.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cuattn import _check, reference
from cuattn._records import Geometry, Problem, SkipMode, View
from cuattn._replay import visible_keys

Array = NDArray[Any]

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
POISON = {"nan": np.nan, "huge": 30000.0}
GARBAGE_PAGES = (2147480000, -1, -2147483648, 1 << 20)  # table entries that must not be followed


@dataclass(frozen=True)
class Case:
    """One attention problem, in words."""

    lengths: tuple[tuple[int, int], ...] = ((113, 203), (113, 203))  # (q_len, kv_len) per request
    q_heads: int = 4
    kv_heads: int = 2
    d_qk: int = 64
    d_v: int = 64
    dtype: str = "bfloat16"
    out_dtype: str | None = None
    causal: bool = True
    window_left: int = -1
    soft_cap: float = 0.0
    sinks: bool = False
    scale: float | None = None
    out_scale: float | None = None
    device_scalars: bool = False
    memory: str = "padded"  # "packed", "padded" (poisoned rows behind), "qkv", "bhsd"
    data: str = "normal"  # "normal", "negative" (every logit far below zero), "structured"
    poison: str = "nan"
    page_size: int = 16
    layout: str = "HND"
    pair: bool = False  # K and V pages as two arrays

    @property
    def id(self) -> str:
        """A sentence about what is not usual."""
        group = self.q_heads // self.kv_heads
        heads = "mha" if group == 1 else f"{'mqa' if self.kv_heads == 1 else 'gqa'}-{group}to1"
        shapes = list(dict.fromkeys(f"{q}x{kv}" for q, kv in self.lengths))
        lengths = "+".join(shapes[:3]) + (f"+{len(shapes) - 3}more" if len(shapes) > 3 else "")
        words = [heads, lengths or "empty"]
        if (self.d_qk, self.d_v) != (64, 64):
            words.append(f"d{self.d_qk}" + ("" if self.d_qk == self.d_v else f"v{self.d_v}"))
        words.append("causal" if self.causal else "full")
        optional = {
            "fp16": self.dtype == "float16",
            f"to-{self.out_dtype}": self.out_dtype is not None,
            f"window{self.window_left}": self.window_left >= 0,
            f"cap{self.soft_cap:g}": self.soft_cap,
            "sinks": self.sinks,
            f"scale{self.scale or 0:g}": self.scale is not None,
            f"outscale{self.out_scale or 0:g}": self.out_scale is not None,
            "device-scalars": self.device_scalars,
            self.memory: self.memory != "padded",
            self.data: self.data != "normal",
            f"{self.poison}-around": self.poison != "nan",
            f"page{self.page_size}": self.page_size != 16,
            self.layout: self.layout != "HND",
            "pair": self.pair,
        }
        return "-".join([*words, *(word for word, given in optional.items() if given)])

    def __str__(self) -> str:
        return self.id

    @property
    def rng(self) -> np.random.Generator:
        """Random numbers of this case, the same in every run."""
        return np.random.default_rng(zlib.crc32(self.id.encode()))

    @property
    def result_dtype(self) -> np.dtype[Any]:
        return np.dtype(DTYPES[self.out_dtype or self.dtype])


@dataclass(frozen=True)
class Call:
    """A public function's name with NumPy arguments; the reference takes the same ones."""

    case: Case
    function: str
    arrays: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def reference(self, **more: Any) -> reference.Result:
        """The float64 result; `geometry` and `skip_softmax` may be given."""
        function = getattr(reference, self.function)
        result: reference.Result = function(*self.arrays, **{**self.options, **more})
        return result

    def plain(self, **more: Any) -> reference.Result:
        """The same in plain arithmetic, from which tolerances are taken."""
        return self.reference(**more, arithmetic="float32-plain")

    def votes(self, geometry: Geometry) -> reference.Result:
        """The float64 result with every vote held and nothing skipped."""
        return self.reference(geometry=geometry)


def options_of(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    options: dict[str, Any] = {"causal": case.causal}
    if case.window_left >= 0:
        options["window_left"] = case.window_left
    if case.soft_cap:
        options["soft_cap"] = case.soft_cap
    if case.sinks:
        options["sinks"] = (3 * rng.standard_normal(case.q_heads)).astype(np.float32)
    if case.out_dtype is not None:
        options["out_dtype"] = case.out_dtype
    for name in ("scale", "out_scale"):
        number = getattr(case, name)
        if number is not None:
            shape = () if name == "scale" else (1,)
            options[name] = np.full(shape, number, np.float32) if case.device_scalars else number
    return options


def _tokens(case: Case, rng: np.random.Generator, tokens: int, which: str) -> Array:
    """Rows [tokens, heads, d] of q, k or v, in float32."""
    heads = case.q_heads if which == "q" else case.kv_heads
    dim = case.d_v if which == "v" else case.d_qk
    x = rng.standard_normal((tokens, heads, dim), dtype=np.float32)
    if case.data == "negative" and which in "qk":
        x = np.abs(x) if which == "q" else -np.abs(x)
    if case.data == "structured" and which in "qk":
        # Nearby tokens resemble each other (both end at the same place): tiles differ in weight.
        place = np.arange(tokens, dtype=np.float32)[:, None, None] - tokens
        angle = place / (8 * 2 ** np.arange(0, 8, 32 / dim, dtype=np.float32))[: dim // 4]
        wave = np.concatenate([np.cos(angle), np.sin(angle)], axis=2)  # [token, 1, dim / 2]
        x[..., : dim // 2] = x[..., : dim // 2] / 2 + math.sqrt(128 / dim) * wave
    return x


def _hide_before_window(case: Case, keys: Array, q_len: int) -> None:
    """Poison the keys [key, …] of one request that no row sees because they are too old."""
    begin, _ = visible_keys(q_len, len(keys), case.causal, case.window_left)
    keys[: begin.min(initial=len(keys))] = POISON[case.poison]


def requests_of(case: Case, rng: np.random.Generator) -> list[tuple[Array, Array, Array]]:
    requests = []
    for q_len, kv_len in case.lengths:
        q, k, v = (
            _tokens(case, rng, n, which)
            for n, which in zip((q_len, kv_len, kv_len), "qkv", strict=True)
        )
        if case.window_left >= 0:
            _hide_before_window(case, k, q_len)
            _hide_before_window(case, v, q_len)
        requests.append((q, k, v))
    return requests


def laid_out(case: Case, parts: list[Array]) -> list[Array]:
    """Arrays [batch, len, heads, d] with the memory that the case asks for, as views of a whole."""
    dtype = DTYPES[case.dtype]
    poison = POISON[case.poison]
    if case.memory == "packed":
        return [part.astype(dtype) for part in parts]
    if case.memory == "qkv":
        whole = np.concatenate(parts, axis=2).astype(dtype)
        ends = np.cumsum([part.shape[2] for part in parts])
        return [whole[:, :, end - p.shape[2] : end] for end, p in zip(ends, parts, strict=True)]
    if case.memory == "bhsd":
        turned = [np.ascontiguousarray(part.transpose(0, 2, 1, 3)) for part in parts]
        return [part.astype(dtype).transpose(0, 2, 1, 3) for part in turned]
    padded = []
    for part in parts:
        batch, length, heads, dim = part.shape
        whole = np.full((batch, length + 70, heads + 1, dim + 8), poison, np.float32)
        whole[:, :length, :heads, :dim] = part
        padded.append(whole.astype(dtype)[:, :length, :heads, :dim])
    return padded


def batched(case: Case) -> Call:
    """`prefill` on requests of equal lengths."""
    rng = case.rng
    requests = requests_of(case, rng)
    parts = [np.stack([request[i] for request in requests]) for i in range(3)]
    return Call(case, "prefill", tuple(laid_out(case, parts)), options_of(case, rng))


def prefix_sums(lengths: list[int]) -> Array:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def ragged(case: Case) -> Call:
    """`prefill_ragged`, with poisoned rows past the last request."""
    rng = case.rng
    requests = requests_of(case, rng)
    parts = []
    for i in range(3):
        behind = np.full((5, *requests[0][i].shape[1:]), POISON[case.poison], np.float32)
        parts.append(np.concatenate([*(request[i] for request in requests), behind])[None])
    q, k, v = (x[0] for x in laid_out(case, parts))
    cu_q, cu_kv = (prefix_sums([n[i] for n in case.lengths]) for i in range(2))
    return Call(case, "prefill_ragged", (q, k, v, cu_q, cu_kv), options_of(case, rng))


def pages_of(case: Case, rng: np.random.Generator, requests: list[Any]) -> tuple[Any, Array, Array]:
    """Cache, table and lengths of requests (q, k, v); what no request owns is poisoned."""
    lengths = np.array([len(k) for _, k, _ in requests], np.int32)
    needed = [-(-int(n) // case.page_size) for n in lengths]
    order = rng.permutation(sum(needed) + 3)
    tables = np.resize(np.array(GARBAGE_PAGES, np.int32), (len(needed), max(needed, default=0) + 2))
    pools = [
        np.full((len(order), case.page_size, case.kv_heads, dim), POISON[case.poison], np.float32)
        for dim in (case.d_qk, case.d_v)
    ]
    first = 0
    for request, (_, k, v) in enumerate(requests):
        own = order[first : first + needed[request]]
        first += len(own)
        tables[request, : len(own)] = own
        for pool, rows in zip(pools, (k, v), strict=True):
            key = np.arange(len(rows))
            pool[own[key // case.page_size], key % case.page_size] = rows
    if case.layout == "HND":
        pools = [np.ascontiguousarray(pool.transpose(0, 2, 1, 3)) for pool in pools]
    cache: Any = tuple(pool.astype(DTYPES[case.dtype]) for pool in pools)
    return cache if case.pair else np.stack(cache, axis=1), tables, lengths


def tokens_of(case: Case, requests: list[Any]) -> Array:
    """Queries of requests one behind the other, and poisoned rows behind them."""
    behind = np.full((5, case.q_heads, case.d_qk), POISON[case.poison], np.float32)
    return laid_out(case, [np.concatenate([*(q for q, _, _ in requests), behind])[None]])[0][0]


def paged(case: Case) -> Call:
    """`prefill_paged` on scattered pages."""
    rng = case.rng
    requests = requests_of(case, rng)
    cache, tables, seq_lens = pages_of(case, rng, requests)
    cu_q = prefix_sums([q_len for q_len, _ in case.lengths])
    options = {**options_of(case, rng), "layout": case.layout}
    arrays = (tokens_of(case, requests), cache, tables, seq_lens, cu_q)
    return Call(case, "prefill_paged", arrays, options)


def _pair(q_len: int, kv_len: int) -> tuple[tuple[int, int], ...]:
    return ((q_len, kv_len),) * 2


USUAL = Case()
RAGGED = ((7, 64), (113, 203), (0, 5), (1, 129), (65, 65), (128, 300), (5, 0), (33, 20))

HEADS = [
    Case(q_heads=4, kv_heads=4),
    Case(q_heads=8, kv_heads=1),
    Case(q_heads=16, kv_heads=2),
    Case(q_heads=10, kv_heads=2),
    Case(q_heads=3, kv_heads=1, causal=False),
]
LENGTHS = [
    *(Case(lengths=_pair(n, n)) for n in (1, 7, 63, 64, 65, 127, 128, 129)),
    *(Case(lengths=_pair(n, n), causal=False) for n in (1, 65, 128)),
    *(Case(lengths=_pair(*n), causal=c) for n in ((799, 3), (3, 799)) for c in (True, False)),
    Case(lengths=_pair(113, 203), causal=False),
    Case(lengths=_pair(203, 113)),  # the first 90 rows see no key
    Case(lengths=((1, 1024),)),
    Case(lengths=((300, 1024),), poison="huge"),
]
DIMS = [
    Case(d_qk=qk, d_v=v)
    for qk, v in (
        *((d, d) for d in (8, 32, 40, 72, 80, 96, 112, 128, 160, 256)),
        *((192, 128), (256, 64), (64, 256), (24, 200)),
    )
]
WINDOWS = [
    *(Case(window_left=w) for w in (0, 1, 31, 63, 64, 127, 1000)),
    Case(lengths=((300, 1024),), window_left=100),
    Case(lengths=((300, 1024),), window_left=100, poison="huge"),
    Case(lengths=((1, 777),), window_left=64),
    Case(window_left=40, causal=False),
    Case(lengths=_pair(203, 113), window_left=20),
]
OPTIONS = [
    Case(soft_cap=30.0),
    Case(soft_cap=2.0, causal=False, scale=0.5),
    Case(sinks=True),
    Case(sinks=True, window_left=17, q_heads=8, kv_heads=1),
    Case(sinks=True, lengths=_pair(203, 113)),  # a row that sees no key gives 0, sink or not
    Case(sinks=True, soft_cap=20.0),
    Case(scale=0.3),
    Case(scale=0.3, out_scale=0.125),
    Case(scale=0.3, out_scale=2.5, device_scalars=True),
    Case(scale=0.05, soft_cap=5.0, device_scalars=True),
]
DTYPE_CASES = [
    Case(dtype="float16"),
    Case(dtype="float16", d_qk=128, d_v=128, causal=False, lengths=_pair(129, 300)),
    Case(out_dtype="float16"),
    Case(out_dtype="float32"),
    Case(dtype="float16", out_dtype="bfloat16"),
    Case(dtype="float16", out_dtype="float32", out_scale=100.0),
]
MEMORY = [
    Case(memory="packed"),
    Case(memory="qkv", lengths=_pair(113, 113)),
    Case(memory="bhsd"),
    Case(poison="huge"),
    Case(poison="huge", causal=False, lengths=_pair(65, 97)),
    Case(poison="huge", d_qk=40, d_v=40),
]
# Logits near ±1e5: far outside what a finite stand-in for -inf would survive.
LARGE = [
    Case(scale=4000.0),
    Case(scale=4000.0, causal=False, lengths=_pair(65, 300)),
    Case(scale=2500.0, data="negative"),
    Case(scale=1000.0, dtype="float16"),
]
BATCHED = [USUAL, *HEADS, *LENGTHS, *DIMS, *WINDOWS, *OPTIONS, *DTYPE_CASES, *MEMORY, *LARGE]

RAGGED_CASES = [
    Case(lengths=RAGGED),
    Case(lengths=RAGGED, causal=False),
    Case(lengths=RAGGED, window_left=50),
    Case(lengths=RAGGED, sinks=True, soft_cap=30.0),
    Case(lengths=RAGGED, dtype="float16", q_heads=8, kv_heads=1),
    Case(lengths=RAGGED, d_qk=192, d_v=128, q_heads=4, kv_heads=4),
    Case(lengths=tuple((n, n) for n in (64, 1, 130, 0, 77)), memory="qkv"),
    Case(lengths=RAGGED, scale=0.2, out_scale=3.0, device_scalars=True),
    Case(lengths=RAGGED, poison="huge"),
    Case(lengths=tuple((1 + i % 5, 3 + 7 * i) for i in range(70))),  # more requests than a warp
    Case(lengths=((0, 0), (0, 7), (3, 3), (0, 0))),
]

PAGED_CASES = [
    Case(lengths=RAGGED),
    Case(lengths=RAGGED, layout="NHD"),
    Case(lengths=RAGGED, layout="NHD", pair=True),
    Case(lengths=RAGGED, pair=True, d_qk=192, d_v=128),
    Case(lengths=RAGGED, causal=False),
    *(Case(lengths=RAGGED, page_size=size) for size in (8, 32, 64, 128, 256)),
    Case(lengths=RAGGED, window_left=50),
    Case(lengths=((20, 500), (64, 333)), window_left=100, sinks=True),
    Case(lengths=((20, 500), (64, 333)), window_left=100, poison="huge"),
    Case(lengths=RAGGED, sinks=True, soft_cap=30.0),
    Case(lengths=RAGGED, dtype="float16", q_heads=10, kv_heads=2),
    Case(lengths=RAGGED, d_qk=128, d_v=128, page_size=64, out_dtype="float32"),
    Case(lengths=RAGGED, scale=0.2, out_scale=3.0, device_scalars=True),
    Case(lengths=tuple((1 + i % 5, 3 + 7 * i) for i in range(70)), page_size=32),
]


# For skip-softmax: enough tiles that some can be left out, data whose tiles differ in weight.
_LONG = Case(lengths=_pair(300, 700), data="structured", scale=0.25)
SKIP_CASES = [
    _LONG,
    replace(_LONG, causal=False),
    replace(_LONG, q_heads=8, kv_heads=1, lengths=((257, 1000),)),
    replace(_LONG, kv_heads=4, lengths=((33, 777),)),  # a vote of one whole warp and a row
    replace(_LONG, q_heads=10, kv_heads=2, lengths=((33, 777),)),  # heads share blocks
    replace(_LONG, lengths=_pair(640, 640)),
    replace(_LONG, window_left=260),
    replace(_LONG, window_left=150, causal=False),
    replace(_LONG, sinks=True),
    replace(_LONG, soft_cap=12.0),
    replace(_LONG, dtype="float16"),
    replace(_LONG, out_dtype="float32", out_scale=0.5),
    replace(_LONG, d_qk=128, d_v=128),
    replace(_LONG, d_qk=192, d_v=128, q_heads=2),
    replace(_LONG, d_qk=256, d_v=256),
    replace(_LONG, device_scalars=True),
    replace(_LONG, poison="huge"),
]
_UNEVEN = ((7, 64), (300, 700), (0, 5), (1, 640), (600, 600), (5, 0), (33, 20), (250, 200))
SKIP_RAGGED = [
    replace(_LONG, lengths=_UNEVEN),
    replace(_LONG, lengths=_UNEVEN, causal=False, sinks=True),
    replace(_LONG, lengths=_UNEVEN, window_left=200),
]
SKIP_PAGED = [
    replace(_LONG, lengths=_UNEVEN),
    replace(_LONG, lengths=_UNEVEN, layout="NHD", page_size=64, q_heads=8, kv_heads=1),
    replace(_LONG, lengths=_UNEVEN, window_left=200, sinks=True),
]


def numpy_skip(**fields: Any) -> SimpleNamespace:
    """A `SkipSoftmax` for the reference: the same fields, NumPy arrays."""
    names = ("threshold", "threshold_scale_factor", "max_dropped_mass", "seeds")
    usual = {**dict.fromkeys(names), "unsafe": False}
    return SimpleNamespace(**{**usual, **fields})


def view_of(array: Array) -> View:
    """A NumPy array as if it lay on device 0."""
    strides = tuple(step // array.dtype.itemsize for step in array.strides)
    return View(0, array.shape, strides, str(array.dtype), 0, None, False, None, 0)


def views_of(options: dict[str, Any]) -> dict[str, Any]:
    """Options with views in place of arrays."""
    return {name: view_of(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}


def problem_of(call: Call, skip: SkipMode | None = None) -> Problem:
    """The `Problem` that cuattn makes of a call; needs no GPU."""
    q, *others = call.arrays
    given = views_of(call.options)
    layout = given.pop("layout", "")
    options = _check.Options(**given, skip=skip)
    if call.function == "prefill":
        return _check.batched(view_of(q), *map(view_of, others), options)
    if call.function == "prefill_ragged":
        return _check.ragged(view_of(q), *map(view_of, others), options)
    cache, *index_arrays = others
    caches = cache if isinstance(cache, tuple) else (cache[:, 0], cache[:, 1])
    return _check.paged(*map(view_of, (q, *caches, *index_arrays)), layout, options)
