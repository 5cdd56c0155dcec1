"""What a kernel is told at launch.  Twin of kernels/attention/params.cuh, byte for byte.

Pointers come first and change from call to call; the rest follows from the problem and its options
and is packed once.
"""

from __future__ import annotations

import struct

from ._records import Layout, Plan, Problem, SplitRule

POINTERS = (
    "q",
    "k",
    "v",
    "cu_seqlens_q",
    "cu_seqlens_kv",
    "seq_lens",
    "block_tables",
    "sinks",
    "scale_array",
    "out_scale_array",
    "thresholds",
    "seeds",
    "out",
    "lse",
    "skip_counts",
    "dropped_mass",
    "partial_out",
    "partial_rows",
    "arrivals",
)
STRIDES = ("q_strides", "k_strides", "v_strides", "out_strides", "lse_strides")  # outer, row, head
INTEGERS = (
    "batch",
    "q_heads",
    "group",
    "q_len",
    "kv_len",
    "q_blocks",
    "head_dim_qk",
    "head_dim_v",
    "page_shift",
    "pages",
    "causal",
    "window_left",
)
MORE = ("kv_heads", "items", "splitting")
FLOATS = ("scale", "out_scale", "soft_cap", "threshold")
FLAGS = ("threshold_per_length", "unsafe")

POINTER_BYTES = struct.Struct(f"={len(POINTERS)}Q")
STRIDES_AT = -(-POINTER_BYTES.size // 16) * 16  # loads of 16 bytes take two of them at a time
_FIELDS = f"={3 * len(STRIDES)}q3q{len(INTEGERS)}if2i{len(MORE)}i{len(FLOATS)}f{len(FLAGS)}i"
_ALIGNMENT = 64  # of the whole, and of what follows
_REST = struct.Struct(
    f"={STRIDES_AT - POINTER_BYTES.size}x{_FIELDS[1:]}"
    f"{-(STRIDES_AT + struct.calcsize(_FIELDS)) % _ALIGNMENT}x"
)
SIZE = POINTER_BYTES.size + _REST.size

_NO_SPLITS = SplitRule(0.0, 0, False)


def pack_rest(
    problem: Problem,
    plan: Plan,
    *,
    out: tuple[int, ...],
    lse: tuple[int, ...],
    tables: int,
    scale: float,
    out_scale: float,
    threshold: float,
) -> bytes:
    """Pack all that follows the pointers.

    `out` and `lse` are strides in elements, `tables` is the distance between two requests' rows of
    block_tables; `threshold` is λ, or λ·kv_len where the problem's skip mode says so.
    """
    skip = problem.skip
    live = skip.thresholds if skip else None
    splits = getattr(plan.geometry, "splits", _NO_SPLITS)
    form = problem.form
    return _REST.pack(
        *_outer_row_head(problem.q.strides, form),
        *_kv_strides(problem.k, form),
        *_kv_strides(problem.v, form),
        *_outer_row_head(out, form),
        *_outer_row_head((*lse, 1), form),
        tables,
        *_threshold_strides(live),
        problem.batch,
        problem.q_heads,
        problem.q_heads // problem.kv_heads,
        problem.q_len,
        problem.kv_len,
        plan.q_blocks,
        problem.head_dim_qk,
        problem.head_dim_v,
        max(problem.page_size.bit_length() - 1, 0),
        problem.k.shape[0] if problem.page_size else 0,
        problem.causal,
        problem.window_left,
        *(splits.share, splits.smallest, splits.alone),
        problem.kv_heads,
        plan.items,
        _splitting(plan),
        scale,
        out_scale,
        problem.soft_cap,
        threshold,
        bool(skip and skip.source == "scale_factor"),
        bool(skip and skip.unsafe),
    )


def _splitting(plan: Plan) -> int:
    """Return 0 if no request may be cut, and who merges its splits: 1 the last, 2 a kernel."""
    return any(plan.partials[:2]) and (1 if plan.merge is None else 2)


def _outer_row_head(strides: tuple[int, ...], form: str) -> tuple[int, int, int]:
    if form == "decode" and len(strides) == 3:  # one token a request
        return strides[0], 0, strides[1]
    if form in ("batched", "decode"):
        return strides[0], strides[1], strides[2]
    return 0, strides[0], strides[1]


def _kv_strides(layout: Layout, form: str) -> tuple[int, int, int]:
    if form in ("paged", "decode", "decode_ragged"):  # [pages, heads, page_size, dim]
        return layout.strides[0], layout.strides[2], layout.strides[1]
    return _outer_row_head(layout.strides, form)


def _threshold_strides(live: Layout | None) -> tuple[int, int]:
    if live is None:
        return 0, 0
    return live.strides[0], live.strides[1] if len(live.strides) == 2 else 0
