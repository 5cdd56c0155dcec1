"""cuattn's functions as PyTorch operators: tensors in, tensors out, under `torch.compile` too.

The functions have cuattn's names and arguments, but for what belongs to PyTorch here: results are
new tensors of its allocator, so there is no `out=` and no `lse=`, and a compiler may reuse their
memory as it likes; the launch goes to its current stream, so there is no `stream=`. Nothing is
copied. CPU tensors are the emulator's.

Under ``mode="reduce-overhead"``, tensors that `append_kv` and `append_mla_kv` write to should be
known to stay in place: ``torch._dynamo.mark_static_address(kv_cache)``.

There are no derivatives: an argument that requires grad is refused while gradients are recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import cuattn

from ._torch_arguments import SkipStats, cache, check_tensors
from ._torch_arguments import options as options_of
from ._torch_operators import Options

__all__ = [
    "SkipStats",
    "append_kv",
    "append_mla_kv",
    "decode",
    "merge_states",
    "mla_decode",
    "prefill",
    "prefill_paged",
    "prefill_ragged",
]

_operators = torch.ops.cuattn


# --- attention -----------------------------------------------------------------------------------


def _asked(results: tuple[Tensor, Tensor, Tensor], options: Options) -> Any:
    """Return the output, or a tuple of it and what else was asked for."""
    out, lse, lost = results
    more = ((lse,) if options.return_lse else ()) + ((lost,) if options.certificate else ())
    return (out, *more) if more else out


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_left: int = -1,
    scale: Any = None,
    out_scale: Any = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    skip_softmax: cuattn.SkipSoftmax | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Attention over whole sequences of equal length; arguments as in `cuattn.prefill`.

    Returns
    -------
    Tensor ``[batch, q_len, q_heads, head_dim_v]``, or a tuple
        With the log-sum-exp if asked for, and with a certificate what each row lost at most: both
        float32 ``[batch, q_len, q_heads]``.

    Examples
    --------
    >>> import torch, cuattn.interop.torch as attention                    # doctest: +SKIP
    >>> q = torch.randn(1, 512, 8, 64, device="cuda").bfloat16()           # doctest: +SKIP
    >>> f = torch.compile(lambda x: attention.prefill(x, x, x, causal=True))    # doctest: +SKIP
    >>> f(q).shape                                                         # doctest: +SKIP
    torch.Size([1, 512, 8, 64])
    """
    check_tensors(q=q, k=k, v=v)
    options = options_of(
        q,
        q.shape[0],
        window_left=window_left,
        scale=scale,
        out_scale=out_scale,
        soft_cap=soft_cap,
        sinks=sinks,
        skip=skip_softmax,
        return_lse=return_lse,
        out_dtype=out_dtype,
    )
    return _asked(_operators.prefill(q, k, v, causal, *options), options)


def prefill_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    *,
    causal: bool = False,
    window_left: int = -1,
    scale: Any = None,
    out_scale: Any = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    skip_softmax: cuattn.SkipSoftmax | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Attention over sequences of unequal length, end to end; as `cuattn.prefill_ragged`.

    Returns
    -------
    Tensor ``[q_tokens, q_heads, head_dim_v]``, or a tuple
        As in `prefill`, with float32 ``[q_tokens, q_heads]``. Tokens that belong to no request are
        not written.
    """
    check_tensors(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv)
    options = options_of(
        q,
        cu_seqlens_q.numel() - 1,
        window_left=window_left,
        scale=scale,
        out_scale=out_scale,
        soft_cap=soft_cap,
        sinks=sinks,
        skip=skip_softmax,
        return_lse=return_lse,
        out_dtype=out_dtype,
    )
    arrays = (q, k, v, cu_seqlens_q, cu_seqlens_kv)
    return _asked(_operators.prefill_ragged(*arrays, causal, *options), options)


def prefill_paged(
    q: Tensor,
    kv_cache: Any,
    block_tables: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    layout: str = "HND",
    causal: bool = True,
    window_left: int = -1,
    scale: Any = None,
    out_scale: Any = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    skip_softmax: cuattn.SkipSoftmax | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Attention of new tokens over a paged cache; arguments as in `cuattn.prefill_paged`.

    Returns
    -------
    Tensor ``[q_tokens, q_heads, head_dim_v]``, or a tuple
        As in `prefill`, with float32 ``[q_tokens, q_heads]``. Tokens that belong to no request are
        not written.
    """
    k, v = cache(kv_cache)
    check_tensors(q=q, block_tables=block_tables, seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q)
    options = options_of(
        q,
        block_tables.shape[0],
        window_left=window_left,
        scale=scale,
        out_scale=out_scale,
        soft_cap=soft_cap,
        sinks=sinks,
        skip=skip_softmax,
        return_lse=return_lse,
        out_dtype=out_dtype,
    )
    arrays = (q, k, v, block_tables, seq_lens, cu_seqlens_q)
    return _asked(_operators.prefill_paged(*arrays, layout, causal, *options), options)


