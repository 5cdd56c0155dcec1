"""Problem and device → plan.  Pure functions; the measurement stands beside each choice."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from . import _hopper
from ._config import (
    CHUNK,
    GROUP_ROWS,
    DecodeConfig,
    FmhaConfig,
    MergeSplitsConfig,
    MlaConfig,
    MlaPortableConfig,
)
from ._records import (
    DecodeGeometry,
    Device,
    Geometry,
    MlaGeometry,
    Plan,
    Problem,
    SkipMode,
    SplitRule,
    Step,
)

# Head dimensions that kernels are compiled for; others are rounded up and the rest is zeros.
HEAD_DIMS = (32, 64, 96, 128, 192, 256)

# Bytes of shared memory one block may use, by NVRTC target: `Device.shared_memory` there.
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90a": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
}
RESERVED = 1024  # bytes that the system takes of every block


# Whether Hopper's own prefill kernel is chosen where it can be.  Not yet: it has run in the
# emulator only, and nobody knows how fast it is.
HOPPER_PREFILL = False


def prefill(problem: Problem, device: Device) -> Plan:
    """Choose kernel, configuration and grid of one prefill call."""
    if HOPPER_PREFILL and device.arch == "sm_90a" and _hopper.fits(problem):
        return hopper_prefill(problem, device)
    return portable_prefill(problem, device)


@lru_cache(maxsize=4096)
def portable_prefill(problem: Problem, device: Device) -> Plan:
    """Make the plan of a call of `fmha_sm80`."""
    head_dim_qk, head_dim_v = round_up(problem.head_dim_qk), round_up(problem.head_dim_v)
    config, reason = portable_tile(
        head_dim_qk, head_dim_v, problem.soft_cap > 0, device.arch, device.shared_memory
    )
    config = replace(config, **_prefill_options(problem))
    rows = config.block_q
    q_blocks, blocks = _row_blocks(problem, rows)
    geometry = Geometry(rows, config.block_kv, config.rows_per_warp, pack_rows=rows)
    return Plan(
        kernel="fmha_sm80",
        config=config,
        q_blocks=q_blocks,
        grid=(blocks, 1, 1),
        threads=config.threads,
        shared_memory=config.shared_memory,
        geometry=geometry,
        reason=reason + _packing(problem, geometry),
    )


def _prefill_options(problem: Problem) -> dict[str, Any]:
    """Return the fields of a prefill kernel's configuration that do not depend on its tiles."""
    return {
        "element": problem.q.dtype,
        "output": problem.out_dtype,
        "paged": problem.form == "paged",
        "soft_cap": problem.soft_cap > 0,
        "skip_softmax": problem.skip is not None,
        "certificate": problem.skip is not None and problem.skip.certificate,
    }


def round_up(head_dim: int) -> int:
    """Return the smallest compiled head dimension that holds `head_dim`."""
    return next(dim for dim in HEAD_DIMS if dim >= head_dim)


