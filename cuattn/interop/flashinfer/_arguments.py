"""FlashInfer's arguments → ours, or one clear error of the type that FlashInfer raises."""

from __future__ import annotations

from functools import lru_cache
from numbers import Real
from typing import Any

import torch

from ...skip_softmax import SkipSoftmax

OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LN2 = 0.6931471805599453

_NO_FP4 = "NVFP4 is not supported"
_NO_MASKS = "None: masks are causal or none, with a window or without"
_NO_RANKS = "cuattn.merge_states merges what ranks have computed"

# What asks for something that is not done here: the values that do not, why others are refused.
_ONLY: dict[str, tuple[tuple[Any, ...], str, type[Exception]]] = {
    "o_sf_scale": ((None, -1, 1), f"None, -1 or 1, since {_NO_FP4}", AssertionError),
    "o_sf_vec_size": ((None, -1), f"None, since {_NO_FP4}", AssertionError),
    "kv_cache_sf": ((None,), f"None, since {_NO_FP4}", ValueError),
    "uses_shared_paged_kv_idx": (
        (True,),
        "True: block_tables [batch, pages] holds the pages of keys and values alike",
        ValueError,
    ),
    "use_fp16_softmax": ((None, False), "None or False: exponentials are float32", ValueError),
    "uses_spcompress": ((None, False), "None or False: nothing is compressed", ValueError),
    "sage_attn_sfs": ((None, (None,) * 4), "four times None: int8 is not supported", ValueError),
    "num_elts_per_sage_attn_blk": (
        (None, (0,) * 4),
        "four times 0: int8 is not supported",
        ValueError,
    ),
    "o_scale": ((None, 1), "1: bmm2_scale multiplies the output", ValueError),
    "mask": (
        (None,),
        "None: each token of a request sees the keys up to its own, and no other mask is supported",
        ValueError,
    ),
    "enable_block_sparse_attention": ((False,), "False: every page of a row is read", ValueError),
    "bf16q_fp8kv_transform_mode": ((None,), "None: float8 caches are not supported", ValueError),
    "kv_scale_format": (("auto",), "'auto': float8 caches are not supported", ValueError),
    "sparse_mla_top_k_lens": (
        (None,),
        "None: a token reads its first min(kv_len - q_len + i + 1, sparse_mla_top_k) entries",
        ValueError,
    ),
    "enable_dcp": ((False,), f"False: {_NO_RANKS}", ValueError),
    "cp_world": ((1,), f"1: {_NO_RANKS}", ValueError),
    "cp_rank": ((0,), f"0: {_NO_RANKS}", ValueError),
    "causal_seqlens_kv_global": ((None,), f"None: {_NO_RANKS}", ValueError),
    # Of the wrappers.
    "jit_args": ((None,), "None: kernels cannot be customised", ValueError),
    "jit_kwargs": ((None,), "None: kernels cannot be customised", ValueError),
    "custom_mask": ((None,), _NO_MASKS, ValueError),
    "packed_custom_mask": ((None,), _NO_MASKS, ValueError),
    "pos_encoding_mode": (("NONE",), "'NONE': queries and keys come rotated", ValueError),
    "use_fp16_qk_reduction": ((False,), "False: sums are float32", ValueError),
    "prefix_len_ptr": ((None,), "None: items are not scored apart", ValueError),
    "token_pos_in_items_ptr": ((None,), "None: items are not scored apart", ValueError),
    "token_pos_in_items_len": ((0,), "0: items are not scored apart", ValueError),
    "max_item_len_ptr": ((None,), "None: items are not scored apart", ValueError),
    "window_right": ((0,), "0: no token sees a key behind its own", NotImplementedError),
}
_PLAIN = (bool, int, float, str, tuple)


def refuse(**given: Any) -> None:
    """Raise for the first argument that asks for what is not done here."""
    for name, value in given.items():
        accepted, wanted, error = _ONLY[name]
        if value is accepted[0] or (isinstance(value, _PLAIN) and value in accepted):
            continue
        raise error(f"{name} is {shown(value)}; wanted {wanted}")


def tensors(**given: Any) -> None:
    """Raise for the first argument that is not a tensor."""
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is {shown(value)}; wanted a torch.Tensor")


def shown(value: Any) -> str:
    """An argument in an error: plain values as they are, anything else by its type."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(shown, value))})"
    if value is None or isinstance(value, (*_PLAIN, torch.dtype)):
        return repr(value)
    return f"a {type(value).__name__}"


def backend_of(backend: Any, known: tuple[str, ...], error: type[Exception]) -> None:
    """Raise for a backend that FlashInfer does not have; the choice itself has no effect here."""
    if backend not in known:
        raise error(f"backend is {shown(backend)}; wanted one of {', '.join(known)}")


def skip_of(factor: Any) -> SkipSoftmax | None:
    """Return what to skip by FlashInfer's factor; None and 0 ask for the dense kernel."""
    if factor is None:
        return None
    if isinstance(factor, bool) or not isinstance(factor, Real):
        raise TypeError(
            f"skip_softmax_threshold_scale_factor is {shown(factor)}; wanted None or a number ≥ 0"
        )
    return _skip_of(float(factor))


