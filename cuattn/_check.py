"""Views and options → `Problem`, or one clear error.  Every error a caller can make is raised here.

`batched`, `ragged` and `paged` depend on shapes, strides, dtypes, device ordinals, options and on
`pointer % 16`, and on nothing else: a caller that has all of these in a key may keep the `Problem`.
What depends on whole pointers is `_overlap.check_overlap`.
"""

from __future__ import annotations

import math
import operator
import re
from dataclasses import replace
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from . import _check_arrays
from ._check_arrays import OUTPUT_DTYPES
from ._overlap import ITEMSIZE
from ._records import Layout, Problem, SkipMode, View

LAYOUTS = ("HND", "NHD")
MAX_HEAD_DIM = 256
INT32_LIMIT = 2**31  # the kernels' counts, and the blocks of a grid along x
SMALLEST_BLOCK_Q = 16  # no kernel gives a block fewer query rows

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).smallest_normal)


class Options(NamedTuple):
    """The keyword arguments of one call: arrays as views, the rest as it came."""

    causal: Any = False
    window_left: Any = -1
    scale: Any = None  # None, a number or a view
    out_scale: Any = None  # None, a number or a view
    soft_cap: Any = 0.0
    sinks: View | None = None
    skip: SkipMode | None = None
    thresholds: View | None = None
    seeds: View | None = None
    out: View | None = None
    lse: View | None = None
    out_dtype: Any = None
    batch_invariant: Any = None


# --- the three forms -----------------------------------------------------------------------------


def batched(q: View, k: View, v: View, options: Options) -> Problem:
    """Check q ``[batch, seq, heads, d]`` against k and v of the same form."""
    _check_arrays.inputs(q, k, v, rank=4, wanted="[batch, seq, heads, head_dim]")
    for name, view in (("k", k), ("v", v)):
        if view.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has batch {view.shape[0]}; wanted q's {q.shape[0]}")
    _check_arrays.same("tokens", k, v, 1)
    _heads_and_dims(q, k, v, "batched")
    return problem("batched", q, k, v, options, Sizes(q.shape[0], q.shape[1], k.shape[1]))


def ragged(
    q: View, k: View, v: View, cu_seqlens_q: View, cu_seqlens_kv: View, options: Options
) -> Problem:
    """Check q ``[tokens, heads, d]`` against k and v of the same form and two prefix sums."""
    _check_arrays.inputs(q, k, v, rank=3, wanted="[tokens, heads, head_dim]")
    _check_arrays.same("tokens", k, v, 0)
    batch = _check_arrays.prefix_sums("cu_seqlens_q", cu_seqlens_q, q)
    batch_kv = _check_arrays.prefix_sums("cu_seqlens_kv", cu_seqlens_kv, q)
    if batch != batch_kv:
        raise ValueError(
            f"cu_seqlens_kv has {batch_kv + 1} elements; wanted cu_seqlens_q's {batch + 1}"
        )
    _heads_and_dims(q, k, v, "ragged")
    return problem("ragged", q, k, v, options, Sizes(batch, q.shape[0], k.shape[0]))


def paged(
    q: View,
    k_cache: View,
    v_cache: View,
    block_tables: View,
    seq_lens: View,
    cu_seqlens_q: View,
    layout: str,
    options: Options,
) -> Problem:
    """Check q ``[tokens, heads, d]`` against two 4-D caches in the caller's layout and a table."""
    k, v = page_views(k_cache, v_cache, layout)
    _check_arrays.inputs(q, k, v, rank=3, wanted="[tokens, heads, head_dim]", cache=True)
    page_size = _page_size(k, v, layout)
    batch, max_pages = tables(block_tables, seq_lens, q)
    _one_more("cu_seqlens_q", cu_seqlens_q, q, batch)
    _heads_and_dims(q, k, v, "paged")
    sizes = Sizes(batch, q.shape[0], max_pages * page_size, page_size)
    return problem("paged", q, k, v, options, sizes)


def decode(
    q: View,
    k_cache: View,
    v_cache: View,
    block_tables: View,
    seq_lens: View,
    cu_seqlens_q: View | None,
    layout: str,
    options: Options,
) -> Problem:
    """Check q of few tokens a request against two 4-D caches in the caller's layout and a table."""
    k, v = page_views(k_cache, v_cache, layout)
    rank, wanted = decode_rank(q, cu_seqlens_q is not None)
    _check_arrays.inputs(q, k, v, rank=rank, wanted=wanted, cache=True)
    _page_size(k, v, layout)
    _heads_and_dims(q, k, v, "decode")
    return decode_problem(q, k, v, block_tables, seq_lens, cu_seqlens_q, options)


