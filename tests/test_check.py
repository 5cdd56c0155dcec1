"""Every legal call becomes the right Problem; every other one is refused in one clear sentence."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from views import BF16, array, index, packed, real

from cuattn import _check
from cuattn._check import Options, split_cache
from cuattn._records import Layout, Problem, SkipMode

TABLE = (3, 7)  # [batch, max_pages]


def batched(**change: Any) -> Problem:
    """Check a good batched call with some arguments or options changed."""
    views = {"q": array(2, 5, 8, 64), "k": array(2, 9, 2, 64), "v": array(2, 9, 2, 32)}
    return _call(_check.batched, views, change)


def ragged(**change: Any) -> Problem:
    views = {
        "q": array(11, 8, 64),
        "k": array(20, 2, 64),
        "v": array(20, 2, 32),
        "cu_seqlens_q": index(4),
        "cu_seqlens_kv": index(4),
    }
    return _call(_check.ragged, views, change)


def paged(layout: Any = "HND", **change: Any) -> Problem:
    views = {
        "q": array(11, 8, 64),
        "k_cache": array(40, 2, 16, 64),
        "v_cache": array(40, 2, 16, 32),
        "block_tables": index(*TABLE),
        "seq_lens": index(3),
        "cu_seqlens_q": index(4),
        "layout": layout,
    }
    return _call(_check.paged, views, change)


def _call(check: Any, views: dict[str, Any], change: dict[str, Any]) -> Problem:
    options = {name: value for name, value in change.items() if name not in views}
    return check(*(change.get(name, value) for name, value in views.items()), Options(**options))


# --- legal calls ---------------------------------------------------------------------------------


def test_batched_call() -> None:
    assert batched(causal=True, window_left=3, soft_cap=2) == Problem(
        form="batched",
        q=Layout((2, 5, 8, 64), (2560, 512, 64, 1), BF16),
        k=Layout((2, 9, 2, 64), (1152, 128, 64, 1), BF16),
        v=Layout((2, 9, 2, 32), (576, 64, 32, 1), BF16),
        batch=2,
        q_heads=8,
        kv_heads=2,
        head_dim_qk=64,
        head_dim_v=32,
        q_len=5,
        kv_len=9,
        page_size=0,
        causal=True,
        window_left=3,
        soft_cap=2.0,
        skip=None,
        out_dtype=BF16,
        out_shape=(2, 5, 8, 32),
        lse_shape=(2, 5, 8),
    )


def test_ragged_call() -> None:
    problem = ragged()
    assert (problem.form, problem.batch, problem.q_len, problem.kv_len) == ("ragged", 3, 11, 20)
    assert (problem.out_shape, problem.lse_shape) == ((11, 8, 32), (11, 8))


def test_paged_call_in_either_layout() -> None:
    problem = paged()
    assert (problem.form, problem.batch, problem.q_len, problem.kv_len) == ("paged", 3, 11, 112)
    assert (problem.page_size, problem.kv_heads) == (16, 2)
    nhd = paged("NHD", k_cache=array(40, 16, 2, 64), v_cache=array(40, 16, 2, 32))
    assert nhd.k == Layout((40, 2, 16, 64), (2048, 64, 128, 1), BF16)
    assert nhd.v == Layout((40, 2, 16, 32), (1024, 32, 64, 1), BF16)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (0, 2, 1, 3, 4)])
def test_one_cache_array_is_split_into_its_halves(order: tuple[int, ...]) -> None:
    """The second half starts where NumPy says, wherever the axis of 2 lies in memory."""
    shape = (4, 2, 3, 16, 8)
    memory = np.zeros([shape[axis] for axis in order], np.uint16).transpose(np.argsort(order))
    k, v = split_cache(array(*shape, strides=tuple(step // 2 for step in memory.strides)))
    for half, expected in ((k, memory[:, 0]), (v, memory[:, 1])):
        assert half.shape == expected.shape
        assert half.strides == tuple(step // 2 for step in expected.strides)
    assert v.pointer - k.pointer == memory[:, 1].ctypes.data - memory.ctypes.data


def test_cache_parts() -> None:
    assert _check.cache_parts(("k", "v")) == ("k", "v")
    assert _check.cache_parts(["k", "v"]) == ("k", "v")
    assert _check.cache_parts("kv") == ("kv",)


EMPTY = {
    "batch-0": lambda: batched(q=array(0, 5, 8, 64), k=array(0, 9, 2, 64), v=array(0, 9, 2, 32)),
    "q_len-0": lambda: batched(q=array(2, 0, 8, 64)),
    "kv_len-0": lambda: batched(k=array(2, 0, 2, 64), v=array(2, 0, 2, 32)),
    "ragged-batch-0": lambda: ragged(cu_seqlens_q=index(1), cu_seqlens_kv=index(1)),
    "ragged-no-tokens": lambda: ragged(
        q=array(0, 8, 64), k=array(0, 2, 64), v=array(0, 2, 32), out=array(0, 8, 32)
    ),
    "paged-batch-0": lambda: paged(
        q=array(0, 8, 64), block_tables=index(0, 7), seq_lens=index(0), cu_seqlens_q=index(1)
    ),
    "paged-no-pages": lambda: paged(k_cache=array(0, 2, 16, 64), v_cache=array(0, 2, 16, 32)),
    "paged-empty-table": lambda: paged(block_tables=index(3, 0)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_do_is_legal(name: str) -> None:
    EMPTY[name]()


LEGAL = {
    "sliced-heads": lambda: batched(q=array(2, 5, 8, 64, strides=(9000, 1024, 64, 1))),
    "broadcast-batch": lambda: batched(k=array(2, 9, 2, 64, strides=(0, 128, 64, 1))),
    "misaligned-unit-axis": lambda: batched(
        q=array(1, 5, 8, 64, strides=(3, 512, 64, 1)), k=array(1, 9, 2, 64), v=array(1, 9, 2, 32)
    ),
    "unaligned-but-empty": lambda: batched(q=array(2, 0, 8, 64, pointer=3)),
    "head-dims-8-and-256": lambda: batched(
        q=array(2, 5, 8, 8), k=array(2, 9, 2, 8), v=array(2, 9, 2, 256)
    ),
    "head-dim-192-and-128": lambda: batched(
        q=array(2, 5, 8, 192), k=array(2, 9, 2, 192), v=array(2, 9, 2, 128)
    ),
    "float16": lambda: batched(
        **{
            name: view._replace(dtype="float16")
            for name, view in (
                ("q", array(2, 5, 8, 64)),
                ("k", array(2, 9, 2, 64)),
                ("v", array(2, 9, 2, 32)),
            )
        }
    ),
    "lengths-with-unit-axes": lambda: paged(seq_lens=index(3, 1, 1, 1)),
    "lengths-with-a-leading-unit-axis": lambda: paged(seq_lens=index(1, 3)),
    "table-with-wide-rows": lambda: paged(block_tables=index(*TABLE, strides=(100, 1))),
    "sinks": lambda: batched(sinks=real(8)),
    "scalars-on-the-device": lambda: batched(scale=real(), out_scale=real(1, 1)),
    "numbers": lambda: batched(scale=np.float32(0.5), out_scale=-2, soft_cap=30),
    "out-transposed": lambda: batched(out=array(2, 5, 8, 32, strides=(1280, 32, 160, 1))),
    "out-and-lse": lambda: batched(out=array(2, 5, 8, 32), lse=real(2, 5, 8)),
    "out-float32": lambda: batched(out=real(2, 5, 8, 32), out_dtype="float32"),
}


@pytest.mark.parametrize("name", LEGAL)
def test_legal(name: str) -> None:
    LEGAL[name]()


@pytest.mark.parametrize(
    ("given", "kept"), [(-1, -1), (0, 0), (8, 8), (9, 9), (10, 9), (2**40, 9), (np.int64(4), 4)]
)
def test_window_is_cut_to_the_keys(given: Any, kept: int) -> None:
    assert batched(window_left=given).window_left == kept


@pytest.mark.parametrize("page_size", [8, 16, 32, 128, 1024])
def test_page_sizes(page_size: int) -> None:
    problem = paged(k_cache=array(40, 2, page_size, 64), v_cache=array(40, 2, page_size, 32))
    assert (problem.page_size, problem.kv_len) == (page_size, 7 * page_size)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (None, BF16),
        ("bfloat16", BF16),
        ("float32", "float32"),
        (np.float16, "float16"),
        (np.dtype("float32"), "float32"),
        (ml_dtypes.bfloat16, BF16),
        (np.dtype(ml_dtypes.bfloat16), BF16),
        (type("T", (), {"__str__": lambda self: "torch.bfloat16"})(), BF16),
    ],
)
def test_out_dtypes(given: Any, name: str) -> None:
    assert batched(out_dtype=given).out_dtype == name


def test_skip_modes() -> None:
    mode = SkipMode("threshold", unsafe=False)
    assert batched(skip=mode).skip == mode
    live = SkipMode("thresholds", unsafe=True, stats=True)
    for shape in ((2,), (2, 8)):
        seen = batched(skip=live, thresholds=real(*shape)).skip
        assert seen == SkipMode(
            "thresholds", True, Layout(shape, packed(shape), "float32"), stats=True
        )


def test_same_call_same_problem() -> None:
    assert hash(batched()) == hash(batched())
    assert batched() == batched(scale=0.25, sinks=real(8))


# --- refusals ------------------------------------------------------------------------------------

Q, K, V = array(2, 5, 8, 64), array(2, 9, 2, 64), array(2, 9, 2, 32)
LIVE = SkipMode("thresholds", unsafe=False)

BATCHED = [
    ({"q": array(5, 8, 64)}, r"q has shape \(5, 8, 64\); wanted 4 axes \[batch, seq, heads, head_"),
    ({"k": array(9, 2, 64)}, r"k has shape \(9, 2, 64\); wanted 4 axes"),
    ({"v": array()}, r"v has shape \(\); wanted 4 axes"),
    ({"q": Q._replace(dtype="float32")}, "q is float32; wanted bfloat16 or float16"),
    (
        {"q": Q._replace(dtype="float8_e4m3fn")},
        "q is float8_e4m3fn, not supported yet; wanted bfloat16",
    ),
    ({"v": V._replace(dtype="float8_e5m2")}, "v is float8_e5m2, not .* yet; wanted bfloat16 or fl"),
    ({"k": K._replace(dtype="float16")}, "k is float16; wanted q's bfloat16"),
    ({"v": V._replace(dtype="int32")}, "v is int32; wanted bfloat16 or float16"),
    ({"k": K._replace(device=1)}, "k is on device 1; wanted q's, device 0"),
    ({"v": V._replace(device=3)}, "v is on device 3; wanted q's, device 0"),
    ({"k": array(3, 9, 2, 64)}, "k has batch 3; wanted q's 2"),
    ({"v": array(1, 9, 2, 32)}, "v has batch 1; wanted q's 2"),
    ({"v": array(2, 8, 2, 32)}, "v has 8 tokens; wanted k's 9"),
    ({"v": array(2, 9, 1, 32)}, "v has 1 heads; wanted k's 2"),
    ({"q": array(2, 5, 7, 64)}, "k has 2 heads, which does not divide q's 7; wanted"),
    ({"q": array(2, 5, 0, 64)}, "k has 2 heads, which does not divide q's 0"),
    ({"k": array(2, 9, 2, 32)}, "k has head_dim 32; wanted q's 64"),
    ({"q": array(2, 5, 8, 264), "k": array(2, 9, 2, 264)}, "q has head_dim 264; .* from 8 to 256"),
    ({"q": array(2, 5, 8, 0), "k": array(2, 9, 2, 0)}, "q has head_dim 0; wanted a multiple of 8"),
    (
        {
            "q": array(2, 5, 8, 12, strides=(640, 128, 16, 1)),
            "k": array(2, 9, 2, 12, strides=(288, 32, 16, 1)),
        },
        "q has head_dim 12; wanted a multiple of 8 from 8 to 256",
    ),
    ({"v": array(2, 9, 2, 512)}, "v has head_dim 512; wanted"),
    (
        {"q": array(2, 5, 8, 64, strides=(5120, 1024, 128, 2))},
        "q has stride 2 on its last axis; wa",
    ),
    ({"k": array(2, 9, 2, 64, strides=(1152, -128, 64, 1))}, "k has strides .*; wanted none below"),
    (
        {"q": Q._replace(pointer=(1 << 20) + 8)},
        "q starts 8 bytes past .*; wanted rows aligned to 1",
    ),
    (
        {"k": array(2, 9, 2, 64, strides=(1304, 132, 64, 1))},
        r"k has stride 132 \(264 bytes\) on axis 1; wanted a multiple of 16 bytes",
    ),
    ({"causal": 1}, "causal is 1; wanted True or False"),
    ({"causal": None}, "causal is None; wanted True or False"),
    ({"window_left": -2}, "window_left is -2; wanted an int ≥ -1"),
    ({"window_left": 3.0}, r"window_left is 3\.0; wanted an int ≥ -1"),
    ({"window_left": True}, "window_left is True; wanted an int ≥ -1"),
    ({"window_left": None}, "window_left is None; wanted an int"),
    ({"scale": 0.0}, r"scale is 0\.0; wanted a positive number or one float32 on the device"),
    ({"scale": -1}, "scale is -1; wanted a positive number"),
    ({"scale": float("nan")}, "scale is nan; wanted a positive number .*, finite in float32"),
    ({"scale": 1e39}, "scale is 1e.39; wanted .* finite in float32"),
    ({"scale": 1e-60}, "scale is 1e-60; wanted a positive number"),
    ({"scale": True}, "scale is True; wanted a positive number"),
    ({"scale": "1"}, "scale is '1'; wanted a positive number"),
    ({"scale": array(1)}, "scale is bfloat16; wanted .* one float32 on the device"),
    ({"scale": real(2)}, r"scale has shape \(2,\); wanted .* one float32"),
    ({"scale": real(1, device=1)}, "scale is on device 1; wanted q's, device 0"),
    ({"out_scale": float("inf")}, "out_scale is inf; wanted a number .*, finite"),
    ({"out_scale": [1.0]}, r"out_scale is \[1\.0\]; wanted a number or one float32"),
    ({"out_scale": index(1)}, "out_scale is int32; wanted a number or one float32"),
    ({"soft_cap": -1.0}, r"soft_cap is -1\.0; wanted a number ≥ 0"),
    ({"soft_cap": float("inf")}, "soft_cap is inf; wanted a number ≥ 0 .*finite"),
    ({"soft_cap": 1e-42}, "soft_cap is 1e-42; wanted a number ≥ 0"),
    ({"soft_cap": None}, "soft_cap is None; wanted a number ≥ 0"),
    ({"soft_cap": False}, "soft_cap is False; wanted a number ≥ 0"),
    ({"sinks": array(8)}, "sinks is bfloat16; wanted float32"),
    ({"sinks": real(2)}, r"sinks has shape \(2,\); wanted \(8,\), \[q heads\]"),
    ({"sinks": real(8, strides=(2,))}, r"sinks has strides \(2,\); wanted a contiguous array"),
    ({"sinks": real(8, device=1)}, "sinks is on device 1; wanted q's, device 0"),
    ({"out_dtype": "int32"}, "out_dtype is 'int32'; wanted bfloat16, float16, float32"),
    ({"out_dtype": "float64"}, "out_dtype is float64; wanted bfloat16, float16, float32"),
    ({"out_dtype": "float8_e4m3fn"}, "out_dtype is float8_e4m3fn; wanted bfloat16"),
    ({"out": real(2, 5, 8, 32)}, r"out is float32; wanted bfloat16 \(q's dtype\)"),
    ({"out": Q, "out_dtype": "float16"}, r"out is bfloat16; wanted float16 \(out_dtype\)"),
    ({"out": Q}, r"out has shape \(2, 5, 8, 64\); wanted \(2, 5, 8, 32\)"),
    ({"out": array(2, 5, 8, 32, device=1)}, "out is on device 1; wanted q's, device 0"),
    ({"out": array(2, 5, 8, 32, pointer=(1 << 20) + 2)}, "out starts 2 bytes past"),
    ({"out": array(2, 5, 8, 32, strides=(1280, 257, 32, 1))}, r"out has stride 257 .* on axis 1"),
    ({"out": array(2, 5, 8, 32, strides=(0, 256, 32, 1))}, "out has strides .* elements share mem"),
    ({"out": array(2, 5, 8, 32, strides=(1280, 128, 32, 1))}, "out .* so elements share memory; w"),
    ({"lse": array(2, 5, 8)}, "lse is bfloat16; wanted float32"),
    ({"lse": real(2, 8, 5)}, r"lse has shape \(2, 8, 5\); wanted \(2, 5, 8\), that of the output"),
    ({"lse": real(2, 5, 8, strides=(40, 1, 5))}, "lse has strides .*; wanted a contiguous array"),
    ({"lse": real(2, 5, 8, device=1)}, "lse is on device 1"),
    ({"skip": LIVE, "thresholds": array(2)}, "skip_softmax.threshold is bfloat16; wanted float32"),
    ({"skip": LIVE, "thresholds": real(3)}, r"threshold has shape \(3,\); wanted \[batch\] = \(2,"),
    ({"skip": LIVE, "thresholds": real(2, 2)}, r"threshold .* or \[batch, q heads\] = \(2, 8\)"),
    ({"skip": LIVE, "thresholds": real(2, strides=(-1,))}, "threshold has strides .*none below 0"),
    ({"skip": LIVE, "thresholds": real(2, device=1)}, "skip_softmax.threshold is on device 1"),
    ({"q": array(2, 2**31, 8, 64)}, "the call has 2147483648 query tokens; wanted fewer than 2"),
    ({"k": array(2, 2**31, 2, 64), "v": array(2, 2**31, 2, 32)}, "has 2147483648 key tokens; want"),
    ({"q": array(2, 2**30, 64, 64)}, "q needs 8589934720 blocks .* so split the batch"),
]

RAGGED = [
    ({"q": array(2, 5, 8, 64)}, r"q has shape .*; wanted 3 axes \[tokens, heads, head_dim\]"),
    ({"v": array(21, 2, 32)}, "v has 21 tokens; wanted k's 20"),
    ({"cu_seqlens_q": array(4, dtype="int64")}, "cu_seqlens_q is int64; wanted int32"),
    (
        {"cu_seqlens_q": index(4, 1)},
        r"cu_seqlens_q has shape \(4, 1\); wanted int32 \[batch \+ 1\]",
    ),
    ({"cu_seqlens_q": index(0)}, r"cu_seqlens_q is empty; wanted batch \+ 1 elements"),
    ({"cu_seqlens_kv": index(4, strides=(2,))}, "cu_seqlens_kv has stride 2; wanted a contiguous"),
    ({"cu_seqlens_kv": index(5)}, "cu_seqlens_kv has 5 elements; wanted cu_seqlens_q's 4"),
    ({"cu_seqlens_kv": index(4, device=1)}, "cu_seqlens_kv is on device 1; wanted q's, device 0"),
    ({"lse": real(11, 2)}, r"lse has shape \(11, 2\); wanted \(11, 8\), that of the output"),
    ({"q": array(2**31, 8, 64)}, "the call has 2147483648 query tokens"),
]

PAGED = [
    (
        {"k_cache": array(40, 2, 2, 16, 64)},
        r"kv_cache \(k\) has shape .*; wanted 4 axes, or one ar",
    ),
    ({"v_cache": array(40, 2, 64)}, r"kv_cache \(v\) has shape \(40, 2, 64\); wanted 4 axes"),
    ({"k_cache": array(40, 2, 16, 64, dtype="float16")}, r"kv_cache \(k\) is float16; wanted q's"),
    ({"v_cache": array(41, 2, 16, 32)}, r"kv_cache \(v\) has 41 pages; wanted kv_cache \(k\)'s 40"),
    ({"v_cache": array(40, 2, 32, 32)}, r"kv_cache \(v\) has 32 tokens a page; wanted .* 16"),
    ({"v_cache": array(40, 4, 16, 32)}, r"kv_cache \(v\) has 4 heads; wanted kv_cache \(k\)'s 2"),
    ({"k_cache": array(40, 2, 16, 128)}, r"kv_cache \(k\) has head_dim 128; wanted q's 64"),
    (
        {"k_cache": array(40, 2, 12, 64), "v_cache": array(40, 2, 12, 32)},
        r"kv_cache has page size 12 \(HND\); wanted a power of two ≥ 8",
    ),
    (
        {"k_cache": array(40, 2, 4, 64), "v_cache": array(40, 2, 4, 32)},
        "kv_cache has page size 4 .*; wanted a power of two ≥ 8",
    ),
    (
        {"k_cache": array(40, 2, 0, 64), "v_cache": array(40, 2, 0, 32)},
        "kv_cache has page size 0",
    ),
    ({"layout": "hnd"}, "layout is 'hnd'; wanted 'HND' or 'NHD'"),
    ({"layout": None}, "layout is None; wanted 'HND' or 'NHD'"),
    (
        {"block_tables": index(21)},
        r"block_tables has shape \(21,\); wanted int32 \[batch, max_page",
    ),
    ({"block_tables": array(3, 7, dtype="int64")}, "block_tables is int64; wanted int32"),
    (
        {"block_tables": index(3, 7, strides=(1, 3))},
        "block_tables has stride 3 on its last axis; w",
    ),
    ({"block_tables": index(3, 7, strides=(-7, 1))}, "block_tables has strides .* none below 0"),
    ({"block_tables": index(3, 7, device=1)}, "block_tables is on device 1"),
    (
        {"seq_lens": index(4)},
        r"seq_lens has shape \(4,\); wanted \[3\], one length per row of block",
    ),
    ({"seq_lens": index()}, r"seq_lens has shape \(\); wanted"),
    ({"seq_lens": array(3, dtype="int64")}, "seq_lens is int64; wanted int32"),
    (
        {"seq_lens": index(3, strides=(2,))},
        r"seq_lens has strides \(2,\); wanted a contiguous arra",
    ),
    ({"seq_lens": index(3, device=1)}, "seq_lens is on device 1"),
    (
        {"cu_seqlens_q": index(3)},
        "cu_seqlens_q has 3 elements; wanted 4, one more than block_table",
    ),
    ({"block_tables": index(3, 2**27)}, "the call has 2147483648 key tokens; wanted fewer"),
]


@pytest.mark.parametrize(
    ("check", "change", "words"),
    [
        (check, *row)
        for check, rows in ((batched, BATCHED), (ragged, RAGGED), (paged, PAGED))
        for row in rows
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_refusal(check: Any, change: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        check(**change)
    message = str(caught.value)
    assert "\n" not in message
    assert "wanted" in message


def test_seq_lens_of_several_axes_must_be_one_list() -> None:
    views = {"block_tables": index(4, 7), "cu_seqlens_q": index(5)}
    with pytest.raises(ValueError, match=r"seq_lens has shape \(2, 2\); wanted \[4\]"):
        paged(seq_lens=index(2, 2), **views)


@pytest.mark.parametrize("shape", [(40, 2, 16, 64), (40, 3, 2, 16, 64), (2,)])
def test_split_cache_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"kv_cache has shape .*; wanted 5 axes \[pages, 2, …\]"):
        split_cache(array(*shape))


def test_cache_parts_refuses_other_counts() -> None:
    with pytest.raises(TypeError, match=r"kv_cache is a tuple of 3; wanted a pair \(k, v\)"):
        _check.cache_parts((1, 2, 3))


def test_decode_only_skipping_is_refused() -> None:
    _check.refuse_decode_only(None, None)
    with pytest.raises(ValueError, match=r"max_dropped_mass=0\.01, which prefill cannot honour"):
        _check.refuse_decode_only(0.01, None)
    with pytest.raises(ValueError, match="skip_softmax has seeds, which prefill cannot use; want"):
        _check.refuse_decode_only(None, real(2, 5, 8))
