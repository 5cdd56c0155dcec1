"""FlashInfer's wrapper for chunks over a paged cache: plan once, run in every layer."""

from __future__ import annotations

from typing import Any

import torch

from ...prefill import prefill_paged
from ._arguments import backend_of, refuse, tensors
from ._results import attend
from ._wrapper import NAMES, PagedWrapper, Pages, Planned, dtypes_of

_BACKENDS = ("auto", "fa2", "fa3", "cudnn", "trtllm-gen", "cute-dsl")


class BatchPrefillWithPagedKVCacheWrapper(PagedWrapper):
    """Attention of new tokens over a paged cache, planned by FlashInfer's page lists.

    `plan` turns the lists into a table on the device; `run` is `cuattn.prefill_paged`, which may be
    captured in a CUDA graph. With `use_cuda_graph` later plans change the values that a captured
    run reads, up to the sizes of the buffers.

    Parameters
    ----------
    float_workspace_buffer : torch.Tensor
        Not used; its device is where plans are kept.
    kv_layout : str
        ``"NHD"`` or ``"HND"``.
    use_cuda_graph : bool
        Keep plans at fixed addresses. Wants the four buffers that follow.
    qo_indptr_buf, paged_kv_indptr_buf : torch.Tensor, int32 ``[batch + 1]``, optional
    paged_kv_indices_buf, paged_kv_last_page_len_buf : torch.Tensor, int32, optional
        ``[most pages in all]`` and ``[batch]``. The table is as wide as the former is long.
    custom_mask_buf, mask_indptr_buf
        Not used: `plan` refuses masks of one's own.
    backend : str
        One of FlashInfer's; of no effect.
    jit_args, jit_kwargs
        None.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
    ) -> None:
        refuse(jit_kwargs=jit_kwargs)
        backend_of(backend, _BACKENDS, ValueError)
        buffers = {
            "qo_indptr_buf": qo_indptr_buf,
            "paged_kv_indptr_buf": paged_kv_indptr_buf,
            "paged_kv_indices_buf": paged_kv_indices_buf,
            "paged_kv_last_page_len_buf": paged_kv_last_page_len_buf,
        }
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, buffers, jit_args)
        self._ends: torch.Tensor | None = None
        self._rows = 0

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        non_blocking: bool = True,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        block_tables: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Say which tokens and pages belong to which request, and what all runs share.

        Cannot be captured: it reads the two `indptr` on the host. The page beside this file says of
        every parameter what becomes of it.

        Parameters
        ----------
        qo_indptr, paged_kv_indptr : torch.Tensor, int32 ``[batch + 1]``
            Prefix sums of the numbers of new tokens and of pages; on the CPU nothing is waited for.
        paged_kv_indices, paged_kv_last_page_len : torch.Tensor, int32
            Pages of all requests, end to end, and the number of tokens on each one's last page.
        num_qo_heads, num_kv_heads, head_dim_qk, page_size, head_dim_vo : int
            What the tensors of every run have.
        causal, sm_scale, window_left, logits_soft_cap
            As `causal`, `scale`, `window_left` and `soft_cap` of `cuattn.prefill_paged`.
        q_data_type, kv_data_type, o_data_type : torch.dtype or str
            Of the tensors of every run; float16, the queries' and the queries' by default.
        seq_lens : torch.Tensor, int32, `batch` elements, optional
            Lengths of the requests, in place of those that follow from the pages.
        block_tables : torch.Tensor, int32 ``[batch, max_pages]``, optional
            The table itself, in place of one made of the page lists; read where it is.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, what came and what was wanted.
        """
        refuse(
            custom_mask=custom_mask,
            packed_custom_mask=packed_custom_mask,
            pos_encoding_mode=pos_encoding_mode,
            use_fp16_qk_reduction=use_fp16_qk_reduction,
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            token_pos_in_items_len=token_pos_in_items_len,
            max_item_len_ptr=max_item_len_ptr,
        )
        dtypes = dtypes_of(q_data_type, kv_data_type, o_data_type)
        tensors(qo_indptr=qo_indptr, paged_kv_indptr=paged_kv_indptr)
        if qo_indptr.shape != paged_kv_indptr.shape:
            raise ValueError(
                f"qo_indptr has shape {tuple(qo_indptr.shape)}; wanted that of paged_kv_indptr, "
                f"{tuple(paged_kv_indptr.shape)}"
            )
        pages = Pages(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
        self._plan_pages(pages, block_tables, seq_lens, non_blocking)
        if self._use_cuda_graph:
            self._ends = self._buffers[0].copy_(qo_indptr, non_blocking=non_blocking)
        else:
            self._ends = qo_indptr.to(self.device, torch.int32, non_blocking=non_blocking)
        self._rows = int(qo_indptr[-1])
        self._planned = Planned(
            (num_qo_heads, num_kv_heads),
            (head_dim_qk, head_dim_qk if head_dim_vo is None else head_dim_vo),
            page_size,
            dtypes,
            {"layout": self._layout, "causal": causal, "soft_cap": logits_soft_cap or 0.0},
            sm_scale,
            window_left,
        )

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: Any,
        *args: Any,
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Any:
        """Attend, as planned.

        Parameters
        ----------
        q : torch.Tensor, ``[qo_indptr[-1], num_qo_heads, head_dim_qk]``
        paged_kv_cache : torch.Tensor or pair of them
            As in `trtllm_batch_context_with_kv_cache`, in the wrapper's `kv_layout`.
        q_scale, k_scale, v_scale : float or torch.Tensor of one float32, optional
            The first two multiply `sm_scale`, the last one the output.
        out, lse, return_lse, sinks, skip_softmax_threshold_scale_factor
            As in `trtllm_batch_context_with_kv_cache`.
        window_left : int, optional
            In place of the plan's.

        Returns
        -------
        torch.Tensor, or a pair of them
            Output and, if asked for, log-sum-exp to base 2, float32 ``[tokens, num_qo_heads]``.

        Raises
        ------
        ValueError, TypeError
            Before anything is launched, naming the argument, what came and what was wanted.
        RuntimeError
            Before the first `plan`.
        """
        refuse(
            kv_cache_sf=kv_cache_sf,
            use_fp16_softmax=use_fp16_softmax,
            uses_spcompress=uses_spcompress,
            jit_args=args or None,
        )
        planned, cache = self._planned_run(q, paged_kv_cache)
        if q.shape[0] != self._rows:
            raise ValueError(f"q has {q.shape[0]} tokens; wanted {self._rows}, as qo_indptr ends")
        factors, skip = (q_scale, k_scale, v_scale), skip_softmax_threshold_scale_factor
        options = planned.options_of(q, window_left, factors, sinks, skip)
        results = self._room(q, planned, out, lse, return_lse)
        arrays = (cache, self._tables, self._lengths, self._ends)
        return attend(prefill_paged, q, arrays, results, options, names=NAMES)

    def run_return_lse(self, q: torch.Tensor, paged_kv_cache: Any, **options: Any) -> Any:
        """Do the same and return ``(out, lse)``."""
        return self.run(q, paged_kv_cache, return_lse=True, **options)
