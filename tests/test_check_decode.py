"""What `decode` refuses, each in one clear sentence, and the Problem that a legal call becomes.

What it shares with `prefill_paged` beyond that is in `test_check.py`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from decode_cases import USUAL, decode_call
from views import array, index, real

import cuattn
from cuattn import _check, emulator
from cuattn._check import Options
from cuattn._records import Layout, Problem, SkipMode

BATCH, PAGES = 3, 7
Q, TOKENS = array(BATCH, 8, 64), array(BATCH, 4, 8, 64)
K, V = array(40, 2, 16, 64), array(40, 2, 16, 32)
ENDS = index(BATCH + 1)
LIVE = SkipMode("thresholds", unsafe=False)


def decode(**change: Any) -> Problem:
    """Check a good call with some arguments or options changed."""
    views: dict[str, Any] = {
        "q": Q,
        "k_cache": K,
        "v_cache": V,
        "block_tables": index(BATCH, PAGES),
        "seq_lens": index(BATCH),
        "cu_seqlens_q": None,
        "layout": "HND",
    }
    options = {name: value for name, value in change.items() if name not in views}
    given = (change.get(name, value) for name, value in views.items())
    return _check.decode(*given, Options(**{"causal": True, **options}))


# --- legal calls ----------------------------------------------------------------------------------


def test_one_token_of_each_request() -> None:
    assert decode(window_left=3, soft_cap=2) == Problem(
        form="decode",
        q=Layout((3, 8, 64), (512, 64, 1), "bfloat16"),
        k=Layout((40, 2, 16, 64), (2048, 1024, 64, 1), "bfloat16"),
        v=Layout((40, 2, 16, 32), (1024, 512, 32, 1), "bfloat16"),
        batch=3,
        q_heads=8,
        kv_heads=2,
        head_dim_qk=64,
        head_dim_v=32,
        q_len=1,
        kv_len=112,
        page_size=16,
        causal=True,
        window_left=3,
        soft_cap=2.0,
        skip=None,
        out_dtype="bfloat16",
        out_shape=(3, 8, 32),
        lse_shape=(3, 8),
        tokens=3,
        batch_invariant=False,
    )


def test_tokens_of_each_form() -> None:
    flat, tokens, ragged = decode(), decode(q=TOKENS), decode(q=array(11, 8, 64), cu_seqlens_q=ENDS)
    assert [(p.form, p.q_len, p.tokens) for p in (flat, tokens, ragged)] == [
        ("decode", 1, 3),
        ("decode", 4, 12),
        ("decode_ragged", 11, 11),
    ]
    assert tokens.out_shape == (3, 4, 8, 32) and tokens.lse_shape == (3, 4, 8)


@pytest.mark.parametrize("given", [True, np.True_])
def test_batch_invariance_is_part_of_the_problem(given: Any) -> None:
    assert decode(batch_invariant=given).batch_invariant
    assert (
        decode(batch_invariant=None)
        == decode(batch_invariant=False)
        != decode(batch_invariant=True)
    )


# --- refusals -------------------------------------------------------------------------------------

RANK = r"wanted \[batch, heads, head_dim\] or \[batch, q_len, heads, head_dim\]"
REFUSED = [
    ({"q": array(8, 64)}, r"q has shape \(8, 64\); " + RANK),
    ({"q": array(1, 3, 4, 8, 64)}, r"q has shape \(1, 3, 4, 8, 64\); " + RANK),
    ({"q": array()}, r"q has shape \(\); " + RANK),
    (
        {"q": TOKENS, "cu_seqlens_q": ENDS},
        r"q has shape \(3, 4, 8, 64\); wanted 3 axes \[tokens, heads, head_dim\]",
    ),
    ({"q": array(4, 8, 64)}, "q has batch 4; wanted 3, as block_tables has rows"),
    ({"q": array(2, 4, 8, 64)}, "q has batch 2; wanted 3, as block_tables has rows"),
    ({"q": Q._replace(dtype="float32")}, "q is float32; wanted bfloat16 or float16"),
    ({"q": Q._replace(dtype="float16")}, r"kv_cache \(k\) is bfloat16; wanted q's float16"),
    (
        {"k_cache": K._replace(dtype="float8_e4m3fn")},
        r"kv_cache \(k\) is float8_e4m3fn, not supported yet; wanted bfloat16 or float16",
    ),
    ({"v_cache": V._replace(dtype="int8")}, r"kv_cache \(v\) is int8; wanted bfloat16 or float16"),
    ({"v_cache": V._replace(device=1)}, r"kv_cache \(v\) is on device 1; wanted q's, device 0"),
    (
        {"q": array(3, 7, 64)},
        r"kv_cache \(k\) has 2 heads, which does not divide q's 7; wanted q's",
    ),
    (
        {"q": array(3, 0, 64)},
        r"kv_cache \(k\) has 2 heads, which does not divide q's 0; wanted q's",
    ),
    ({"v_cache": array(40, 1, 16, 32)}, r"kv_cache \(v\) has 1 heads; wanted kv_cache \(k\)'s 2"),
    ({"v_cache": array(39, 2, 16, 32)}, r"kv_cache \(v\) has 39 pages; wanted kv_cache \(k\)'s 40"),
    ({"v_cache": array(40, 2, 8, 32)}, r"kv_cache \(v\) has 8 tokens a page; wanted .*'s 16"),
    ({"q": array(3, 8, 128)}, r"kv_cache \(k\) has head_dim 64; wanted q's 128"),
    (
        {"q": array(3, 8, 264), "k_cache": array(40, 2, 16, 264)},
        "q has head_dim 264; wanted a multiple of 8 from 8 to 256",
    ),
    (
        {"v_cache": array(40, 2, 16, 512)},
        r"kv_cache \(v\) has head_dim 512; wanted a multiple of 8",
    ),
    (
        {"k_cache": array(40, 2, 24, 64), "v_cache": array(40, 2, 24, 32)},
        r"kv_cache has page size 24 \(HND\); wanted a power of two ≥ 8",
    ),
    (
        {"k_cache": array(40, 4, 2, 64), "v_cache": array(40, 4, 2, 32), "layout": "NHD"},
        r"kv_cache has page size 4 \(NHD\); wanted a power of two ≥ 8",
    ),
    ({"layout": "BHD"}, "layout is 'BHD'; wanted 'HND' or 'NHD'"),
    ({"k_cache": array(40, 16, 64)}, r"kv_cache \(k\) has shape \(40, 16, 64\); wanted 4 axes"),
    ({"block_tables": index(21)}, r"block_tables has shape \(21,\); wanted int32 \[batch, max_pag"),
    ({"block_tables": array(3, 7, dtype="int64")}, "block_tables is int64; wanted int32"),
    ({"block_tables": index(3, 7, device=1)}, "block_tables is on device 1; wanted q's, device 0"),
    (
        {"seq_lens": index(4)},
        r"seq_lens has shape \(4,\); wanted \[3\], one length per row of block",
    ),
    ({"seq_lens": index()}, r"seq_lens has shape \(\); wanted"),
    ({"seq_lens": array(3, dtype="int64")}, "seq_lens is int64; wanted int32"),
    ({"seq_lens": index(3, strides=(2,))}, r"seq_lens has strides \(2,\); wanted a contiguous arr"),
    (
        {"q": array(11, 8, 64), "cu_seqlens_q": index(3)},
        "cu_seqlens_q has 3 elements; wanted 4, one more than block_tables has rows",
    ),
    ({"cu_seqlens_q": index(0)}, r"cu_seqlens_q is empty; wanted batch \+ 1 elements, the first"),
    (
        {"cu_seqlens_q": index(4, 1)},
        r"cu_seqlens_q has shape \(4, 1\); wanted int32 \[batch \+ 1\]",
    ),
    ({"cu_seqlens_q": array(4, dtype="int64")}, "cu_seqlens_q is int64; wanted int32"),
    ({"batch_invariant": 1}, "batch_invariant is 1; wanted True or False"),
    ({"batch_invariant": "yes"}, "batch_invariant is 'yes'; wanted True or False"),
    ({"window_left": -2}, r"window_left is -2; wanted an int ≥ -1 \(-1: none\)"),
    ({"scale": 0.0}, r"scale is 0\.0; wanted a positive number or one float32 on the device"),
    ({"soft_cap": -1.0}, r"soft_cap is -1\.0; wanted a number ≥ 0"),
    ({"sinks": real(2)}, r"sinks has shape \(2,\); wanted \(8,\), \[q heads\]"),
    ({"out_dtype": "int8"}, "out_dtype is 'int8'; wanted bfloat16, float16, float32"),
    ({"out": array(3, 8, 64)}, r"out has shape \(3, 8, 64\); wanted \(3, 8, 32\)"),
    ({"out": array(3, 1, 8, 32)}, r"out has shape \(3, 1, 8, 32\); wanted \(3, 8, 32\)"),
    ({"out": real(3, 8, 32)}, r"out is float32; wanted bfloat16 \(q's dtype\)"),
    ({"lse": real(8, 3)}, r"lse has shape \(8, 3\); wanted \(3, 8\), that of the output"),
    ({"skip": LIVE, "thresholds": array(3)}, "skip_softmax.threshold is bfloat16; wanted float32"),
    (
        {"skip": LIVE, "thresholds": real(3, 2)},
        r"threshold has shape \(3, 2\); wanted \[batch\] = \(3,\) or \[batch, q heads\] = \(3, 8\)",
    ),
    ({"skip": LIVE, "thresholds": real(3, device=1)}, "threshold is on device 1; wanted q's"),
    ({"skip": LIVE, "seeds": array(3, 8)}, "seeds is bfloat16; wanted float32"),
    (
        {"skip": LIVE, "seeds": real(3, 1, 8)},
        r"seeds has shape \(3, 1, 8\); wanted \(3, 8\), q's but for its last axis",
    ),
    (
        {"skip": LIVE, "seeds": real(3, 8, strides=(16, 1))},
        r"seeds has strides \(16, 1\); wanted a contiguous array",
    ),
    ({"skip": LIVE, "seeds": real(3, 8, device=1)}, "seeds is on device 1; wanted q's"),
    ({"q": array(3, 2**31, 8, 64)}, "the call has 2147483648 query tokens; wanted fewer than 2"),
]


def assert_one_sentence(message: str) -> None:
    assert "\n" not in message
    assert message.count("; wanted ") == 1, "what came, and then what was wanted"


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_refusal(change: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^(skip_softmax.)?{words}") as caught:
        decode(**change)
    assert_one_sentence(str(caught.value))


ONE = "wanted exactly one of threshold, threshold_scale_factor and max_dropped_mass"
SKIPS = [
    ({}, "SkipSoftmax has no threshold; " + ONE),
    ({"certificate": True}, "SkipSoftmax has no threshold; " + ONE),
    ({"threshold": 0.1, "max_dropped_mass": 0.1}, "has threshold and max_dropped_mass; " + ONE),
    ({"max_dropped_mass": 1.0}, r"max_dropped_mass is 1\.0; wanted below 1"),
    ({"max_dropped_mass": 1.0, "unsafe": True}, r"max_dropped_mass is 1\.0; wanted below 1"),
    ({"max_dropped_mass": -0.1}, r"max_dropped_mass is -0\.1; wanted a finite number ≥ 0"),
    ({"max_dropped_mass": math.nan}, "max_dropped_mass is nan; wanted a finite number ≥ 0"),
    ({"max_dropped_mass": True}, "max_dropped_mass is True; wanted a number"),
    ({"max_dropped_mass": "0.1"}, r"max_dropped_mass is '0\.1'; wanted a number"),
    ({"max_dropped_mass": np.zeros(3, np.float32)}, "max_dropped_mass is array.*; wanted a number"),
    ({"threshold": 0.1, "certificate": 1}, "certificate is 1; wanted True or False"),
    ({"threshold": 0.1, "certificate": None}, "certificate is None; wanted True or False"),
    ({"threshold": 0.1, "unsafe": "no"}, "unsafe is 'no'; wanted True or False"),
    ({"threshold": 0.1, "stats": {}}, "stats is a dict; wanted a SkipStats"),
    ({"threshold": 1.0}, r"threshold is 1\.0; wanted below 1, or unsafe=True"),
    ({"threshold": [0.1]}, "threshold is a list; wanted a number or a float32 array on the device"),
    ({"threshold": 0.1, "seeds": [0.1]}, "seeds is a list; wanted a float32 array on the device"),
    ({"threshold": 0.1, "seeds": 0.1}, "seeds is a float; wanted a float32 array on the device"),
    (
        {"max_dropped_mass": 0.1, "seeds": np.zeros((3, 8), np.float32)},
        r"seeds and max_dropped_mass=0\.1; wanted seeds with a threshold only",
    ),
    ({"threshold_scale_factor": math.inf}, "threshold_scale_factor is inf; wanted a finite number"),
]


@pytest.mark.parametrize(("fields", "words"), SKIPS, ids=[words for _, words in SKIPS])
def test_refused_ways_to_skip(fields: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        cuattn.SkipSoftmax(**fields)
    assert_one_sentence(str(caught.value))


# Through the public function: nothing is launched, and so nothing is compiled.
CALLS = [
    ({"skip_softmax": 0.1}, "skip_softmax is a float; wanted a SkipSoftmax"),
    ({"skip_softmax": {"threshold": 0.1}}, "skip_softmax is a dict; wanted a SkipSoftmax"),
    ({"return_lse": 1}, "return_lse is 1; wanted True or False"),
    ({"kv_cache": (1, 2, 3)}, r"kv_cache is a tuple of 3; wanted a pair \(k, v\)"),
    (
        {"kv_cache": np.zeros((4, 3, 2, 16, 64), np.float16)},
        r"kv_cache has shape .*\[pages, 2, …\]",
    ),
    ({"kv_cache": np.zeros((4, 2, 16, 64), np.float16)}, r"kv_cache has shape .*\[pages, 2, …\]"),
    ({"seq_lens": np.array([100, 203])}, "seq_lens is int64; wanted int32"),
    ({"seq_lens": np.array([100], np.int32)}, r"seq_lens has shape \(1,\); wanted \[2\]"),
    ({"block_tables": np.zeros((3, 4), np.int32)}, r"seq_lens has shape \(2,\); wanted \[3\]"),
    ({"batch_invariant": 0}, "batch_invariant is 0; wanted True or False"),
    ({"layout": None}, "layout is None; wanted 'HND' or 'NHD'"),
]


@pytest.mark.parametrize(("change", "words"), CALLS, ids=[words for _, words in CALLS])
def test_refusals_of_the_public_function(change: dict[str, Any], words: str) -> None:
    call = decode_call(USUAL)
    names = ("q", "kv_cache", "block_tables", "seq_lens")
    arguments = {**dict(zip(names, call.arrays, strict=True)), **call.options, **change}
    with emulator.enabled() as launches, pytest.raises((ValueError, TypeError), match=words) as e:
        cuattn.decode(**arguments)
    assert_one_sentence(str(e.value))
    assert not launches


def test_results_may_not_lie_in_the_cache() -> None:
    call = decode_call(USUAL)
    q, cache, *_ = call.arrays
    room = cache[:1, 0, :1].reshape(-1)[: q.size].reshape(q.shape)
    with emulator.enabled(), pytest.raises(ValueError, match=r"out .*kv_cache"):
        cuattn.decode(*call.arrays, **call.options, out=room)
