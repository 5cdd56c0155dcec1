"""Arguments of one call under JAX → operands, views and results; see `_jax_call`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import cuattn

from .. import _call, _check, _check_tools
from .._records import Problem, View
from ..skip_softmax import SkipSoftmax, SkipStats
from ._jax_call import (
    LIVE,
    Call,
    Operands,
    Result,
    bind,
    cache_operands,
    counts_result,
    operand,
    view,
)

_MARK = object()  # stands for a part of a SkipSoftmax that is an operand


@dataclass(frozen=True)
class Asked:
    """A call of attention, but for its arrays and options."""

    function: str
    form: _call.Form
    return_lse: bool
    return_counts: bool = False
    requests: frozenset[str] = frozenset()  # see `bind`
    more: tuple[tuple[str, Any], ...] = ()  # options of this function alone

    def attend(self, operands: Operands, given: tuple[Any, ...], layout: str | None = None) -> Any:
        """Return the result, or a tuple of them; `given` holds the `_call.Keywords`."""
        keywords = _call.Keywords(*given)
        live = {
            name: operand(value, name)
            for name in ("scale", "out_scale", "sinks")
            if not isinstance(value := getattr(keywords, name), Real) and value is not None
        }
        keywords = keywords._replace(**dict.fromkeys(live))
        self._check_counting(keywords.skip)
        skip = keywords.skip
        if isinstance(skip, SkipSoftmax):
            arrays = {
                name: operand(value, f"skip_softmax.{name}")
                for name in LIVE
                if not isinstance(value := getattr(skip, name), Real | None)
            }
            live |= arrays
            marks: dict[str, Any] = dict.fromkeys(arrays, _MARK)
            keywords = keywords._replace(skip=replace(skip, **marks))
        results = self._bound({**operands, **live}, keywords, layout)
        return results[0] if len(results) == 1 else results

    def _check_counting(self, skip: Any) -> None:
        """Raise ValueError for counters that a pure function cannot have."""
        _check.flag("return_counts", self.return_counts)
        if self.return_counts and skip is None:
            raise ValueError("return_counts is True without skip_softmax; wanted both or neither")
        if getattr(skip, "stats", None) is not None:
            raise ValueError(
                "skip_softmax has stats, which count in place; wanted stats=None and "
                "return_counts=True under JAX"
            )

    def _bound(
        self, operands: Operands, keywords: _call.Keywords, layout: str | None
    ) -> tuple[Any, ...]:
        problem = self._problem(operands, keywords, layout)
        skip = keywords.skip
        results = [Result("out", problem.out_shape, problem.out_dtype)]
        if self.return_lse:
            results.append(Result("lse", problem.lse_shape, "float32"))
        if skip is not None and skip.certificate:
            results.append(Result("lost", problem.lse_shape, "float32"))
        if self.return_counts:
            results.append(counts_result(problem.batch, problem.q_heads))
        options = {
            **keywords._asdict(),
            "layout": layout,
            "out_dtype": problem.out_dtype,
            "return_lse": self.return_lse,
        }
        taken = set(inspect.signature(getattr(cuattn, self.function)).parameters)
        taken -= {"out", "lse", "stream", "skip_softmax", *operands}
        chosen = tuple((name, value) for name, value in options.items() if name in taken)
        chosen += self.more
        call = Call(self.function, chosen, tuple(results), skip)

        def again(operands: Operands) -> tuple[Any, ...]:
            return self._bound(operands, keywords, layout)

        requests = self.requests | set(LIVE) if self.requests else self.requests
        return bind(call, operands, again, requests)

    def _problem(self, operands: Operands, keywords: _call.Keywords, layout: str | None) -> Problem:
        named = {name: name for name in ("sinks", "scale", "out_scale", "seeds")}
        named["threshold"] = "thresholds"
        live = {named[name]: view(x) for name, x in operands.items() if name in named}
        if self.return_counts and isinstance(keywords.skip, SkipSoftmax):
            keywords = keywords._replace(skip=replace(keywords.skip, stats=SkipStats()))
        views = self._views(operands)
        return _call.problem_of(self.form, views, keywords, live, self.return_lse, layout)

    def _views(self, operands: Operands) -> tuple[View, ...]:
        q = view(operands["q"])
        if "kv_cache" not in operands:
            return (q, *[view(operands[name]) for name in self.form.arrays[1:]])
        if self.function == "mla_decode":
            caches: tuple[View, ...] = (_check_tools.mla_cache(view(operands["kv_cache"])),)
        else:
            caches = cache_views(operands["kv_cache"])
        ends = operands["cu_seqlens_q"]
        rest = (view(operands[self.form.tables]), view(operands["seq_lens"]))
        return (q, *caches, *rest, *(() if ends is None else (view(ends),)))


def paged_operands(
    q: Any, kv_cache: Any, block_tables: Any, seq_lens: Any, cu_seqlens_q: Any
) -> Operands:
    """Return the operands of attention over a paged cache; the caller says which may be None."""
    optional = {"block_tables": block_tables, "cu_seqlens_q": cu_seqlens_q}
    return {
        "q": operand(q, "q"),
        "kv_cache": cache_operands(kv_cache),
        "seq_lens": operand(seq_lens, "seq_lens"),
        **{name: None if x is None else operand(x, name) for name, x in optional.items()},
    }


def decode_requests(operands: Operands) -> frozenset[str]:
    """Return the operands of decode whose first axis counts requests, if others do not."""
    ragged = operands["cu_seqlens_q"] is not None
    if ragged or operands["seq_lens"].ndim != 1:
        return frozenset()
    return frozenset({"q", "block_tables", "sparse_indices", "seq_lens"})


def cache_views(kv_cache: Any) -> tuple[View, View]:
    """Return the views of keys and values of a cache, one array or two."""
    if isinstance(kv_cache, tuple):
        return view(kv_cache[0]), view(kv_cache[1])
    return _check.split_cache(view(kv_cache))


# --- new tokens ----------------------------------------------------------------------------------


def place_operands(block_tables: Any, seq_lens: Any, cu_seqlens_new: Any) -> Operands:
    """Return the operands that say where new tokens go."""
    ends = cu_seqlens_new
    return {
        "block_tables": operand(block_tables, "block_tables"),
        "seq_lens": operand(seq_lens, "seq_lens"),
        "cu_seqlens_new": None if ends is None else operand(ends, "cu_seqlens_new"),
    }


def place_views(operands: Operands) -> tuple[View, ...]:
    """Return their views."""
    names = ("block_tables", "seq_lens", "cu_seqlens_new")
    return tuple(view(operands[name]) for name in names if operands[name] is not None)


def appended(function: str, operands: Operands, options: tuple[tuple[str, Any], ...]) -> Any:
    """Return the cache after a checked call."""
    cache = operands["kv_cache"]
    arrays = cache if isinstance(cache, tuple) else (cache,)
    results = tuple(Result("kv_cache", tuple(x.shape), x.dtype.name) for x in arrays)

    def again(operands: Operands) -> tuple[Any, ...]:  # pragma: no cover
        raise AssertionError("no operand of these calls counts requests alone")

    made = bind(Call(function, options, results), operands, again)
    return made if isinstance(cache, tuple) else made[0]


# --- partial results -----------------------------------------------------------------------------


def parts_operand(x: Any, name: str) -> Any:
    """Return a list of parts, or the array that holds them."""
    if not isinstance(x, (list, tuple)):
        return operand(x, name)
    if not x:
        raise ValueError(f"{name} is empty; wanted at least one part")
    return [operand(part, f"{name}[{i}]") for i, part in enumerate(x)]


def part_views(x: Any, name: str) -> list[View]:
    """Return the views of the parts."""
    if isinstance(x, list):
        return [view(part) for part in x]
    if not x.ndim or not x.shape[0]:
        raise ValueError(f"{name} has shape {x.shape}; wanted [parts, …] with at least one part")
    whole = view(x)
    part = whole._replace(shape=whole.shape[1:], strides=whole.strides[1:])
    return [part] * whole.shape[0]
