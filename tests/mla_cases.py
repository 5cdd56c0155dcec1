"""What the tests of MLA decode run: `MlaCase` says it, `mla_call` makes its arrays.

As in `decode_cases`, memory around everything that may be read is poisoned: slots past the end of a
request, unused pages, rows of no request, table entries past the last page.  A case is small for
the emulator's sake, which takes about 0.02 s for one tile of 64 keys and 64 rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from cases import Call, laid_out, options_of, pages_of, prefix_sums, tokens_of, view_of, views_of
from decode_cases import DecodeCase
from numpy.typing import NDArray

from cuattn import _check, _check_mla, _check_tools
from cuattn._records import Problem, SkipMode

Array = NDArray[Any]

LATENT, ROPE = 512, 64
TILE = 64  # keys, and rows of a block


@dataclass(frozen=True)
class MlaCase(DecodeCase):
    """One problem of MLA decode, in words."""

    lengths: tuple[tuple[int, int], ...] = ((1, 65), (1, 130))
    q_heads: int = 16
    kv_heads: int = 1
    d_qk: int = LATENT + ROPE
    d_v: int = LATENT
    page_size: int = 64
    scale: float | None = 192**-0.5  # that of heads of 128 + 64 before absorption
    head_axis: str = ""  # of 1 in the cache: "before" or "behind" that of the slots
    top_k: int = 0  # sparse: entries of each token's list

    @property
    def id(self) -> str:
        """A sentence about what is not usual."""
        usual = replace(self, d_qk=64, d_v=64, kv_heads=self.q_heads, scale=None)
        words = super(MlaCase, usual).id.replace("mha", f"h{self.q_heads}", 1)
        if self.scale != 192**-0.5:
            words += f"-scale{self.scale or 0:g}"
        if (self.d_qk, self.d_v) != (LATENT + ROPE, LATENT):
            words += f"-{self.d_v}+{self.d_qk - self.d_v}"
        if self.top_k:
            words += f"-top{self.top_k}"
        return f"{words}-axis-{self.head_axis}" if self.head_axis else words

    @property
    def tiles(self) -> int:
        """How many tiles of keys all blocks of rows walk over, about."""
        blocks = [(-(-q_len * self.q_heads // TILE), kv_len) for q_len, kv_len in self.lengths]
        return sum(rows * -(-kv_len // TILE) for rows, kv_len in blocks)


def mla_call(case: MlaCase) -> Call:
    """`mla_decode` on scattered pages, with poison around queries, pages and slots."""
    rng = case.rng
    requests = []
    for q_len, kv_len in case.lengths:
        q, rows = (
            rng.standard_normal((n, heads, case.d_qk), dtype=np.float32)
            for n, heads in ((q_len, case.q_heads), (kv_len, 1))
        )
        if case.data == "negative":
            q, rows = np.abs(q), -np.abs(rows)
        if case.data == "structured":
            _weigh_tiles(rng, q, rows)
        requests.append((q, rows, rows[..., : case.d_v]))
    paged = replace(case, layout="NHD", pair=True)
    (cache, _), tables, seq_lens = pages_of(paged, rng, requests)
    if not case.head_axis:
        cache = cache[:, :, 0]
    elif case.head_axis == "before":
        cache = cache.swapaxes(1, 2)
    options = options_of(case, rng)
    del options["causal"]  # which decode always is
    if case.top_k:
        options["sparse_indices"] = chosen(case, rng, tables, len(cache))
    if case.form == "ragged":
        q = tokens_of(case, requests)
        options["cu_seqlens_q"] = prefix_sums([q_len for q_len, _ in case.lengths])
    else:
        q = np.stack([q for q, _, _ in requests])
        q = laid_out(case, [q.swapaxes(0, 1) if case.form == "flat" else q])[0]
        q = q[0] if case.form == "flat" else q
    return Call(case, "mla_decode", (q, cache, tables, seq_lens), options)


def _weigh_tiles(rng: np.random.Generator, q: Array, rows: Array) -> None:
    """Give the first column a part in all scores of a tile, large in the first and the last."""
    weights = rng.uniform(-2.5, 1.2, -(-len(rows) // TILE)).astype(np.float32)
    weights[:1] = weights[-1:] = 1.0
    q[..., 0] = 30.0
    rows[:, 0, 0] = np.repeat(weights, TILE)[: len(rows)]


def problem_of_mla(call: Call, skip: SkipMode | None = None) -> Problem:
    """The `Problem` that cuattn makes of a call; needs no GPU."""
    given = views_of(call.options)
    cu_seqlens_q = given.pop("cu_seqlens_q", None)
    q, cache, tables, seq_lens = (view_of(x) for x in call.arrays)
    lists = given.pop("sparse_indices", None)
    options = _check.Options(**given, causal=True, skip=skip)
    given = (seq_lens, cu_seqlens_q, "HND", options)
    cache = _check_tools.mla_cache(cache)
    if lists is not None:
        return _check_mla.mla_decode_sparse(None, q, cache, lists, *given)
    return _check_mla.mla_decode(None, q, cache, tables, *given)


NOWHERE = (-1, -(2**31), 2**31 - 1)  # and the number of slots


def chosen(case: MlaCase, rng: np.random.Generator, tables: Array, pages: int) -> Array:
    """Each token's list: any keys of its request, some nowhere; behind its end, poisoned slots.

    Keys of structured data are in order, so that tiles of entries differ in weight too.
    """
    size, slots = case.page_size, pages * case.page_size
    places = []
    for (_, kv_len), table in zip(case.lengths, tables, strict=True):
        key = np.arange(kv_len)
        places.append(table[key // size] * size + key % size)
    poisoned = np.setdiff1d(np.arange(slots), np.concatenate(places))
    lists = []
    for (q_len, kv_len), own in zip(case.lengths, places, strict=True):
        for token in range(q_len):
            entries = rng.choice(poisoned, case.top_k)
            count = min(max(kv_len - q_len + token + 1, 0), case.top_k)
            picked = rng.choice(len(own), count) if count else np.zeros(0, int)
            entries[:count] = own[np.sort(picked) if case.data == "structured" else picked]
            some = rng.random(count) < 0.2
            entries[:count][some] = rng.choice([*NOWHERE, slots], some.sum())
            lists.append(entries)
    if case.form == "ragged":  # tokens of no request have lists too
        lists += [rng.choice(poisoned, case.top_k)] * 5
        return np.array(lists, np.int32)
    batch = len(case.lengths)
    shape = (batch, case.top_k) if case.form == "flat" else (batch, -1, case.top_k)
    return np.array(lists, np.int32).reshape(shape)


def ones(*kv_lens: int) -> tuple[tuple[int, int], ...]:
    """Requests of one new token."""
    return tuple((1, kv_len) for kv_len in kv_lens)


def _tokens(q_len: int, *kv_lens: int, **fields: Any) -> MlaCase:
    """As many new tokens in every request."""
    lengths = tuple((q_len, kv_len) for kv_len in kv_lens)
    return MlaCase(lengths=lengths, form="tokens", **fields)


USUAL = MlaCase()
RAGGED = ((0, 0), (1, 64), (4, 130), (0, 5), (2, 65), (5, 0), (7, 3), (0, 70), (1, 1), (0, 0))
UNEVEN = MlaCase(lengths=RAGGED, form="ragged")

HEADS = [MlaCase(q_heads=heads) for heads in (1, 16, 20, 64, 65, 128)]
TOKENS = [
    _tokens(1, 65, 130),
    _tokens(2, 65, 130, q_heads=1),
    _tokens(2, 130, q_heads=20),
    _tokens(2, 65, q_heads=128),
    _tokens(4, 64, 130),  # four tokens of 16 heads: one whole block
    _tokens(4, 65, 130, q_heads=20),  # a block ends inside a token
    _tokens(4, 3, 4, 5, 67),  # more tokens than keys; the last tile is one that some rows see
    UNEVEN,
    replace(UNEVEN, q_heads=20),
    replace(UNEVEN, q_heads=128, lengths=((2, 65), (0, 9), (1, 64), (3, 2))),
    replace(UNEVEN, q_heads=1, lengths=((70, 130), (0, 0), (2, 2))),
    MlaCase(lengths=((0, 7), (3, 3), (0, 0)), form="ragged"),
]
PAGES = [
    *(
        MlaCase(page_size=size, lengths=ones(size - 1, size, size + 1, size + 67))
        for size in (16, 32, 64, 128)
    ),
    *(replace(UNEVEN, page_size=size) for size in (16, 128)),
    MlaCase(head_axis="before"),
    MlaCase(head_axis="behind"),
    MlaCase(head_axis="before", page_size=16),
]
LENGTHS = [
    MlaCase(lengths=ones(0, 1, 63, 64, 65, 130, 300)),
    MlaCase(lengths=ones(1)),
    MlaCase(lengths=ones(0, 0)),
    MlaCase(lengths=ones(300)),
    MlaCase(lengths=ones(2500)),
    MlaCase(lengths=ones(33, 1500, 0, 255)),
    MlaCase(lengths=ones(1200), q_heads=128, page_size=16),
    _tokens(4, 700, 3, q_heads=20),
    MlaCase(lengths=((2, 600), (0, 33), (5, 900), (0, 0)), form="ragged", page_size=128),
    MlaCase(lengths=ones(*(1 + 3 * i for i in range(33))), q_heads=1),  # more than a warp
]
OPTIONS = [
    MlaCase(sinks=True),
    MlaCase(sinks=True, lengths=ones(0, 1, 130)),  # no key: 0 and -inf, sink or not
    MlaCase(sinks=True, lengths=ones(1000), q_heads=20),  # added once, not by every split
    replace(UNEVEN, sinks=True, q_heads=20),
    MlaCase(scale=0.3),
    MlaCase(scale=0.05, out_scale=0.125),
    MlaCase(scale=0.05, out_scale=2.5, device_scalars=True),
    MlaCase(out_scale=-3.0, lengths=ones(600)),  # by the merge, not by every split
]
DTYPE_CASES = [
    MlaCase(dtype="float16"),
    MlaCase(dtype="float16", lengths=ones(600), q_heads=64),
    MlaCase(out_dtype="float32"),
    MlaCase(out_dtype="float32", lengths=ones(600)),
    MlaCase(dtype="float16", out_dtype="float32", out_scale=100.0),
    MlaCase(out_dtype="float16"),
]
MEMORY = [
    MlaCase(memory="packed"),
    MlaCase(poison="huge"),
    replace(UNEVEN, poison="huge"),
]
# Logits near ±1e5: far outside what a finite stand-in for -inf would survive.
LARGE = [
    MlaCase(scale=1000.0),
    MlaCase(scale=250.0, data="negative", lengths=ones(130, 600)),
    MlaCase(scale=300.0, dtype="float16"),
]
MLA = [*HEADS, *TOKENS, *PAGES, *LENGTHS, *OPTIONS, *DTYPE_CASES, *MEMORY, *LARGE]
MLA = list(dict.fromkeys(MLA))

# For skip-softmax: tiles differ in weight, and there are some beside the seeds of several splits.
LONG = MlaCase(lengths=ones(1500, 700), data="structured")
SHORT = replace(LONG, lengths=ones(700))
# Up to 32 heads run the portable kernel on every GPU.
SPARSE = [
    MlaCase(top_k=64),
    MlaCase(top_k=128, lengths=ones(0, 1, 63, 128, 129, 300), page_size=16, q_heads=1),
    MlaCase(top_k=2048, lengths=ones(2100), sinks=True, out_scale=0.5),  # several splits
    MlaCase(top_k=2048, lengths=ones(70), page_size=8),
    MlaCase(top_k=192, lengths=((3, 200), (3, 2)), form="tokens", scale=0.1),
    replace(UNEVEN, top_k=64, page_size=256, sinks=True),
    MlaCase(top_k=64, lengths=((0, 7), (3, 3), (0, 0)), form="ragged"),
    MlaCase(top_k=128, lengths=ones(40, 200), q_heads=128),
    MlaCase(top_k=1024, lengths=((2, 1100),), form="tokens", q_heads=65, memory="packed"),
    replace(UNEVEN, top_k=64, q_heads=64, poison="huge"),
    replace(UNEVEN, top_k=128, q_heads=40, page_size=8, sinks=True),
    MlaCase(top_k=2048, lengths=ones(0, 1, 2100), q_heads=64, sinks=True, out_scale=0.5),
]
PAIRS = [
    MlaCase(d_qk=512, dtype="float16", lengths=ones(0, 65, 600)),
    MlaCase(d_qk=512, dtype="float16", lengths=((2, 65), (2, 1)), form="tokens", q_heads=5),
    MlaCase(d_qk=320, d_v=256, q_heads=64, top_k=128, lengths=ones(50, 200)),
    MlaCase(d_qk=320, d_v=256, q_heads=128, top_k=576, lengths=ones(600), scale=0.1),
]
