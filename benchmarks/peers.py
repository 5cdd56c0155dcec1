"""Other implementations on the same arrays, each taken only if it can be imported.

A maker gets CuPy arrays ``[batch, seq, heads, dim]`` and returns a function without arguments that
runs the peer and returns its output in the same order of axes, as a torch tensor.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from cuattn._workloads import Inputs

Run = Callable[[], Any]
Maker = Callable[[Inputs, bool], Run]


def available(flashinfer: bool) -> dict[str, Maker]:
    """Peers that can be imported here, by name, fastest first."""
    makers: dict[str, Maker] = {}
    if importlib.util.find_spec("torch"):
        makers["torch_cudnn"] = lambda inputs, causal: _sdpa(inputs, causal, "CUDNN_ATTENTION")
    if importlib.util.find_spec("flash_attn_interface"):
        makers["flash_attention_3"] = _flash_attention_3
    if flashinfer and importlib.util.find_spec("flashinfer"):
        makers["flashinfer_fa3"] = lambda inputs, causal: _flashinfer(inputs, causal, "fa3")
        makers["flashinfer_fa2"] = lambda inputs, causal: _flashinfer(inputs, causal, "fa2")
    if importlib.util.find_spec("torch"):
        makers["torch_fa2"] = lambda inputs, causal: _sdpa(inputs, causal, "FLASH_ATTENTION")
    return makers


def as_cupy(output: Any) -> Any:
    """The peer's output as a CuPy array, not copied."""
    import cupy

    return output if isinstance(output, cupy.ndarray) else cupy.from_dlpack(output)


def tensors(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs as torch tensors, not copied."""
    import torch

    return tuple(torch.from_dlpack(x) for x in inputs)


def _sdpa(inputs: Inputs, causal: bool, backend: str) -> Run:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (x.transpose(1, 2) for x in tensors(inputs))  # [batch, heads, seq, dim]
    grouped = q.shape[1] != k.shape[1]
    choice = getattr(SDPBackend, backend)

    def run() -> Any:
        with sdpa_kernel(choice):
            out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2)

    return run


def _flash_attention_3(inputs: Inputs, causal: bool) -> Run:
    from flash_attn_interface import flash_attn_func

    q, k, v = tensors(inputs)

    def run() -> Any:
        result = flash_attn_func(q, k, v, causal=causal)
        return result[0] if isinstance(result, tuple) else result

    return run


def _flashinfer(inputs: Inputs, causal: bool, backend: str) -> Run:
    import torch
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    q, k, v = tensors(inputs)
    batch, seq, q_heads, dim_qk = q.shape
    kv_heads, dim_v = v.shape[2:]
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * seq
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend=backend)
    wrapper.plan(
        starts,
        starts,
        q_heads,
        kv_heads,
        dim_qk,
        head_dim_vo=dim_v,
        causal=causal,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    flat = [x.reshape(batch * seq, *x.shape[2:]) for x in (q, k, v)]

    def run() -> Any:
        return wrapper.run(*flat).reshape(batch, seq, q_heads, dim_v)

    return run
