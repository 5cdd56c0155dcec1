"""The operators ``torch.ops.cuattn.*``: what they take, what runs them, what shapes they give.

Schemas have no defaults and hold options as plain numbers and tensors: `cuattn.interop.torch` has
the functions to call.  A result that was not asked for is a tensor without elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import cuattn
from cuattn import _check_mla
from cuattn._records import HOST

from ._torch_stream import torch_stream

_LIBRARY = torch.library.Library("cuattn", "DEF")  # the operators are there as long as it is

OPTIONS = (
    "int window_left, float? scale, Tensor? scale_array, float? out_scale, "
    "Tensor? out_scale_array, float soft_cap, Tensor? sinks, float? threshold, "
    "Tensor? threshold_array, float? threshold_scale_factor, float? max_dropped_mass, "
    "bool unsafe, bool certificate, Tensor? seeds, Tensor(a!)? counts, bool return_lse, "
    "ScalarType? out_dtype"
)


class Options(NamedTuple):
    """The arguments that all attention operators end with."""

    window_left: int
    scale: float | None
    scale_array: Tensor | None
    out_scale: float | None
    out_scale_array: Tensor | None
    soft_cap: float
    sinks: Tensor | None
    threshold: float | None
    threshold_array: Tensor | None
    threshold_scale_factor: float | None
    max_dropped_mass: float | None
    unsafe: bool
    certificate: bool
    seeds: Tensor | None
    counts: Tensor | None  # int64 [visited, skipped, ineligible][batch, q heads], added to
    return_lse: bool
    out_dtype: torch.dtype | None

    def keywords(self) -> dict[str, Any]:
        """Return the keyword arguments of cuattn's functions."""
        scale, out_scale = self.scale_array, self.out_scale_array
        return {
            "window_left": self.window_left,
            "scale": self.scale if scale is None else scale,
            "out_scale": self.out_scale if out_scale is None else out_scale,
            "soft_cap": self.soft_cap,
            "sinks": self.sinks,
            "skip_softmax": self._skip(),
            "return_lse": self.return_lse,
            "out_dtype": self.out_dtype,
        }

    def _skip(self) -> cuattn.SkipSoftmax | None:
        threshold = self.threshold if self.threshold_array is None else self.threshold_array
        given = (threshold, self.threshold_scale_factor, self.max_dropped_mass)
        if all(number is None for number in given):
            return None
        stats = None if self.counts is None else _Counters(self.counts)
        return cuattn.SkipSoftmax(*given, self.unsafe, stats, self.certificate, self.seeds)


