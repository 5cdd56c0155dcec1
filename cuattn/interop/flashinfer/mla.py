"""`flashinfer.mla`: decode over a paged cache of latent vectors."""

from __future__ import annotations

from typing import Any

import torch

from ...mla import mla_decode
from ._arguments import backend_of, factor_of, refuse, sinks_of, skip_of, tensors
from ._results import attend, room

_BACKENDS = ("auto", "trtllm-gen", "xqa", "cute-dsl", "sparse")


def trtllm_batch_decode_with_kv_cache_mla(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    workspace_buffer: torch.Tensor,
    qk_nope_head_dim: int,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    sparse_mla_top_k: int = 0,
    out: torch.Tensor | None = None,
    bmm1_scale: Any = 1.0,
    bmm2_scale: Any = 1.0,
    sinks: Any = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    enable_pdl: bool | None = None,
    backend: str = "auto",
    *,
    is_var_seq: bool = True,
    uses_shared_paged_kv_idx: bool = True,
    lse: torch.Tensor | None = None,
    return_lse: bool = False,
    cute_dsl_impl: str = "auto",
    kv_scale_format: str = "auto",
    cum_seq_lens_q: torch.Tensor | None = None,
    max_q_len: int | None = None,
    multi_ctas_kv_counter_buffer: torch.Tensor | None = None,
    sparse_mla_top_k_lens: torch.Tensor | None = None,
    enable_dcp: bool = False,
    cp_world: int = 1,
    cp_rank: int = 0,
    causal_seqlens_kv_global: torch.Tensor | None = None,
    use_fp16_softmax: bool | None = None,
) -> Any:
    """MLA decode, absorbed: each request's newest tokens over its pages of latent vectors.

    What `cuattn.mla_decode` does, called as FlashInfer's function of this name; see there for the
    supported shapes. Parameters that are not listed have no effect or must keep their default: the
    page beside this file says which.

    Parameters
    ----------
    query : torch.Tensor, ``[batch, q_len, heads, kv_lora_rank + qk_rope_head_dim]``
        bfloat16 or float16; with `cum_seq_lens_q`: ``[tokens, heads, …]``.
    kv_cache : torch.Tensor, ``[pages, page_size, dim]`` or ``[pages, 1, page_size, dim]``
        Its first `kv_lora_rank` columns are the values.
    block_tables : torch.Tensor, int32 ``[batch, max_pages]``
        With `sparse_mla_top_k`: ``[batch, q_len, top_k]``, physical positions of tokens.
    seq_lens : torch.Tensor, int32, `batch` elements
        Length of each request in the cache, new tokens included.
    sparse_mla_top_k : int
        How many keys a token reads at most, 0 for all. Token i of a request reads its first
        ``min(kv_len - q_len + i + 1, top_k)`` entries.
    out : torch.Tensor, ``[batch, q_len, heads, kv_lora_rank]``, optional
        Written in place and returned; its dtype is the output's.
    bmm1_scale, bmm2_scale : float or torch.Tensor of one float32
        Multiply Q·Kᵀ and the output. Tensors are read on the device.
    sinks : torch.Tensor, float32 ``[heads]``, optional
        A logit per head that enters the denominator only; also as a list of one.
    skip_softmax_threshold_scale_factor : float, optional
        λ of a request is this over its length; a request with λ ≥ 1 runs without skipping. None
        and 0: nothing is skipped.
    lse : torch.Tensor, float32 ``[batch * q_len, heads]`` or ``[batch, q_len, heads]``, optional
        Filled whenever it is given.
    return_lse : bool
        Return ``(out, lse)``.
    cum_seq_lens_q : torch.Tensor, int32 ``[batch + 1]``, optional
        Prefix sums of the numbers of new tokens, where they differ.

    Returns
    -------
    torch.Tensor, or a pair of them
        Output and, if asked for, log-sum-exp to base 2, sinks included. Rows that see no key are 0
        and −∞.

    Raises
    ------
    ValueError, TypeError
        Before anything is launched, naming the argument, what came and what was wanted.

    Examples
    --------
    >>> import torch                                                        # doctest: +SKIP
    >>> from cuattn.interop import flashinfer                               # doctest: +SKIP
    >>> def new(*shape, dtype=torch.bfloat16):                              # doctest: +SKIP
    ...     return torch.zeros(shape, dtype=dtype, device="cuda")
    >>> tables = new(2, 4, dtype=torch.int32)                               # doctest: +SKIP
    >>> lengths = torch.tensor([100, 7], dtype=torch.int32, device="cuda")  # doctest: +SKIP
    >>> flashinfer.mla.trtllm_batch_decode_with_kv_cache_mla(               # doctest: +SKIP
    ...     new(2, 1, 128, 576), new(10, 64, 576), new(1 << 20, dtype=torch.int8), 128, 512, 64,
    ...     tables, lengths, 256, bmm1_scale=192**-0.5,
    ... ).shape
    torch.Size([2, 1, 128, 512])
    """
    refuse(
        uses_shared_paged_kv_idx=uses_shared_paged_kv_idx,
        kv_scale_format=kv_scale_format,
        sparse_mla_top_k_lens=sparse_mla_top_k_lens,
        enable_dcp=enable_dcp,
        cp_world=cp_world,
        cp_rank=cp_rank,
        causal_seqlens_kv_global=causal_seqlens_kv_global,
        use_fp16_softmax=use_fp16_softmax,
    )
    backend_of(backend, _BACKENDS, ValueError)
    tensors(query=query)
    shape = query.shape
    _check_query(shape, kv_lora_rank, qk_rope_head_dim, cum_seq_lens_q is not None)
    skip = skip_of(skip_softmax_threshold_scale_factor)
    options = {"scale": bmm1_scale, "out_scale": factor_of(bmm2_scale), "sinks": sinks_of(sinks)}
    if cum_seq_lens_q is not None:
        options["cu_seqlens_q"] = cum_seq_lens_q
    if skip is not None:
        options["skip_softmax"] = skip
    if sparse_mla_top_k:
        _check_sparse(sparse_mla_top_k, block_tables, shape, skip is not None)
        options["sparse_indices"], block_tables = block_tables, None
    dtype = query.dtype if out is None else getattr(out, "dtype", query.dtype)
    results = room(query, kv_lora_rank, dtype, out, lse, return_lse)
    return attend(mla_decode, query, (kv_cache, block_tables, seq_lens), results, options)


def _check_query(shape: tuple[int, ...], latent: int, rope: int, ragged: bool) -> None:
    """Check the queries' axes, which tell a batch of tokens from tokens of unequal requests."""
    if len(shape) != (3 if ragged else 4):
        axes = "[tokens, heads, dim]" if ragged else "[batch, q_len, heads, dim]"
        raise ValueError(f"query has shape {tuple(shape)}; wanted {axes}")
    if shape[-1] != latent + rope:
        raise ValueError(
            f"query has head_dim {shape[-1]}; wanted {latent + rope}, kv_lora_rank plus "
            "qk_rope_head_dim"
        )


def _check_sparse(top_k: int, table: torch.Tensor, query: tuple[int, ...], skip: bool) -> None:
    if skip:
        raise ValueError(
            "skip_softmax_threshold_scale_factor is not supported for sparse MLA; wanted None or "
            "sparse_mla_top_k=0"
        )
    tensors(block_tables=table)
    if table.shape != (*query[:-2], top_k):
        raise ValueError(
            f"block_tables has shape {tuple(table.shape)}; wanted {(*query[:-2], top_k)}, "
            "sparse_mla_top_k positions for every token"
        )
