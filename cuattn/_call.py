"""One attention call from views to result: check and plan the first time, then only launch.

Calls that look alike (shapes, strides, dtypes, options; anything but pointers) share a `_Prepared`
record.  Finding it is all that a call in steady state does besides allocating and launching.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16

from . import (
    _check,
    _check_mla,
    _device,
    _heuristics,
    _ingest,
    _launch,
    _overlap,
    _params,
    _tensor_map,
    _validate,
    _workspace,
)
from ._records import Device, Plan, Problem, SkipMode, View
from .skip_softmax import SkipKey, SkipSoftmax, skip_key_of

_DTYPES = {
    "bfloat16": np.dtype(bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


@dataclass(frozen=True, slots=True, eq=False)  # hashed by identity, which is quick
class Form:
    """One of the ways in which arrays hold requests; without the last array, one less."""

    check: Callable[..., Problem]
    plan: Callable[[Problem, Device], Plan]
    arrays: tuple[str, ...]  # names, in the order of the views
    decodes: bool = False
    tables: str = "block_tables"  # the array that says where keys lie, if the form has it


class Keywords(NamedTuple):
    """The keyword arguments that all forms share, as they came."""

    causal: Any
    window_left: Any
    scale: Any
    out_scale: Any
    soft_cap: Any
    sinks: Any
    skip: SkipSoftmax | None
    out: Any
    lse: Any
    out_dtype: Any
    batch_invariant: Any


class _Optional(NamedTuple):
    """Arrays that a call may do without."""

    sinks: View | None = None
    scale: View | None = None
    out_scale: View | None = None
    thresholds: View | None = None
    seeds: View | None = None
    out: View | None = None
    lse: View | None = None


class _Prepared(NamedTuple):
    """All that calls alike share."""

    launch: _launch.Launch
    out_shape: tuple[int, ...]
    out_dtype: np.dtype[Any]
    lse_shape: tuple[int, ...]
    batch: int
    q_heads: int
    partials: tuple[int, int, int] | None  # bytes
    extents: list[tuple[int, int]]  # of all views, outputs last


_PAGES = ("q", "kv_cache (k)", "kv_cache (v)", "block_tables", "seq_lens", "cu_seqlens_q")

BATCHED = Form(_check.batched, _heuristics.prefill, ("q", "k", "v"))
RAGGED = Form(
    _check.ragged, _heuristics.prefill, (*BATCHED.arrays, "cu_seqlens_q", "cu_seqlens_kv")
)
PAGED = Form(_check.paged, _heuristics.prefill, _PAGES)
DECODE = Form(_check.decode, _heuristics.decode, _PAGES, decodes=True)


@cache
def mla(latent: int | None, sparse: bool) -> Form:
    """Return the form of MLA decode with such a `latent_dim`, with `sparse_indices` or without."""
    tables = "sparse_indices" if sparse else "block_tables"
    return Form(
        partial(_check_mla.mla_decode_sparse if sparse else _check_mla.mla_decode, latent),
        _heuristics.mla_decode,
        ("q", "kv_cache", tables, *_PAGES[4:]),
        decodes=True,
        tables=tables,
    )


class _Asked(NamedTuple):
    """All of a call that is looked at when it is of a new kind."""

    form: Form
    views: tuple[View, ...]
    layout: str | None
    optional: _Optional
    given: Keywords
    skip_key: SkipKey | None
    return_lse: bool


_NONE = _Optional()
_NO_PARTIALS = (0, 0, 0)
_token = itemgetter(8)  # of a View
_prepared: dict[Any, _Prepared] = {}
_PREPARED_LIMIT = 4096  # token counts vary without end in a server: then begin anew


def attend(
    form: Form,
    views: tuple[View, ...],
    pointers: tuple[int, ...],
    given: tuple[Any, ...],
    return_lse: bool,
    stream: int | None,
    layout: str | None = None,
) -> Any:
    """Return the output of one call, or a tuple of it and what else was asked for.

    `pointers` are those of `_params.POINTERS` up to block_tables, 0 for what the form lacks;
    `given` holds the `Keywords`; `layout` is a paged cache's.
    """
    q = views[0]
    if q.device < 0:
        return _emulate(form, views, given, return_lse, layout)
    import cupy

    if q.device != cupy.cuda.runtime.getDevice():
        with cupy.cuda.Device(q.device):
            return attend(form, views, pointers, given, return_lse, stream, layout)

    (
        causal,
        window_left,
        scale,
        out_scale,
        soft_cap,
        sinks,
        skip,
        out,
        lse,
        out_dtype,
        batch_invariant,
    ) = given
    optional, skip_key = _NONE, None
    more: tuple[Any, ...] = ()
    sinks_at = scale_at = out_scale_at = thresholds_at = seeds_at = 0
    out_at = lse_at = counts_at = lost_at = 0
    if not (scale is out_scale is sinks is skip is out is lse is None):
        optional = _optional(form, given, stream, q)
        skip_key = skip_key_of(skip)
        if optional is not _NONE:
            more = tuple([view and view[8] for view in optional])
            sinks_at, scale_at, out_scale_at, thresholds_at, seeds_at, out_at, lse_at = [
                view.pointer if view else 0 for view in optional
            ]
            scale = None if scale_at else scale
            out_scale = None if out_scale_at else out_scale
    key = (
        form,
        layout,
        more,
        skip_key,
        (pointers[0] | pointers[1] | pointers[2] | out_at) & 15,
        causal,
        causal.__class__,  # 1 == True
        window_left,
        scale,
        out_scale,
        soft_cap,
        out_dtype,
        return_lse,
        batch_invariant,
        batch_invariant.__class__,
        *map(_token, views),
    )
    try:
        prepared = _prepared.get(key)
    except TypeError:  # an option of a type that has no hash: the checks say which
        prepared = None
    if prepared is None:
        prepared = _prepare(
            _Asked(form, views, layout, optional, Keywords(*given), skip_key, return_lse)
        )
        if len(_prepared) >= _PREPARED_LIMIT:
            _prepared.clear()
        _prepared[key] = prepared
    if _validate.checking:
        _validate.check_call(form.arrays, views, layout, stream)
    launch, out_shape, dtype, lse_shape, batch, q_heads, partials, extents = prepared

    every = [*views, *[view for view in optional if view]] if more else views
    if out_at or lse_at:
        outputs = (out_at != 0) + (lse_at != 0)
        if _overlap.near(every, extents, outputs):
            _check_overlap(form, views, optional)
    if skip_key and skip_key[3]:
        counts_at = skip.stats.counts(batch, q_heads, q.device).data.ptr
    current = cupy.cuda.get_current_stream().ptr
    new = _workspace.array if current and _launch.capturing(current) else cupy.ndarray
    if out is None:
        out = new(out_shape, dtype)
        out_at = out.data.ptr
    if lse is None and return_lse:
        lse = new(lse_shape, np.float32)
        lse_at = lse.data.ptr
    lost = None
    if skip_key and skip_key[4]:
        lost = new(lse_shape, np.float32)
        lost_at = lost.data.ptr
    places = (
        *pointers,
        sinks_at,
        scale_at,
        out_scale_at,
        thresholds_at,
        seeds_at,
        out_at,
        lse_at,
        counts_at,
        lost_at,
    )
    if stream is None and _launch.simple(every, current):
        launch((*places, *_room(partials, q.device, current)), current)
    else:
        order = _launch.Order(stream, current, every)
        order.before()
        launch((*places, *_room(partials, q.device, order.stream)), order.stream)
        order.after()
        _launch.hold(every, order.stream)
    return _results(out, lse if return_lse else None, lost)


def _room(partials: tuple[int, int, int] | None, device: int, stream: int) -> tuple[int, int, int]:
    return _NO_PARTIALS if partials is None else _workspace.partials(partials, device, stream)


def _results(out: Any, lse: Any, lost: Any) -> Any:
    """Return the output, or a tuple of it and what else was asked for."""
    if lse is None and lost is None:
        return out
    return tuple(x for x in (out, lse, lost) if x is not None)


def _emulate(
    form: Form,
    views: tuple[View, ...],
    given: tuple[Any, ...],
    return_lse: bool,
    layout: str | None,
) -> Any:
    """Do the same for CPU arrays, in the emulator; results are NumPy arrays."""
    from .emulator import _launch, _settings

    settings = _settings.current()
    keywords = Keywords(*given)
    optional, skip_key = _optional(form, given, None, views[0]), skip_key_of(keywords.skip)
    asked = _Asked(form, views, layout, optional, keywords, skip_key, return_lse)
    problem, plan, rest = _planned(asked, settings.device)
    if _validate.checking:
        _validate.check_call(form.arrays, views, layout, None)
    named = _check_overlap(form, views, optional)
    results: dict[str, Any] = {}
    if keywords.skip is not None and keywords.skip.stats is not None:
        counts = keywords.skip.stats.counts(problem.batch, problem.q_heads, views[0].device)
        results["skip_counts"] = counts
    for name, view, shape, dtype in (
        ("out", optional.out, problem.out_shape, _DTYPES[problem.out_dtype]),
        ("lse", optional.lse, problem.lse_shape, np.dtype(np.float32)),
    ):
        if view is not None:
            results[name] = _launch.array_of(view)
        elif name == "out" or return_lse:
            results[name] = np.full(shape, np.nan, dtype)
    if keywords.skip is not None and keywords.skip.certificate:
        results["dropped_mass"] = np.full(problem.lse_shape, np.nan, np.float32)
    for name, size, fill in zip(_params.POINTERS[-3:], plan.partials, (0x5A, 0x5A, 0), strict=True):
        if size:
            results[name] = np.full(size, fill, np.uint8)
    inputs = {name: view for name, view in named.items() if view is not None}
    maps = _tensor_map.maps_of(problem, plan)
    _launch.launch(plan.steps, _params.POINTERS, rest, inputs, results, settings, maps)
    out = results["out"] if keywords.out is None else keywords.out
    lse = None
    if return_lse:
        lse = results["lse"] if keywords.lse is None else keywords.lse
    return _results(out, lse, results.get("dropped_mass"))


def _optional(form: Form, given: tuple[Any, ...], stream: int | None, q: View) -> _Optional:
    """Return the views of the arrays among the keyword arguments."""
    _, _, scale, out_scale, _, sinks, skip, out, lse, _, _ = given
    threshold = seeds = None
    if skip is not None:
        _check_skip(form, skip)
        threshold = _ingest.number(skip.threshold, "skip_softmax.threshold", stream, q)
        if skip.seeds is not None:
            seeds = _ingest.view(skip.seeds, "skip_softmax.seeds", stream, q)
    scale = _ingest.number(scale, "scale", stream, q)
    out_scale = _ingest.number(out_scale, "out_scale", stream, q)
    optional = _Optional(
        None if sinks is None else _ingest.view(sinks, "sinks", stream, q),
        scale if isinstance(scale, View) else None,
        out_scale if isinstance(out_scale, View) else None,
        threshold if isinstance(threshold, View) else None,
        seeds,
        None if out is None else _ingest.view(out, "out", stream, q, True),
        None if lse is None else _ingest.view(lse, "lse", stream, q, True),
    )
    return optional if any(optional) else _NONE


def _check_skip(form: Form, skip: Any) -> None:
    if skip is None:
        return
    if not isinstance(skip, SkipSoftmax):
        raise TypeError(f"skip_softmax is a {type(skip).__name__}; wanted a SkipSoftmax")
    if not form.decodes:
        _check.refuse_decode_only(skip.max_dropped_mass, skip.seeds)


def _prepare(asked: _Asked) -> _Prepared:
    """Check a call of a new kind, plan it, and load its kernel on the current device."""
    device = _device.describe(asked.views[0].device)
    problem, plan, rest = _planned(asked, device)
    maps = [(_params.POINTERS.index(m.pointer), m) for m in _tensor_map.maps_of(problem, plan)]
    return _Prepared(
        _launch.prepare(plan.steps, device, _params.POINTER_BYTES, rest, maps),
        problem.out_shape,
        _DTYPES[problem.out_dtype],
        problem.lse_shape,
        problem.batch,
        problem.q_heads,
        plan.partials if any(plan.partials) else None,
        _overlap.extents([*asked.views, *filter(None, asked.optional)]),
    )


def _check_overlap(
    form: Form, views: tuple[View, ...], optional: _Optional
) -> dict[str, View | None]:
    """Return the inputs by name, none of which may share memory with an output."""
    named: dict[str, View | None] = dict(zip(form.arrays, views, strict=False))
    named |= dict(zip(_Optional._fields[:-2], optional[:-2], strict=True))
    _overlap.check_overlap({"out": optional.out, "lse": optional.lse}, named)
    return named


def problem_of(
    form: Form,
    views: tuple[View, ...],
    given: tuple[Any, ...],
    arrays: Mapping[str, View],
    return_lse: bool,
    layout: str | None = None,
) -> Problem:
    """Check a call before there is memory to point to; `arrays` holds the views of `_Optional`.

    Where `arrays` has a view, what `given` has of it counts for nothing.
    """
    keywords = Keywords(*given)
    _check_skip(form, keywords.skip)
    optional = _Optional(**arrays)
    skip_key = skip_key_of(keywords.skip)
    return _checked(_Asked(form, views, layout, optional, keywords, skip_key, return_lse))


def _checked(asked: _Asked) -> Problem:
    """Check a call of a new kind."""
    form, views, layout, optional, keywords, skip_key, return_lse = asked
    _check.flag("return_lse", return_lse)
    options = _check.Options(
        causal=keywords.causal,
        window_left=keywords.window_left,
        scale=optional.scale or keywords.scale,
        out_scale=optional.out_scale or keywords.out_scale,
        soft_cap=keywords.soft_cap,
        sinks=optional.sinks,
        skip=None
        if skip_key is None
        else SkipMode(skip_key[0], skip_key[1], stats=skip_key[3], certificate=skip_key[4]),
        thresholds=optional.thresholds,
        seeds=optional.seeds,
        out=optional.out,
        lse=optional.lse,
        out_dtype=keywords.out_dtype,
        batch_invariant=keywords.batch_invariant,
    )
    missing = (None,) * (len(form.arrays) - len(views))
    of_cache = (layout,) if form.tables in form.arrays else ()
    return form.check(*views, *missing, *of_cache, options)


def _planned(asked: _Asked, device: Device) -> tuple[Problem, Plan, bytes]:
    """Check and plan a call; return the packed parameters behind its pointers, too."""
    form, views, layout, optional, keywords, skip_key, _ = asked
    problem = _checked(asked)
    plan = form.plan(problem, device)
    out, lse = optional.out, optional.lse
    scale = problem.head_dim_qk**-0.5 if keywords.scale is None else keywords.scale
    out_scale = 1.0 if keywords.out_scale is None else keywords.out_scale
    rest = _params.pack_rest(
        problem,
        plan,
        out=_packed(problem.out_shape) if out is None else out.strides,
        lse=_packed(problem.lse_shape) if lse is None else lse.strides,
        tables=0 if layout is None else views[form.arrays.index(form.tables)].strides[-2],
        scale=float(scale) if optional.scale is None else 0.0,
        out_scale=float(out_scale) if optional.out_scale is None else 0.0,
        threshold=skip_key[2] if skip_key else 0.0,
    )
    return problem, plan, rest


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))
