"""What tables and lengths hold, checked on the device: `validate`, and the check before a call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import _check, _check_tools, _ingest, _launch, _tool_params, _tools
from ._records import Step, View
from ._tool_params import SUMS, Fault

# Whether every call checks its tables and lengths before it launches.  Read when cuattn is
# imported; tests set it (`monkeypatch.setattr(_validate, "checking", True)`).
checking = os.environ.get("CUATTN_CHECK", "0") not in ("", "0")

_CONFIG = _tool_params.ValidateConfig()
_NEW = ("k_new", "c_kv_new")
_OWNERS = dict(zip(SUMS, (("q",), ("k",), _NEW), strict=True))  # who may own their tokens
_READ = ("block_tables", "seq_lens", *SUMS)  # by the kernel, in its order
_NO_LIMIT = 2**31 - 1

_Named = Mapping[str, View]
_Limits = Mapping[str, tuple[str, int]]  # of prefix sums: whose tokens they count, and how many


def validate(
    kv_cache: Any = None,
    block_tables: Any = None,
    seq_lens: Any = None,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    cu_seqlens_new: Any = None,
    q: Any = None,
    k: Any = None,
    k_new: Any = None,
    layout: str = "HND",
    stream: Any = None,
) -> None:
    """Check what the device arrays of a call hold, and wait for the answer.

    Takes the arguments of `prefill_paged`, `prefill_ragged`, `decode`, `mla_decode` or `append_kv`
    by their names; what is left out is not checked. Only entries that the call would read are
    looked at, and the first offender is reported: that of the first request, its prefix sums before
    its length, its length before its pages. Requests may share pages. With ``CUATTN_CHECK=1`` in
    the environment the calls do this themselves, except in the capture of a graph.

    Parameters
    ----------
    kv_cache : array or pair of arrays, optional
        As in the call, of any dtype; only its shape matters.
    block_tables : array, int32 ``[batch, max_pages]``, optional
        Wants `kv_cache` and `seq_lens`.
    seq_lens : array, int32 ``[batch]``, optional
        From 0 to ``max_pages * page_size``, and no less than the request's new tokens.
    cu_seqlens_q, cu_seqlens_kv, cu_seqlens_new : array, int32 ``[batch + 1]``, optional
        From 0 on, never decreasing, up to the tokens of `q`, `k` or `k_new`.
    q, k, k_new : array, optional
        Of the call; only their numbers of tokens matter.
    layout : str
        ``"HND"`` or ``"NHD"``.
    stream : int or object with ``__cuda_stream__`` or ``ptr``, optional
        As in `prefill`.

    Raises
    ------
    ValueError
        Naming the argument, the request and the entry: ``block_tables[3, 17] is 90210; wanted a
        page from 0 to 4095``; or what is wrong with the arrays themselves.
    TypeError
        If an array is none, or of the wrong dtype.
    RuntimeError
        In the capture of a CUDA graph, which cannot wait.

    Examples
    --------
    >>> import cupy, cuattn                                                 # doctest: +SKIP
    >>> cache = cupy.zeros((10, 2, 8, 64, 128), "float16")                 # doctest: +SKIP
    >>> tables, lengths = cupy.array([[3, 70]], "i4"), cupy.array([100], "i4")  # doctest: +SKIP
    >>> cuattn.validate(cache, tables, lengths)                            # doctest: +SKIP
    Traceback (most recent call last):
    ValueError: block_tables[0, 1] is 70; wanted a page from 0 to 9
    """
    launch = None if stream is None else _ingest.stream_handle(stream)
    given = {
        "block_tables": block_tables,
        "seq_lens": seq_lens,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_kv": cu_seqlens_kv,
        "cu_seqlens_new": cu_seqlens_new,
        "q": q,
        "k": k,
        "k_new": k_new,
    }
    named = {
        name: _ingest.view(array, name, launch)
        for name, array in given.items()
        if array is not None
    }
    pages = None
    if kv_cache is not None:
        parts = [_ingest.view(x, "kv_cache", launch) for x in _check.cache_parts(kv_cache)]
        pages = _check_tools.page_geometry(parts, layout)
    if not _check_contents(named, pages, launch):
        raise RuntimeError(
            "validate waits for the device, which the capture of a graph cannot; call it before"
        )


def check_call(
    names: Sequence[str], views: Sequence[View], layout: str | None, stream: int | None
) -> None:
    """Do the same for the views of a call that was found to be well formed.

    `names` are those of `_call.Form.arrays`, or `_check_tools.APPEND` or `APPEND_MLA`; `layout` is
    a paged cache's. Does nothing in the capture of a graph.
    """
    named = dict(zip(names, views, strict=False))
    if "block_tables" not in named:  # lengths without tables have no limit
        named.pop("seq_lens", None)
    cache = named.get(_check_tools.CACHES[0]) or named.get("kv_cache")
    pages = None
    if cache is not None and layout is not None:
        pages = _check_tools.page_geometry([cache, cache], layout)
    if any(name in named for name in ("block_tables", *SUMS)):
        _check_contents(named, pages, stream)


def _check_contents(named: _Named, pages: tuple[int, int] | None, stream: int | None) -> bool:
    """Raise ValueError for the first offender; return False in a capture, which cannot wait."""
    job, batch, limits = _plan(named, pages)
    views = [named[name] for name in _READ if name in named]
    if batch == 0:
        return True
    if _tools.on_host(views[0]):
        findings = np.zeros((batch, 4), np.int32)
        parameters = dict(zip(_READ, job.parameters.pointers, strict=False))
        inputs = {parameters[name]: named[name] for name in _READ if name in named}
        job.emulate(inputs, {"findings": findings})
    else:
        answer = _ask(job, batch, named, views, stream)
        if answer is None:
            return False
        findings = answer
    found = np.flatnonzero(findings[:, 0])
    if len(found):
        request = int(found[0])
        raise ValueError(_sentence(request, findings[request].tolist(), limits))
    return True


def _ask(
    job: _tools.Job, batch: int, named: _Named, views: Sequence[View], stream: int | None
) -> Any:
    """Run the kernel on the GPU and return its findings; None in a capture."""
    import cupy

    with _tools.on(views[0].device):
        if _tools.captured(stream, views):
            return None
        run = _tools.kept((validate, job.rest, views[0].device), job.prepare)
        findings = cupy.ndarray((batch, 4), np.int32)
        places = [named[name].pointer if name in named else 0 for name in _READ]
        _launch.send([(run, (*places, findings.data.ptr))], views, stream)
        return findings.get()


def _plan(named: _Named, pages: tuple[int, int] | None) -> tuple[_tools.Job, int, _Limits]:
    """Check the arrays; return the job, batch, and what the prefix sums may reach."""
    tables, lengths = named.get("block_tables"), named.get("seq_lens")
    sums = {name: named[name] for name in SUMS if name in named}
    if tables is None and not sums:
        raise ValueError("nothing was given to check; wanted block_tables or prefix sums")
    if (tables is None) != (lengths is None) or (tables is not None and pages is None):
        raise ValueError(
            "block_tables, seq_lens and kv_cache are checked against each other; wanted all of them"
        )
    checked = {"block_tables": tables, "seq_lens": lengths, **sums}
    present = {name: view for name, view in checked.items() if view is not None}
    (name, first), *_ = present.items()
    _check_tools.on_one_device(name, first, present)
    count, page_size = pages or (0, 8)
    batch = None
    if tables is not None and lengths is not None:
        batch = _check_tools.tables(tables, lengths, page_size)
    for name, view in sums.items():
        batch = _check_tools.prefix_sums(name, view, batch, first)
    assert batch is not None
    limits = {name: _limit(owners, named) for name, owners in _OWNERS.items()}
    rest = _tool_params.VALIDATE.pack(
        {
            "block_table_stride": tables.strides[0] if tables else 0,
            "tokens": [min(tokens, _NO_LIMIT) for _, tokens in limits.values()],
            "new_each": _new_each(named) if SUMS[2] not in named else 0,
            "batch": batch,
            "max_pages": tables.shape[1] if tables else 0,
            "page_shift": page_size.bit_length() - 1,
            "pages": count,
        }
    )
    grid = -(-batch // _CONFIG.warps)
    _check_tools.fits("requests", grid * _CONFIG.warps)
    step = Step("validate", _CONFIG, grid, _CONFIG.threads, 0)
    return _tools.Job(step, _tool_params.VALIDATE, rest), batch, limits


def _limit(owners: Sequence[str], named: _Named) -> tuple[str, int]:
    """Return whose tokens prefix sums count, and how many there are."""
    given = [(name, named[name].shape[0]) for name in owners if name in named]
    return given[0] if given else (owners[0], _NO_LIMIT)


def _new_each(named: _Named) -> int:
    """Return the number of tokens that every request appends."""
    new = [named[name].shape for name in _NEW if name in named]
    if not new:
        return 0
    return new[0][1] if len(new[0]) == 4 else 1


def _sentence(request: int, finding: Sequence[int], limits: _Limits) -> str:
    """Return the error for one finding."""
    fault, where, value, other = finding
    if fault == Fault.length:
        return f"seq_lens[{request}] is {value}; wanted 0 to {other} (max_pages × page_size)"
    if fault == Fault.too_new:
        return (
            f"seq_lens[{request}] is {value}, below the request's {other} new tokens; wanted the "
            "length that includes them"
        )
    if fault == Fault.page:
        wanted = f"a page from 0 to {other - 1}" if other else "none, for kv_cache has no pages"
        return f"block_tables[{request}, {where}] is {value}; wanted {wanted}"
    name = SUMS[where]
    if fault == Fault.start:
        return f"{name}[0] is {value}; wanted 0"
    owner, tokens = limits[name]
    reach = f"{owner}'s {tokens} tokens"
    if fault == Fault.past_end:
        return f"{name}[{request + 1}] is {value}; wanted at most {reach}"
    bound = "" if tokens == _NO_LIMIT else f" to {reach}"
    return (
        f"{name}[{request + 1}] is {value}, below {name}[{request}] = {other}; wanted a "
        f"non-decreasing sequence from 0{bound}"
    )
