"""FlashInfer's signatures as they are, what is refused and by which error, and the page of it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

from cuattn.interop import flashinfer
from cuattn.interop.flashinfer import _arguments

PAGE = Path(flashinfer.__file__).with_name("README.md")
REQUIRED = inspect.Parameter.empty

RAGGED = flashinfer.prefill.trtllm_ragged_attention_deepseek
CONTEXT = flashinfer.prefill.trtllm_batch_context_with_kv_cache
DECODE = flashinfer.decode.trtllm_batch_decode_with_kv_cache
MLA = flashinfer.mla.trtllm_batch_decode_with_kv_cache_mla
PREFILL_WRAPPER = flashinfer.prefill.BatchPrefillWithPagedKVCacheWrapper
DECODE_WRAPPER = flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper

# Names in the order of FlashInfer's pull request 2547, from the first with a default on with that;
# then what came later, which is given by name.
POSITIONAL: dict[Callable[..., Any], tuple[str, dict[str, Any]]] = {
    RAGGED: (
        "query key value workspace_buffer seq_lens max_q_len max_kv_len bmm1_scale bmm2_scale "
        "o_sf_scale batch_size window_left cum_seq_lens_q cum_seq_lens_kv enable_pdl is_causal "
        "return_lse",
        {
            "attention_sinks": None,
            "skip_softmax_threshold_scale_factor": None,
            "out": None,
            "lse": None,
        },
    ),
    CONTEXT: (
        "query kv_cache workspace_buffer block_tables seq_lens max_q_len max_kv_len bmm1_scale "
        "bmm2_scale batch_size cum_seq_lens_q cum_seq_lens_kv",
        {
            "window_left": -1,
            "out": None,
            "out_dtype": None,
            "o_sf_scale": None,
            "o_sf_vec_size": None,
            "kv_layout": "HND",
            "enable_pdl": None,
            "sinks": None,
            "skip_softmax_threshold_scale_factor": None,
        },
    ),
    DECODE: (
        "query kv_cache workspace_buffer block_tables seq_lens max_seq_len",
        {
            "bmm1_scale": 1.0,
            "bmm2_scale": 1.0,
            "window_left": -1,
            "out": None,
            "out_dtype": None,
            "o_sf_scale": None,
            "o_sf_vec_size": None,
            "sinks": None,
            "kv_layout": "HND",
            "enable_pdl": None,
            "backend": "auto",
            "q_len_per_req": 1,
            "o_scale": 1.0,
            "mask": None,
            "max_q_len": None,
            "cum_seq_lens_q": None,
            "skip_softmax_threshold_scale_factor": None,
        },
    ),
    MLA: (
        "query kv_cache workspace_buffer qk_nope_head_dim kv_lora_rank qk_rope_head_dim "
        "block_tables seq_lens max_seq_len",
        {
            "sparse_mla_top_k": 0,
            "out": None,
            "bmm1_scale": 1.0,
            "bmm2_scale": 1.0,
            "sinks": None,
            "skip_softmax_threshold_scale_factor": None,
            "enable_pdl": None,
            "backend": "auto",
        },
    ),
}
LATER: dict[Callable[..., Any], dict[str, Any]] = {
    RAGGED: {
        "sage_attn_sfs": (None,) * 4,
        "num_elts_per_sage_attn_blk": (0,) * 4,
        "backend": "trtllm-gen",
        "q_seq_lens_cpu": None,
        "kv_seq_lens_cpu": None,
        "use_fp16_softmax": None,
        "uses_spcompress": None,
    },
    CONTEXT: {
        "kv_cache_sf": None,
        "uses_shared_paged_kv_idx": True,
        "causal": True,
        "lse": None,
        "return_lse": False,
        "multi_ctas_kv_counter_buffer": None,
        "use_fp16_softmax": None,
        "uses_spcompress": None,
    },
    DECODE: {
        "kv_cache_sf": None,
        "uses_shared_paged_kv_idx": True,
        "lse": None,
        "return_lse": False,
        "bmm1_scale_log2": None,
        "multi_ctas_kv_counter_buffer": None,
        "enable_block_sparse_attention": False,
        "bf16q_fp8kv_transform_mode": None,
    },
    MLA: {
        "is_var_seq": True,
        "uses_shared_paged_kv_idx": True,
        "lse": None,
        "return_lse": False,
        "cute_dsl_impl": "auto",
        "kv_scale_format": "auto",
        "cum_seq_lens_q": None,
        "max_q_len": None,
        "multi_ctas_kv_counter_buffer": None,
        "sparse_mla_top_k_lens": None,
        "enable_dcp": False,
        "cp_world": 1,
        "cp_rank": 0,
        "causal_seqlens_kv_global": None,
        "use_fp16_softmax": None,
    },
}


@pytest.mark.parametrize("function", POSITIONAL, ids=lambda f: f.__name__)
def test_order_and_defaults_are_flashinfers(function: Callable[..., Any]) -> None:
    required, defaults = POSITIONAL[function]
    wanted = {**dict.fromkeys(required.split(), REQUIRED), **defaults}
    parameters = inspect.signature(function).parameters
    positional = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    }
    assert list(positional.items()) == list(wanted.items())
    by_name = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert by_name == LATER[function]
    assert len(parameters) == len(wanted) + len(by_name)


def positional(method: Callable[..., Any]) -> str:
    parameters = inspect.signature(method).parameters.values()
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return " ".join(p.name for p in parameters if p.kind is kind and p.name != "self")


def test_wrappers_take_flashinfers_arguments_in_order() -> None:
    assert positional(PREFILL_WRAPPER.__init__) == (
        "float_workspace_buffer kv_layout use_cuda_graph qo_indptr_buf paged_kv_indptr_buf "
        "paged_kv_indices_buf paged_kv_last_page_len_buf custom_mask_buf mask_indptr_buf backend "
        "jit_args jit_kwargs"
    )
    assert positional(DECODE_WRAPPER.__init__) == (
        "float_workspace_buffer kv_layout use_cuda_graph use_tensor_cores paged_kv_indptr_buffer "
        "paged_kv_indices_buffer paged_kv_last_page_len_buffer backend jit_args"
    )
    assert positional(PREFILL_WRAPPER.plan) == (
        "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads "
        "num_kv_heads head_dim_qk page_size head_dim_vo custom_mask packed_custom_mask causal "
        "pos_encoding_mode use_fp16_qk_reduction sm_scale window_left logits_soft_cap rope_scale "
        "rope_theta q_data_type kv_data_type o_data_type non_blocking prefix_len_ptr "
        "token_pos_in_items_ptr token_pos_in_items_len max_item_len_ptr seq_lens seq_lens_q "
        "block_tables max_token_per_sequence max_sequence_kv fixed_split_size disable_split_kv"
    )
    assert positional(DECODE_WRAPPER.plan) == (
        "indptr indices last_page_len num_qo_heads num_kv_heads head_dim page_size "
        "pos_encoding_mode window_left logits_soft_cap q_data_type kv_data_type o_data_type "
        "data_type sm_scale rope_scale rope_theta non_blocking block_tables seq_lens "
        "fixed_split_size disable_split_kv q_len_per_req"
    )
    for wrapper in (PREFILL_WRAPPER, DECODE_WRAPPER):
        assert positional(wrapper.run) == "q paged_kv_cache"
        assert wrapper.begin_forward is wrapper.plan


def test_functions_are_where_flashinfer_has_them() -> None:
    assert flashinfer.decode.trtllm_batch_decode_with_kv_cache_mla is MLA
    assert set(flashinfer.__all__) - {"decode", "mla", "prefill"} == {
        *(function.__name__ for function in POSITIONAL),
        PREFILL_WRAPPER.__name__,
        DECODE_WRAPPER.__name__,
    }


def test_every_refusal_is_of_a_parameter_that_exists() -> None:
    known = {
        name
        for function in (
            *POSITIONAL,
            *(getattr(w, m) for w in (PREFILL_WRAPPER, DECODE_WRAPPER) for m in METHODS),
        )
        for name in inspect.signature(function).parameters
    }
    assert set(_arguments._ONLY) <= known


# --- the page -------------------------------------------------------------------------------------

METHODS = ("__init__", "plan", "run")
SECTIONS = {
    **{f"`{function.__name__}`": (function,) for function in POSITIONAL},
    **{
        f"`{wrapper.__name__}`": tuple(getattr(wrapper, method) for method in METHODS)
        for wrapper in (PREFILL_WRAPPER, DECODE_WRAPPER)
    },
}


@pytest.mark.parametrize("title", SECTIONS)
def test_the_page_says_of_every_parameter_what_becomes_of_it(title: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    _, found, rest = text.partition(f"### {title}\n")
    assert found, f"no section {title}"
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", re.split(r"\n##", rest)[0], re.MULTILINE)
    verdicts = [verdict for _, verdict in rows]
    assert set(verdicts) <= {"honoured", "no effect", "refused", "honoured or refused"}, verdicts
    listed = [name for names, _ in rows for name in re.findall(r"`(\w+)`", names)]
    wanted = {
        name
        for function in SECTIONS[title]
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    }
    assert set(listed) == wanted
    assert len(listed) == len(set(listed)), "a parameter is listed twice"


# --- imports --------------------------------------------------------------------------------------


def test_ours_is_imported_only_when_asked_for() -> None:
    code = (
        "import sys, cuattn.interop; "
        "print(*[name for name in ('torch', 'cuattn.interop.flashinfer') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
