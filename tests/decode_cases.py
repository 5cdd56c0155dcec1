"""What the tests of decode run: `DecodeCase` says it, `decode_call` makes its arrays.

As in `cases`, memory around everything that may be read is poisoned, and few kernels are compiled:
dtypes, head dims, soft cap and skipping make a new one, all else is a number.  Lengths are small
(mostly at most 6000 keys over batch and KV heads) for the emulator's sake.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from cases import (
    Call,
    Case,
    laid_out,
    options_of,
    pages_of,
    prefix_sums,
    requests_of,
    tokens_of,
    view_of,
)
from numpy.typing import NDArray

from cuattn import _check
from cuattn._records import Problem, SkipMode

Array = NDArray[Any]


@dataclass(frozen=True)
class DecodeCase(Case):
    """One problem of decode, in words."""

    lengths: tuple[tuple[int, int], ...] = ((1, 100), (1, 203))
    q_heads: int = 8
    form: str = "flat"  # q is [batch, …], "tokens" [batch, q_len, …], "ragged" [tokens, …]

    @property
    def id(self) -> str:
        """A sentence about what is not usual."""
        words = super().id.replace("-causal", "")
        return words if self.form == "flat" else f"{words}-{self.form}"


def decode_call(case: DecodeCase) -> Call:
    """`decode` on scattered pages, with poison around queries, pages and slots."""
    return call_of(case, requests_of(case, case.rng))


def call_of(case: DecodeCase, requests: list[tuple[Array, Array, Array]]) -> Call:
    """The same on given q, k and v [token, head, dim] of each request."""
    rng = case.rng
    cache, tables, seq_lens = pages_of(case, rng, requests)
    options = {**options_of(case, rng), "layout": case.layout}
    del options["causal"]  # which decode always is
    if case.form == "ragged":
        q = tokens_of(case, requests)
        options["cu_seqlens_q"] = prefix_sums([q_len for q_len, _ in case.lengths])
    else:
        q = np.stack([q for q, _, _ in requests])
        q = laid_out(case, [q.swapaxes(0, 1) if case.form == "flat" else q])[0]
        q = q[0] if case.form == "flat" else q
    return Call(case, "decode", (q, cache, tables, seq_lens), options)


def alone(call: Call, request: int) -> Call:
    """One request of a flat or uniform call, with the same pages."""
    q, cache, tables, seq_lens = call.arrays
    only = slice(request, request + 1)
    case = replace(call.case, lengths=call.case.lengths[only])
    return replace(call, case=case, arrays=(q[only], cache, tables[only], seq_lens[only]))


# Logits over keys at places in [0, 1), meant to overdraw a careless account of dropped mass.
LOGITS = {
    "flat": lambda place, rng: 0 * place,
    "falling": lambda place, rng: -9 * place,
    "rising": lambda place, rng: 9 * place,
    "deep-ends": lambda place, rng: np.where(abs(place - 0.5) > 0.45, -20.0, 0.0),
    "deep-middle": lambda place, rng: np.where(abs(place - 0.5) < 0.4, -1000.0, 0.0),
    "one-high": lambda place, rng: np.where(np.arange(len(place)) == len(place) // 2, 8.0, 0.0),
    "far-apart": lambda place, rng: rng.uniform(-900, 900, len(place)),
    "random": lambda place, rng: 2 * rng.standard_normal(len(place)),
}


def adversarial(kind: str, keys: int) -> Call:
    """Three tokens of five heads with the same logits, up to a factor of each row."""
    case = DecodeCase(
        lengths=((3, keys),), q_heads=5, kv_heads=1, dtype="float16", form="tokens", scale=1.0
    )
    rng = case.rng
    q, k = np.zeros((3, 5, 64)), np.zeros((keys, 1, 64))
    k[:, 0, 0] = LOGITS[kind](np.arange(keys) / keys, rng)
    q[..., 0] = rng.uniform(0.5, 1, (3, 5))
    return call_of(case, [(q, k, rng.standard_normal((keys, 1, 64)))])


def problem_of_decode(call: Call, skip: SkipMode | None = None) -> Problem:
    """The `Problem` that cuattn makes of a call; needs no GPU."""
    q, cache, tables, seq_lens = call.arrays
    caches = cache if isinstance(cache, tuple) else (cache[:, 0], cache[:, 1])
    given = {
        name: view_of(x) if isinstance(x, np.ndarray) else x for name, x in call.options.items()
    }
    layout, cu_seqlens_q = given.pop("layout"), given.pop("cu_seqlens_q", None)
    arrays = (view_of(x) for x in (q, *caches, tables, seq_lens))
    return _check.decode(
        *arrays, cu_seqlens_q, layout, _check.Options(**given, causal=True, skip=skip)
    )


def _ones(*kv_lens: int) -> tuple[tuple[int, int], ...]:
    """Requests of one new token."""
    return tuple((1, kv_len) for kv_len in kv_lens)


USUAL = DecodeCase()
RAGGED = ((1, 64), (4, 203), (0, 5), (2, 129), (5, 65), (16, 100), (5, 0), (7, 3), (1, 1), (0, 0))
UNEVEN = DecodeCase(lengths=RAGGED, form="ragged")

GROUPS = [
    USUAL,
    *(DecodeCase(q_heads=2 * group) for group in (1, 2, 3, 5, 7, 8)),
    *(DecodeCase(q_heads=group, kv_heads=1) for group in (12, 16, 24, 64)),
]


def _tokens(q_len: int, *kv_lens: int, **fields: Any) -> DecodeCase:
    """As many new tokens in every request."""
    lengths = tuple((q_len, kv_len) for kv_len in kv_lens)
    return DecodeCase(lengths=lengths, form="tokens", **fields)


TOKENS = [
    _tokens(1, 100, 203),
    _tokens(2, 100, 203),
    _tokens(4, 100, 203),  # four tokens of four heads: one block of 16 rows
    _tokens(5, 100, 203, q_heads=6),
    _tokens(5, 3, 5, 6, 64),  # more tokens than keys
    _tokens(16, 100, 203, q_heads=16),
    _tokens(16, 65, 16, q_heads=2),
    _tokens(2, 150, q_heads=64, kv_heads=1),
    _tokens(5, 150, q_heads=24, kv_heads=1),
    _tokens(16, 203, q_heads=5, kv_heads=1),  # blocks begin and end inside a token
    UNEVEN,
    replace(UNEVEN, q_heads=2),
    replace(UNEVEN, q_heads=10),
    replace(UNEVEN, q_heads=24, kv_heads=1, page_size=32),
    DecodeCase(lengths=((0, 7), (3, 3), (0, 0)), form="ragged"),
]
DIMS = [
    DecodeCase(d_qk=qk, d_v=v, pair=qk != v)
    for qk, v in (*((d, d) for d in (8, 40, 80, 96, 128, 136, 192, 256)), (192, 128), (64, 128))
]
PAGES = [
    *(
        DecodeCase(page_size=size, lengths=_ones(size - 1, size, size + 1, 2 * size + 3))
        for size in (8, 32, 64, 128, 256)
    ),
    DecodeCase(layout="NHD"),
    DecodeCase(pair=True),
    DecodeCase(layout="NHD", pair=True, page_size=64),
    DecodeCase(d_qk=192, d_v=128, pair=True, layout="NHD"),
    replace(UNEVEN, layout="NHD", page_size=8),
]
LENGTHS = [
    DecodeCase(lengths=_ones(0, 1, 2, 15, 16, 17)),
    DecodeCase(lengths=_ones(63, 64, 65, 127, 128, 129)),
    DecodeCase(lengths=_ones(1)),
    DecodeCase(lengths=_ones(0, 0)),
    DecodeCase(lengths=_ones(777)),
    DecodeCase(lengths=_ones(1, 900, 0, 333, 512)),
    DecodeCase(lengths=_ones(3000)),
    DecodeCase(lengths=_ones(3333), kv_heads=1, page_size=64),
    _tokens(4, 3100, kv_heads=1, q_heads=4, page_size=32),
    DecodeCase(lengths=_ones(*(3 + 5 * i for i in range(33))), kv_heads=1, q_heads=5),
]
WINDOWS = [
    *(DecodeCase(window_left=w) for w in (0, 1, 15, 16, 63, 127, 1000)),
    DecodeCase(lengths=_ones(3000), window_left=100),
    DecodeCase(lengths=_ones(3000), window_left=777, poison="huge", page_size=64),
    _tokens(4, 100, 203, window_left=20),
    _tokens(16, 300, 7, window_left=5, q_heads=6),
    replace(UNEVEN, window_left=50),
]
OPTIONS = [
    DecodeCase(soft_cap=30.0),
    DecodeCase(soft_cap=2.0, scale=0.5),
    DecodeCase(sinks=True),
    DecodeCase(sinks=True, lengths=_ones(0, 1, 200)),  # no key: 0 and -inf, sink or not
    DecodeCase(sinks=True, window_left=17, q_heads=8, kv_heads=1),
    DecodeCase(sinks=True, lengths=_ones(2500), kv_heads=1),  # added once, not by every split
    replace(UNEVEN, sinks=True, soft_cap=30.0),
    DecodeCase(scale=0.3),
    DecodeCase(scale=0.3, out_scale=0.125),
    DecodeCase(scale=0.3, out_scale=2.5, device_scalars=True),
    DecodeCase(scale=0.05, soft_cap=2.0, device_scalars=True),
]
DTYPE_CASES = [
    DecodeCase(dtype="float16"),
    DecodeCase(dtype="float16", d_qk=128, d_v=128, lengths=_ones(129, 300)),
    DecodeCase(dtype="float16", lengths=_ones(2000)),
    DecodeCase(out_dtype="float16"),
    DecodeCase(out_dtype="float32"),
    DecodeCase(dtype="float16", out_dtype="bfloat16"),
    DecodeCase(dtype="float16", out_dtype="float32", out_scale=100.0),
]
MEMORY = [
    DecodeCase(memory="packed"),
    DecodeCase(poison="huge"),
    DecodeCase(poison="huge", d_qk=40, d_v=40),
    replace(UNEVEN, poison="huge"),
]
# Logits near ±1e5: far outside what a finite stand-in for -inf would survive.
LARGE = [
    DecodeCase(scale=4000.0),
    DecodeCase(scale=2500.0, data="negative", lengths=_ones(100, 1500)),
    DecodeCase(scale=1000.0, dtype="float16"),
]
DECODE = [
    *(*GROUPS, *TOKENS, *DIMS, *PAGES, *LENGTHS),
    *(*WINDOWS, *OPTIONS, *DTYPE_CASES, *MEMORY, *LARGE),
]

# For skip-softmax: enough tiles for several lanes, data whose tiles differ in weight.
LONG = DecodeCase(lengths=_ones(1500, 900), data="structured", scale=0.25)
SKIP_DECODE = [
    LONG,
    replace(LONG, q_heads=2),
    replace(LONG, q_heads=10),
    replace(LONG, q_heads=8, kv_heads=1, lengths=_ones(3500)),
    replace(LONG, q_heads=24, kv_heads=1, lengths=_ones(2500)),  # a vote of one token and a half
    replace(LONG, lengths=((4, 1500), (4, 777)), form="tokens"),
    replace(LONG, lengths=((5, 1700),), form="tokens", q_heads=6),
    replace(LONG, lengths=((1, 64), (4, 900), (0, 5), (2, 700), (5, 0), (3, 1200)), form="ragged"),
    replace(LONG, window_left=700),
    replace(LONG, lengths=((4, 1500),), form="tokens", window_left=900),
    replace(LONG, sinks=True),
    replace(LONG, soft_cap=12.0),
    replace(LONG, dtype="float16"),
    replace(LONG, out_dtype="float32", out_scale=0.5),
    replace(LONG, d_qk=128, d_v=128, page_size=64),
    replace(LONG, d_qk=192, d_v=128, q_heads=2, pair=True),
    replace(LONG, d_qk=256, d_v=256, lengths=_ones(1500)),
    replace(LONG, layout="NHD", pair=True, device_scalars=True),
    replace(LONG, poison="huge", page_size=8),
]
