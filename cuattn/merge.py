"""Partial attention results into one."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16

from . import _check_tools, _ingest, _launch, _overlap, _tools, _workspace
from ._overlap import ITEMSIZE
from ._records import Step, View
from ._tool_params import COLUMNS, MERGE, MOST_PARTS, MergeConfig

_DTYPES = {
    "bfloat16": np.dtype(bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
_Strides = tuple[int, int, int]

# Results of a round that goes on, which the replays of a graph write and read: its capture cannot
# tell how long that will be, so they stay.
_captured: list[Any] = []


class _Round(NamedTuple):
    """One launch: parts [first, end), on top of those before them."""

    job: _tools.Job
    first: int
    end: int


class _Plan(NamedTuple):
    rounds: tuple[_Round, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class _Parts(NamedTuple):
    """The views of a call."""

    outs: Sequence[View]
    lses: Sequence[View]
    out: View | None
    lse: View | None


def merge_states(
    outs: Any,
    lses: Any,
    *,
    out: Any = None,
    lse: Any = None,
    out_dtype: Any = None,
    stream: Any = None,
) -> Any:
    """Merge attention results of the same queries over disjoint sets of keys.

    With L the log-sum-exp over all parts, the output is ``Σ exp(lse - L) * out``. A part whose LSE
    is −∞ counts for nothing, whatever its output holds; a row of which that is true in every part
    is 0, its LSE −∞. Sums are float32 and the result is rounded once. Parts are merged in order,
    up to 32 in a launch; between launches the result so far is float32, so that a longer list costs
    bandwidth, and another float32 rounding for every 32 parts.

    Parameters
    ----------
    outs : sequence of arrays ``[…, heads, head_dim]``, or one array ``[parts, …, heads, head_dim]``
        Of 2 to 4 axes each: ``[tokens, heads, head_dim]``, ``[batch, seq, heads, head_dim]``, …;
        bfloat16, float16 or float32, all alike. `head_dim` is a multiple of 8, up to 2048.
    lses : sequence of arrays, or one array
        float32, natural logarithm, of the same shapes without head_dim. The sink of a head, if any,
        must be in one part only.
    out : array of the shape of a part, optional
        Written in place and returned as it is; shares no memory with a part.
    lse : array, float32, optional
        The same for the log-sum-exp.
    out_dtype : dtype, optional
        bfloat16, float16 or float32; that of the parts by default.
    stream : int or object with ``__cuda_stream__`` or ``ptr``, optional
        As in `prefill`.

    Returns
    -------
    pair of cupy.ndarray
        The output and its log-sum-exp.

    Raises
    ------
    ValueError, TypeError
        Before anything is launched, naming the argument, what came and what was wanted.

    Examples
    --------
    >>> import cupy, cuattn                                                 # doctest: +SKIP
    >>> q = cupy.ones((1, 5, 8, 64), "float16")                            # doctest: +SKIP
    >>> k = cupy.random.rand(1, 200, 8, 64).astype("float16")              # doctest: +SKIP
    >>> halves = [k[:, :90], k[:, 90:]]                                    # doctest: +SKIP
    >>> parts = [cuattn.prefill(q, x, x, return_lse=True) for x in halves]  # doctest: +SKIP
    >>> out, lse = cuattn.merge_states(*zip(*parts))                       # doctest: +SKIP
    >>> out.shape, lse.shape                                               # doctest: +SKIP
    ((1, 5, 8, 64), (1, 5, 8))
    """
    launch = None if stream is None else _ingest.stream_handle(stream)
    out_views = _part_views(outs, "outs", launch, None)
    like = out_views[0]
    parts = _Parts(
        out_views,
        _part_views(lses, "lses", launch, like),
        None if out is None else _ingest.view(out, "out", launch, like, True),
        None if lse is None else _ingest.view(lse, "lse", launch, like, True),
    )
    if _tools.on_host(like):
        made = _emulate(parts, out_dtype)
    else:
        with _tools.on(like[4]):
            made = _launched(parts, out_dtype, launch)
    return (made[0] if out is None else out), (made[1] if lse is None else lse)


def _part_views(x: Any, name: str, stream: int | None, like: View | None) -> list[View]:
    """Return the views of a sequence of arrays, or of the slices of a stacked one."""
    if isinstance(x, (list, tuple)) and x:
        return [_ingest.view(part, f"{name}[{i}]", stream, like) for i, part in enumerate(x)]
    if isinstance(x, (list, tuple)):
        raise ValueError(f"{name} is empty; wanted at least one part")
    whole = _ingest.view(x, name, stream, like)
    pointer, shape, strides, dtype, *rest = whole
    if not shape or not shape[0]:
        raise ValueError(f"{name} has shape {shape}; wanted [parts, …] with at least one part")
    step = strides[0] * ITEMSIZE.get(dtype, 1)
    part = (shape[1:], strides[1:], dtype, *rest)
    return [tuple.__new__(View, (pointer + i * step, *part)) for i in range(shape[0])]


def _launched(parts: _Parts, out_dtype: Any, stream: int | None) -> tuple[Any, Any]:
    """Plan a call of a new kind, and launch its rounds on the current device."""
    import cupy

    outs, lses, out, lse = parts
    given = [view for view in (out, lse) if view]
    views = [*outs, *lses, *given]
    key = (
        merge_states,
        out_dtype,
        len(outs),
        out is None,
        lse is None,
        _tools.alignment([*outs, out] if out else outs),
        *map(_tools.layout_of, views),
    )
    plan, launches = _tools.kept(key, lambda: _prepared(parts, out_dtype))
    if given:
        _check_overlap(parts)
    current = cupy.cuda.get_current_stream().ptr
    captured = current and _launch.capturing(current)
    new = _workspace.array if captured else cupy.ndarray
    made_out: Any = new(plan.shape, plan.dtype) if out is None else None
    made_lse: Any = new(plan.shape[:-1], np.float32) if lse is None else None
    last = (out[0] if out else made_out.data.ptr, lse[0] if lse else made_lse.data.ptr)
    between = [_between(plan, new) for _ in plan.rounds[1:]]
    ends = [*((x.data.ptr, y.data.ptr) for x, y in between), last]
    begins = [(0, 0), *ends[:-1]]
    sent = [
        (run, _places(parts, step, begin, end))
        for run, step, begin, end in zip(launches, plan.rounds, begins, ends, strict=True)
    ]
    _launch.send(sent, views, stream)
    if between and _tools.captured(stream, views):
        _captured.extend(between)
    return made_out, made_lse


def _prepared(parts: _Parts, out_dtype: Any) -> tuple[_Plan, list[_launch.Launch]]:
    plan = _plan(parts, out_dtype)
    return plan, [step.job.prepare(_packer(step.end - step.first)) for step in plan.rounds]


def _packer(parts: int) -> struct.Struct:
    """Return the packer of the pointers of so many parts; it zeroes those of the others."""
    rest = (MOST_PARTS - parts) * 8
    return struct.Struct(f"={parts}Q{rest}x{parts}Q{rest}x4Q")


def _places(
    parts: _Parts, step: _Round, begin: tuple[int, int], end: tuple[int, int]
) -> tuple[int, ...]:
    """Return the pointers of one round, whose result goes to `end`."""
    outs = [view[0] for view in parts.outs[step.first : step.end]]
    lses = [view[0] for view in parts.lses[step.first : step.end]]
    return (*outs, *lses, *begin, *end)


def _between(plan: _Plan, empty: Any) -> tuple[Any, Any]:
    """Make room for what one round hands to the next."""
    return empty(plan.shape, np.float32), empty(plan.shape[:-1], np.float32)


def _emulate(parts: _Parts, out_dtype: Any) -> tuple[Any, Any]:
    """Do the same for CPU arrays, in the emulator."""
    from .emulator._launch import array_of

    plan = _plan(parts, out_dtype)
    _check_overlap(parts)
    before: dict[str, View] = {}
    result = {}
    for step in plan.rounds:
        inputs = dict(before)
        for name, views in (("outs", parts.outs), ("lses", parts.lses)):
            chosen = views[step.first : step.end]
            inputs |= {f"{name}[{i}]": view for i, view in enumerate(chosen)}
        if step is plan.rounds[-1]:
            out = array_of(parts.out) if parts.out else np.full(plan.shape, np.nan, plan.dtype)
            shape = plan.shape[:-1]
            lse = array_of(parts.lse) if parts.lse else np.full(shape, np.nan, np.float32)
        else:
            out, lse = _between(plan, np.empty)
        result = {"out": out, "lse": lse}
        step.job.emulate(inputs, result)
        before = {f"carried_{name}": _ingest.view(x, name) for name, x in result.items()}
    return result["out"], result["lse"]


def _check_overlap(parts: _Parts) -> None:
    """Raise ValueError if a result shares memory with a part, or with the other one."""
    inputs = {f"outs[{i}]": view for i, view in enumerate(parts.outs)}
    inputs |= {f"lses[{i}]": view for i, view in enumerate(parts.lses)}
    _overlap.check_overlap({"out": parts.out, "lse": parts.lse}, inputs)


# --- the plan ------------------------------------------------------------------------------------


def _plan(parts: _Parts, out_dtype: Any) -> _Plan:
    """Check a call and cut it into rounds."""
    outs, lses, out, lse = parts
    dtype = _check_tools.merge(outs, lses, out, lse, out_dtype)
    shape = outs[0].shape
    packed = (_packed(shape)[:-1], _packed(shape[:-1]))
    given = (out.strides[:-1] if out else packed[0], lse.strides if lse else packed[1])
    rounds = []
    for first in range(0, len(outs), MOST_PARTS):
        end = min(first + MOST_PARTS, len(outs))
        last = end == len(outs)
        config = MergeConfig(outs[0].dtype, dtype if last else "float32", first > 0)
        job = _job(config, outs[first:end], lses[first:end], given if last else packed)
        rounds.append(_Round(job, first, end))
    return _Plan(tuple(rounds), shape, _DTYPES[dtype])


def _job(
    config: MergeConfig,
    outs: Sequence[View],
    lses: Sequence[View],
    to: tuple[tuple[int, ...], tuple[int, ...]],
) -> _tools.Job:
    """Pack one round, which writes to strides `to` of out and lse."""
    *_, inner, heads = (1, 1, *outs[0].shape[:-1])
    rows = math.prod(outs[0].shape[:-1])
    row_threads = outs[0].shape[-1] // COLUMNS
    block_rows = config.threads // row_threads
    rest = MERGE.pack(
        {
            "out_parts": list(_padded(view.strides[:-1] for view in outs)),
            "lse_parts": list(_padded(view.strides for view in lses)),
            "out_strides": _outer_row_head(to[0]),
            "lse_strides": _outer_row_head(to[1]),
            "parts": len(outs),
            "rows": rows,
            "inner": inner,
            "heads": heads,
            "row_threads": row_threads,
            "block_rows": block_rows,
        }
    )
    step = Step("merge_states", config, -(-rows // block_rows), config.threads, 0)
    return _tools.Job(step, MERGE, rest)


def _outer_row_head(strides: Sequence[int]) -> _Strides:
    """Return the distances of [outer, row, head], of which the first may be missing."""
    outer, row, head = (0, 0, *strides)[-3:]
    return outer, row, head


def _padded(parts: Any) -> Iterator[int]:
    """Yield the strides of every part, and zeros for those that a launch has room for besides."""
    count = 0
    for strides in parts:
        yield from _outer_row_head(strides)
        count += 1
    yield from (0,) * 3 * (MOST_PARTS - count)


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))