def decode_rank(q: View, ragged: bool) -> tuple[int, str]:
    """Return how many axes q must have, and which."""
    if ragged:
        return 3, "[tokens, heads, head_dim]"
    if len(q.shape) not in (3, 4):
        raise ValueError(
            f"q has shape {q.shape}; wanted [batch, heads, head_dim] or [batch, q_len, heads, "
            "head_dim]"
        )
    return len(q.shape), "[batch, heads, head_dim]"


def decode_problem(
    q: View,
    k: View,
    v: View,
    block_tables: View,
    seq_lens: View,
    cu_seqlens_q: View | None,
    options: Options,
) -> Problem:
    """Check what goes with q and caches [pages, heads, page_size, dim] that fit each other."""
    batch, max_pages = tables(block_tables, seq_lens, q)
    if cu_seqlens_q is not None:
        _one_more("cu_seqlens_q", cu_seqlens_q, q, batch)
    elif q.shape[0] != batch:
        raise ValueError(f"q has batch {q.shape[0]}; wanted {batch}, as block_tables has rows")
    return decode_sizes(q, k, v, batch, max_pages * k.shape[2], cu_seqlens_q, options)


def decode_sizes(
    q: View,
    k: View,
    v: View,
    batch: int,
    kv_len: int,
    cu_seqlens_q: View | None,
    options: Options,
) -> Problem:
    """Check what is left when batch and the most keys of a request are known."""
    page_size = k.shape[2]
    if cu_seqlens_q is not None:
        q_len = tokens = q.shape[0]
    else:
        q_len = 1 if len(q.shape) == 3 else q.shape[1]
        tokens = batch * q_len
    if options.batch_invariant is not None:
        flag("batch_invariant", options.batch_invariant)
    form = "decode" if cu_seqlens_q is None else "decode_ragged"
    sizes = Sizes(batch, q_len, kv_len, page_size)
    return replace(
        problem(form, q, k, v, options, sizes),
        tokens=tokens,
        batch_invariant=bool(options.batch_invariant),
    )


class Sizes(NamedTuple):
    """Those fields of a Problem that every form reads from another place."""

    batch: int
    q_len: int
    kv_len: int
    page_size: int = 0


def _heads_and_dims(q: View, k: View, v: View, form: str) -> None:
    """Check heads and head dims against each other."""
    cache = form in ("paged", "decode")
    q_heads, head_dim = q.shape[-2:]
    head_axis = 1 if cache else -2
    kv_heads, head_dim_v = k.shape[head_axis], v.shape[-1]
    k_name, v_name = _check_arrays.cache_names(cache)
    _check_arrays.same("heads", k, v, head_axis, cache=cache)
    if q_heads == 0 or kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(
            f"{k_name} has {kv_heads} heads, which does not divide q's {q_heads}; wanted q's heads "
            "to be a multiple of it"
        )
    if k.shape[-1] != head_dim:
        raise ValueError(f"{k_name} has head_dim {k.shape[-1]}; wanted q's {head_dim}")
    for name, dim in (("q", head_dim), (v_name, head_dim_v)):
        if not 0 < dim <= MAX_HEAD_DIM or dim % 8:
            raise ValueError(
                f"{name} has head_dim {dim}; wanted a multiple of 8 from 8 to {MAX_HEAD_DIM}"
            )


