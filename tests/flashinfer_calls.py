"""A `Call` under FlashInfer's names: PyTorch tensors, all arguments, results as tests have them.

Tensors lie where the fixture `device` is: on the GPU, or on the CPU for the emulator.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import Call
from conftest import Gpu, Outcome
from numpy.typing import NDArray

from cuattn.interop import flashinfer

Array = NDArray[Any]
Options = dict[str, Any]

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int32": torch.int32,
}
DIRTY = 0xA5  # every byte of the workspace
FUNCTIONS = {
    "prefill_ragged": flashinfer.prefill.trtllm_ragged_attention_deepseek,
    "prefill_paged": flashinfer.prefill.trtllm_batch_context_with_kv_cache,
    "decode": flashinfer.decode.trtllm_batch_decode_with_kv_cache,
    "mla_decode": flashinfer.mla.trtllm_batch_decode_with_kv_cache_mla,
}


def place_of(device: Any) -> str:
    """PyTorch's name for where a fixture's arrays are."""
    if not isinstance(device, Gpu):
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("PyTorch is built without CUDA")
    return "cuda"


def tensor_of(array: Array, place: str) -> torch.Tensor:
    """A tensor with the same strides in a copy of the same memory, poison included."""
    whole = array
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    start = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    raw = torch.from_numpy(np.array(whole).reshape(-1).view(np.uint8)).clone().to(place)
    size = array.dtype.itemsize
    strides = [step // size for step in array.strides]
    return raw.view(DTYPES[array.dtype.name]).as_strided(array.shape, strides, start // size)


def array_of(tensor: torch.Tensor) -> Array:
    """A NumPy copy of a tensor."""
    if tensor.dtype is torch.bfloat16:
        return tensor.cpu().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: Array = tensor.cpu().contiguous().numpy()
    return array


def words(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits as integers."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def arguments(call: Call, place: str) -> Options:
    """Everything that FlashInfer's function is given, by name, but `out` and `lse`."""
    q, *others = (
        tuple(tensor_of(part, place) for part in x) if isinstance(x, tuple) else tensor_of(x, place)
        for x in call.arrays
    )
    given = {
        name: tensor_of(x, place) if isinstance(x, np.ndarray) else x
        for name, x in call.options.items()
    }
    options: Options = {
        "query": q,
        "workspace_buffer": torch.full((4096,), DIRTY, dtype=torch.uint8, device=place),
        "bmm1_scale": given.get("scale", call.case.d_qk**-0.5),
        "bmm2_scale": given.get("out_scale", 1.0),
        "return_lse": True,
    }
    sinks = "attention_sinks" if call.function == "prefill_ragged" else "sinks"
    options[sinks] = given.get("sinks")
    if call.function != "mla_decode":
        options["window_left"] = given.get("window_left", -1)
    if call.function == "prefill_ragged":
        return options | _ragged(call, others, given)
    options["kv_cache"], options["block_tables"], options["seq_lens"], *ends = others
    batch, keys = len(call.case.lengths), max((n for _, n in call.case.lengths), default=0)
    if call.function == "prefill_paged":
        return options | {
            "max_q_len": max((n for n, _ in call.case.lengths), default=0),
            "max_kv_len": keys,
            "batch_size": batch,
            "cum_seq_lens_q": ends[0],
            "cum_seq_lens_kv": torch.full((batch + 1,), -(2**31), dtype=torch.int32),  # not read
            "kv_layout": given["layout"],
            "causal": given["causal"],
        }
    options["max_seq_len"] = keys
    if "cu_seqlens_q" in given:
        options["cum_seq_lens_q"] = given["cu_seqlens_q"]
        options["max_q_len"] = max(n for n, _ in call.case.lengths)
    if call.function == "decode":
        uniform = q.dim() == 4
        return options | {
            "kv_layout": given["layout"],
            "query": q.flatten(0, 1) if uniform else q,
            "q_len_per_req": q.shape[1] if uniform else 1,
        }
    if "sparse_indices" in given:
        options["block_tables"] = given["sparse_indices"]
        options["sparse_mla_top_k"] = given["sparse_indices"].shape[-1]
    flat = q.dim() == 3 and "cu_seqlens_q" not in given
    return options | {
        "query": q[:, None] if flat else q,
        "qk_nope_head_dim": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
    }


def _ragged(call: Call, others: list[Any], given: Options) -> Options:
    key, value, ends_q, ends_kv = others
    lengths = np.array([n for _, n in call.case.lengths], np.int32).reshape(-1, 1, 1, 1)
    return {
        "key": key,
        "value": value,
        "seq_lens": tensor_of(lengths, ends_q.device.type),
        "max_q_len": max((n for n, _ in call.case.lengths), default=0),
        "max_kv_len": max((n for _, n in call.case.lengths), default=0),
        "o_sf_scale": -1,
        "batch_size": len(lengths),
        "cum_seq_lens_q": ends_q,
        "cum_seq_lens_kv": ends_kv,
        "enable_pdl": None,
        "is_causal": given["causal"],
    }


def rooms(call: Call, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` and `lse` filled with NaN, which shows rows that are not written."""
    query = options["query"]
    rows = query.shape[:-1]
    dtype = DTYPES[str(call.case.result_dtype)]
    out = torch.full((*rows, call.case.d_v), torch.nan, dtype=dtype, device=query.device)
    flat = (rows.numel() // rows[-1], rows[-1])
    return out, torch.full(flat, torch.nan, dtype=torch.float32, device=query.device)


def ask(call: Call, options: Options) -> Outcome:
    """Call FlashInfer's function into tensors of one's own; LSE comes back natural.

    What comes back must be the given tensors, and the workspace as it was.
    """
    out, lse = rooms(call, options)
    places = out.data_ptr(), lse.data_ptr()
    result = FUNCTIONS[call.function](**options, out=out, lse=lse)
    assert result[0] is out and result[1] is lse
    assert (out.data_ptr(), lse.data_ptr()) == places
    assert (options["workspace_buffer"] == DIRTY).all(), "the workspace was written"
    shape = call.arrays[0].shape[:-1]
    natural = (array_of(lse).astype(np.float64) * math.log(2)).astype(np.float32)
    return Outcome(array_of(out).reshape(*shape, -1), natural.reshape(shape))


def check(device: Any, call: Call, **changes: Any) -> Outcome:
    """Call FlashInfer's function and compare with the reference."""
    outcome = ask(call, arguments(call, place_of(device)) | changes)
    device.compare(call, outcome)
    return outcome
