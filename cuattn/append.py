"""New tokens into a paged cache."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _check, _check_tools, _ingest, _launch, _overlap, _tool_params, _tools, _validate
from ._records import Step, View

_ITEMSIZE = 2  # bytes of an element, whatever the dtype
_VECTOR = 16 // _ITEMSIZE  # elements
_CONFIG = _tool_params.AppendConfig()
# Numbers of views that must not share memory; the last pair, if keys and values are two arrays.
_APART = ((0, 2), (0, 3), (1, 2), (1, 3), (0, 1))


def append_kv(
    kv_cache: Any,
    k_new: Any,
    v_new: Any,
    block_tables: Any,
    seq_lens: Any,
    cu_seqlens_new: Any = None,
    *,
    layout: str = "HND",
    stream: Any = None,
) -> None:
    """Write the keys and values of new tokens into the pages of a cache.

    Token i of a request's n goes to position ``seq_lens[request] - n + i``. A token whose position
    is below 0 or past the end of its row of `block_tables`, or whose page is not one of the cache,
    is not written. Two tokens for the same place leave one of them, whole.

    Parameters
    ----------
    kv_cache : array or pair of arrays
        ``[pages, 2, kv_heads, page_size, head_dim]`` (HND), ``[pages, 2, page_size, kv_heads,
        head_dim]`` (NHD), or keys and values apart without the axis of 2; bfloat16 or float16,
        written in place. `page_size` is a power of two, at least 8.
    k_new : array, ``[tokens, kv_heads, head_dim]``
        The new tokens of all requests, one behind the other, of the cache's dtype; without
        `cu_seqlens_new` ``[batch, kv_heads, head_dim]`` or ``[batch, tokens, kv_heads, head_dim]``.
    v_new : array
        As `k_new`; its `head_dim` may differ.
    block_tables : array, int32 ``[batch, max_pages]``
        The pages of each request, in order.
    seq_lens : array, int32 ``[batch]``
        Length of each request in the cache, new tokens included.
    cu_seqlens_new : array, int32 ``[batch + 1]``, optional
        Prefix sums of the numbers of new tokens. Default: all requests have as many.
    layout : str
        ``"HND"`` or ``"NHD"``.
    stream : int or object with ``__cuda_stream__`` or ``ptr``, optional
        As in `prefill`.

    Raises
    ------
    ValueError, TypeError
        Before anything is launched, naming the argument, what came and what was wanted.

    Examples
    --------
    >>> import cupy, cuattn                                                 # doctest: +SKIP
    >>> cache = cupy.zeros((10, 2, 8, 64, 128), "float16")                 # doctest: +SKIP
    >>> k = v = cupy.ones((5, 8, 128), "float16")                          # doctest: +SKIP
    >>> tables, lengths = cupy.array([[3, 7]], "i4"), cupy.array([100], "i4")  # doctest: +SKIP
    >>> ends = cupy.array([0, 5], "i4")                                    # doctest: +SKIP
    >>> cuattn.append_kv(cache, k, v, tables, lengths, ends)               # doctest: +SKIP
    """
    launch = None if stream is None else _ingest.stream_handle(stream)
    k_view = _ingest.view(k_new, "k_new", launch)
    caches, whole = _cache_views(kv_cache, launch, k_view)
    v_view = _ingest.view(v_new, "v_new", launch, k_view)
    call = _Call((*caches, k_view, v_view), whole, layout, _check_tools.APPEND)
    _append(call, block_tables, seq_lens, cu_seqlens_new, launch)


def append_mla_kv(
    kv_cache: Any,
    c_kv_new: Any,
    k_pe_new: Any,
    block_tables: Any,
    seq_lens: Any,
    cu_seqlens_new: Any = None,
    *,
    stream: Any = None,
) -> None:
    """Write the latent and the rope part of new tokens into the pages of an MLA cache.

    A row of the cache is a token's latent part, 512 columns in DeepSeek's models, and behind it the
    rope part, 64 columns; any two multiples of 8 will do. Tokens find their places, or are dropped,
    as in `append_kv`.

    Parameters
    ----------
    kv_cache : array, ``[pages, page_size, latent + rope]``
        bfloat16 or float16, written in place; also with a head axis of 1 before or behind that of
        `page_size`, which is a power of two, at least 8.
    c_kv_new : array, ``[tokens, latent]`` or ``[tokens, 1, latent]``
        The latent parts of all requests' new tokens, one behind the other, of the cache's dtype;
        without `cu_seqlens_new` ``[batch, latent]`` or ``[batch, tokens, latent]``.
    k_pe_new : array or None
        The rope parts, of as many tokens, in any of these forms. None: the cache holds none.
    block_tables, seq_lens, cu_seqlens_new, stream
        As in `append_kv`.

    Raises
    ------
    ValueError, TypeError
        Before anything is launched, naming the argument, what came and what was wanted.

    Examples
    --------
    >>> import cupy, cuattn                                                 # doctest: +SKIP
    >>> cache = cupy.zeros((10, 64, 576), "float16")                       # doctest: +SKIP
    >>> c_kv, k_pe = cupy.ones((1, 512), "f2"), cupy.ones((1, 64), "f2")   # doctest: +SKIP
    >>> tables, lengths = cupy.array([[3, 7]], "i4"), cupy.array([100], "i4")  # doctest: +SKIP
    >>> cuattn.append_mla_kv(cache, c_kv, k_pe, tables, lengths)           # doctest: +SKIP
    """
    launch = None if stream is None else _ingest.stream_handle(stream)
    c_kv = _ingest.view(c_kv_new, "c_kv_new", launch)
    k_pe = None if k_pe_new is None else _ingest.view(k_pe_new, "k_pe_new", launch, c_kv)
    cache = _ingest.view(kv_cache, "kv_cache", launch, c_kv, True)
    copied = _check_tools.mla_views(cache, c_kv, k_pe, cu_seqlens_new is not None)
    call = _Call(copied, {"kv_cache": cache}, "HND", _check_tools.APPEND_MLA)
    _append(call, block_tables, seq_lens, cu_seqlens_new, launch)


class _Call(NamedTuple):
    """What is copied where: rows of keys and values, of MLA the latent and the rope part."""

    copied: tuple[View, View, View, View]  # into two caches, from the rows of new tokens
    whole: dict[str, View | None]  # the arrays that hold the caches, by name
    layout: str
    names: tuple[str, ...]  # of all views, in errors


def _append(
    call: _Call, block_tables: Any, seq_lens: Any, cu_seqlens_new: Any, launch: int | None
) -> None:
    """Ingest the rest of a call and run it."""
    copied, whole, layout, names = call
    new = copied[2]
    views: tuple[View, ...] = (
        *copied,
        _ingest.view(block_tables, "block_tables", launch, new),
        _ingest.view(seq_lens, "seq_lens", launch, new),
    )
    pointers = tuple([view[0] for view in views])
    if cu_seqlens_new is not None:
        ends = _ingest.view(cu_seqlens_new, "cu_seqlens_new", launch, new)
        views += (ends,)
        pointers += (ends[0],)
    else:
        pointers += (0,)
    if _tools.on_host(new):
        _emulate(views, call)
        return
    with _tools.on(new[4]):
        aligned = _tools.alignment(copied)
        key = (append_kv, names, layout, aligned, *map(_tools.layout_of, views))
        run, reach = _tools.kept(key, lambda: _prepared(views, layout, names))
        if _near(views, reach, len(whole)):
            _overlap.check_overlap(whole, dict(zip(names[2:4], copied[2:], strict=True)))
        if _validate.checking:
            _validate.check_call(names[: len(views)], views, layout, launch)
        _launch.send([(run, pointers)], views, launch)


def _cache_views(
    kv_cache: Any, stream: int | None, like: View
) -> tuple[tuple[View, View], dict[str, View | None]]:
    """Return the views of keys and values, and those of the arrays that hold them by name."""
    parts = _check.cache_parts(kv_cache)
    if len(parts) == 1:
        whole = _ingest.view(parts[0], "kv_cache", stream, like, True)
        return _check.split_cache(whole), {"kv_cache": whole}
    k_name, v_name = _check_tools.CACHES
    k = _ingest.view(parts[0], k_name, stream, like, True)
    v = _ingest.view(parts[1], v_name, stream, like, True)
    return (k, v), {k_name: k, v_name: v}


def _prepared(
    views: tuple[View, ...], layout: str, names: tuple[str, ...]
) -> tuple[_launch.Launch, list[int]]:
    """Check a call of a new kind and load its kernel; return the bytes of its arrays, too."""
    return _plan(views, layout, names).prepare(), [_overlap.reach(view) for view in views[:4]]


def _near(views: tuple[View, ...], reach: list[int], arrays: int) -> bool:
    """Say whether the arrays lie such that a cache may share memory with another one.

    NOTE: 4 µs less than `check_overlap`, which then finds out whether it does.
    """
    for first, second in _APART[: 3 + arrays]:
        distance = views[second][0] - views[first][0]
        if -reach[second] < distance < reach[first]:
            return True
    return False


def _emulate(views: tuple[View, ...], call: _Call) -> None:
    """Do the same for CPU arrays, in the emulator."""
    from .emulator._launch import array_of

    job = _plan(views, call.layout, call.names)
    _overlap.check_overlap(call.whole, dict(zip(call.names[2:4], views[2:4], strict=True)))
    if _validate.checking:
        _validate.check_call(call.names[: len(views)], views, call.layout, None)
    results = {"k": array_of(views[0]), "v": array_of(views[1])}
    job.emulate(dict(zip(job.parameters.pointers[2:], views[2:], strict=False)), results)


def _plan(
    views: tuple[View, ...], layout: str, names: tuple[str, ...] = _check_tools.APPEND
) -> _tools.Job:
    """Check a call and pack what it tells the kernel."""
    k, v = _check_tools.append(views, layout, names)
    k_new, v_new, tables = views[2:5]
    ragged = len(views) == len(names)
    batch, max_pages = tables.shape
    tokens_each = k_new.shape[1] if len(k_new.shape) == 4 else 1
    tokens = k_new.shape[0] * (1 if ragged else tokens_each)
    pages, heads, page_size, _ = k.shape
    k_vectors, v_vectors = k.shape[3] // _VECTOR, v.shape[3] // _VECTOR
    k_shares, v_shares = (-(-heads * n // _CONFIG.share) for n in (k_vectors, v_vectors))
    blocks = -(-tokens * (k_shares + v_shares) // _CONFIG.warps) if batch else 0
    _check_tools.fits("parts of new tokens", blocks * _CONFIG.warps)
    rest = _tool_params.APPEND.pack(
        {
            "k_strides": _page_row_head(k),
            "v_strides": _page_row_head(v),
            "k_new_strides": _request_row_head(k_new),
            "v_new_strides": _request_row_head(v_new),
            "block_table_stride": tables.strides[0],
            "batch": batch,
            "tokens": tokens,
            "tokens_each": max(tokens_each, 1),
            "kv_heads": heads,
            "k_vectors": k_vectors,
            "v_vectors": v_vectors,
            "k_shares": k_shares,
            "v_shares": v_shares,
            "page_shift": page_size.bit_length() - 1,
            "pages": pages,
            "max_pages": max_pages,
            "unused": 0,
        }
    )
    step = Step("append_kv", _CONFIG, blocks, _CONFIG.threads, 0)
    return _tools.Job(step, _tool_params.APPEND, rest)


def _page_row_head(cache: View) -> list[int]:
    page, head, row, _ = cache.strides
    return [step // _VECTOR for step in (page, row, head)]


def _request_row_head(new: View) -> list[int]:
    strides = new.strides[:-1]
    if len(strides) == 2:
        # [tokens, …] and [batch, …] alike: a token is a row, or a request of one row.
        strides = (strides[0], strides[0], strides[1])
    return [step // _VECTOR for step in strides]
