"""Tensors for results, and one call of ours that fills them as FlashInfer would."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from .._torch_stream import torch_stream
from ._arguments import OUTPUT_DTYPES, shown

_LOG2E = 1.4426950408889634

# Our names for FlashInfer's arguments, in errors.
NAMES = {
    "q": "query",
    "scale": "bmm1_scale",
    "out_scale": "bmm2_scale",
    "cu_seqlens_q": "cum_seq_lens_q",
    "layout": "kv_layout",
    "sparse_indices": "block_tables",
}


class Results(NamedTuple):
    """Where a call's results go."""

    out: torch.Tensor
    lse: torch.Tensor | None  # base 2, as it is returned
    natural: torch.Tensor | None  # packed, what our kernel writes; `lse` itself if that is packed
    return_lse: bool


def room(
    query: torch.Tensor,
    dim: int,
    dtype: torch.dtype,
    out: Any,
    lse: Any,
    return_lse: bool,
) -> Results:
    """Check the caller's tensors for results, or make them: PyTorch's own, so a graph keeps them.

    Rows are those of `query`, of `dim` columns each in `out`.
    """
    rows = query.shape[:-1]
    if out is None:
        out = query.new_empty((*rows, dim), dtype=dtype)
    else:
        _check("out", out, (*rows, dim), dtype)
    if lse is None and not return_lse:
        return Results(out, None, None, False)
    flat = (rows.numel() // rows[-1] if rows[-1] else 0, rows[-1])
    if lse is None:
        lse = query.new_empty(flat, dtype=torch.float32)
    else:
        _check("lse", lse, flat if lse.dim() == 2 else rows, torch.float32)
    natural = lse if lse.is_contiguous() else query.new_empty(lse.shape, dtype=torch.float32)
    return Results(out, lse, natural, return_lse)


def _check(name: str, given: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(given, torch.Tensor):
        raise ValueError(f"{name} is {shown(given)}; wanted a torch.Tensor")
    if given.dtype is not dtype or dtype not in OUTPUT_DTYPES:
        wanted = dtype if dtype in OUTPUT_DTYPES else "torch.bfloat16, torch.float16 or float32"
        raise ValueError(f"{name} is {given.dtype}; wanted {wanted}")
    if given.shape != shape:
        raise ValueError(f"{name} has shape {tuple(given.shape)}; wanted {tuple(shape)}")


def attend(
    function: Callable[..., Any],
    query: torch.Tensor,
    arrays: tuple[Any, ...],
    results: Results,
    options: Mapping[str, Any],
    tokens: tuple[int, int] | None = None,
    names: Mapping[str, str] = NAMES,
) -> Any:
    """Call one of our functions and return what FlashInfer returns.

    `tokens`, if given, is (batch, tokens of each request), into which the first axis is split.
    """
    out, lse, natural, return_lse = results
    place = out
    if tokens is not None:
        query = query.view(*tokens, *query.shape[1:])
        place = out.view(*tokens, *out.shape[1:])
    if out.dtype is not query.dtype:
        options = {**options, "out_dtype": out.dtype}
    if natural is not None:
        rows = natural if natural.dim() + 1 == query.dim() else natural.view(query.shape[:-1])
        options = {**options, "lse": rows}
    try:
        with torch_stream(query):
            function(query, *arrays, out=place, **options)
    except (TypeError, ValueError) as error:
        raise _named(error, names) from None
    if lse is None or natural is None:
        return out
    torch.mul(natural, _LOG2E, out=lse)  # ours is natural
    return (out, lse) if return_lse else out


def _named(error: Exception, names: Mapping[str, str]) -> Exception:
    """The same error with FlashInfer's names of arguments."""
    words = "|".join(map(re.escape, names))
    return type(error)(re.sub(rf"\b({words})\b", lambda word: names[word.group()], str(error)))
