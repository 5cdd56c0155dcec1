"""Host time of one call in steady state: what Python adds before the kernel is queued."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

from cuattn._workloads import Inputs, Size, iid
from cuattn._workloads_paged import PagedInputs, PagedSize, iid_paged

from . import peers
from .report import Options, Row, say

CALLS, BATCHES = 400, 5
TINY = Size(1, 16, 1, 1, 64, 64)  # the kernel is shorter than the call, so the queue stays empty
TINY_PAGED = PagedSize((16,), 1, 1, page=16, head_dim=64)
MAX_PAGES = 256  # of the table; a request that may be this long may be cut, which takes a workspace


def run(options: Options) -> list[Row]:
    """Time every way to call asked for, and the steps of which one consists."""
    import cupy

    inputs = iid(TINY, xp=cupy)
    paged = iid_paged(TINY_PAGED, xp=cupy)._replace(tables=cupy.zeros((1, MAX_PAGES), "i4"))
    calls = _calls(inputs) | _decode_calls(paged) | _flashinfer_calls(paged)
    rows = []
    for name, call in (calls | _steps(inputs)).items():
        if options.wants(name, tuple(calls)):
            microseconds = host_us(call, cupy.cuda.runtime.deviceSynchronize)
            impl = name.split(":")[0]
            rows.append(Row("host", name, impl, ms=1e-3 * microseconds))
            say(f"{name:40}{microseconds:9.2f} µs a call")
    return rows


def host_us(call: Callable[[], object], synchronize: Callable[[], object]) -> float:
    """Median microseconds a call, the device not waited for."""
    for _ in range(20):
        call()
    times = []
    for _ in range(BATCHES):
        synchronize()
        start = perf_counter()
        for _ in range(CALLS):
            call()
        times.append(perf_counter() - start)
    synchronize()
    return 1e6 * median(times) / CALLS


def _calls(inputs: Inputs) -> dict[str, Callable[[], object]]:
    import cupy

    import cuattn

    prefill = cuattn.prefill
    out = cupy.empty(inputs.q.shape, dtype=inputs.q.dtype)
    lse = cupy.empty(inputs.q.shape[:3], dtype=cupy.float32)
    skip = cuattn.SkipSoftmax(threshold=0.01)
    counted = cuattn.SkipSoftmax(threshold=0.01, stats=cuattn.SkipStats())
    calls: dict[str, Callable[[], object]] = {
        "cuattn: cupy": lambda: prefill(*inputs, causal=True),
        "cuattn: cupy, out=": lambda: prefill(*inputs, causal=True, out=out),
        "cuattn: cupy, return_lse": lambda: prefill(*inputs, causal=True, return_lse=True),
        "cuattn: cupy, out=, lse=": lambda: prefill(*inputs, causal=True, out=out, lse=lse),
        "cuattn: cupy, skip": lambda: prefill(*inputs, causal=True, skip_softmax=skip),
        "cuattn: cupy, skip, stats": lambda: prefill(*inputs, causal=True, skip_softmax=counted),
    }
    if "torch_fa2" in peers.available(flashinfer=False):
        tensors = peers.tensors(inputs)
        place = tensors[0].clone()
        calls["cuattn: torch"] = lambda: prefill(*tensors, causal=True)
        calls["cuattn: torch, out="] = lambda: prefill(*tensors, causal=True, out=place)
        calls["cuattn: torch, return_lse"] = lambda: prefill(*tensors, causal=True, return_lse=True)
        sdpa = peers.available(flashinfer=False)["torch_fa2"](inputs, True)
        calls["torch_fa2: the same shape"] = sdpa
    return calls


def _decode_calls(inputs: PagedInputs) -> dict[str, Callable[[], object]]:
    import cupy

    import cuattn

    decode = cuattn.decode
    out = cupy.empty(inputs.q.shape, dtype=inputs.q.dtype)
    skip = cuattn.SkipSoftmax(threshold=0.01)
    counted = cuattn.SkipSoftmax(threshold=0.01, stats=cuattn.SkipStats())
    calls: dict[str, Callable[[], object]] = {
        "cuattn: decode, cupy": lambda: decode(*inputs),
        "cuattn: decode, cupy, out=": lambda: decode(*inputs, out=out),
        "cuattn: decode, cupy, skip": lambda: decode(*inputs, skip_softmax=skip),
        "cuattn: decode, cupy, skip, out=": lambda: decode(*inputs, skip_softmax=skip, out=out),
        "cuattn: decode, cupy, skip, stats": lambda: decode(*inputs, skip_softmax=counted),
    }
    if "torch_fa2" in peers.available(flashinfer=False):
        tensors = peers.tensors(inputs)
        place = tensors[0].clone()
        calls["cuattn: decode, torch"] = lambda: decode(*tensors)
        calls["cuattn: decode, torch, out="] = lambda: decode(*tensors, out=place)
        calls["cuattn: decode, torch, skip"] = lambda: decode(*tensors, skip_softmax=skip)
    return calls


def _flashinfer_calls(inputs: PagedInputs) -> dict[str, Callable[[], object]]:
    """Calls by FlashInfer's names, of decode and of MLA decode."""
    if "torch_fa2" not in peers.available(flashinfer=False):
        return {}
    import torch

    from cuattn.interop import flashinfer

    decode = flashinfer.decode.trtllm_batch_decode_with_kv_cache
    mla = flashinfer.mla.trtllm_batch_decode_with_kv_cache_mla
    q, cache, tables, lengths = peers.tensors(inputs)
    latent_q = torch.zeros(1, 1, 16, 576, dtype=q.dtype, device=q.device)
    latent = torch.zeros(len(cache), 16, 576, dtype=q.dtype, device=q.device)
    out = torch.empty(1, 1, 16, 512, dtype=q.dtype, device=q.device)
    common = (latent_q, latent, None, 128, 512, 64, tables, lengths, 4096, 0)
    return {
        "cuattn: flashinfer, decode": lambda: decode(q, cache, None, tables, lengths, 4096, 0.125),
        "cuattn: flashinfer, mla": lambda: mla(*common, None, 0.07),
        "cuattn: flashinfer, mla, out=": lambda: mla(*common, out, 0.07),
        "cuattn: flashinfer, mla, lse": lambda: mla(*common, None, 0.07, return_lse=True),
    }


def _steps(inputs: Inputs) -> dict[str, Callable[[], object]]:
    """Parts of a call that can be run alone; the rest is look-ups, packing and the launch."""
    import cupy

    from cuattn import _device, _ingest, _workspace

    device, side = _device.current(), cupy.cuda.Stream(non_blocking=True)
    room = (1 << 16, 1 << 10, 1 << 6)  # bytes
    kernel = cupy.RawKernel('extern "C" __global__ void nothing() {}', "nothing")
    steps: dict[str, Callable[[], object]] = {
        "step: view of a cupy array": lambda: _ingest.view(inputs.q, "q"),
        "step: cupy.empty of the output": lambda: cupy.empty(inputs.q.shape, inputs.q.dtype),
        "step: workspace of the default stream": lambda: _workspace.partials(room, device, 0),
        "step: workspace of a stream": lambda: _workspace.partials(room, device, side.ptr),
        "step: launch of an empty RawKernel": lambda: kernel((1,), (32,), ()),
    }
    if "torch_fa2" in peers.available(flashinfer=False):
        tensor: Any = peers.tensors(inputs)[0]
        steps["step: view of a torch tensor"] = lambda: _ingest.view(tensor, "q")
    return steps
