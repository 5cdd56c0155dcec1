"""What tests of append_kv and append_mla_kv share: where tokens go, arrays inside of others."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from cases import DTYPES, GARBAGE_PAGES
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class AppendCase:
    """One call, in words; arrays hold random bits, NaN among them."""

    lengths: tuple[tuple[int, int], ...] = ((37, 5), (16, 16), (0, 0), (9, 1), (40, 0), (23, 7))
    dtype: str = "bfloat16"
    page_size: int = 16
    padded: bool = True  # bits before, between and behind what the call is given
    uniform: bool = False  # no cu_seqlens_new
    extra: int = 0  # new tokens that belong to no request

    def words(self) -> dict[str, bool]:
        """What may be said of the case, and whether it is."""
        return {
            f"{len(self.lengths)}requests": True,
            self.dtype: self.dtype != "bfloat16",
            f"page{self.page_size}": True,
            "packed": not self.padded,
            f"{self.lengths[0][1] if self.lengths else 0}each": self.uniform,
            f"{self.extra}extra": bool(self.extra),
        }

    @property
    def id(self) -> str:
        """A sentence about what is not usual."""
        return "-".join(word for word, said in self.words().items() if said)

    def __str__(self) -> str:
        return self.id


class AppendCall:
    """The arguments on the host, each cut out of a larger array."""

    def __init__(self, case: AppendCase) -> None:
        self.padded, self.dtype = case.padded, DTYPES[case.dtype]
        self.page_size = case.page_size
        self.rng = rng = np.random.default_rng(zlib.crc32(case.id.encode()))
        seq_lens, new = (np.array(x, np.int32) for x in zip(*case.lengths, strict=True))
        needed = -(-seq_lens // case.page_size)
        self.pages, max_pages = int(needed.sum()) + 2, int(needed.max(initial=0)) + 1
        self.tables = np.resize(np.array(GARBAGE_PAGES, np.int32), (len(seq_lens), max_pages))
        free = iter(rng.permutation(self.pages))
        for row, count in zip(self.tables, needed, strict=True):
            row[:count] = [next(free) for _ in range(count)]
        self.seq_lens = seq_lens
        self.ends = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)

    def random(self, shape: tuple[int, ...]) -> Array:
        """Random bits, with more of them around the array if the case is padded."""
        if self.padded:
            shape = (*(n + 1 for n in shape[:-1]), shape[-1] + 8)
        return self.rng.integers(0, 1 << 16, shape, np.uint16).view(self.dtype)

    def cut(self, whole: Any) -> Any:
        """The part of an array that the call is given."""
        if not self.padded:
            return whole
        return whole[(*(slice(0, n - 1) for n in whole.shape[:-1]), slice(0, -8))]

    def places(self) -> Iterator[tuple[int, int, int]]:
        """Token, page and row in it, of every token that has a place."""
        for request, table in enumerate(self.tables):
            begin, end = map(int, self.ends[request : request + 2])
            for token in range(begin, end):
                entry, row = divmod(int(self.seq_lens[request]) - (end - token), self.page_size)
                page = table[entry] if 0 <= entry < len(table) else -1
                if 0 <= page < self.pages:
                    yield token, page, row
