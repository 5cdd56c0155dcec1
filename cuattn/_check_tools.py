"""Errors of the operations that are no attention, one clear sentence each; see `_check`.

Results depend on shapes, strides, dtypes, device ordinals, options and `pointer % 16` only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from . import _check, _check_arrays
from ._check import INT32_LIMIT
from ._check_arrays import INPUT_DTYPES, OUTPUT_DTYPES
from ._overlap import ITEMSIZE, distinct
from ._records import View

CACHES = ("kv_cache (k)", "kv_cache (v)")
APPEND = (*CACHES, "k_new", "v_new", "block_tables", "seq_lens", "cu_seqlens_new")
APPEND_MLA = ("kv_cache", "kv_cache", "c_kv_new", "k_pe_new", *APPEND[4:])
MAX_MERGED_DIM = 2048  # head_dim of merge_states: a row is one block's
MOST_ROWS = 2**30

_Form = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


# --- paged caches --------------------------------------------------------------------------------


def append(views: Sequence[View], layout: str, names: Sequence[str] = APPEND) -> tuple[View, View]:
    """Check a call of append_kv; return the caches as [pages, heads, page_size, dim].

    With the names `APPEND_MLA` one of append_mla_kv, by the views that `mla_views` gave.
    """
    k_cache, v_cache, k_new, v_new, tables, lengths, *ends = views
    on_one_device(names[2], k_new, dict(zip(names, views, strict=False)))
    _new_tokens(k_new, v_new, bool(ends), names)
    k, v = _caches(k_cache, v_cache, layout, k_new, names)
    if names is APPEND_MLA:  # parts of one row, which must not run into the next one
        distinct_elements(names[0], k._replace(shape=(*k.shape[:3], k.shape[3] + v.shape[3])))
    for name, fresh, cache_name, cache in (
        (names[2], k_new, names[0], k),
        (names[3], v_new, names[1], v),
    ):
        if fresh.shape[-2] != cache.shape[1]:
            raise ValueError(
                f"{name} has {fresh.shape[-2]} heads; wanted {cache_name}'s {cache.shape[1]}"
            )
        if fresh.shape[-1] != cache.shape[3]:
            raise ValueError(
                f"{name} has head_dim {fresh.shape[-1]}; wanted {cache_name}'s {cache.shape[3]}"
            )
    batch = _tables(tables, lengths, k.shape[2], k_new)
    if ends:
        prefix_sums("cu_seqlens_new", ends[0], batch, k_new)
    elif k_new.shape[0] != batch:
        raise ValueError(
            f"{names[2]} has batch {k_new.shape[0]}; wanted {batch}, one request per row of "
            "block_tables, or cu_seqlens_new"
        )
    fits("pages", k.shape[0])
    return k, v


def _new_tokens(k_new: View, v_new: View, ragged: bool, names: Sequence[str]) -> None:
    k_name, v_name = names[2:4]
    if k_new.dtype not in INPUT_DTYPES:
        raise TypeError(f"{k_name} is {k_new.dtype}; wanted {' or '.join(INPUT_DTYPES)}")
    if v_new.dtype != k_new.dtype:
        raise TypeError(f"{v_name} is {v_new.dtype}; wanted {k_name}'s {k_new.dtype}")
    wanted = "3 axes [tokens, kv_heads, head_dim]"
    if not ragged:
        wanted = "[batch, kv_heads, head_dim] or [batch, tokens, kv_heads, head_dim]"
    if len(k_new.shape) != 3 and (ragged or len(k_new.shape) != 4):
        raise ValueError(f"{k_name} has shape {k_new.shape}; wanted {wanted}")
    if v_new.shape[:-1] != k_new.shape[:-1] or len(v_new.shape) != len(k_new.shape):
        raise ValueError(
            f"{v_name} has shape {v_new.shape}; wanted {k_name}'s {k_new.shape}, head_dim aside"
        )
    for name, view in ((k_name, k_new), (v_name, v_new)):
        absent = view.shape[-1] == 0 and name != APPEND_MLA[3]  # which may have no columns
        if absent or view.shape[-1] % 8:
            raise ValueError(f"{name} has head_dim {view.shape[-1]}; wanted a multiple of 8")
        _check_arrays.strides(name, view)
    fits("new tokens", math.prod(k_new.shape[:-2]))


def _caches(
    k_cache: View, v_cache: View, layout: str, k_new: View, names: Sequence[str]
) -> tuple[View, View]:
    k, v = _check.page_views(k_cache, v_cache, layout)
    for name, view in zip(names[:2], (k, v), strict=True):
        if view.dtype != k_new.dtype:
            raise TypeError(f"{name} is {view.dtype}; wanted {names[2]}'s {k_new.dtype}")
        _check_arrays.strides(name, view)
        distinct_elements(name, view)
    for what, axis in (("pages", 0), ("tokens a page", 2), ("heads", 1)):
        _check_arrays.same(what, k, v, axis, cache=True)
    _page_size(k.shape[2])
    return k, v


def _page_size(page_size: int) -> None:
    if page_size < 8 or page_size & (page_size - 1):
        raise ValueError(f"kv_cache has page size {page_size}; wanted a power of two ≥ 8")


def page_geometry(parts: Sequence[View], layout: str) -> tuple[int, int]:
    """Return (pages, page size) of a cache of any dtype: [pages, 2, …], a pair, or MLA's."""
    if layout not in _check.LAYOUTS:
        raise ValueError(f"layout is {layout!r}; wanted 'HND' or 'NHD'")
    shape = parts[0].shape
    if len(parts) == 1 and len(shape) == 5:
        shape = _check.split_cache(parts[0])[0].shape
    if len(shape) == 4:
        page_size = shape[2 if layout == "HND" else 1]
    elif len(shape) == 3 and len(parts) == 1:  # MLA: [pages, page_size, dim]
        page_size = shape[1]
    else:
        raise ValueError(
            f"kv_cache has shape {shape}; wanted [pages, 2, …], a pair of 4-D arrays, or an MLA "
            "cache [pages, page_size, dim]"
        )
    _page_size(page_size)
    fits("pages", shape[0])
    return shape[0], page_size