def problem(form: str, q: View, k: View, v: View, options: Options, sizes: Sizes) -> Problem:
    """Check what all forms share, and make the record."""
    q_heads, head_dim = q.shape[-2:]
    batch, q_len, kv_len, page_size = sizes
    kv_heads, head_dim_v = k.shape[1 if page_size else -2], v.shape[-1]
    counts = {"batch": batch, "query heads": q_heads, "query tokens": q_len, "key tokens": kv_len}
    for what, size in {**counts, "pages": k.shape[0] if page_size else 0}.items():
        if size >= INT32_LIMIT:
            raise ValueError(f"the call has {size} {what}; wanted fewer than 2^31")
    tiles = q_len // SMALLEST_BLOCK_Q + 1
    blocks = q_heads * (batch * tiles if form in ("batched", "decode") else batch + tiles)
    if blocks >= INT32_LIMIT:
        raise ValueError(
            f"q needs {blocks} blocks of {SMALLEST_BLOCK_Q} query rows; wanted fewer than 2^31, "
            "so split the batch"
        )
    out_dtype = dtype_name(options.out_dtype) or q.dtype
    out_shape = (*q.shape[:-1], head_dim_v)
    _check_arrays.outputs(options.out, options.lse, options.out_dtype, q, out_dtype, out_shape)
    if options.sinks is not None:
        _check_arrays.float_array("sinks", options.sinks, q, (q_heads,), "[q heads]")
    _number("scale", options.scale, q, positive=True)
    _number("out_scale", options.out_scale, q)
    return Problem(
        form=form,
        q=Layout(*q[1:4]),
        k=Layout(*k[1:4]),
        v=Layout(*v[1:4]),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim_qk=head_dim,
        head_dim_v=head_dim_v,
        **sizes._asdict(),
        causal=flag("causal", options.causal),
        window_left=_window(options.window_left, kv_len),
        soft_cap=_soft_cap(options.soft_cap),
        skip=_skip(options, q, batch, q_heads),
        out_dtype=out_dtype,
        out_shape=out_shape,
        lse_shape=q.shape[:-1],
    )


def _page_size(k: View, v: View, layout: str) -> int:
    _check_arrays.same("pages", k, v, 0, cache=True)
    _check_arrays.same("tokens a page", k, v, 2, cache=True)
    page_size = k.shape[2]
    if page_size < 8 or page_size & (page_size - 1):
        raise ValueError(
            f"kv_cache has page size {page_size} ({layout}); wanted a power of two ≥ 8"
        )
    return page_size


def tables(block_tables: View, seq_lens: View, q: View) -> tuple[int, int]:
    """Check tables and lengths and return (batch, max_pages)."""
    _check_arrays.index_array("block_tables", block_tables, q, rank=2, wanted="[batch, max_pages]")
    _check_arrays.strides("block_tables", block_tables, aligned=False)
    batch, max_pages = block_tables.shape
    _check_arrays.lengths(seq_lens, q, batch)
    return batch, max_pages


def _one_more(name: str, ends: View, q: View, batch: int) -> None:
    """Check a prefix sum over the requests of block_tables."""
    given = _check_arrays.prefix_sums(name, ends, q)
    if given != batch:
        raise ValueError(
            f"{name} has {given + 1} elements; wanted {batch + 1}, one more than block_tables has "
            "rows"
        )


# --- paged caches --------------------------------------------------------------------------------


def cache_parts(kv_cache: Any) -> tuple[Any, ...]:
    """Return (k, v) of a pair of arrays, (array,) of one array; nothing is ingested yet."""
    if not isinstance(kv_cache, (tuple, list)):
        return (kv_cache,)
    if len(kv_cache) != 2:
        raise TypeError(
            f"kv_cache is a {type(kv_cache).__name__} of {len(kv_cache)}; wanted a pair (k, v) of "
            "4-D arrays or one array [pages, 2, …]"
        )
    return tuple(kv_cache)


def split_cache(cache: View) -> tuple[View, View]:
    """Return the k and v halves of one ``[pages, 2, …]`` cache, in the caller's layout."""
    pointer, shape, strides, dtype, *rest = cache
    *half, step = _half(shape, strides, dtype)
    # NOTE: called every time; `_replace` would cost 3 µs more.
    k = tuple.__new__(View, (pointer, *half, *rest))
    return k, tuple.__new__(View, (pointer + step, *half, *rest))


@lru_cache(maxsize=256)
def _half(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: str
) -> tuple[tuple[int, ...], tuple[int, ...], str, int]:
    """Return shape, strides and dtype of one half, and the bytes between the two."""
    if len(shape) != 5 or shape[1] != 2:
        raise ValueError(
            f"kv_cache has shape {shape}; wanted 5 axes [pages, 2, …], or a pair of 4-D arrays"
        )
    step = strides[1] * ITEMSIZE.get(dtype, 1)
    return shape[:1] + shape[2:], strides[:1] + strides[2:], dtype, step


