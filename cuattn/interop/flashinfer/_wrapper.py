"""What the two wrappers share: plans of pages, made on the device, and the checks of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ._arguments import cache_of, dtype_of, factor_of, refuse, shown, sinks_of, skip_of, tensors
from ._results import Results, room

_LAYOUTS = ("NHD", "HND")

# Our names for the wrappers' arguments, in errors.
NAMES = {
    "kv_cache": "paged_kv_cache",
    "scale": "sm_scale",
    "out_scale": "v_scale",
    "soft_cap": "logits_soft_cap",
    "cu_seqlens_q": "qo_indptr",
    "layout": "kv_layout",
}


@dataclass(frozen=True, slots=True)
class Planned:
    """What `plan` was told of all runs that follow."""

    heads: tuple[int, int]  # of queries, of keys
    head_dims: tuple[int, int]  # of queries and keys, of values
    page_size: int
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]  # of queries, cache and output
    options: Mapping[str, Any]  # of our function, the same in every run
    scale: float | None
    window_left: int

    def options_of(
        self,
        q: torch.Tensor,
        window_left: int | None,
        factors: tuple[Any, ...],
        sinks: Any,
        skip: Any,
    ) -> dict[str, Any]:
        """Return the options of one run; `factors` are those of queries, keys and values."""
        *of_scores, of_values = factors
        return {
            **self.options,
            "window_left": self.window_left if window_left is None else window_left,
            "scale": scale_of(self.scale, q.shape[-1], *of_scores),
            "out_scale": factor_of(of_values),
            "sinks": sinks_of(sinks),
            "skip_softmax": skip_of(skip),
        }


@dataclass(frozen=True, slots=True)
class Pages:
    """The pages of each request, as FlashInfer has them: end to end."""

    indptr: torch.Tensor  # [batch + 1], where each request's pages begin in `indices`
    indices: torch.Tensor
    last_page_len: torch.Tensor  # [batch], how many tokens are on each request's last page
    page_size: int


class PagedWrapper:
    """Tables and lengths that every run of a plan reads, at the same addresses in a CUDA graph."""

    def __init__(
        self,
        workspace: torch.Tensor,
        kv_layout: str,
        use_cuda_graph: bool,
        buffers: Mapping[str, torch.Tensor | None],
        jit_args: Any,
    ) -> None:
        refuse(jit_args=jit_args)
        if kv_layout not in _LAYOUTS:
            raise ValueError(f"kv_layout is {shown(kv_layout)}; wanted 'NHD' or 'HND'")
        self.device = workspace.device
        self._layout = kv_layout
        self._use_cuda_graph = use_cuda_graph
        self._planned: Planned | None = None
        self._tables: torch.Tensor | None = None
        self._lengths: torch.Tensor | None = None
        self._buffers: list[torch.Tensor] = []
        if not use_cuda_graph:
            return
        for name, buffer in buffers.items():
            if not isinstance(buffer, torch.Tensor):
                raise ValueError(
                    f"{name} is {shown(buffer)}; wanted a torch.Tensor, as use_cuda_graph=True"
                )
            self._buffers.append(buffer)
        *ends, _, last_page_len = self._buffers
        self._batch = last_page_len.shape[0]
        for name, buffer in zip(buffers, ends, strict=False):
            if buffer.shape[0] != self._batch + 1:
                raise ValueError(
                    f"{name} has {buffer.shape[0]} elements; wanted {self._batch + 1}, one more "
                    "than the buffer of last_page_len"
                )

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plans are kept at addresses that a captured run goes on reading."""
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor
    ) -> None:
        """Take other workspaces, which are not used either."""

    # --- plan -------------------------------------------------------------------------------------

    def _plan_pages(
        self,
        pages: Pages,
        block_tables: torch.Tensor | None,
        seq_lens: torch.Tensor | None,
        non_blocking: bool,
    ) -> None:
        """Make `_tables` and `_lengths`; waits for `indptr` if that is on the device."""
        tensors(indptr=pages.indptr, indices=pages.indices, last_page_len=pages.last_page_len)
        batch = pages.last_page_len.shape[0]
        if pages.indptr.shape != (batch + 1,):
            raise ValueError(
                f"indptr has shape {tuple(pages.indptr.shape)}; wanted [{batch + 1}], one more "
                "than last_page_len has elements"
            )
        starts = pages.indptr.tolist()
        if starts[-1] > pages.indices.shape[0]:
            raise ValueError(
                f"indices has {pages.indices.shape[0]} pages; wanted {starts[-1]}, as indptr ends"
            )
        width = max((end - start for start, end in pairwise(starts)), default=0)
        if self._use_cuda_graph:
            pages = self._buffered(pages, non_blocking)
        else:
            indptr, indices, last_page_len = (
                x.to(self.device, torch.int32, non_blocking=non_blocking)
                for x in (pages.indptr, pages.indices, pages.last_page_len)
            )
            pages = Pages(indptr, indices, last_page_len, pages.page_size)
        if seq_lens is None:
            lengths = _lengths_of(pages)
        else:
            lengths = seq_lens.flatten().to(self.device, torch.int32, non_blocking=non_blocking)
        self._lengths = self._kept(self._lengths, lengths)
        if block_tables is not None:
            self._tables = block_tables.to(self.device, torch.int32, non_blocking=non_blocking)
            return
        tables = _table_of(pages, max(width, 1))
        if self._use_cuda_graph and self._tables is None:
            self._tables = tables.new_zeros(batch, max(pages.indices.shape[0], 1))
        self._tables = self._kept(self._tables, tables)

    def _buffered(self, pages: Pages, non_blocking: bool) -> Pages:
        """Copy a plan's pages into the buffers that the constructor was given."""
        if pages.last_page_len.shape[0] != self._batch:
            raise ValueError(
                f"last_page_len has {pages.last_page_len.shape[0]} elements; wanted {self._batch} "
                "in every plan, as use_cuda_graph=True"
            )
        *_, indptr, indices, last_page_len = self._buffers
        if pages.indices.shape[0] > indices.shape[0]:
            raise ValueError(
                f"indices has {pages.indices.shape[0]} pages; wanted at most {indices.shape[0]}, "
                "what its buffer holds"
            )
        indptr.copy_(pages.indptr, non_blocking=non_blocking)
        indices[: pages.indices.shape[0]].copy_(pages.indices, non_blocking=non_blocking)
        last_page_len.copy_(pages.last_page_len, non_blocking=non_blocking)
        return Pages(indptr, indices, last_page_len, pages.page_size)

    def _kept(self, old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        """In a CUDA graph's wrapper put new values where the old ones are."""
        if not self._use_cuda_graph or old is None:
            return new
        old[..., : new.shape[-1]].copy_(new)
        return old

    # --- run --------------------------------------------------------------------------------------

    def _planned_run(self, q: torch.Tensor, paged_kv_cache: Any) -> tuple[Planned, Any]:
        """Check a run's tensors against the plan; return that and the cache for our function."""
        planned = self._planned
        if planned is None:
            raise RuntimeError("run() came before plan()")
        tensors(q=q)
        cache, _ = cache_of(paged_kv_cache, "paged_kv_cache")
        keys = cache[0] if isinstance(cache, tuple) else cache
        _same_dtype("q", q.dtype, "q_data_type", planned.dtypes[0])
        _same_dtype("paged_kv_cache", keys.dtype, "kv_data_type", planned.dtypes[1])
        heads, dims = planned.heads, planned.head_dims
        if q.shape[-2:] != (heads[0], dims[0]):
            raise ValueError(
                f"q has shape {tuple(q.shape)}; wanted {heads[0]} heads of {dims[0]}, as planned"
            )
        wanted = (planned.page_size, heads[1]), (heads[1], planned.page_size)
        if keys.shape[-3:-1] != wanted[self._layout == "HND"]:
            raise ValueError(
                f"paged_kv_cache has shape {tuple(keys.shape)} ({self._layout}); wanted pages of "
                f"{planned.page_size} tokens and {heads[1]} heads, as planned"
            )
        return planned, cache

    def _room(
        self, q: torch.Tensor, planned: Planned, out: Any, lse: Any, return_lse: bool
    ) -> Results:
        return room(q, planned.head_dims[1], planned.dtypes[2], out, lse, return_lse)


def _lengths_of(pages: Pages) -> torch.Tensor:
    counts = pages.indptr.diff()
    return ((counts - 1) * pages.page_size + pages.last_page_len).clamp_(min=0)


def _table_of(pages: Pages, width: int) -> torch.Tensor:
    """Return int32 [batch, width]; what stands behind a request's pages is never read."""
    batch = pages.last_page_len.shape[0]
    if not pages.indices.shape[0]:
        return pages.indptr.new_zeros(batch, width)
    place = torch.arange(width, dtype=torch.int32, device=pages.indptr.device)
    place = (pages.indptr[:-1, None] + place).clamp_(max=pages.indices.shape[0] - 1)
    return pages.indices.index_select(0, place.flatten()).view(batch, width)


def dtypes_of(q: Any, kv: Any, out: Any) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Return a plan's dtypes, each the queries' unless it is given."""
    q_dtype = dtype_of(q, "q_data_type")
    return (
        q_dtype,
        q_dtype if kv is None else dtype_of(kv, "kv_data_type"),
        q_dtype if out is None else dtype_of(out, "o_data_type"),
    )


def scale_of(planned: float | None, head_dim: int, *factors: Any) -> Any:
    """Return what multiplies Q·Kᵀ: the plan's scale times what a run gives."""
    scale: Any = head_dim**-0.5 if planned is None else planned
    for factor in factors:
        if factor is not None:
            scale = scale * factor
    return scale


def _same_dtype(name: str, dtype: torch.dtype, planned_name: str, planned: torch.dtype) -> None:
    if dtype is not planned:
        raise ValueError(f"{name} is {dtype}; wanted {planned}, the plan's {planned_name}")