@lru_cache(maxsize=64)
def _skip_of(factor: float) -> SkipSoftmax | None:
    try:
        skip = SkipSoftmax(threshold_scale_factor=factor)
    except ValueError as error:
        raise ValueError(f"skip_softmax_{error}") from None
    return skip if factor else None


def scale_of(scale: Any, log2_scale: torch.Tensor | None) -> Any:
    """Return what multiplies Q·Kᵀ; `bmm1_scale_log2` wins over `bmm1_scale`."""
    if log2_scale is None:
        return scale
    if not isinstance(log2_scale, torch.Tensor):
        raise TypeError(f"bmm1_scale_log2 is {shown(log2_scale)}; wanted a tensor of one float32")
    return log2_scale * _LN2


def factor_of(scale: Any) -> Any:
    """Return what multiplies the output, None for 1."""
    return None if type(scale) is float and scale == 1.0 else scale


def sinks_of(sinks: Any, name: str = "sinks") -> Any:
    """Return one tensor of sinks, which FlashInfer's annotations put in a list."""
    if isinstance(sinks, (list, tuple)):
        if len(sinks) != 1:
            raise ValueError(f"{name} has {len(sinks)} tensors; wanted one, float32 [heads]")
        return sinks[0]
    return sinks


def cache_of(kv_cache: Any, name: str = "kv_cache") -> tuple[Any, int]:
    """Return a paged cache as our functions take it, and the head dim of its values."""
    if isinstance(kv_cache, (tuple, list)):
        if len(kv_cache) != 2 or not all(isinstance(part, torch.Tensor) for part in kv_cache):
            raise TypeError(f"{name} is {shown(kv_cache)}; wanted a tensor or a pair of them")
        return tuple(kv_cache), kv_cache[1].shape[-1]
    tensors(**{name: kv_cache})
    shape = kv_cache.shape
    if len(shape) < 2 or shape[1] not in (1, 2):
        raise AssertionError(
            f"{name} has shape {tuple(shape)}; wanted [pages, 2, …], [pages, 1, …] for keys that "
            "are values too, or a pair of tensors of 4 axes"
        )
    if shape[1] == 1:
        shared = kv_cache[:, 0] if len(shape) == 5 else kv_cache
        return (shared, shared), shape[-1]
    return kv_cache, shape[-1]


def dtype_of(dtype: Any, name: str) -> torch.dtype:
    """Return a dtype given as such or, as in FlashInfer's plans, by its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} is {shown(dtype)}; wanted a dtype such as torch.bfloat16")
    return found


def out_dtype_of(out_dtype: Any, out: Any, query: torch.Tensor) -> torch.dtype:
    """Return the dtype of the output: asked for, else that of `out`, else the queries'."""
    if out_dtype is None:
        return query.dtype if out is None else getattr(out, "dtype", None)
    if out_dtype not in OUTPUT_DTYPES:
        raise ValueError(
            f"out_dtype is {shown(out_dtype)}; wanted torch.bfloat16, torch.float16 or "
            "torch.float32"
        )
    chosen: torch.dtype = out_dtype
    return chosen


def batch_of(batch_size: int, given: int, name: str) -> None:
    """Check `batch_size` against the rows of an array."""
    if given != batch_size:
        raise ValueError(f"batch_size is {batch_size!r}; wanted {given}, as {name} has it")


def host_lengths(q: Any, kv: Any, tokens: tuple[int, int], most: tuple[int, int], n: int) -> None:
    """Check `q_seq_lens_cpu` and `kv_seq_lens_cpu`, which spare FlashInfer a wait.

    `tokens` are those of query and key, `most` are max_q_len and max_kv_len, `n` is the batch.
    """
    if q is None and kv is None:
        return
    if q is None or kv is None:
        raise ValueError("q_seq_lens_cpu and kv_seq_lens_cpu come together; one of them is None")
    named = (("q_seq_lens_cpu", q), ("kv_seq_lens_cpu", kv))
    for (name, lengths), total, bound in zip(named, tokens, most, strict=True):
        if lengths.device.type != "cpu" or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} is {lengths.dtype} on {lengths.device}; wanted int32 or int64 on the CPU"
            )
        if lengths.shape != (n,):
            raise ValueError(f"{name} has shape {tuple(lengths.shape)}; wanted [{n}]")
        counts = lengths.tolist()
        if min(counts, default=0) < 0 or max(counts, default=0) > bound or sum(counts) != total:
            raise ValueError(
                f"{name} is {counts}; wanted lengths from 0 to {bound} that add up to {total}"
            )