def page_views(k: View, v: View, layout: str) -> tuple[View, View]:
    """Return two 4-D caches as [pages, heads, page_size, dim], whatever the caller's layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; wanted 'HND' or 'NHD'")
    for name, view in (("k", k), ("v", v)):
        if len(view.shape) != 4:
            raise ValueError(
                f"kv_cache ({name}) has shape {view.shape}; wanted 4 axes, or one array "
                "[pages, 2, …] of 5"
            )
    return (k, v) if layout == "HND" else (_heads_first(k), _heads_first(v))


def _heads_first(view: View) -> View:
    (pages, tokens, heads, dim), strides = view.shape, view.strides
    return view._replace(
        shape=(pages, heads, tokens, dim), strides=(strides[0], strides[2], strides[1], strides[3])
    )


# --- numbers and flags ---------------------------------------------------------------------------


def flag(name: str, value: Any) -> bool:
    """Return a bool argument, or raise TypeError."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}; wanted True or False")
    return bool(value)


def dtype_name(dtype: Any) -> str | None:
    """Return the name in a string, NumPy dtype or framework dtype; None stays None."""
    if dtype is None:
        return None
    found = re.search(r"(?<![a-z0-9_])b?float\d+\w*", str(dtype))
    if not found:
        raise TypeError(f"out_dtype is {dtype!r}; wanted {', '.join(OUTPUT_DTYPES)}")
    return found.group()


def refuse_decode_only(max_dropped_mass: Any, seeds: Any) -> None:
    """Raise ValueError for the parts of a SkipSoftmax that only decode can honour."""
    if seeds is not None:
        raise ValueError("skip_softmax has seeds, which prefill cannot use; wanted None")
    if max_dropped_mass is not None:
        raise ValueError(
            f"skip_softmax has max_dropped_mass={max_dropped_mass!r}, which prefill cannot honour; "
            "wanted threshold or threshold_scale_factor"
        )


def _window(value: Any, kv_len: int) -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        window = operator.index(value)
    except TypeError:
        raise TypeError(f"window_left is {value!r}; wanted an int ≥ -1 (-1: none)") from None
    if window < -1:
        raise ValueError(f"window_left is {window}; wanted an int ≥ -1 (-1: none)")
    return min(window, kv_len)  # a wider one hides nothing more, and this fits int32


def _real(name: str, value: Any, wanted: str) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; wanted {wanted}")
    number = float(value)
    if not math.isfinite(number) or abs(number) > _LARGEST:
        raise ValueError(f"{name} is {value!r}; wanted {wanted}, finite in float32")
    return number


def _number(name: str, value: Any, q: View, *, positive: bool = False) -> None:
    """Check None, a number, or a view of one float32."""
    wanted = f"a {'positive ' if positive else ''}number or one float32 on the device"
    if isinstance(value, View):
        if value.dtype != "float32":
            raise TypeError(f"{name} is {value.dtype}; wanted {wanted}")
        if math.prod(value.shape) != 1:
            raise ValueError(f"{name} has shape {value.shape}; wanted {wanted}")
        _check_arrays.same_device(name, value, q)
    elif value is not None:
        number = _real(name, value, wanted)
        if positive and number < _SMALLEST:
            raise ValueError(f"{name} is {value!r}; wanted {wanted}, above 0")


def _soft_cap(value: Any) -> float:
    cap = _real("soft_cap", value, "a number ≥ 0 (0: none)")
    if cap < 0 or 0 < cap < _SMALLEST:
        raise ValueError(f"soft_cap is {value!r}; wanted a number ≥ 0 (0: none)")
    return cap


def _skip(options: Options, q: View, batch: int, q_heads: int) -> SkipMode | None:
    skip, live = options.skip, options.thresholds
    if options.seeds is not None:
        wanted = "q's but for its last axis"
        _check_arrays.float_array("skip_softmax.seeds", options.seeds, q, q.shape[:-1], wanted)
    if skip is None or live is None:
        return skip
    if live.dtype != "float32":
        raise TypeError(f"skip_softmax.threshold is {live.dtype}; wanted float32")
    if live.shape not in ((batch,), (batch, q_heads)):
        raise ValueError(
            f"skip_softmax.threshold has shape {live.shape}; wanted [batch] = ({batch},) or "
            f"[batch, q heads] = ({batch}, {q_heads})"
        )
    if min(live.strides) < 0:
        raise ValueError(f"skip_softmax.threshold has strides {live.strides}; wanted none below 0")
    _check_arrays.same_device("skip_softmax.threshold", live, q)
    return replace(skip, thresholds=Layout(*live[1:4]))