def _row_blocks(problem: Problem, block_q: int) -> tuple[int, int]:
    """Return the blocks of rows of a head (and, batched, of a request), and of all."""
    if problem.form == "batched":
        q_blocks = -(-problem.q_len // block_q)
        return q_blocks, q_blocks * problem.q_heads * problem.batch
    # Each request may end with one block that is not full.
    q_blocks = problem.q_len // block_q + problem.batch if problem.q_len else 0
    return q_blocks, q_blocks * problem.q_heads


def _packing(problem: Problem, geometry: Geometry) -> str:
    """Say what a block has if heads share it; in other forms, lengths on the device decide."""
    pack = geometry.pack(problem.q_len, problem.q_heads // problem.kv_heads)
    if problem.form != "batched" or pack == 1:
        return ""
    return f", {geometry.tokens(pack)} tokens of all {pack} heads of a kv head a block"


def portable_tile(
    head_dim_qk: int, head_dim_v: int, soft_cap: bool, arch: str, shared_memory: int
) -> tuple[FmhaConfig, str]:
    """Return tile sizes, and the reason for them.

    TFLOP/s on an H200, bf16, causal 16k unless said otherwise (rows a warp × keys a tile):
      128/128  32 × 64: 353    32 × 32: 315    16 × 64: 274    16 × 128: 323
      192/128  32 × 48: 345    32 × 32: 311    32 × 64, one block: 308
      64/64    32 × 128: 327   32 × 64: 282
      256/256  (4 × 4096) 16 × 64: 266    16 × 32: 220
    """
    dims = FmhaConfig(head_dim_qk=head_dim_qk, head_dim_v=head_dim_v)
    if head_dim_v > 128:
        # The output of 32 rows would not fit the registers; eight warps fill a multiprocessor.
        tiles = [replace(dims, rows_per_warp=16, block_kv=keys) for keys in (64, 32)]
        reason = "16 rows a warp (head_dim_v > 128)"
        blocks = 1
    else:
        # 32 rows a warp halve the traffic of K and V from shared memory to the tensor cores.
        reason = "32 rows a warp"
        sizes: tuple[int, ...] = (64, 32)
        if max(head_dim_qk, head_dim_v) <= 64 and arch == "sm_90a":
            sizes = (128, 64, 32)  # for sm_100, ptxas spills
        if arch != "sm_90a" and (head_dim_qk > 128 or head_dim_v > 96):
            sizes = (32,)  # with more keys, ptxas spills for some of these targets
        elif head_dim_qk > 128:
            sizes = (48, 32)  # of 64 keys, two blocks do not fit
        elif soft_cap:  # tanh takes registers that the largest tile does not leave
            sizes, reason = sizes[1:], "32 rows a warp, a smaller tile for the soft cap"
        tiles = [replace(dims, rows_per_warp=32, block_kv=keys) for keys in sizes]
        blocks = 2
    for count in range(blocks, 0, -1):  # four warps alone cannot hide their own latencies
        for tile in tiles:
            if count * (tile.shared_memory + RESERVED) <= shared_memory + RESERVED:
                return tile, f"{reason}, {count} blocks a multiprocessor by shared memory"
    small = replace(dims, rows_per_warp=16, block_kv=32, block_q=64)
    assert small.shared_memory <= shared_memory, f"{small} does not fit {shared_memory} bytes"
    return small, "64 rows a block: no larger tile fits the shared memory"


# --- prefill on Hopper ----------------------------------------------------------------------------

HOPPER_KERNEL = "fmha_sm90"
HOPPER_LONG = 8192  # keys of a request, where all have as many


@lru_cache(maxsize=4096)
def hopper_prefill(problem: Problem, device: Device) -> Plan:
    """Make the plan of a call of `fmha_sm90`: blocks stay and take items one by one."""
    # Elsewhere kv_len is of all requests together or a bound: bits must not depend on these.
    long = problem.form == "batched" and problem.kv_len >= HOPPER_LONG
    full = not problem.causal and problem.window_left < 0
    config = replace(
        _hopper.tile(problem.head_dim_qk, problem.head_dim_v, device.shared_memory, full and long),
        **_prefill_options(problem),
    )
    q_blocks, items = _row_blocks(problem, config.block_q)
    where = "registers" if config.q_in_registers else "shared memory"
    geometry = Geometry(config.block_q, config.block_kv, GROUP_ROWS, pack_rows=GROUP_ROWS)
    return Plan(
        kernel=HOPPER_KERNEL,
        config=config,
        q_blocks=q_blocks,
        grid=(min(items, device.multiprocessors), 1, 1),
        threads=config.threads,
        shared_memory=config.shared_memory,
        geometry=geometry,
        reason=f"{config.consumers} warp-groups compute, Q in {where}, "
        "one block a multiprocessor by registers" + _packing(problem, geometry),
        items=items,
        partials=(0, 0, 4),
    )


# --- decode ---------------------------------------------------------------------------------------

SLOT_BYTES = 12_288  # of keys or values, at most; two a warp are in flight
WAVES = 4  # parts of the load for every place, where blocks are small
LINE = 32  # blocks in line for every place; if there may be more items, blocks do several
WARPS = 8  # of a block, and of one of two to a multiprocessor:
SMALL_WARPS = 4
MANY_ITEMS = 6  # to a multiprocessor
SMALLEST_SPLIT = 256  # keys
SMALLEST_INVARIANT_SPLIT = 2048


@lru_cache(maxsize=4096)
def decode(problem: Problem, device: Device) -> Plan:
    """Choose kernel, configuration, splits and grid of one decode call."""
    group = problem.q_heads // problem.kv_heads
    rows = _decode_rows(problem, group)
    if problem.form == "decode":
        row_blocks = problem.batch * -(-problem.q_len * group // rows)
    else:  # each request may end with a block of rows that is not full
        row_blocks = problem.tokens * group // rows + problem.batch
    whole = row_blocks * problem.kv_heads  # items, if no request is cut
    config = _decode_config(problem, device, rows, whole)
    places = config.blocks * device.multiprocessors
    # Small blocks share a multiprocessor, so the last ones are slow: finer loads end together.
    loads = places if config.blocks == 1 else WAVES * places
    rule, most, items = _splits(problem, whole, loads, SMALLEST_SPLIT)
    return Plan(
        kernel="decode",
        config=config,
        q_blocks=row_blocks,
        grid=(min(items, LINE * places) if problem.tokens else 0, 1, 1),
        threads=config.threads,
        shared_memory=config.shared_memory,
        geometry=DecodeGeometry(rows, config.block_kv, config.warps, rule),
        reason=f"{config.warps} warps, {config.blocks} blocks a multiprocessor, "
        f"at most {most} splits",
        items=items,
        partials=_partials(problem, rows, whole, items) if most > 1 else (0, 0, 0),
    )


def _splits(problem: Problem, whole: int, loads: int, smallest: int) -> tuple[SplitRule, int, int]:
    """Return the rule, into how many parts it cuts a request at most, and how many items it makes.

    `whole` items are there if no request is cut; the load of all is cut into `loads` parts.
    """
    alone = problem.batch_invariant
    smallest = SMALLEST_INVARIANT_SPLIT if alone else smallest
    rule = SplitRule(float(np.float32(problem.kv_heads / loads)), smallest, alone)
    # No more parts of one load or more than there are loads, and of a request than its keys allow.
    most = min(max(loads // problem.kv_heads, 1), max(_most_keys(problem) // smallest, 1))
    more = whole * (most - 1)
    return rule, most, whole + (more if alone else min(more, loads + problem.kv_heads))


def _partials(problem: Problem, rows: int, whole: int, items: int) -> tuple[int, int, int]:
    """Return the bytes of partial_out, partial_rows and arrivals."""
    return items * rows * problem.head_dim_v * 4, items * rows * 16, whole * 4


def _most_keys(problem: Problem) -> int:
    """Return how many keys a request sees at most."""
    if problem.window_left < 0:
        return problem.kv_len
    tokens = problem.q_len if problem.form == "decode" else problem.tokens
    return min(problem.kv_len, problem.window_left + tokens)


def _decode_rows(problem: Problem, group: int) -> int:
    """Return the rows of a block, by the rows of a request."""
    tokens = problem.q_len
    if problem.form == "decode_ragged":
        tokens = -(-problem.tokens // max(problem.batch, 1))
    dims = round_up(problem.head_dim_qk), round_up(problem.head_dim_v)
    # More would not fit the registers; at 96 ptxas spills, though not at 128.
    return 32 if tokens * group > 16 and max(dims) <= 128 and max(dims) != 96 else 16


def _decode_config(problem: Problem, device: Device, rows: int, items: int) -> DecodeConfig:
    # Many items tend to be short: two small blocks then hide each other's beginning and end.
    # Of 1024 items of 2048 keys 4.12 TB/s against 3.96; of 256 items of 65536 keys 4.48 against
    # 4.52, and of ragged ones 3.99 against 4.41 (H200).
    many = items > MANY_ITEMS * device.multiprocessors and not problem.batch_invariant
    config = decode_tile(
        round_up(problem.head_dim_qk),
        round_up(problem.head_dim_v),
        rows,
        SMALL_WARPS if many else WARPS,
        device.shared_memory,
    )
    return replace(
        config,
        element=problem.q.dtype,
        output=problem.out_dtype,
        soft_cap=problem.soft_cap > 0,
        **_skipping(problem.skip),
    )


def _skipping(skip: SkipMode | None) -> dict[str, bool]:
    """Return the fields of a decode kernel's configuration that say how it skips."""
    by_mass = skip is not None and skip.source == "dropped_mass"
    masses = skip is not None and (by_mass or skip.certificate)
    return {"skip_softmax": skip is not None, "masses": masses, "mass_rule": by_mass}


def decode_tile(
    head_dim_qk: int, head_dim_v: int, rows: int, warps: int, shared_memory: int
) -> DecodeConfig:
    """Return the geometry of a decode kernel: keys a tile, warps, blocks to a multiprocessor."""
    row_bytes = max(head_dim_qk, head_dim_v, CHUNK) * 2
    # Two row tiles of scores and of waiting probabilities leave registers for 32 keys only.
    keys = min(64 if rows == 16 else 32, 1 << (SLOT_BYTES // row_bytes).bit_length() - 1)
    if row_bytes > 256 and shared_memory < SHARED_MEMORY["sm_80"]:
        keys = 16
    config = DecodeConfig(
        head_dim_qk=head_dim_qk,
        head_dim_v=head_dim_v,
        rows=rows,
        block_kv=keys,
        warps=warps,
    )
    while config.shared_memory > shared_memory:
        config = replace(config, warps=config.warps // 2)
    fitting = (shared_memory + RESERVED) // (config.shared_memory + RESERVED)
    return replace(config, blocks=min(fitting, WARPS // config.warps))


# --- MLA decode -----------------------------------------------------------------------------------

MLA_HOPPER = "mla_decode_sm90"
MLA_PORTABLE = "mla_decode_sm80"
MLA_ROWS = 64  # of Hopper's kernel: query rows, and keys a tile
MLA_PAGE_SIZES = (16, 32, 64, 128)  # that its bulk copies take
MLA_STAGES = 4  # tiles in shared memory, at most
# Two tiles: 1 × 8K then has 64 blocks at work instead of 32.  Reasoned, not yet measured.
SMALLEST_MLA_SPLIT = 128
# Bytes of parts that one block reads at most.  It reads about 120 GB/s (12 warps, 8 KB each on
# their way, 0.8 µs): 70 µs for the 8.6 MB of 66 splits, and for 0.5 MB what another launch takes,
# 4 µs.  Reasoned from whole calls (1 × 64K × 128 heads: 145 µs on an H200), not yet measured.
MOST_MERGED = 1 << 19


@lru_cache(maxsize=4096)
def mla_decode(problem: Problem, device: Device) -> Plan:
    """Choose kernel, configuration, splits and grid of one call of MLA decode."""
    dims = problem.head_dim_v, problem.head_dim_qk - problem.head_dim_v
    config: MlaConfig | MlaPortableConfig
    if device.arch == "sm_90a" and dims == (512, 64) and _suits_hopper(problem):
        kernel, rows, keys, votes = MLA_HOPPER, MLA_ROWS, MLA_ROWS, 1
        page = MLA_ROWS if problem.sparse else problem.page_size  # of lists, any will do
        config = MlaConfig(
            problem.q.dtype, problem.out_dtype, page, problem.sparse, **_skipping(problem.skip)
        )
    else:
        tile = mla_tile(*dims, _mla_rows(problem), device.shared_memory)
        kernel, rows, keys = MLA_PORTABLE, tile.rows, tile.block_kv
        votes = rows // tile.rows_per_warp  # of the warps that share rows
        config = replace(
            tile,
            element=problem.q.dtype,
            output=problem.out_dtype,
            sparse=problem.sparse,
            **_skipping(problem.skip),
        )
    if problem.sparse:  # a block has rows of one token
        row_blocks = problem.tokens * -(-problem.q_heads // rows) if problem.batch else 0
    elif problem.form == "decode":
        row_blocks = problem.batch * -(-problem.q_len * problem.q_heads // rows)
    else:  # each request may end with a block of rows that is not full
        row_blocks = problem.tokens * problem.q_heads // rows + problem.batch
    places = device.multiprocessors  # one block fills the shared memory
    rule, most, items = _splits(problem, row_blocks, places, SMALLEST_MLA_SPLIT)
    merge = _mla_merge(problem, rows, row_blocks, places, most)
    partials = _partials(problem, rows, row_blocks, items) if most > 1 else (0, 0, 0)
    arrivals = partials[2] if merge is None else 0
    blocks = min(items, LINE * places)
    if kernel == MLA_HOPPER:
        # Blocks that stay ask for the next item, with one counter more.
        blocks = items if problem.sparse else min(items, places)
        arrivals = arrivals if blocks == items else 4 * (row_blocks + 1)
    return Plan(
        kernel=kernel,
        config=config,
        q_blocks=row_blocks,
        grid=(blocks if problem.tokens else 0, 1, 1),
        threads=config.threads,
        shared_memory=config.shared_memory,
        geometry=MlaGeometry(rows // votes, keys, 1, rule, votes=votes),
        reason=f"{rows} rows and {keys} keys, one block a multiprocessor by shared memory, "
        f"at most {most} splits, merged by "
        f"{'their last block' if merge is None else 'a kernel of its own'}",
        items=items,
        partials=(*partials[:2], arrivals),
        merge=merge,
    )


def _suits_hopper(problem: Problem) -> bool:
    """Say whether Hopper's kernel does it: pages that bulk copies take, or lists for most rows.

    Up to 32 heads, a list is bound by memory: a tile of 74 KB takes a multiprocessor 2.4 µs at its
    share of 4 TB/s, and the portable kernel's products of 32 rows 1.6 µs.  At 64 rows these would
    take 3.1 µs, Hopper's less than 2.  Reasoned, not yet measured.
    """
    if problem.sparse:
        return _mla_rows(problem) == MLA_ROWS
    return problem.page_size in MLA_PAGE_SIZES and _hopper.describable(problem.k)


def _mla_merge(
    problem: Problem, block_rows: int, row_blocks: int, places: int, most: int
) -> Step | None:
    """Return the kernel that merges splits, if they are many for the last block to arrive.

    So many splits as requests of one length are cut into: `most` counts a single long one, too.
    """
    equal = -(-places // max(row_blocks, 1))
    splits = most if problem.batch_invariant else min(most, equal)
    rows = min(block_rows, (1 if problem.sparse else problem.q_len) * problem.q_heads)
    if splits * rows * problem.head_dim_v * 4 <= MOST_MERGED:
        return None
    config = MergeSplitsConfig(problem.out_dtype, block_rows, problem.head_dim_v, problem.sparse)
    return Step("merge_splits", config, row_blocks * rows, config.threads, 0)


def _mla_rows(problem: Problem) -> int:
    """Return the rows of a portable block, by those that read the same keys."""
    tokens = problem.q_len
    if problem.sparse:
        tokens = 1
    elif problem.form == "decode_ragged":
        tokens = -(-problem.tokens // max(problem.batch, 1))
    return next((rows for rows in (16, 32) if tokens * problem.q_heads <= rows), MLA_ROWS)


def mla_tile(latent: int, rope: int, rows: int, shared_memory: int) -> MlaPortableConfig:
    """Return the geometry of a portable MLA kernel: the largest tile of which two fit.

    16 rows a warp keep most of Q in registers; at 32 rows a warp every key and value that is read
    from shared memory serves twice as many products.
    """
    for here in (size for size in (64, 32, 16) if size <= rows):
        for keys in (64, 32):
            config = MlaPortableConfig(
                latent=latent,
                rope=rope,
                rows=here,
                rows_per_warp=32 if here == 64 else 16,
                block_kv=keys,
                warps=keys // 8 if here == 16 else 8,  # each has at least 8 keys
            )
            if config.shared_memory <= shared_memory:
                deeper = (replace(config, stages=n) for n in range(MLA_STAGES, 2, -1))
                return next((c for c in deeper if c.shared_memory <= shared_memory), config)
    raise AssertionError(f"no tile of MLA decode fits {shared_memory} bytes")
