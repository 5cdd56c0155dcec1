"""FlashInfer's wrapper for decode over a paged cache: plan once, run in every layer."""

from __future__ import annotations

from typing import Any

import torch

from ...decode import decode
from ._arguments import backend_of, refuse, shown
from ._results import attend
from ._wrapper import NAMES, PagedWrapper, Pages, Planned, dtypes_of

_BACKENDS = ("auto", "fa2", "fa3", "trtllm-gen", "cute-dsl", "cutile")


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    """Attention of each request's newest tokens, planned by FlashInfer's page lists.

    `plan` turns the lists into a table on the device; `run` is `cuattn.decode`, which may be
    captured in a CUDA graph. With `use_cuda_graph` later plans change the values that a captured
    run reads, up to the sizes of the buffers.

    Parameters
    ----------
    float_workspace_buffer : torch.Tensor
        Not used; its device is where plans are kept.
    kv_layout : str
        ``"NHD"`` or ``"HND"``.
    use_cuda_graph : bool
        Keep plans at fixed addresses. Wants the three buffers that follow.
    use_tensor_cores : bool
        Of no effect: they are used.
    paged_kv_indptr_buffer : torch.Tensor, int32 ``[batch + 1]``, optional
    paged_kv_indices_buffer, paged_kv_last_page_len_buffer : torch.Tensor, int32, optional
        ``[most pages in all]`` and ``[batch]``. The table is as wide as the former is long.
    backend : str
        One of FlashInfer's; of no effect.
    jit_args
        None.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: Any = None,
    ) -> None:
        backend_of(backend, _BACKENDS, ValueError)
        buffers = {
            "paged_kv_indptr_buffer": paged_kv_indptr_buffer,
            "paged_kv_indices_buffer": paged_kv_indices_buffer,
            "paged_kv_last_page_len_buffer": paged_kv_last_page_len_buffer,
        }
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, buffers, jit_args)

    @property
    def use_tensor_cores(self) -> bool:
        """True, whatever the constructor was given."""
        return True

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        data_type: Any = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        *,
        window_right: int = 0,
    ) -> None:
        """Say which pages belong to which request, and what all runs share.

        Cannot be captured: it reads `indptr` on the host. The page beside this file says of every
        parameter what becomes of it.

        Parameters
        ----------
        indptr : torch.Tensor, int32 ``[batch + 1]``
            Prefix sums of the numbers of pages; on the CPU nothing is waited for.
        indices, last_page_len : torch.Tensor, int32
            Pages of all requests, end to end, and the number of tokens on each one's last page.
        num_qo_heads, num_kv_heads, head_dim, page_size : int
            What the tensors of every run have.
        window_left, logits_soft_cap, sm_scale
            As `window_left`, `soft_cap` and `scale` of `cuattn.decode`.
        q_data_type, kv_data_type, o_data_type : torch.dtype or str
            Of the tensors of every run; float16, the queries' and the queries' by default.
        data_type : torch.dtype or str, optional
            Of queries and cache where those are None.
        block_tables : torch.Tensor, int32 ``[batch, max_pages]``, optional
            The table itself, in place of one made of the page lists; read where it is.
        seq_lens : torch.Tensor, int32, `batch` elements, optional
            Lengths of the requests, in place of those that follow from the pages.
        fixed_split_size, disable_split_kv : int, bool
            Either one asks for results that do not depend on the batch: `batch_invariant` of
            `cuattn.decode`, which cuts requests at lengths of its own.
        q_len_per_req : int
            New tokens of each request; a run's queries say it, too, and decide.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, what came and what was wanted.
        NotImplementedError
            For a `window_right` other than 0.
        """
        refuse(pos_encoding_mode=pos_encoding_mode, window_right=window_right)
        if type(q_len_per_req) is not int or q_len_per_req < 1:
            raise ValueError(f"q_len_per_req is {shown(q_len_per_req)}; wanted an int ≥ 1")
        dtypes = dtypes_of(
            data_type if q_data_type is None else q_data_type,
            data_type if kv_data_type is None else kv_data_type,
            o_data_type,
        )
        self._plan_pages(
            Pages(indptr, indices, last_page_len, page_size), block_tables, seq_lens, non_blocking
        )
        invariant = fixed_split_size is not None or disable_split_kv
        self._planned = Planned(
            (num_qo_heads, num_kv_heads),
            (head_dim, head_dim),
            page_size,
            dtypes,
            {
                "layout": self._layout,
                "soft_cap": logits_soft_cap or 0.0,
                "batch_invariant": True if invariant else None,
            },
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
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
    ) -> Any:
        """Attend, as planned.

        Parameters
        ----------
        q : torch.Tensor, ``[batch * q_len, num_qo_heads, head_dim]``
        paged_kv_cache : torch.Tensor or pair of them
            As in `trtllm_batch_decode_with_kv_cache`, in the wrapper's `kv_layout`.
        q_scale, k_scale, v_scale : float or torch.Tensor of one float32, optional
            The first two multiply `sm_scale`, the last one the output.
        out, lse, return_lse, sinks, skip_softmax_threshold_scale_factor
            As in `trtllm_batch_decode_with_kv_cache`.
        window_left : int, optional
            In place of the plan's.
        q_len_per_req : int, optional
            New tokens of each request; by default as many as `q` holds.

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
        refuse(kv_cache_sf=kv_cache_sf, jit_args=args or None)
        planned, cache = self._planned_run(q, paged_kv_cache)
        batch, rows = self._tables.shape[0], q.shape[0]  # type: ignore[union-attr]
        q_len = (rows // batch if batch else 1) if q_len_per_req is None else q_len_per_req
        if rows != batch * q_len:
            each = "as many for each" if q_len_per_req is None else f"{q_len_per_req} for each"
            raise ValueError(f"q has {rows} tokens; wanted {each} of the plan's {batch} requests")
        factors, skip = (q_scale, k_scale, v_scale), skip_softmax_threshold_scale_factor
        options = planned.options_of(q, window_left, factors, sinks, skip)
        results = self._room(q, planned, out, lse, return_lse)
        arrays = (cache, self._tables, self._lengths)
        tokens = None if q_len == 1 else (batch, q_len)
        return attend(decode, q, arrays, results, options, tokens, NAMES)

    def run_return_lse(self, q: torch.Tensor, paged_kv_cache: Any, **options: Any) -> Any:
        """Do the same and return ``(out, lse)``."""
        return self.run(q, paged_kv_cache, return_lse=True, **options)
