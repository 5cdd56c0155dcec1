"""`flashinfer.decode`: few new tokens of each request over its paged cache."""

from __future__ import annotations

from typing import Any

import torch

from ...decode import decode
from ._arguments import (
    backend_of,
    cache_of,
    factor_of,
    out_dtype_of,
    refuse,
    scale_of,
    shown,
    sinks_of,
    skip_of,
    tensors,
)
from ._decode_wrapper import (
    BatchDecodeWithPagedKVCacheWrapper as BatchDecodeWithPagedKVCacheWrapper,
)
from ._results import attend, room
from .mla import trtllm_batch_decode_with_kv_cache_mla as trtllm_batch_decode_with_kv_cache_mla

_BACKENDS = ("auto", "trtllm-gen", "xqa")


def trtllm_batch_decode_with_kv_cache(
    query: torch.Tensor,
    kv_cache: Any,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    bmm1_scale: Any = 1.0,
    bmm2_scale: Any = 1.0,
    window_left: int = -1,
    out: torch.Tensor | None = None,
    out_dtype: Any = None,
    o_sf_scale: float | None = None,
    o_sf_vec_size: int | None = None,
    sinks: Any = None,
    kv_layout: str = "HND",
    enable_pdl: bool | None = None,
    backend: str = "auto",
    q_len_per_req: int | None = 1,
    o_scale: float | None = 1.0,
    mask: torch.Tensor | None = None,
    max_q_len: int | None = None,
    cum_seq_lens_q: torch.Tensor | None = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    *,
    kv_cache_sf: Any = None,
    uses_shared_paged_kv_idx: bool = True,
    lse: torch.Tensor | None = None,
    return_lse: bool = False,
    bmm1_scale_log2: torch.Tensor | None = None,
    multi_ctas_kv_counter_buffer: torch.Tensor | None = None,
    enable_block_sparse_attention: bool = False,
    bf16q_fp8kv_transform_mode: str | None = None,
) -> Any:
    """Attention of each request's newest tokens over a paged cache that holds them already.

    What `cuattn.decode` does, called as FlashInfer's function of this name; see there for the
    supported shapes. Token i of a request that has n of them sees its keys up to ``seq_len - n +
    i``. Parameters that are not listed have no effect or must keep their default: the page beside
    this file says which.

    Parameters
    ----------
    query : torch.Tensor, ``[batch * q_len_per_req, q_heads, head_dim]``
        bfloat16 or float16; with `cum_seq_lens_q`: ``[tokens, q_heads, head_dim]``.
    kv_cache : torch.Tensor or pair of them
        ``[pages, 2, kv_heads, page_size, head_dim]`` (HND), ``[pages, 2, page_size, kv_heads,
        head_dim]`` (NHD), with an axis of 1 in place of 2 for keys that are values too, or keys and
        values apart without that axis.
    block_tables : torch.Tensor, int32 ``[batch, max_pages]``
    seq_lens : torch.Tensor, int32, `batch` elements
        Length of each request in the cache, new tokens included.
    bmm1_scale, bmm2_scale : float or torch.Tensor of one float32
        Multiply Q·Kᵀ and the output. Tensors are read on the device.
    window_left : int
        How many keys before its own a token sees; -1: all.
    out : torch.Tensor, the queries' shape with the values' head_dim, optional
        Written in place and returned.
    out_dtype : torch.dtype, optional
        bfloat16, float16 or float32; that of `out`, else of `query`, by default.
    sinks : torch.Tensor, float32 ``[q_heads]``, optional
        A logit per head that enters the denominator only; also as a list of one.
    kv_layout : str
        ``"HND"`` or ``"NHD"``.
    q_len_per_req : int, optional
        New tokens of each request.
    cum_seq_lens_q : torch.Tensor, int32 ``[batch + 1]``, optional
        In place of `q_len_per_req`: prefix sums of the numbers of new tokens.
    skip_softmax_threshold_scale_factor : float, optional
        λ of a request is this over its length; a request with λ ≥ 1 runs without skipping. None
        and 0: nothing is skipped.
    lse : torch.Tensor, float32 ``[tokens, q_heads]``, optional
        Filled whenever it is given.
    return_lse : bool
        Return ``(out, lse)``.
    bmm1_scale_log2 : torch.Tensor of one float32, optional
        `bmm1_scale` times log2(e), in place of it; costs one launch more.

    Returns
    -------
    torch.Tensor, or a pair of them
        Output and, if asked for, log-sum-exp to base 2, sinks included. Rows that see no key are 0
        and −∞.

    Raises
    ------
    ValueError, TypeError
        Before anything is launched, naming the argument, what came and what was wanted.
    AssertionError
        For a `kv_cache` whose second axis is neither 1 nor 2, and for the scales of NVFP4.
    KeyError
        For a backend that FlashInfer does not have.

    Examples
    --------
    >>> import torch                                                        # doctest: +SKIP
    >>> from cuattn.interop import flashinfer                               # doctest: +SKIP
    >>> cache = torch.zeros(10, 2, 8, 64, 128, device="cuda").half()        # doctest: +SKIP
    >>> tables = torch.tensor([[3, 7]], dtype=torch.int32, device="cuda")   # doctest: +SKIP
    >>> lengths = torch.tensor([100], dtype=torch.int32, device="cuda")     # doctest: +SKIP
    >>> flashinfer.decode.trtllm_batch_decode_with_kv_cache(                # doctest: +SKIP
    ...     cache[:1, 0, :, 0], cache, torch.empty(0), tables, lengths, 128, 128**-0.5
    ... ).shape
    torch.Size([1, 8, 128])
    """
    refuse(
        o_sf_scale=o_sf_scale,
        o_sf_vec_size=o_sf_vec_size,
        o_scale=o_scale,
        mask=mask,
        kv_cache_sf=kv_cache_sf,
        uses_shared_paged_kv_idx=uses_shared_paged_kv_idx,
        enable_block_sparse_attention=enable_block_sparse_attention,
        bf16q_fp8kv_transform_mode=bf16q_fp8kv_transform_mode,
    )
    backend_of(backend, _BACKENDS, KeyError)
    tensors(query=query, block_tables=block_tables)
    ragged = cum_seq_lens_q is not None
    tokens = tokens_of(query.shape[0], block_tables.shape[0], q_len_per_req, ragged)
    cache, dim = cache_of(kv_cache)
    results = room(query, dim, out_dtype_of(out_dtype, out, query), out, lse, return_lse)
    options = {
        "cu_seqlens_q": cum_seq_lens_q,
        "layout": kv_layout,
        "window_left": window_left,
        "scale": scale_of(bmm1_scale, bmm1_scale_log2),
        "out_scale": factor_of(bmm2_scale),
        "sinks": sinks_of(sinks),
        "skip_softmax": skip_of(skip_softmax_threshold_scale_factor),
    }
    return attend(decode, query, (cache, block_tables, seq_lens), results, options, tokens)


def tokens_of(rows: int, batch: int, q_len: int | None, ragged: bool) -> tuple[int, int] | None:
    """Return (batch, q_len) if the queries' first axis is to be split, else None."""
    if ragged:
        if q_len not in (None, 1):
            raise ValueError(f"q_len_per_req is {q_len!r}; wanted None beside cum_seq_lens_q")
        return None
    if type(q_len) is not int or q_len < 1:
        raise ValueError(
            f"q_len_per_req is {shown(q_len)}; wanted an int ≥ 1, or None and cum_seq_lens_q"
        )
    if rows != batch * q_len:
        raise ValueError(
            f"query has {rows} tokens; wanted {batch * q_len}, q_len_per_req={q_len} for each row "
            "of block_tables"
        )
    return None if q_len == 1 else (batch, q_len)
