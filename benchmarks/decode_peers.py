"""Other implementations of paged decode on the same arrays, each only if it can be imported.

A maker gets the inputs and caches that may stand in for theirs; it returns one function without
arguments for each cache, which runs the peer and returns its output, as a torch tensor.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from cuattn._workloads_paged import PagedInputs, PagedSize

Run = Callable[[], Any]
Maker = Callable[[PagedInputs, PagedSize, list[Any]], list[Run]]

WORKSPACE = 256 << 20  # bytes


def available(flashinfer: bool, size: PagedSize) -> dict[str, Maker]:
    """Peers for a shape that can be imported here, by name."""
    if not (flashinfer and importlib.util.find_spec("flashinfer")):
        return {}
    if size.q_len > 1:
        return {"flashinfer_prefill_fa2": _flashinfer_prefill}
    makers: dict[str, Maker] = {
        "flashinfer_tensor_cores": lambda *given: _flashinfer(*given, tensor_cores=True)
    }
    if size.q_heads == size.kv_heads:
        makers["flashinfer_cuda_cores"] = lambda *given: _flashinfer(*given, tensor_cores=False)
    return makers


def capture(runs: list[Run]) -> Run:
    """Put the runs into a CUDA graph of torch's; return what replays it."""
    import torch

    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph.replay


def _flashinfer(
    inputs: PagedInputs, size: PagedSize, caches: list[Any], *, tensor_cores: bool
) -> list[Run]:
    import torch
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    q = torch.from_dlpack(inputs.q)
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=tensor_cores)
    wrapper.plan(
        *_page_lists(inputs, size),
        size.q_heads,
        size.kv_heads,
        size.head_dim,
        size.page,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    return _runs(wrapper, q, caches)


def _flashinfer_prefill(inputs: PagedInputs, size: PagedSize, caches: list[Any]) -> list[Run]:
    import torch
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    q = torch.from_dlpack(inputs.q).flatten(0, 1)  # [token, head, dim]
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
    wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend="fa2")
    starts = torch.arange(size.batch + 1, dtype=torch.int32, device="cuda") * size.q_len
    wrapper.plan(
        starts,
        *_page_lists(inputs, size),
        size.q_heads,
        size.kv_heads,
        size.head_dim,
        size.page,
        causal=True,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    return _runs(wrapper, q, caches)


def _page_lists(inputs: PagedInputs, size: PagedSize) -> tuple[Any, Any, Any]:
    """Where each request's pages begin in one list of all; that list; keys on the last pages."""
    import torch

    tables = torch.from_dlpack(inputs.tables)
    starts = [0]
    for count in size.pages:
        starts.append(starts[-1] + count)
    last = [(length - 1) % size.page + 1 for length in size.lengths]
    indices = torch.cat([tables[i, :count] for i, count in enumerate(size.pages)])
    return (
        torch.tensor(starts, dtype=torch.int32, device="cuda"),
        indices,
        torch.tensor(last, dtype=torch.int32, device="cuda"),
    )


def _runs(wrapper: Any, q: Any, caches: list[Any]) -> list[Run]:
    import torch

    out = torch.empty_like(q)

    def on(cache: Any) -> Run:
        return lambda: wrapper.run(q, cache, out=out)

    return [on(torch.from_dlpack(cache)) for cache in caches]
