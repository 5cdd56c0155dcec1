"""The operator `prefill_padded`: rows of unequal length in dense tensors, without a copy.

A batch row is cut into pieces, each a request of a ragged batch: keys that no query sees, queries
that see no key, and the request itself.  Where the pieces end lies on the device, so nothing waits
for it and a CUDA graph may be replayed with other lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import cuattn

from ._torch_operators import OPTIONS, Options, define
from ._torch_stream import torch_stream

CAUSAL_PIECES = 4  # keys before, queries before, the request, queries behind it
FULL_PIECES = 2  # keys before, the request


def pieces(
    first: Tensor, end: Tensor, q_first: Tensor | None, q_end: Tensor | None, q_len: int
) -> Tensor:
    """Return the ends of all pieces, int32 ``[1, 1, 3, requests + 1]``.

    Parameters
    ----------
    first, end : Tensor, ``[batch]``
        The keys of each row, ``first ≤ end``.
    q_first, q_end : Tensor or None
        The same of its queries; None: all of them.
    q_len : int
        Queries of a row, those outside of the request included.

    Notes
    -----
    The three lines: prefix sums of queries; of keys, counted from the beginning of their batch row;
    the number of that row.
    """
    rows = torch.arange(first.shape[0], device=first.device)
    if q_first is None or q_end is None:
        queries = torch.stack((torch.zeros_like(rows), torch.full_like(rows, q_len)), 1)
        keys = torch.stack((first, end), 1)
    else:
        all_of_them = torch.full_like(rows, q_len)
        queries = torch.stack((torch.zeros_like(rows), q_first, q_end, all_of_them), 1)
        keys = torch.stack((first, first, end, end), 1)
    lines = torch.stack((queries + q_len * rows[:, None], keys, rows[:, None].expand_as(keys)))
    ends = torch.nn.functional.pad(lines.flatten(1), (1, 0))
    return ends.to(torch.int32)[None, None]


def _end_to_end(x: Tensor) -> tuple[Tensor, int]:
    """Return ``[batch, len, heads, dim]`` as ``[tokens, heads, dim]``, and tokens between rows.

    With heads outside of tokens, what lies between the rows are tokens of other heads: the view
    overlaps itself, and nobody looks there.
    """
    batch, length, heads, dim = x.shape
    of_row, of_token, of_head, _ = x.stride()
    if batch == 1:
        return x[0], length
    if of_token and of_row % of_token == 0:
        step = of_row // of_token
        tokens = (batch - 1) * step + length
        return x.as_strided((tokens, heads, dim), (of_token, of_head, 1)), step
    return x.reshape(batch * length, heads, dim), length


def _prefill_padded(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, causal: bool, *rest: Any
) -> Tensor:
    options = Options(*rest)
    batch, _, heads, _ = q.shape
    keys, step = _end_to_end(k)
    values, v_step = _end_to_end(v)
    if v_step != step:
        keys, values, step = k.flatten(0, 1), v.flatten(0, 1), k.shape[1]
    requests = ends.shape[-1] - 1
    of_row = requests // batch
    ends_q, within_row, row = ends[0, 0].unbind()
    ends_kv = torch.add(within_row, row, alpha=step)
    local = None
    if options.counts is not None:
        local = torch.zeros((3, requests, heads), dtype=torch.int64, device=q.device)
    live = options.threshold_array
    of_requests = options._replace(
        counts=local,
        threshold_array=None if live is None else live.repeat_interleave(of_row, 0),
    )
    out = _prefill_padded_shapes(q, k, v, ends, causal, *rest)
    with torch_stream(q):
        cuattn.prefill_ragged(
            q.flatten(0, 1),
            keys,
            values,
            ends_q,
            ends_kv,
            causal=causal,
            **of_requests.keywords(),
            out=out.flatten(0, 1),
        )
    if options.counts is not None and local is not None:
        options.counts.add_(local.view(3, batch, of_row, heads).sum(2))
    return out


def _prefill_padded_shapes(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, causal: bool, *rest: Any
) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=Options(*rest).out_dtype or q.dtype)


define(
    "prefill_padded",
    f"Tensor q, Tensor k, Tensor v, Tensor ends, bool causal, {OPTIONS}",
    "Tensor",
    _prefill_padded,
    _prefill_padded_shapes,
)
