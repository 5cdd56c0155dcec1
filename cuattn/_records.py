"""The records that pass from stage to stage: View → Problem → Plan.

Each is made once and never changed.  `View` is a named tuple rather than a dataclass because one is
made for every argument of every call (0.35 µs against 1.3 µs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

HOST = -1  # the ordinal of host memory, which only the emulator reads


class View(NamedTuple):
    """An array of any framework, as a kernel sees it.

    `owner` keeps the memory alive; `stream` is the producer's current stream as an integer, None
    when it cannot be asked; `guarded` says that the producer may reuse the memory as soon as the
    owner is dropped, whatever our stream is still doing.  `token` stands for shape, strides, dtype
    and device of the array that the view was made of: two arrays with one token are alike in these,
    and so are the views made of them for the same argument.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements; the packed value for an axis of length 1
    dtype: str
    device: int
    stream: int | None
    guarded: bool
    owner: Any
    token: int

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return "the CPU" if self.device == HOST else f"device {self.device}"


@dataclass(frozen=True, slots=True)
class Layout:
    """Shape, strides and dtype of a view: all of it that a plan may depend on."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class SkipMode:
    """What of a `SkipSoftmax` changes the kernel or its parameters' meaning, not their values."""

    source: str  # "threshold" | "thresholds" | "scale_factor" | "dropped_mass"
    unsafe: bool
    thresholds: Layout | None = None  # of the live array, [batch] or [batch, heads]
    stats: bool = False
    certificate: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """One attention call, checked: shapes and options, no pointers."""

    form: str  # "batched" | "ragged" | "paged" | "decode" | "decode_ragged"
    q: Layout
    k: Layout  # paged: [pages, heads, page_size, dim], whatever the caller's layout
    v: Layout
    batch: int
    q_heads: int
    kv_heads: int
    head_dim_qk: int
    head_dim_v: int
    q_len: int  # tokens of one request; for ragged and paged: of all requests together
    kv_len: int  # the same for keys; paged: max_pages * page_size
    page_size: int  # 0 unless paged
    causal: bool
    window_left: int  # -1: none
    soft_cap: float  # 0: none
    skip: SkipMode | None
    out_dtype: str
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    tokens: int = 0  # of q in all; decode only, as what follows
    batch_invariant: bool = False
    sparse: bool = False  # every token has a list of kv_len positions in the cache; MLA only


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan may know of a GPU."""

    ordinal: int
    name: str
    capability: tuple[int, int]
    arch: str  # exact NVRTC target, "sm_90a" on Hopper
    multiprocessors: int
    shared_memory: int  # bytes one block may opt in to


@dataclass(frozen=True, slots=True)
class Geometry:
    """Who votes on what: the part of a plan that a skip-softmax result depends on.

    A block has the tokens of one query head or, if these are few, of all heads of a kv head: row r
    of a unit of `pack_rows` rows is then of its token r // group and of head r % group.
    """

    block_q: int
    block_kv: int
    rows_per_vote: int
    order: str = "first tile, then the last one downwards"
    pack_rows: int = 0  # 0: heads never share a block

    def pack(self, q_len: int, group: int) -> int:
        """Return how many heads share a request's blocks.  Twin of pack_of in schedule.cuh."""
        return group if q_len <= self.block_q // 2 and group <= self.pack_rows else 1

    def tokens(self, pack: int) -> int:
        """Return the tokens of a block whose rows `pack` heads share."""
        unit = self.pack_rows or self.block_q
        return self.block_q // unit * (unit // pack)


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Into how many parts the keys of a request are cut.  Twin of the struct in params.cuh.

    Into parts of the load that all blocks at work have on average, or of `smallest` keys if that is
    more; so what is much longer than the others is shared out, and everything if there is little.
    """

    share: float  # of a block in the keys of all, a float32: kv heads / blocks at work at a time
    smallest: int  # keys
    alone: bool  # the load is that of the request alone

    def splits(self, keys: int, load: int) -> int:
        """Return the number of parts of a request that sees `keys` keys.

        `load` is the sum over all requests of the keys they see times their blocks of rows.
        """
        part = max(self.smallest, int(np.float32(load) * np.float32(self.share)))
        return max(keys // part, 1)


@dataclass(frozen=True, slots=True)
class DecodeGeometry:
    """The same for decode, where warps own tiles and splits share seeds."""

    rows_per_vote: int
    block_kv: int
    warps: int
    splits: SplitRule
    order: str = "round-robin to splits and warps, each from the last tile down"

    @property
    def block_rows(self) -> int:
        """Rows of a block, by which keys are split: those of its votes."""
        return self.rows_per_vote

    @property
    def last_seeds(self) -> int:
        """How many of the last tiles are seeds; the first tile is one too."""
        return self.warps - 1


@dataclass(frozen=True, slots=True)
class MlaGeometry(DecodeGeometry):
    """The same for MLA decode, where the warps of a vote share its tiles.

    Portable blocks have rows of `votes` votes side by side, which go over the block's tiles.
    """

    order: str = "round-robin to splits, each from the last tile down, seeds first"
    votes: int = 1

    @property
    def block_rows(self) -> int:
        """Rows of a block, by which keys are split: those of its votes."""
        return self.votes * self.rows_per_vote

    @property
    def last_seeds(self) -> int:
        """The last tile, and the first one."""
        return 1


class Step(NamedTuple):
    """One kernel, compiled how, over which grid."""

    kernel: str
    config: Any  # the kernel's configuration record, see `_config`
    grid: int
    threads: int
    shared_memory: int  # bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """A call, decided: which kernel, compiled how, over which grid, and why."""

    kernel: str
    config: Any  # the kernel's configuration record, see `_config`
    q_blocks: int  # blocks of query rows a head (and, batched, a request)
    grid: tuple[int, int, int]
    threads: int
    shared_memory: int  # bytes
    geometry: Any  # Geometry, DecodeGeometry
    reason: str
    items: int = 0  # that blocks take one by one, at most; decode only
    partials: tuple[int, int, int] = (0, 0, 0)  # bytes of partial_out, partial_rows, arrivals
    merge: Step | None = None  # what merges the splits, if not the last block of them to arrive

    @property
    def steps(self) -> tuple[Step, ...]:
        """Its kernels, to be launched one after the other."""
        own = Step(self.kernel, self.config, self.grid[0], self.threads, self.shared_memory)
        return (own,) if self.merge is None else (own, self.merge)