def _tables(tables: View, lengths: View, page_size: int, like: View) -> int:
    """Check block_tables and seq_lens; return batch."""
    _check_arrays.index_array("block_tables", tables, like, rank=2, wanted="[batch, max_pages]")
    _check_arrays.strides("block_tables", tables, aligned=False)
    batch, max_pages = tables.shape
    _check_arrays.lengths(lengths, like, batch)
    fits("requests", batch)
    fits("tokens in a request's pages", max_pages * page_size)
    return batch


def tables(tables: View, lengths: View, page_size: int) -> int:
    """Check block_tables and seq_lens against each other; return batch."""
    return _tables(tables, lengths, page_size, tables)


def prefix_sums(name: str, view: View, batch: int | None, like: View) -> int:
    """Check a ``[batch + 1]`` array, against a batch that is known; return batch."""
    found = _check_arrays.prefix_sums(name, view, like)
    if batch is not None and found != batch:
        raise ValueError(
            f"{name} has {found + 1} elements; wanted {batch + 1}, one more than there are requests"
        )
    return found


# --- MLA caches: one row a token, latent columns before rope columns ----------------------------


def mla_views(
    cache: View, c_kv: View, k_pe: View | None, ragged: bool
) -> tuple[View, View, View, View]:
    """Return an MLA cache and its new tokens as keys and values of one head, layout "HND".

    Keys are the latent part, values the rope part, without columns if there is none.
    """
    rope = None if k_pe is None else k_pe[1:3]
    latent, columns, rows, rope_rows = _mla_forms(cache[1:3], c_kv[1:3], rope, ragged)
    offset = c_kv[1][-1] * ITEMSIZE.get(c_kv[3], 1)
    return (
        _formed(cache, latent),
        _formed(cache, columns, offset),
        _formed(c_kv, rows),
        _formed(c_kv if k_pe is None else k_pe, rope_rows),
    )


