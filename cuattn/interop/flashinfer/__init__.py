"""FlashInfer's paged and ragged attention by the kernels of cuattn: the same calls, one new import.

::

    import cuattn.interop.flashinfer as flashinfer

    flashinfer.decode.trtllm_batch_decode_with_kv_cache(query, kv_cache, workspace, …)

Functions are where FlashInfer has them: in `prefill`, `decode` and `mla`.  PyTorch tensors go in
and come out, on PyTorch's current stream; LSE has base 2.  The page beside this file says of every
parameter whether it is honoured, of no effect, or refused.
"""

from . import decode, mla, prefill
from .decode import BatchDecodeWithPagedKVCacheWrapper, trtllm_batch_decode_with_kv_cache
from .mla import trtllm_batch_decode_with_kv_cache_mla
from .prefill import (
    BatchPrefillWithPagedKVCacheWrapper,
    trtllm_batch_context_with_kv_cache,
    trtllm_ragged_attention_deepseek,
)

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "decode",
    "mla",
    "prefill",
    "trtllm_batch_context_with_kv_cache",
    "trtllm_batch_decode_with_kv_cache",
    "trtllm_batch_decode_with_kv_cache_mla",
    "trtllm_ragged_attention_deepseek",
]
