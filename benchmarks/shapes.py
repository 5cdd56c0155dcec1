"""The shapes that are measured, and figures measured elsewhere to compare with.

The figures are from one NVIDIA H200; machines differ by 2.5 %, so a ratio to a peer of the same run
says more than one to a figure here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cuattn._workloads import Size
from cuattn._workloads_paged import PagedSize


@dataclass(frozen=True, slots=True)
class Shape:
    """One prefill case; `best` is the fastest kernel known, TFLOP/s on an H200."""

    name: str
    size: Size
    causal: bool
    best: float

    def __str__(self) -> str:
        return f"{self.size} {'causal' if self.causal else 'full'}"


PREFILL = (
    Shape("mha_d128_full_1k", Size(16, 1024, 16, 16), False, 612),
    Shape("mha_d128_causal_1k", Size(16, 1024, 16, 16), True, 490),
    Shape("mha_d128_full_16k", Size(1, 16384, 16, 16), False, 695),
    Shape("mha_d128_causal_16k", Size(1, 16384, 16, 16), True, 752),
    Shape("mha_d128_causal_4k", Size(4, 4096, 16, 16), True, 692),
    Shape("gqa_64_8_causal_8k", Size(1, 8192, 64, 8), True, 744),
    Shape("gqa_32_8_causal_32k", Size(1, 32768, 32, 8), True, 665),
    Shape("ds_192_128_causal_4k", Size(1, 4096, 128, 128, 192, 128), True, 709),
    Shape("ds_192_128_causal_16k", Size(1, 16384, 16, 16, 192, 128), True, 773),
    Shape("mha_d64_causal_16k", Size(1, 16384, 32, 32, 64, 64), True, 566),
)
QUICK_PREFILL = ("mha_d128_full_16k", "mha_d128_causal_16k", "gqa_64_8_causal_8k")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A few new tokens of each request over a paged cache."""

    name: str
    size: PagedSize

    @property
    def flops(self) -> int:
        """Work of all pairs that are seen."""
        size = self.size
        pairs = sum(size.q_len * n - size.q_len * (size.q_len - 1) // 2 for n in size.lengths)
        return 4 * size.head_dim * size.q_heads * pairs


@dataclass(frozen=True, slots=True)
class Sweep:
    """One skip-softmax case: a workload and thresholds; `others` maps λ to another kernel's ms."""

    name: str
    workload: str  # "w0" | "w1" | "w1_sink"
    size: Size
    causal: bool
    thresholds: tuple[float, ...]
    others: tuple[float, ...] = ()  # dense first, then one per threshold from 1e-30 on

    def other_ms(self, threshold: float | None) -> float | None:
        """The other kernel's time at this threshold, None for its dense kernel."""
        known = (None, *self.thresholds[1:])
        if not self.others or threshold not in known:
            return None
        return self.others[known.index(threshold)]

    def __str__(self) -> str:
        return f"{self.size} {'causal' if self.causal else 'full'}"


# 0 and 1e-30 skip nothing and must equal the dense kernel; the others are the published sweep.
W0 = (0.0, 1e-30, 0.5, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0, 5.0)
W1 = (0.0, 1e-3, 1e-2, 3e-2, 0.1, 0.3)
LONG, MIDDLE = Size(1, 65536, 64, 4), Size(1, 16384, 64, 4)

# FlashInfer 0.7.2 `trtllm_fmha_v2_prefill`, ms: dense, then W0[1:].
FMHA_V2 = "fmha_v2"
FULL_64K = (247.9, 270.6, 265.0, 228.7, 209.2, 179.4, 163.4, 152.9, 145.4, 135.7)
CAUSAL_64K = (123.8, 135.9, 132.5, 121.3, 112.5, 97.7, 88.6, 81.6, 76.4, 69.2)

SKIP = (
    Sweep("w0_16k_full", "w0", MIDDLE, False, W0),
    Sweep("w0_16k_causal", "w0", MIDDLE, True, W0),
    Sweep("w1_16k_causal", "w1", MIDDLE, True, W1),
    Sweep("w1_sink_16k_causal", "w1_sink", MIDDLE, True, W1),
    Sweep("w1_64k_causal", "w1", LONG, True, W1),
    Sweep("w0_64k_causal", "w0", LONG, True, W0, CAUSAL_64K),
    Sweep("w0_64k_full", "w0", LONG, False, W0, FULL_64K),
)
QUICK_SKIP = ("w0_16k_full", "w1_16k_causal")


@dataclass(frozen=True, slots=True)
class Decode:
    """One decode case; `best` is the fastest kernel known, GB/s on an H200."""

    name: str
    size: PagedSize
    best: float | None = None


def paged(batch: int, kv_len: int, q_heads: int, kv_heads: int, **more: int) -> PagedSize:
    """Sizes of a batch of equal requests."""
    return PagedSize((kv_len,) * batch, q_heads, kv_heads, **more)


def ragged_lengths() -> tuple[int, ...]:
    """Lengths of 64 requests, from 512 to 32768 keys."""
    return tuple(int(x) for x in np.random.default_rng(0).integers(512, 32769, 64))


DECODE = (
    Decode("gqa_32_8_b1_8k", paged(1, 8192, 32, 8), 1361),
    Decode("gqa_32_8_b1_128k", paged(1, 131072, 32, 8), 3853),
    Decode("gqa_32_8_b16_8k", paged(16, 8192, 32, 8), 3853),
    Decode("gqa_32_8_b64_8k", paged(64, 8192, 32, 8), 4432),
    Decode("gqa_64_8_b128_2k", paged(128, 2048, 64, 8, page=16), 4167),
    Decode("mha_32_32_b16_4k", paged(16, 4096, 32, 32, page=16), 4188),
    Decode("gqa_64_4_b64_16k", paged(64, 16384, 64, 4), 4249),
    Decode("gqa_64_4_b64_64k", paged(64, 65536, 64, 4), 4519),
    Decode("gqa_32_8_b64_ragged", PagedSize(ragged_lengths(), 32, 8)),
    Decode("gqa_32_8_b16_8k_q4", paged(16, 8192, 32, 8, q_len=4)),
)
QUICK_DECODE = ("gqa_32_8_b1_8k", "gqa_32_8_b16_8k")


@dataclass(frozen=True, slots=True)
class DecodeSweep:
    """One case of skip-softmax decode: a workload, thresholds, and bounds of the dropped mass."""

    name: str
    workload: str  # "w0" | "w1"
    size: PagedSize
    thresholds: tuple[float, ...]
    bounds: tuple[float, ...] = ()


# Also batched, ragged and in pages.
FORMS = tuple(
    shape
    for shape in PREFILL
    if shape.name in ("mha_d128_causal_16k", "mha_d128_causal_4k", "gqa_64_8_causal_8k")
)
CHUNKS = tuple(
    Chunk(f"gqa_64_8_b8_16k_q{q_len}", paged(8, 16384, 64, 8, q_len=q_len))
    for q_len in (2, 16, 64, 128, 512)
)
QUICK_FORMS = ("gqa_64_8_causal_8k", "gqa_64_8_b8_16k_q16")

# About 0, 20, 40, 54, 66, 80, 93 and 99.5 % skipped at 32 keys a tile.
DECODE_W0 = (0.0, 0.385, 0.485, 0.56, 0.65, 0.81, 1.2, 8.0)
# Mean dropped masses from 0.01 % to 5 %.
DECODE_W1 = (0.0, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
BOUNDS = (0.001, 0.01, 0.05)

DECODE_SKIP = (
    DecodeSweep("w1_b1_128k", "w1", paged(1, 131072, 32, 8), DECODE_W1, BOUNDS),
    DecodeSweep("w1_b4_32k", "w1", paged(4, 32768, 32, 8), DECODE_W1, BOUNDS),
    DecodeSweep("w1_b16_64k", "w1", paged(16, 65536, 64, 4), DECODE_W1, BOUNDS),
    DecodeSweep("w0_b64_64k", "w0", paged(64, 65536, 64, 4), DECODE_W0),
)
QUICK_DECODE_SKIP = ("w1_b4_32k",)


LATENT, ROPE = 512, 64
COMPUTE_BOUND = 64  # query heads, from which MLA decode waits for the tensor cores


@dataclass(frozen=True, slots=True)
class Mla:
    """One MLA decode case, pages of 64 tokens; `best` is the fastest kernel known on an H200.

    TFLOP/s from `COMPUTE_BOUND` heads on, else GB/s.
    """

    name: str
    batch: int
    kv_len: int
    heads: int
    q_len: int = 1
    top_k: int = 0  # sparse: so many keys a token
    best: float | None = None

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys' rows."""
        return self.batch * self.kv_len * (LATENT + ROPE) * 2

    @property
    def bytes(self) -> int:
        """Bytes that a dense call must move: rows, queries and output, each once."""
        tokens = self.batch * self.q_len
        rows = tokens * self.top_k * (LATENT + ROPE) * 2 if self.top_k else self.cache_bytes
        return rows + tokens * self.heads * (2 * LATENT + ROPE) * 2

    @property
    def flops(self) -> int | None:
        """Those of every pair of query and key, where they are the limit."""
        if self.heads < COMPUTE_BOUND:
            return None
        pairs = self.batch * self.q_len * self.heads * (self.top_k or self.kv_len)
        return 2 * pairs * (2 * LATENT + ROPE)

    def __str__(self) -> str:
        tokens = "" if self.q_len == 1 else f", {self.q_len} tokens"
        sparse = f", {self.top_k} of them" if self.top_k else ""
        return f"{self.batch}×{self.kv_len}{sparse} {self.heads} heads{tokens}"


MLA = (
    Mla("mla_h128_b128_q1_4k", 128, 4096, 128, best=639),
    Mla("mla_h128_b128_q2_4k", 128, 4096, 128, 2, best=685),
    Mla("mla_h128_b64_q1_16k", 64, 16384, 128, best=665),
    Mla("mla_h128_b1_q1_64k", 1, 65536, 128),
    Mla("mla_h16_b128_q1_8k", 128, 8192, 16, best=4205),
    Mla("mla_h16_b16_q1_32k", 16, 32768, 16, best=3885),
    Mla("mla_h16_b1_q1_8k", 1, 8192, 16),
    Mla("mla_h128_b128_sparse_2k", 128, 32768, 128, top_k=2048),
)
QUICK_MLA = ("mla_h128_b128_q1_4k", "mla_h16_b1_q1_8k")

# Skipped of i.i.d. scores by votes of 64 rows: nothing, nothing, then about 1 to 97 %.
MLA_SKIP = {"mla_h128_b128_q2_4k": (0.0, 1e-30, 0.7, 1.0, 1.3, 1.6, 2.0, 3.0, 8.0)}