def mla_cache(cache: View) -> View:
    """Return an MLA cache as [pages, 1, page_size, row]."""
    return _formed(cache, _mla_pages(cache[1], cache[2]))


def _formed(view: View, form: _Form, offset: int = 0) -> View:
    # NOTE: four a call; `_replace` would cost 3 µs more.
    return tuple.__new__(View, (view[0] + offset, *form, *view[3:]))


@lru_cache(maxsize=256)
def _mla_forms(
    cache: _Form, c_kv: _Form, k_pe: _Form | None, ragged: bool
) -> tuple[_Form, _Form, _Form, _Form]:
    """Check shapes against each other; return what `mla_views` makes of them."""
    pages, strides = _mla_pages(*cache)
    rows = _mla_rows("c_kv_new", *c_kv, ragged)
    rope_rows = ((*rows[0][:-1], 0), rows[1])
    latent, rope = rows[0][-1], 0
    if k_pe is not None:
        rope_rows = _mla_rows("k_pe_new", *k_pe, ragged)
        rope = rope_rows[0][-1]
        if rope_rows[0][:-1] != rows[0][:-1]:
            raise ValueError(
                f"k_pe_new has shape {k_pe[0]}; wanted as many tokens as c_kv_new, {c_kv[0]}"
            )
    if pages[-1] != latent + rope:
        parts = "no k_pe_new" if k_pe is None else f"k_pe_new's {rope}"
        raise ValueError(
            f"kv_cache has rows of {pages[-1]}; wanted {latent + rope}, for c_kv_new's {latent} "
            f"and {parts}"
        )
    return ((*pages[:-1], latent), strides), ((*pages[:-1], rope), strides), rows, rope_rows


@lru_cache(maxsize=256)
def _mla_pages(shape: tuple[int, ...], strides: tuple[int, ...]) -> _Form:
    """Return shape and strides of [pages, 1, page_size, row]."""
    if len(shape) == 4 and 1 in shape[1:3]:
        head = 1 if shape[1] == 1 else 2
        shape, strides = (x[:head] + x[head + 1 :] for x in (shape, strides))
    if len(shape) != 3:
        raise ValueError(
            f"kv_cache has shape {shape}; wanted [pages, page_size, latent + rope], or that with a "
            "head axis of 1"
        )
    return (shape[0], 1, *shape[1:]), (strides[0], shape[2], *strides[1:])


def _mla_rows(name: str, shape: tuple[int, ...], strides: tuple[int, ...], ragged: bool) -> _Form:
    """Return shape and strides of [tokens, 1, dim], or [batch, tokens, 1, dim] unless ragged."""
    unit = len(shape) == 3 and shape[1] == 1
    if len(shape) != 2 and not unit and (ragged or len(shape) != 3):
        one, many = ("tokens", "tokens, 1") if ragged else ("batch", "batch, tokens")
        raise ValueError(f"{name} has shape {shape}; wanted [{one}, dim] or [{many}, dim]")
    dim = shape[-1]
    if dim == 0 or dim % 8:
        raise ValueError(f"{name} has rows of {dim}; wanted a multiple of 8")
    if ragged:
        return (shape[0], 1, dim), (strides[0], dim, strides[-1])
    each, step = (1, dim) if len(shape) == 2 else (shape[1], strides[1])
    return (shape[0], each, 1, dim), (strides[0], step, dim, strides[-1])


# --- partial results -----------------------------------------------------------------------------