def decode(
    q: Tensor,
    kv_cache: Any,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    layout: str = "HND",
    window_left: int = -1,
    scale: Any = None,
    out_scale: Any = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    skip_softmax: cuattn.SkipSoftmax | None = None,
    batch_invariant: bool | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Attention of each request's newest tokens over a paged cache; as `cuattn.decode`.

    Returns
    -------
    Tensor, or a tuple of them
        The output; if asked for the log-sum-exp, and with a certificate what each row lost.
    """
    k, v = cache(kv_cache)
    check_tensors(q=q, block_tables=block_tables, seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q)
    options = options_of(
        q,
        block_tables.shape[0],
        window_left=window_left,
        scale=scale,
        out_scale=out_scale,
        soft_cap=soft_cap,
        sinks=sinks,
        skip=skip_softmax,
        return_lse=return_lse,
        out_dtype=out_dtype,
    )
    arrays = (q, k, v, block_tables, seq_lens, cu_seqlens_q)
    return _asked(_operators.decode(*arrays, layout, batch_invariant, *options), options)


def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor | None,
    seq_lens: Tensor,
    *,
    scale: Any,
    cu_seqlens_q: Tensor | None = None,
    out_scale: Any = None,
    sinks: Tensor | None = None,
    skip_softmax: cuattn.SkipSoftmax | None = None,
    sparse_indices: Tensor | None = None,
    latent_dim: int | None = None,
    batch_invariant: bool | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Absorbed latent attention over a paged cache; arguments as in `cuattn.mla_decode`.

    Returns
    -------
    Tensor, or a tuple of them
        The output, q's shape with the latent columns; if asked for the log-sum-exp, and with a
        certificate what each row lost.
    """
    check_tensors(q=q, kv_cache=kv_cache, block_tables=block_tables, seq_lens=seq_lens)
    check_tensors(cu_seqlens_q=cu_seqlens_q, sparse_indices=sparse_indices)
    options = options_of(
        q,
        seq_lens.shape[0],
        window_left=-1,
        scale=scale,
        out_scale=out_scale,
        soft_cap=0.0,
        sinks=sinks,
        skip=skip_softmax,
        return_lse=return_lse,
        out_dtype=out_dtype,
    )
    arrays = (q, kv_cache, block_tables, seq_lens, cu_seqlens_q, sparse_indices)
    return _asked(_operators.mla_decode(*arrays, latent_dim, batch_invariant, *options), options)


# --- around attention ----------------------------------------------------------------------------


def merge_states(
    outs: Sequence[Tensor] | Tensor,
    lses: Sequence[Tensor] | Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge results of the same queries over disjoint sets of keys; as `cuattn.merge_states`.

    Returns
    -------
    pair of Tensor
        The output and its log-sum-exp.
    """
    parts: list[list[Tensor]] = []
    for name, given in (("outs", outs), ("lses", lses)):
        if not isinstance(given, (tuple, list)):
            check_tensors(**{name: given})
        parts.append(list(given))
        if not parts[-1]:
            raise ValueError(f"{name} is empty; wanted at least one part")
        check_tensors(**{f"{name}[{i}]": part for i, part in enumerate(parts[-1])})
    out, lse = _operators.merge_states(*parts, out_dtype)
    return out, lse


def append_kv(
    kv_cache: Any,
    k_new: Tensor,
    v_new: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    cu_seqlens_new: Tensor | None = None,
    *,
    layout: str = "HND",
) -> None:
    """Write keys and values of new tokens into the pages of a cache; as `cuattn.append_kv`."""
    k, v = cache(kv_cache)
    check_tensors(k_new=k_new, v_new=v_new, block_tables=block_tables, seq_lens=seq_lens)
    check_tensors(cu_seqlens_new=cu_seqlens_new)
    _operators.append_kv(k, v, k_new, v_new, block_tables, seq_lens, cu_seqlens_new, layout)


def append_mla_kv(
    kv_cache: Tensor,
    c_kv_new: Tensor,
    k_pe_new: Tensor | None,
    block_tables: Tensor,
    seq_lens: Tensor,
    cu_seqlens_new: Tensor | None = None,
) -> None:
    """Write new tokens into the pages of an MLA cache; as `cuattn.append_mla_kv`."""
    check_tensors(kv_cache=kv_cache, c_kv_new=c_kv_new, k_pe_new=k_pe_new)
    check_tensors(block_tables=block_tables, seq_lens=seq_lens, cu_seqlens_new=cu_seqlens_new)
    _operators.append_mla_kv(kv_cache, c_kv_new, k_pe_new, block_tables, seq_lens, cu_seqlens_new)