class _Counters(cuattn.SkipStats):
    """Counters in a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def counts(self, batch: int, heads: int, device: Any) -> Any:
        tensor, shape = self._tensor, (3, batch, heads)
        if tensor.shape != shape or tensor.dtype != torch.int64 or not tensor.is_contiguous():
            raise ValueError(
                f"counts is {tensor.dtype} of shape {tuple(tensor.shape)}; wanted contiguous int64 "
                f"{shape}"
            )
        if (HOST if tensor.device.type == "cpu" else tensor.device.index) != device:
            raise ValueError(f"counts is on {tensor.device}; wanted q's device")
        if device == HOST:
            return tensor.numpy().view(np.uint64)
        return SimpleNamespace(data=SimpleNamespace(ptr=tensor.data_ptr()))


_Three = tuple[Tensor, Tensor, Tensor]


def _three(q: Tensor, head_dim: int, options: Options) -> _Three:
    """Make room for output, LSE and what each row lost."""
    rows = q.shape[:-1]
    return (
        q.new_empty((*rows, head_dim), dtype=options.out_dtype or q.dtype),
        q.new_empty(rows if options.return_lse else (0,), dtype=torch.float32),
        q.new_empty(rows if options.certificate else (0,), dtype=torch.float32),
    )


# --- running --------------------------------------------------------------------------------------

# CuPy's memory for certificates, which the replays of a graph write to.
_captured: list[Any] = []


def _run(
    function: Callable[..., Any],
    arrays: Sequence[Any],
    results: _Three,
    keywords: dict[str, Any],
) -> None:
    """Call a function of cuattn with the options of an operator, into its results."""
    out, lse, lost = results
    with torch_stream(out):
        returned = function(
            *arrays, **keywords, out=out, lse=lse if keywords["return_lse"] else None
        )
        if lost.numel():
            share = returned[-1]
            lost.copy_(torch.from_dlpack(share))
            if out.is_cuda and torch.cuda.is_current_stream_capturing():
                _captured.append(share)


def _pages(k: Tensor, v: Tensor | None) -> Any:
    return k if v is None else (k, v)


# --- attention -----------------------------------------------------------------------------------


def _prefill(q: Tensor, k: Tensor, v: Tensor, causal: bool, *rest: Any) -> _Three:
    options = Options(*rest)
    results = _three(q, v.shape[-1], options)
    _run(cuattn.prefill, (q, k, v), results, {"causal": causal, **options.keywords()})
    return results


def _prefill_shapes(q: Tensor, k: Tensor, v: Tensor, causal: bool, *rest: Any) -> _Three:
    return _three(q, v.shape[-1], Options(*rest))


def _prefill_ragged(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_kv: Tensor, causal: bool, *rest: Any
) -> _Three:
    options = Options(*rest)
    results = _three(q, v.shape[-1], options)
    keywords = {"causal": causal, **options.keywords()}
    _run(cuattn.prefill_ragged, (q, k, v, ends_q, ends_kv), results, keywords)
    return results


def _prefill_ragged_shapes(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_kv: Tensor, causal: bool, *rest: Any
) -> _Three:
    return _three(q, v.shape[-1], Options(*rest))


class _Pages(NamedTuple):
    """The arguments that operators on paged caches begin with."""

    q: Tensor
    k: Tensor  # or both, of 5 axes
    v: Tensor | None
    tables: Tensor
    lengths: Tensor
    ends: Tensor | None
    layout: str

    def three(self, options: Options) -> _Three:
        """Make room for the results."""
        return _three(self.q, (self.k if self.v is None else self.v).shape[-1], options)


def _prefill_paged(*given: Any) -> _Three:
    pages, (causal, *rest) = _Pages(*given[:7]), given[7:]
    options = Options(*rest)
    results = pages.three(options)
    arrays = (pages.q, _pages(pages.k, pages.v), pages.tables, pages.lengths, pages.ends)
    keywords = {"layout": pages.layout, "causal": causal, **options.keywords()}
    _run(cuattn.prefill_paged, arrays, results, keywords)
    return results


def _prefill_paged_shapes(*given: Any) -> _Three:
    return _Pages(*given[:7]).three(Options(*given[8:]))


def _decode(*given: Any) -> _Three:
    pages, (batch_invariant, *rest) = _Pages(*given[:7]), given[7:]
    options = Options(*rest)
    results = pages.three(options)
    arrays = (pages.q, _pages(pages.k, pages.v), pages.tables, pages.lengths)
    own = {"cu_seqlens_q": pages.ends, "layout": pages.layout, "batch_invariant": batch_invariant}
    _run(cuattn.decode, arrays, results, {**own, **options.keywords()})
    return results


def _decode_shapes(*given: Any) -> _Three:
    return _Pages(*given[:7]).three(Options(*given[8:]))


class _Mla(NamedTuple):
    """The arguments that MLA decode begins with."""

    q: Tensor
    cache: Tensor
    tables: Tensor | None
    lengths: Tensor
    ends: Tensor | None
    chosen: Tensor | None
    latent_dim: int | None
    batch_invariant: bool | None

    def three(self, options: Options) -> _Three:
        """Make room for the results."""
        latent = self.latent_dim or _check_mla.latent_of(self.cache.shape[-1])
        return _three(self.q, latent, options)


def _mla_decode(*given: Any) -> _Three:
    mla, options = _Mla(*given[:8]), Options(*given[8:])
    results = mla.three(options)
    keywords = {
        **options.keywords(),
        "cu_seqlens_q": mla.ends,
        "sparse_indices": mla.chosen,
        "latent_dim": mla.latent_dim,
        "batch_invariant": mla.batch_invariant,
    }
    del keywords["window_left"], keywords["soft_cap"]
    _run(cuattn.mla_decode, (mla.q, mla.cache, mla.tables, mla.lengths), results, keywords)
    return results


def _mla_decode_shapes(*given: Any) -> _Three:
    return _Mla(*given[:8]).three(Options(*given[8:]))


# --- around attention ----------------------------------------------------------------------------


def _merge_states(
    outs: list[Tensor], lses: list[Tensor], out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    out, lse = _merge_states_shapes(outs, lses, out_dtype)
    with torch_stream(out):
        cuattn.merge_states(outs, lses, out=out, lse=lse, out_dtype=out_dtype)
    return out, lse


def _merge_states_shapes(
    outs: list[Tensor], lses: list[Tensor], out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    first = outs[0]
    return (
        first.new_empty(first.shape, dtype=out_dtype or first.dtype),
        first.new_empty(first.shape[:-1], dtype=torch.float32),
    )


def _append_kv(
    k: Tensor,
    v: Tensor | None,
    k_new: Tensor,
    v_new: Tensor,
    tables: Tensor,
    lengths: Tensor,
    ends: Tensor | None,
    layout: str,
) -> None:
    with torch_stream(k):
        cuattn.append_kv(_pages(k, v), k_new, v_new, tables, lengths, ends, layout=layout)


def _append_mla_kv(
    cache: Tensor,
    c_kv_new: Tensor,
    k_pe_new: Tensor | None,
    tables: Tensor,
    lengths: Tensor,
    ends: Tensor | None,
) -> None:
    with torch_stream(cache):
        cuattn.append_mla_kv(cache, c_kv_new, k_pe_new, tables, lengths, ends)


def _nothing(*given: Any) -> None:
    """The shapes of an operator that gives nothing."""


# --- the operators -------------------------------------------------------------------------------

_TABLES = "Tensor block_tables, Tensor seq_lens"
_CACHE = f"Tensor k_cache, Tensor? v_cache, {_TABLES}"
_PAIR, _THREE = "(Tensor, Tensor)", "(Tensor, Tensor, Tensor)"


def define(
    name: str,
    arguments: str,
    returned: str,
    run: Callable[..., Any],
    shapes: Callable[..., Any],
) -> None:
    """Add an operator that runs on a GPU or, for CPU tensors, in the emulator."""
    _LIBRARY.define(f"{name}({arguments}) -> {returned}", tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CUDA", "CPU"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"cuattn::{name}", shapes, lib=_LIBRARY)


define(
    "prefill",
    f"Tensor q, Tensor k, Tensor v, bool causal, {OPTIONS}",
    _THREE,
    _prefill,
    _prefill_shapes,
)
define(
    "prefill_ragged",
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_kv, bool causal, "
    + OPTIONS,
    _THREE,
    _prefill_ragged,
    _prefill_ragged_shapes,
)
define(
    "prefill_paged",
    f"Tensor q, {_CACHE}, Tensor cu_seqlens_q, str layout, bool causal, {OPTIONS}",
    _THREE,
    _prefill_paged,
    _prefill_paged_shapes,
)
define(
    "decode",
    f"Tensor q, {_CACHE}, Tensor? cu_seqlens_q, str layout, bool? batch_invariant, {OPTIONS}",
    _THREE,
    _decode,
    _decode_shapes,
)
define(
    "mla_decode",
    "Tensor q, Tensor kv_cache, Tensor? block_tables, Tensor seq_lens, Tensor? cu_seqlens_q, "
    f"Tensor? sparse_indices, int? latent_dim, bool? batch_invariant, {OPTIONS}",
    _THREE,
    _mla_decode,
    _mla_decode_shapes,
)
define(
    "merge_states",
    "Tensor[] outs, Tensor[] lses, ScalarType? out_dtype",
    _PAIR,
    _merge_states,
    _merge_states_shapes,
)
define(
    "append_kv",
    f"Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor k_new, Tensor v_new, {_TABLES}, "
    "Tensor? cu_seqlens_new, str layout",
    "()",
    _append_kv,
    _nothing,
)
define(
    "append_mla_kv",
    f"Tensor(a!) kv_cache, Tensor c_kv_new, Tensor? k_pe_new, {_TABLES}, Tensor? cu_seqlens_new",
    "()",
    _append_mla_kv,
    _nothing,
)
