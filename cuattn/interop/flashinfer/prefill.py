"""`flashinfer.prefill`: ragged batches, and chunks over a paged cache."""

from __future__ import annotations

from typing import Any

import torch

from ...prefill import prefill_paged, prefill_ragged
from ._arguments import (
    batch_of,
    cache_of,
    factor_of,
    host_lengths,
    out_dtype_of,
    refuse,
    shown,
    sinks_of,
    skip_of,
    tensors,
)
from ._prefill_wrapper import (
    BatchPrefillWithPagedKVCacheWrapper as BatchPrefillWithPagedKVCacheWrapper,
)
from ._results import NAMES, attend, room

_RAGGED_NAMES = {
    **NAMES,
    "k": "key",
    "v": "value",
    "cu_seqlens_kv": "cum_seq_lens_kv",
    "causal": "is_causal",
    "sinks": "attention_sinks",
}


def trtllm_ragged_attention_deepseek(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    workspace_buffer: torch.Tensor,
    seq_lens: torch.Tensor,
    max_q_len: int,
    max_kv_len: int,
    bmm1_scale: Any,
    bmm2_scale: Any,
    o_sf_scale: float,
    batch_size: int,
    window_left: int,
    cum_seq_lens_q: torch.Tensor,
    cum_seq_lens_kv: torch.Tensor,
    enable_pdl: bool | None,
    is_causal: bool,
    return_lse: bool,
    attention_sinks: torch.Tensor | None = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    *,
    sage_attn_sfs: tuple[Any, ...] = (None, None, None, None),
    num_elts_per_sage_attn_blk: tuple[int, ...] = (0, 0, 0, 0),
    backend: str = "trtllm-gen",
    q_seq_lens_cpu: torch.Tensor | None = None,
    kv_seq_lens_cpu: torch.Tensor | None = None,
    use_fp16_softmax: bool | None = None,
    uses_spcompress: bool | None = None,
) -> Any:
    """Attention over sequences of unequal length that lie end to end.

    What `cuattn.prefill_ragged` does, called as FlashInfer's function of this name; see there for
    the supported shapes. Parameters that are not listed have no effect or must keep their default:
    the page beside this file says which.

    Parameters
    ----------
    query : torch.Tensor, ``[q_tokens, q_heads, head_dim]``
    key : torch.Tensor, ``[kv_tokens, kv_heads, head_dim]``
    value : torch.Tensor, ``[kv_tokens, kv_heads, head_dim_v]``
        bfloat16 or float16. The last stride is 1, the others are free multiples of 16 bytes.
    seq_lens : torch.Tensor, int32, `batch_size` elements
        Lengths of the keys; they are read from `cum_seq_lens_kv`.
    bmm1_scale, bmm2_scale : float or torch.Tensor of one float32
        Multiply Q·Kᵀ and the output. Tensors are read on the device.
    window_left : int
        How many keys before its own a token sees; -1: all.
    cum_seq_lens_q, cum_seq_lens_kv : torch.Tensor, int32 ``[batch_size + 1]``
        Prefix sums of the lengths in tokens, on the device. Requests may be empty.
    is_causal, return_lse : bool
        Mask the keys behind a token, aligned to the last ones; return ``(out, lse)``.
    attention_sinks : torch.Tensor, float32 ``[q_heads]``, optional
        A logit per head that enters the denominator only.
    skip_softmax_threshold_scale_factor : float, optional
        λ of a request is this over its length; a request with λ ≥ 1 runs without skipping. None
        and 0: nothing is skipped.
    out : torch.Tensor, ``[q_tokens, q_heads, head_dim_v]``, optional
        Written in place and returned; its dtype is the output's.
    lse : torch.Tensor, float32 ``[q_tokens, q_heads]``, optional
        Filled whenever it is given.

    Returns
    -------
    torch.Tensor, or a pair of them
        Output and, if asked for, log-sum-exp to base 2, sinks included. Rows that see no key are 0
        and −∞; rows of no request are not written in the output.

    Raises
    ------
    ValueError, TypeError
        Before anything is launched, naming the argument, what came and what was wanted.
    AssertionError
        For an `o_sf_scale` other than None, -1 and 1.

    Examples
    --------
    >>> import torch                                                        # doctest: +SKIP
    >>> from cuattn.interop import flashinfer                               # doctest: +SKIP
    >>> x = torch.ones(300, 16, 128, dtype=torch.bfloat16, device="cuda")   # doctest: +SKIP
    >>> ends = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")  # doctest: +SKIP
    >>> flashinfer.prefill.trtllm_ragged_attention_deepseek(                # doctest: +SKIP
    ...     x, x, x, torch.empty(0), ends.diff(), 200, 200, 128**-0.5, 1.0, -1, 2, -1, ends, ends,
    ...     None, True, False,
    ... ).shape
    torch.Size([300, 16, 128])
    """
    refuse(
        o_sf_scale=o_sf_scale,
        sage_attn_sfs=sage_attn_sfs,
        num_elts_per_sage_attn_blk=num_elts_per_sage_attn_blk,
        use_fp16_softmax=use_fp16_softmax,
        uses_spcompress=uses_spcompress,
    )
    if not isinstance(backend, str):
        raise ValueError(f"backend is {shown(backend)}; wanted a name")
    tensors(query=query, key=key, value=value, seq_lens=seq_lens, cum_seq_lens_q=cum_seq_lens_q)
    batch_of(batch_size, cum_seq_lens_q.shape[0] - 1, "cum_seq_lens_q")
    batch_of(batch_size, seq_lens.numel(), "seq_lens")
    tokens = (query.shape[0], key.shape[0])
    host_lengths(q_seq_lens_cpu, kv_seq_lens_cpu, tokens, (max_q_len, max_kv_len), batch_size)
    dtype = out_dtype_of(None, out, query)
    results = room(query, value.shape[-1], dtype, out, lse, return_lse)
    options = {
        "causal": is_causal,
        "window_left": window_left,
        "scale": bmm1_scale,
        "out_scale": factor_of(bmm2_scale),
        "sinks": sinks_of(attention_sinks, "attention_sinks"),
        "skip_softmax": skip_of(skip_softmax_threshold_scale_factor),
    }
    arrays = (key, value, cum_seq_lens_q, cum_seq_lens_kv)
    return attend(prefill_ragged, query, arrays, results, options, names=_RAGGED_NAMES)


