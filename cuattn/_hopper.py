"""Hopper's prefill kernel: which calls it can take, and in what tiles.  Figures beside each choice.

Those of the prototype are of a throw-away kernel of the same schedule; ours is not yet measured.
"""

from __future__ import annotations

from dataclasses import replace

from ._config import FmhaHopperConfig
from ._records import Layout, Problem

HEAD_DIMS = (64, 96, 128, 192, 256)  # it is compiled for; others are rounded up
SMALLEST_PAGE = 8  # rows that the swizzle repeats after
LARGEST_STRIDE = (1 << 40) - 1  # bytes, of a tensor map
ACCUMULATORS = 200  # registers for S, P and O that leave a thread of 232 enough for the rest
WITH_QUERIES = 192  # the same with Q; of 208 ptxas spills


def fits(problem: Problem) -> bool:
    """Say whether tensor maps can describe the arrays of a call."""
    if problem.form == "paged" and problem.page_size < SMALLEST_PAGE:
        return False
    return all(map(describable, (problem.q, problem.k, problem.v)))


def describable(array: Layout) -> bool:
    """Say whether a tensor map can have an array's strides."""
    return 0 in array.shape or all(
        size == 1 or 0 < 2 * stride <= LARGEST_STRIDE
        for size, stride in zip(array.shape[:-1], array.strides[:-1], strict=True)
    )


def tile(
    head_dim_qk: int, head_dim_v: int, shared_memory: int, tall: bool = False
) -> FmhaHopperConfig:
    """Return rows and keys of a tile; `tall`: there are many keys, and every row sees them all.

    A thread holds S and P of keys / 2 and keys / 4 registers, O of head_dim_v / 2, and Q of
    head_dim_qk / 4 where there is room.  Bytes are those of shared memory.
      64/64     192 × 128  128 registers, Q shared     88 K   prototype: 515 to 575 against 460 to
                                                              482 TFLOP/s with 128 rows (causal 16k)
      96/96     128 × 128  168 with Q                 160 K
      128/128   128 × 128  192 with Q                 160 K   prototype: causal 757 to 765, full 693
                                                              to 761; Q shared 1.7 % less, 176 keys
                                                              4 %
        tall    192 × 80   124, Q shared              128 K   prototype: 741 to 755, 727 to 764
      192/128   128 × 128  160, Q shared              208 K   prototype: 790; 112 keys: 682
      192/192   128 × 96   168, Q shared              192 K
      256/256   128 × 80   188, Q shared              224 K   prototype: 798
    """
    dims = FmhaHopperConfig(
        head_dim_qk=_round_up(head_dim_qk),
        head_dim_v=_round_up(head_dim_v),
    )
    if max(dims.head_dim_qk, dims.head_dim_v) == 64:
        return replace(dims, consumers=3, q_in_registers=False)
    if tall and max(dims.head_dim_qk, dims.head_dim_v) == 128:
        return replace(dims, consumers=3, block_kv=80, q_in_registers=False)
    for keys in (128, 96, 80):
        config = replace(dims, block_kv=keys)
        registers = keys // 2 + keys // 4 + dims.head_dim_v // 2
        if registers <= ACCUMULATORS and config.shared_memory <= shared_memory:
            break
    return replace(config, q_in_registers=registers + config.head_dim_qk // 4 <= WITH_QUERIES)


def _round_up(head_dim: int) -> int:
    return next(dim for dim in HEAD_DIMS if dim >= head_dim)