def merge(
    outs: Sequence[View], lses: Sequence[View], out: View | None, lse: View | None, out_dtype: Any
) -> str:
    """Check a call of merge_states; return the dtype of its result."""
    if len(lses) != len(outs):
        raise ValueError(f"lses has {len(lses)} parts; wanted as many as outs, {len(outs)}")
    first = outs[0]
    named = {f"outs[{i}]": view for i, view in enumerate(outs)}
    sums = {f"lses[{i}]": view for i, view in enumerate(lses)}
    if first.dtype not in OUTPUT_DTYPES:
        raise TypeError(f"outs[0] is {first.dtype}; wanted {', '.join(OUTPUT_DTYPES)}")
    if not 2 <= len(first.shape) <= 4:
        raise ValueError(
            f"outs[0] has shape {first.shape}; wanted 2 to 4 axes, the last one head_dim"
        )
    dim = first.shape[-1]
    if not 0 < dim <= MAX_MERGED_DIM or dim % 8:
        raise ValueError(
            f"outs[0] has head_dim {dim}; wanted a multiple of 8 from 8 to {MAX_MERGED_DIM}"
        )
    on_one_device("outs[0]", first, {**named, **sums})
    for name, view in named.items():
        if view.dtype != first.dtype:
            raise TypeError(f"{name} is {view.dtype}; wanted outs[0]'s {first.dtype}")
        if view.shape != first.shape:
            raise ValueError(f"{name} has shape {view.shape}; wanted outs[0]'s {first.shape}")
        _check_arrays.strides(name, view)
    for name, view in sums.items():
        _sums(name, view, first.shape[:-1])
    if math.prod(first.shape[:-1]) >= MOST_ROWS:
        raise ValueError(
            f"outs[0] has {math.prod(first.shape[:-1])} rows; wanted fewer than {MOST_ROWS}"
        )
    dtype = _check.dtype_name(out_dtype) or first.dtype
    if dtype not in OUTPUT_DTYPES:
        raise TypeError(f"out_dtype is {dtype}; wanted {', '.join(OUTPUT_DTYPES)}")
    _merged(first, dtype, "outs' dtype" if out_dtype is None else "out_dtype", out, lse)
    return dtype


def _sums(name: str, view: View, shape: tuple[int, ...]) -> None:
    if view.dtype != "float32":
        raise TypeError(f"{name} is {view.dtype}; wanted float32")
    if view.shape != shape:
        raise ValueError(f"{name} has shape {view.shape}; wanted {shape}, outs[0]'s but head_dim")
    if 0 not in shape and min(view.strides) < 0:
        raise ValueError(f"{name} has strides {view.strides}; wanted none below 0")


def _merged(first: View, dtype: str, source: str, out: View | None, lse: View | None) -> None:
    """Check the caller's own arrays for the result."""
    for name, view in (("out", out), ("lse", lse)):
        if view is None:
            continue
        on_one_device("outs[0]", first, {name: view})
        if name == "lse":
            _sums(name, view, first.shape[:-1])
        else:
            if view.dtype != dtype:
                raise TypeError(f"out is {view.dtype}; wanted {dtype} ({source})")
            if view.shape != first.shape:
                raise ValueError(f"out has shape {view.shape}; wanted outs[0]'s {first.shape}")
            _check_arrays.strides(name, view)
        distinct_elements(name, view)


# --- common --------------------------------------------------------------------------------------


def on_one_device(name: str, first: View, others: Mapping[str, View]) -> None:
    """Check that all views are on the device of the one that is named."""
    for other, view in others.items():
        if view.device != first.device:
            raise ValueError(f"{other} is on {view.place}; wanted {name}'s, {first.place}")


def distinct_elements(name: str, view: View) -> None:
    """Check that every element of what is written has memory of its own."""
    if not distinct(view):
        raise ValueError(
            f"{name} has strides {view.strides} for shape {view.shape}, so elements share "
            "memory; wanted each element to have its own"
        )


def fits(what: str, count: int) -> int:
    """Return a count that the kernels can hold."""
    if count >= INT32_LIMIT:
        raise ValueError(f"the call has {count} {what}; wanted fewer than 2^31")
    return count