def trtllm_batch_context_with_kv_cache(
    query: torch.Tensor,
    kv_cache: Any,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_q_len: int,
    max_kv_len: int,
    bmm1_scale: Any,
    bmm2_scale: Any,
    batch_size: int,
    cum_seq_lens_q: torch.Tensor,
    cum_seq_lens_kv: torch.Tensor,
    window_left: int = -1,
    out: torch.Tensor | None = None,
    out_dtype: Any = None,
    o_sf_scale: float | None = None,
    o_sf_vec_size: int | None = None,
    kv_layout: str = "HND",
    enable_pdl: bool | None = None,
    sinks: Any = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    *,
    kv_cache_sf: Any = None,
    uses_shared_paged_kv_idx: bool = True,
    causal: bool = True,
    lse: torch.Tensor | None = None,
    return_lse: bool = False,
    multi_ctas_kv_counter_buffer: torch.Tensor | None = None,
    use_fp16_softmax: bool | None = None,
    uses_spcompress: bool | None = None,
) -> Any:
    """Attention of new tokens over a paged cache that holds them already: chunked prefill.

    What `cuattn.prefill_paged` does, called as FlashInfer's function of this name; see there for
    the supported shapes. Parameters that are not listed have no effect or must keep their default:
    the page beside this file says which.

    Parameters
    ----------
    query : torch.Tensor, ``[tokens, q_heads, head_dim]``
    kv_cache : torch.Tensor or pair of them
        ``[pages, 2, kv_heads, page_size, head_dim]`` (HND), ``[pages, 2, page_size, kv_heads,
        head_dim]`` (NHD), with an axis of 1 in place of 2 for keys that are values too, or keys and
        values apart without that axis.
    block_tables : torch.Tensor, int32 ``[batch_size, max_pages]``
    seq_lens : torch.Tensor, int32, `batch_size` elements
        Length of each request in the cache, new tokens included.
    bmm1_scale, bmm2_scale : float or torch.Tensor of one float32
        Multiply Q·Kᵀ and the output. Tensors are read on the device.
    cum_seq_lens_q : torch.Tensor, int32 ``[batch_size + 1]``
        Prefix sums of the numbers of new tokens.
    cum_seq_lens_kv : torch.Tensor
        Not read: `seq_lens` and `block_tables` say it all.
    window_left : int
        How many keys before its own a token sees; -1: all.
    out : torch.Tensor, the queries' shape with the values' head_dim, optional
        Written in place and returned.
    out_dtype : torch.dtype, optional
        bfloat16, float16 or float32; that of `out`, else of `query`, by default.
    kv_layout : str
        ``"HND"`` or ``"NHD"``.
    sinks, skip_softmax_threshold_scale_factor, lse, return_lse
        As in `trtllm_ragged_attention_deepseek`.
    causal : bool
        Mask the keys behind a token. A window without it is allowed here.

    Returns
    -------
    torch.Tensor, or a pair of them
        As from `trtllm_ragged_attention_deepseek`.

    Raises
    ------
    ValueError, TypeError
        Before anything is launched, naming the argument, what came and what was wanted.
    AssertionError
        For a `kv_cache` whose second axis is neither 1 nor 2, and for the scales of NVFP4.

    Examples
    --------
    >>> import torch                                                        # doctest: +SKIP
    >>> from cuattn.interop import flashinfer                               # doctest: +SKIP
    >>> cache = torch.zeros(10, 2, 8, 64, 128, device="cuda").half()        # doctest: +SKIP
    >>> def ints(*values):                                                  # doctest: +SKIP
    ...     return torch.tensor(values, dtype=torch.int32, device="cuda")
    >>> flashinfer.prefill.trtllm_batch_context_with_kv_cache(              # doctest: +SKIP
    ...     cache[0, 0, :, :5].transpose(0, 1), cache, torch.empty(0), ints([3, 7]), ints(100), 5,
    ...     128, 128**-0.5, 1.0, 1, ints(0, 5), ints(0, 2),
    ... ).shape
    torch.Size([5, 8, 128])
    """
    refuse(
        o_sf_scale=o_sf_scale,
        o_sf_vec_size=o_sf_vec_size,
        kv_cache_sf=kv_cache_sf,
        uses_shared_paged_kv_idx=uses_shared_paged_kv_idx,
        use_fp16_softmax=use_fp16_softmax,
        uses_spcompress=uses_spcompress,
    )
    tensors(query=query, block_tables=block_tables)
    batch_of(batch_size, block_tables.shape[0], "block_tables")
    cache, dim = cache_of(kv_cache)
    results = room(query, dim, out_dtype_of(out_dtype, out, query), out, lse, return_lse)
    options = {
        "layout": kv_layout,
        "causal": causal,
        "window_left": window_left,
        "scale": bmm1_scale,
        "out_scale": factor_of(bmm2_scale),
        "sinks": sinks_of(sinks),
        "skip_softmax": skip_of(skip_softmax_threshold_scale_factor),
    }
    arrays = (cache, block_tables, seq_lens, cum_seq_lens_q)
    return attend(prefill_paged, query, arrays, results, options)
