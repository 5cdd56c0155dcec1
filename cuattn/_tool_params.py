"""What the kernels that are no attention are compiled and launched with.

Twins of the structs at the heads of kernels/append_kv.cu, merge_states.cu and validate.cu, byte for
byte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import product
from typing import Any

from ._config import KernelConfig

MOST_PARTS = 32  # of one launch of merge_states
COLUMNS = 8  # of a thread of merge_states
SUMS = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_new")  # in the order of ValidateParams


# --- configurations ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AppendConfig(KernelConfig):
    """Configuration of append_kv: warps of a block, 16-byte vectors of a lane."""

    warps: int = 4
    vectors: int = 4

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps * 32

    @property
    def share(self) -> int:
        """Vectors of a warp."""
        return self.vectors * 32


@dataclass(frozen=True, slots=True)
class MergeConfig(KernelConfig):
    """Configuration of merge_states: dtypes, and whether a launch goes on from another one."""

    element: str = "bfloat16"
    output: str = "bfloat16"
    carried: bool = False
    threads: int = 256


@dataclass(frozen=True, slots=True)
class ValidateConfig(KernelConfig):
    """Configuration of validate: warps of a block."""

    warps: int = 4

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps * 32


def shipped_configs() -> list[tuple[str, Any]]:
    """Return the configurations that `python -m cuattn compile` makes for every architecture.

    Merges to another dtype than that of the parts are compiled at first use.
    """
    merges = (
        MergeConfig(element, output, carried)
        for element, carried in product(("bfloat16", "float16", "float32"), (False, True))
        for output in dict.fromkeys((element, "float32"))
    )
    return [
        ("append_kv", AppendConfig()),
        ("validate", ValidateConfig()),
        *(("merge_states", config) for config in merges),
    ]


# --- parameters ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parameters:
    """A parameter struct: pointers, which change from call to call, then numbers.

    `numbers` has the `struct` code of each field: "i" or "q" behind how many of them.
    """

    name: str  # in C++
    pointers: tuple[str, ...]
    numbers: Mapping[str, str]

    @property
    def pointer_bytes(self) -> struct.Struct:
        """The packer of the pointers."""
        return struct.Struct(f"={len(self.pointers)}Q")

    def pack(self, values: Mapping[str, int | Iterable[int]]) -> bytes:
        """Pack all numbers, given by name."""
        assert values.keys() == self.numbers.keys(), values.keys() ^ self.numbers.keys()
        flat: list[int] = []
        for name in self.numbers:
            value = values[name]
            flat += [value] if isinstance(value, int) else value
        return struct.pack("=" + "".join(self.numbers.values()), *flat)


APPEND = Parameters(
    "AppendParams",
    ("k", "v", "k_new", "v_new", "block_tables", "seq_lens", "cu_seqlens_new"),
    {
        **dict.fromkeys(("k_strides", "v_strides", "k_new_strides", "v_new_strides"), "3q"),
        "block_table_stride": "1q",
        **dict.fromkeys(("batch", "tokens", "tokens_each", "kv_heads"), "1i"),
        **dict.fromkeys(("k_vectors", "v_vectors", "k_shares", "v_shares"), "1i"),
        **dict.fromkeys(("page_shift", "pages", "max_pages", "unused"), "1i"),
    },
)

MERGE = Parameters(
    "MergeParams",
    (
        *(f"outs[{part}]" for part in range(MOST_PARTS)),
        *(f"lses[{part}]" for part in range(MOST_PARTS)),
        *("carried_out", "carried_lse", "out", "lse"),
    ),
    {
        **dict.fromkeys(("out_parts", "lse_parts"), f"{3 * MOST_PARTS}q"),
        **dict.fromkeys(("out_strides", "lse_strides"), "3q"),
        **dict.fromkeys(("parts", "rows", "inner", "heads", "row_threads", "block_rows"), "1i"),
    },
)

VALIDATE = Parameters(
    "ValidateParams",
    ("block_tables", "seq_lens", *(f"cu_seqlens[{i}]" for i in range(len(SUMS))), "findings"),
    {
        "block_table_stride": "1q",
        "tokens": f"{len(SUMS)}i",
        **dict.fromkeys(("new_each", "batch", "max_pages", "page_shift", "pages"), "1i"),
    },
)


class Fault(IntEnum):
    """What the kernel validate finds wrong."""

    none = 0
    start = 1
    decreasing = 2
    past_end = 3
    length = 4
    too_new = 5
    page = 6
