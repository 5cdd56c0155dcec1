"""What the four functions refuse and by which error, and what they accept without effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

import torch

import cuattn
from cuattn.interop import flashinfer

RAGGED = flashinfer.prefill.trtllm_ragged_attention_deepseek
CONTEXT = flashinfer.prefill.trtllm_batch_context_with_kv_cache
DECODE = flashinfer.decode.trtllm_batch_decode_with_kv_cache
MLA = flashinfer.mla.trtllm_batch_decode_with_kv_cache_mla


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def usual(function: Callable[..., Any]) -> dict[str, Any]:
    """Arguments that are fine, on the CPU."""
    ends = ints(0, 3, 5)
    if function is RAGGED:
        x = new(5, 4, 64)
        return {
            **{"query": x, "key": x, "value": x, "workspace_buffer": new(16)},
            **{"seq_lens": ints(3, 2), "max_q_len": 3, "max_kv_len": 3, "bmm1_scale": 0.1},
            **{"bmm2_scale": 1.0, "o_sf_scale": -1, "batch_size": 2, "window_left": -1},
            **{"cum_seq_lens_q": ends, "cum_seq_lens_kv": ends, "enable_pdl": None},
            **{"is_causal": True, "return_lse": False},
        }
    arguments: dict[str, Any] = {
        "workspace_buffer": new(16),
        "block_tables": ints([0, 1], [2, 3]),
        "seq_lens": ints(20, 5),
    }
    if function is MLA:
        query, cache = new(2, 1, 16, 576), new(4, 16, 576)
        dims = {"qk_nope_head_dim": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
        arguments |= {"query": query, "kv_cache": cache, **dims, "max_seq_len": 32}
        return arguments
    arguments |= {"kv_cache": new(4, 2, 2, 16, 64), "bmm1_scale": 0.1}
    if function is DECODE:
        return arguments | {"query": new(2, 4, 64), "max_seq_len": 32}
    return arguments | {
        **{"query": new(5, 4, 64), "max_q_len": 3, "max_kv_len": 20, "bmm2_scale": 1.0},
        **{"batch_size": 2, "cum_seq_lens_q": ends, "cum_seq_lens_kv": ends},
    }


def on_all(*functions: Callable[..., Any], **changes: Any) -> list[Any]:
    return [(function, changes) for function in functions]


ALL = (RAGGED, CONTEXT, DECODE, MLA)
PAGED = (CONTEXT, DECODE)
FP8 = torch.float8_e4m3fn
CACHE_FP8 = new(4, 2, 2, 16, 64).to(FP8)

# Who asks for what, which error it is, and what the sentence says.
REFUSED = [
    # NVFP4
    (on_all(RAGGED, *PAGED, o_sf_scale=0.5), AssertionError, "o_sf_scale is 0.5; wanted .*NVFP4"),
    (on_all(*PAGED, o_sf_vec_size=16), AssertionError, "o_sf_vec_size is 16; wanted None"),
    (on_all(*PAGED, out_dtype="nvfp4"), ValueError, "out_dtype is 'nvfp4'; wanted .*float32"),
    (on_all(*PAGED, kv_cache_sf=(new(1), new(1))), ValueError, "kv_cache_sf is .*NVFP4"),
    (on_all(*ALL, out=(new(1), new(1))), ValueError, "out is a|out is .*wanted a torch.Tensor"),
    # float8
    (on_all(*PAGED, out_dtype=FP8), ValueError, "out_dtype is torch.float8_e4m3fn; wanted torch.b"),
    (on_all(*PAGED, kv_cache=CACHE_FP8), TypeError, r"kv_cache \(k\) is float8_e4m3fn, not supp"),
    (on_all(DECODE, bf16q_fp8kv_transform_mode="k_only"), ValueError, "float8 caches are not"),
    (on_all(MLA, kv_scale_format="arbitrary_fp32"), ValueError, "kv_scale_format is 'arbitrary"),
    # other kernels' features
    (on_all(*PAGED, MLA, uses_shared_paged_kv_idx=False), ValueError, r"wanted True: block_tables"),
    (on_all(DECODE, enable_block_sparse_attention=True), ValueError, "every page of a row is read"),
    (on_all(DECODE, mask=ints(1)), ValueError, "mask is a Tensor; wanted None: each token"),
    (on_all(DECODE, o_scale=2.0), ValueError, "o_scale is 2.0; wanted 1: bmm2_scale"),
    (on_all(RAGGED, CONTEXT, MLA, use_fp16_softmax=True), ValueError, "exponentials are float32"),
    (on_all(RAGGED, CONTEXT, uses_spcompress=True), ValueError, "uses_spcompress is True; wanted"),
    (
        on_all(RAGGED, sage_attn_sfs=(new(1), None, None, None)),
        ValueError,
        r"sage_attn_sfs is \(a Tensor, None, None, None\); wanted four times None",
    ),
    (on_all(RAGGED, num_elts_per_sage_attn_blk=(1, 1, 1, 1)), ValueError, "wanted four times 0"),
    (on_all(MLA, sparse_mla_top_k_lens=ints(1, 1)), ValueError, "sparse_mla_top_k_lens is a Tens"),
    (on_all(MLA, enable_dcp=True), ValueError, "enable_dcp is True; wanted False: .*merge_states"),
    (on_all(MLA, cp_world=2), ValueError, "cp_world is 2; wanted 1"),
    (on_all(MLA, cp_rank=1), ValueError, "cp_rank is 1; wanted 0"),
    (on_all(MLA, causal_seqlens_kv_global=ints(1)), ValueError, "causal_seqlens_kv_global is"),
    (on_all(DECODE, backend="fa9"), KeyError, "backend is 'fa9'; wanted one of auto, trtllm-gen"),
    (on_all(MLA, backend="fa9"), ValueError, "backend is 'fa9'; wanted one of auto, trtllm-gen"),
    (on_all(RAGGED, backend=3), ValueError, "backend is 3; wanted a name"),
    # what is no tensor
    (on_all(*ALL, query=None), TypeError, "query is None; wanted a torch.Tensor"),
    (on_all(*PAGED, block_tables=[1]), TypeError, r"block_tables is \(1\); wanted a torch.Tensor"),
    (on_all(RAGGED, seq_lens=3), TypeError, "seq_lens is 3; wanted a torch.Tensor"),
    (on_all(*PAGED, kv_cache=None), TypeError, "kv_cache is None; wanted a torch.Tensor"),
    (
        on_all(*PAGED, kv_cache=(new(1),)),
        TypeError,
        r"kv_cache is \(a Tensor\); wanted a tensor",
    ),
    (on_all(MLA, seq_lens=None), TypeError, "seq_lens is None; wanted an array on a CUDA device"),
    # arguments that contradict each other or have wrong values
    (on_all(*PAGED, kv_cache=new(4, 3, 2, 16, 64)), AssertionError, r"kv_cache has shape \(4, 3"),
    (on_all(*PAGED, kv_layout="DHN"), ValueError, "kv_layout is 'DHN'; wanted 'HND' or 'NHD'"),
    (on_all(CONTEXT, out_dtype=torch.int8), ValueError, "out_dtype is torch.int8; wanted torch"),
    (on_all(*PAGED, RAGGED, out=new(5, 4, 8)), ValueError, r"out has shape \(5, 4, 8\); wanted"),
    (
        on_all(*PAGED, out=new(5, 4, 64), out_dtype=torch.float16),
        ValueError,
        "out is torch.bfloat16; wanted torch.float16",
    ),
    (on_all(*ALL, out=new(5, 4, 64).to(FP8)), ValueError, "out is torch.float8_e4m3fn; wanted"),
    (on_all(*ALL, lse=new(5, 4)), ValueError, "lse is torch.bfloat16; wanted torch.float32"),
    (
        on_all(*ALL, lse=new(9, 4, dtype=torch.float32)),
        ValueError,
        r"lse has shape \(9, 4\); wanted",
    ),
    (on_all(*ALL, bmm1_scale=new(1)), TypeError, "bmm1_scale is bfloat16; wanted a positive num"),
    (on_all(*ALL, bmm1_scale=-1.0), ValueError, "bmm1_scale is -1.0; wanted a positive number"),
    (on_all(*ALL, bmm2_scale=new(1)), TypeError, "bmm2_scale is bfloat16; wanted a number"),
    (on_all(DECODE, bmm1_scale_log2=2.0), TypeError, "bmm1_scale_log2 is 2.0; wanted a tensor"),
    (on_all(RAGGED, window_left=-2), ValueError, "window_left is -2; wanted an int ≥ -1"),
    (on_all(RAGGED, is_causal=1), TypeError, "is_causal is 1; wanted True or False"),
    (on_all(RAGGED, attention_sinks=new(4)), TypeError, "attention_sinks is bfloat16; wanted fl"),
    (on_all(*PAGED, MLA, sinks=[new(4), new(4)]), ValueError, "sinks has 2 tensors; wanted one"),
    (on_all(RAGGED, CONTEXT, batch_size=3), ValueError, "batch_size is 3; wanted 2, as "),
    (on_all(RAGGED, seq_lens=ints(1, 2, 3)), ValueError, "wanted 3, as seq_lens has it"),
    (
        on_all(DECODE, cum_seq_lens_q=ints(0, 1, 2), max_q_len=1, q_len_per_req=2),
        ValueError,
        "q_len_per_req is 2; wanted None beside cum_seq_lens_q",
    ),
    (on_all(DECODE, q_len_per_req=None), ValueError, "q_len_per_req is None; wanted an int ≥ 1"),
    (on_all(DECODE, q_len_per_req=3), ValueError, "query has 2 tokens; wanted 6, q_len_per_req=3"),
    (on_all(MLA, query=new(2, 16, 576)), ValueError, r"query has shape \(2, 16, 576\); wanted \["),
    (on_all(MLA, kv_lora_rank=256), ValueError, "query has head_dim 576; wanted 320, kv_lora_rank"),
    (
        on_all(MLA, sparse_mla_top_k=64, skip_softmax_threshold_scale_factor=1.0),
        ValueError,
        "skip_softmax_threshold_scale_factor is not supported for sparse MLA",
    ),
    (
        on_all(MLA, sparse_mla_top_k=64),
        ValueError,
        r"block_tables has shape \(2, 2\); wanted \(2, 1, 64\), sparse_mla_top_k positions",
    ),
    (
        on_all(RAGGED, q_seq_lens_cpu=ints(3, 2)),
        ValueError,
        "q_seq_lens_cpu and kv_seq_lens_cpu come together",
    ),
    (
        on_all(RAGGED, q_seq_lens_cpu=ints(3, 2), kv_seq_lens_cpu=ints(3, 3)),
        ValueError,
        r"kv_seq_lens_cpu is \[3, 3\]; wanted lengths from 0 to 3 that add up to 5",
    ),
    (
        on_all(RAGGED, q_seq_lens_cpu=new(2), kv_seq_lens_cpu=ints(3, 2)),
        ValueError,
        "q_seq_lens_cpu is torch.bfloat16 on cpu; wanted int32 or int64 on the CPU",
    ),
    # the factor
    (on_all(*ALL, skip_softmax_threshold_scale_factor=-1.0), ValueError, "scale_factor is -1.0; w"),
    (
        on_all(*ALL, skip_softmax_threshold_scale_factor=float("nan")),
        ValueError,
        "skip_softmax_threshold_scale_factor is nan; wanted a finite number",
    ),
    (
        on_all(*ALL, skip_softmax_threshold_scale_factor=new(1)),
        TypeError,
        "skip_softmax_threshold_scale_factor is a Tensor; wanted None or a number",
    ),
    # shapes that no kernel is for: the supported set is named (FlashInfer #3511, #3343, #4094)
    (on_all(*PAGED, kv_cache=new(4, 2, 2, 12, 64)), ValueError, "wanted a power of two ≥ 8"),
    (
        on_all(DECODE, query=new(2, 4, 512), kv_cache=new(4, 2, 2, 16, 512)),
        ValueError,
        "query has head_dim 512; wanted a multiple of 8 from 8 to 256",
    ),
    (
        on_all(DECODE, query=new(2, 3, 64)),
        ValueError,
        r"kv_cache \(k\) has 2 heads, which does not divide query's 3; wanted query's heads",
    ),
    (on_all(MLA, kv_cache=new(4, 12, 576)), ValueError, "page size 12; wanted a power of two"),
    (on_all(MLA, query=new(2, 1, 129, 576)), ValueError, "query has 129 heads; wanted 1 to 128"),
]


def test_usual_arguments_are_fine_but_for_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """So each refusal below is due to what it changes; without the emulator a CPU is refused."""
    monkeypatch.delenv("CUATTN_EMULATOR", raising=False)
    for function in ALL:
        with pytest.raises(TypeError, match=r"^query is on the CPU \(a torch Tensor\)"):
            function(**usual(function))


@pytest.mark.parametrize(
    ("function", "changes", "error", "sentence"),
    [
        pytest.param(*asked, error, sentence, id=f"{asked[0].__name__}-{'-'.join(asked[1])}")
        for all_asked, error, sentence in REFUSED
        for asked in all_asked
    ],
)
def test_is_refused(
    function: Callable[..., Any], changes: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with cuattn.emulator.enabled() as launches, pytest.raises(error, match=sentence) as caught:
        function(**usual(function) | changes)
    assert caught.type is error
    assert not launches, "a kernel ran before the error was raised"


@pytest.mark.parametrize(
    ("function", "changes"),
    [
        *on_all(RAGGED, *PAGED, o_sf_scale=1.0),
        *on_all(RAGGED, *PAGED, o_sf_scale=-1),
        *on_all(*ALL, enable_pdl=True),
        *on_all(*ALL, workspace_buffer=None),
        *on_all(DECODE, MLA, backend="xqa"),
        *on_all(RAGGED, backend="trtllm-native"),
        *on_all(*PAGED, MLA, multi_ctas_kv_counter_buffer=ints(0)),
        *on_all(CONTEXT, cum_seq_lens_kv=None),
        *on_all(MLA, qk_nope_head_dim=192),
        *on_all(MLA, is_var_seq=False),
        *on_all(DECODE, MLA, max_q_len=7),
        *on_all(MLA, cute_dsl_impl="monolithic"),
        *on_all(RAGGED, use_fp16_softmax=False),
        *on_all(RAGGED, q_seq_lens_cpu=ints(3, 2), kv_seq_lens_cpu=ints(3, 2)),
    ],
    ids=lambda x: getattr(x, "__name__", None) or "-".join(x),
)
def test_is_accepted_and_has_no_effect(
    function: Callable[..., Any], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reaches our function is the same with and without it."""
    seen: list[Any] = []

    def record(*arrays: Any, **options: Any) -> None:
        del options["out"]
        tensors = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arrays[1:]]
        seen.append((arrays[0].shape, tensors, options))

    ours = {RAGGED: "prefill_ragged", CONTEXT: "prefill_paged", DECODE: "decode", MLA: "mla_decode"}
    monkeypatch.setitem(function.__globals__, ours[function], record)
    arguments = usual(function)
    function(**arguments)
    function(**arguments | changes)
    assert len(seen) == 2
    assert seen[0] == seen[1]
