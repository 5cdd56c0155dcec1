"""FlashInfer's two wrappers: plans of page lists, runs against the reference, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

import torch
from cases import Call, Case, numpy_skip, paged
from compare import assert_same_bits
from conftest import Outcome
from decode_cases import LONG, DecodeCase, decode_call
from flashinfer_calls import DTYPES, array_of, place_of, tensor_of
from skip_checks import threshold_for

from cuattn import emulator
from cuattn.interop import flashinfer

PREFILL = flashinfer.BatchPrefillWithPagedKVCacheWrapper
DECODE = flashinfer.BatchDecodeWithPagedKVCacheWrapper
LENGTHS = ((7, 64), (33, 100), (0, 5), (5, 1), (1, 129))
PREFILL_CASE = Case(lengths=LENGTHS)
DECODE_CASE = DecodeCase(lengths=((1, 100), (1, 203), (1, 0), (1, 64)))
TOKENS = DecodeCase(lengths=((4, 100), (4, 203)), form="tokens")


def lists_of(call: Call) -> dict[str, torch.Tensor]:
    """FlashInfer's page lists of a call's table, on the CPU."""
    tables, seq_lens = call.arrays[2:4]
    size = call.case.page_size
    pages = [row[: -(-int(n) // size)] for row, n in zip(tables, seq_lens, strict=True)]
    last = [(int(n) - 1) % size + 1 if n else 0 for n in seq_lens]
    return {
        "indptr": torch.tensor(np.cumsum([0, *map(len, pages)]), dtype=torch.int32),
        "indices": torch.from_numpy(np.concatenate(pages)),
        "last_page_len": torch.tensor(last, dtype=torch.int32),
    }


def wrapper_of(call: Call, place: str, **constructed: Any) -> Any:
    """A wrapper for calls like this one."""
    kind = PREFILL if call.function == "prefill_paged" else DECODE
    workspace = torch.full((64,), 0xA5, dtype=torch.uint8, device=place)
    return kind(workspace, call.case.layout, **constructed)


def plan(call: Call, wrapper: Any, lists: dict[str, Any], **planned: Any) -> None:
    case = call.case
    dtypes = {"q_data_type": DTYPES[case.dtype], "o_data_type": DTYPES[str(case.result_dtype)]}
    shared = {
        "sm_scale": case.scale,
        "window_left": case.window_left,
        "logits_soft_cap": case.soft_cap or None,
        **dtypes,
        **planned,
    }
    pages = (lists["indptr"], lists["indices"], lists["last_page_len"])
    heads = (case.q_heads, case.kv_heads, case.d_qk, case.page_size)
    if call.function == "prefill_paged":
        ends = torch.from_numpy(call.arrays[4]).clone()
        wrapper.plan(ends, *pages, *heads, causal=case.causal, **shared)
    else:
        wrapper.plan(*pages, *heads, **shared)


def run(call: Call, wrapper: Any, place: str, **given: Any) -> Outcome:
    """A run's results by the call's rows; rows of no request stay NaN."""
    q, cache = call.arrays[:2]
    tokens = sum(n for n, _ in call.case.lengths)
    rows = q[:tokens] if call.function == "prefill_paged" else q.reshape(-1, *q.shape[-2:])
    caches = tensor_of(cache, place) if isinstance(cache, np.ndarray) else None
    caches = tuple(tensor_of(part, place) for part in cache) if caches is None else caches
    sinks = call.options.get("sinks")
    more = {} if sinks is None else {"sinks": tensor_of(sinks, place)}
    dtype = DTYPES[str(call.case.result_dtype)]
    room = torch.full((*rows.shape[:-1], call.case.d_v), torch.nan, dtype=dtype, device=place)
    sums = torch.full(rows.shape[:-1], torch.nan, dtype=torch.float32, device=place)
    out, lse = wrapper.run(
        tensor_of(rows, place), caches, out=room, lse=sums, return_lse=True, **more, **given
    )
    assert out is room and lse is sums
    natural = (array_of(lse).astype(np.float64) * math.log(2)).astype(np.float32)
    whole = np.full((*q.shape[:-1], call.case.d_v), np.nan, array_of(out).dtype)
    whole_lse = np.full(q.shape[:-1], np.nan, np.float32)
    for all_rows, seen in ((whole, array_of(out)), (whole_lse, natural)):
        all_rows.reshape(-1, *seen.shape[1:])[: len(seen)] = seen
    return Outcome(whole, whole_lse)


def planned(call: Call, place: str, **planned: Any) -> Any:
    wrapper = wrapper_of(call, place)
    plan(call, wrapper, lists_of(call), **planned)
    return wrapper


def call_of(case: Case) -> Call:
    return decode_call(case) if isinstance(case, DecodeCase) else paged(case)


@pytest.mark.parametrize(
    "case",
    [
        PREFILL_CASE,
        replace(PREFILL_CASE, layout="NHD", causal=False, pair=True),
        replace(PREFILL_CASE, window_left=20, sinks=True, scale=0.3),
        replace(PREFILL_CASE, soft_cap=30.0),
        DECODE_CASE,
        replace(TOKENS, layout="NHD", window_left=40, sinks=True, scale=0.3),
        replace(DECODE_CASE, pair=True),
        replace(DECODE_CASE, soft_cap=30.0),
    ],
    ids=lambda case: f"{type(case).__name__}-{case}",
)
def test_matches_reference(device: Any, case: Case) -> None:
    call, place = call_of(case), place_of(device)
    wrapper = planned(call, place)
    assert wrapper._lengths.tolist() == [kv_len for _, kv_len in case.lengths]
    device.compare(call, run(call, wrapper, place))


@pytest.mark.parametrize("case", [PREFILL_CASE, DECODE_CASE], ids=lambda c: type(c).__name__)
def test_tables_and_lengths_may_be_given(device: Any, case: Case) -> None:
    call, place = call_of(case), place_of(device)
    wanted = run(call, planned(call, place), place)
    given = {
        "block_tables": torch.from_numpy(call.arrays[2].copy()),
        "seq_lens": torch.from_numpy(call.arrays[3].copy()).reshape(-1, 1, 1, 1),
    }
    lists = lists_of(call)
    lists["indices"].fill_(0)  # not what is read
    wrapper = wrapper_of(call, place)
    plan(call, wrapper, lists, **given)
    outcome = run(call, wrapper, place)
    device.compare(call, outcome)
    rows = np.isfinite(wanted.lse)
    assert_same_bits(outcome.lse[rows], wanted.lse[rows], case)


@pytest.mark.parametrize("case", [PREFILL_CASE, DECODE_CASE], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("tensors", [False, True], ids=["floats", "tensors"])
def test_scales_multiply(device: Any, case: Case, tensors: bool) -> None:
    """q_scale and k_scale what sm_scale is, v_scale the output; all before it is rounded."""
    place = place_of(device)
    call = call_of(replace(case, scale=0.3, out_scale=0.125))
    scales: dict[str, Any] = {"q_scale": 0.5, "k_scale": 2.0, "v_scale": 0.125}
    if tensors:
        scales = {name: torch.tensor([x], device=place) for name, x in scales.items()}
    device.compare(call, run(call, planned(call, place), place, **scales))


@pytest.mark.parametrize("case", [PREFILL_CASE, DECODE_CASE], ids=lambda c: type(c).__name__)
def test_a_run_may_have_another_window(device: Any, case: Case) -> None:
    call, place = call_of(replace(case, window_left=20)), place_of(device)
    wrapper = planned(call, place, window_left=-1)
    device.compare(call, run(call, wrapper, place, window_left=20))


@pytest.mark.parametrize(
    "case",
    [
        Case(lengths=((64, 400), (20, 300)), data="structured", scale=0.25),
        replace(LONG, lengths=((1, 900), (1, 500)), kv_heads=4),
    ],
    ids=lambda c: type(c).__name__,
)
def test_a_factor_skips_what_the_rule_says(device: Any, case: Case) -> None:
    call, place = call_of(case), place_of(device)
    geometry = device.geometry(call, threshold_scale_factor=1.0)
    votes = call.votes(geometry).statistics
    factor = 0.6 * case.lengths[0][1] * threshold_for(votes[np.isfinite(votes)], 0.4)
    skip = numpy_skip(threshold_scale_factor=factor)
    expected = call.reference(geometry=geometry, skip_softmax=skip)
    assert expected.margin > 1e-4 and 0 < expected.skipped.sum() < expected.visited.sum()
    wrapper = planned(call, place)
    outcome = run(call, wrapper, place, skip_softmax_threshold_scale_factor=factor)
    device.compare(call, outcome, geometry=geometry, skip_softmax=skip)
    rows = np.isfinite(outcome.lse)
    assert (outcome.lse[rows] < run(call, wrapper, place).lse[rows] - 1e-5).any()


def test_a_fixed_split_size_makes_requests_independent_of_their_batch(device: Any) -> None:
    """FlashInfer #2270, #2424, #1675: the same request alone and between others."""
    case = DecodeCase(lengths=((1, 64), (1, 5000), (1, 700)), kv_heads=1, q_heads=4)
    call, place = decode_call(case), place_of(device)
    together = run(call, planned(call, place, fixed_split_size=4), place)
    device.compare(call, together)
    q, cache, tables, lengths = call.arrays
    single = replace(
        call,
        case=replace(case, lengths=case.lengths[1:2]),
        arrays=(q[1:2], cache, tables[1:2], lengths[1:2]),
    )
    alone = run(single, planned(single, place, disable_split_kv=True), place)
    assert_same_bits(alone.out[0], together.out[1], case)
    assert_same_bits(alone.lse[0], together.lse[1], case)


@pytest.mark.parametrize("function", ["prefill_paged", "decode"])
def test_plans_of_a_graph_stay_at_their_addresses(device: Any, function: str) -> None:
    """What a captured run reads is what the last plan said."""
    place = place_of(device)
    small: Case = DecodeCase(lengths=((1, 30), (1, 203)))
    large: Case = DecodeCase(lengths=((1, 250), (1, 70)))
    if function == "prefill_paged":
        small, large = Case(lengths=((20, 30), (5, 203))), Case(lengths=((3, 250), (22, 70)))
    names = ["paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer"]
    if function == "prefill_paged":
        names = ["qo_indptr_buf", *(name.removesuffix("fer") for name in names)]
    sizes = [3] * (len(names) - 2) + [40, 2]
    buffers = {
        name: torch.full((size,), -9, dtype=torch.int32, device=place)
        for name, size in zip(names, sizes, strict=True)
    }
    wrapper, places = None, []
    for case in (small, large, small):
        call = call_of(case)
        lists = lists_of(call)
        if wrapper is None:
            wrapper = wrapper_of(call, place, use_cuda_graph=True, **buffers)
            assert wrapper.is_cuda_graph_enabled
        plan(call, wrapper, lists)
        device.compare(call, run(call, wrapper, place))
        tensors = [wrapper._tables, wrapper._lengths, *wrapper._buffers]
        places.append([x.data_ptr() for x in tensors])
        indices = buffers[names[-2]]
        assert (indices[: len(lists["indices"])].cpu() == lists["indices"]).all()
    assert places[0] == places[1] == places[2]
    call = call_of(small)
    lists = lists_of(call)
    many = {**lists, "indices": torch.zeros(41, dtype=torch.int32)}
    with pytest.raises(ValueError, match="indices has 41 pages; wanted at most 40"):
        plan(call, wrapper, many)
    one = call_of(replace(small, lengths=small.lengths[:1]))
    with pytest.raises(ValueError, match="last_page_len has 1 elements; wanted 2 in every plan"):
        plan(one, wrapper, lists_of(one))


# --- refusals -------------------------------------------------------------------------------------


def test_constructors_refuse() -> None:
    workspace = torch.zeros(8)
    for wrapper in (PREFILL, DECODE):
        for given, sentence in (
            ({"kv_layout": "DHN"}, "kv_layout is 'DHN'; wanted 'NHD' or 'HND'"),
            ({"backend": "fa9"}, "backend is 'fa9'; wanted one of auto, fa2"),
            ({"jit_args": []}, r"jit_args is \(\); wanted None"),
            ({"use_cuda_graph": True}, r"wanted a torch\.Tensor, as use_cuda_graph=True"),
        ):
            with pytest.raises(ValueError, match=sentence):
                wrapper(workspace, **given)
        assert not wrapper(workspace).is_cuda_graph_enabled
    assert DECODE(workspace, use_tensor_cores=False).use_tensor_cores
    ends = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="paged_kv_indptr_buffer has 4 elements; wanted 3"):
        DECODE(workspace, "NHD", True, False, ends, ends, ends[:2])


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"pos_encoding_mode": "ROPE_LLAMA"}, ValueError, "wanted 'NONE': queries and keys come"),
        ({"kv_data_type": 3}, ValueError, "kv_data_type is 3; wanted a dtype such as"),
        ({"o_data_type": "float99"}, ValueError, "o_data_type is 'float99'; wanted a dtype"),
    ],
)
@pytest.mark.parametrize("case", [PREFILL_CASE, DECODE_CASE], ids=lambda c: type(c).__name__)
def test_plans_refuse(
    case: Case, changes: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        planned(call_of(case), "cpu", **changes)


@pytest.mark.parametrize(
    ("case", "changes", "error", "sentence"),
    [
        (PREFILL_CASE, {"custom_mask": torch.ones(1)}, ValueError, "custom_mask is a Tensor; wan"),
        (PREFILL_CASE, {"packed_custom_mask": 1}, ValueError, "wanted None: masks are causal or"),
        (PREFILL_CASE, {"use_fp16_qk_reduction": True}, ValueError, "sums are float32"),
        (PREFILL_CASE, {"token_pos_in_items_len": 3}, ValueError, "items are not scored apart"),
        (DECODE_CASE, {"window_right": -1}, NotImplementedError, "window_right is -1; wanted 0"),
        (DECODE_CASE, {"q_len_per_req": 0}, ValueError, "q_len_per_req is 0; wanted an int ≥ 1"),
    ],
)
def test_one_plan_refuses(
    case: Case, changes: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        planned(call_of(case), "cpu", **changes)


def test_page_lists_must_fit_each_other() -> None:
    call = decode_call(DECODE_CASE)
    lists = lists_of(call)
    wrapper = wrapper_of(call, "cpu")
    with pytest.raises(ValueError, match=r"indptr has shape \(4,\); wanted \[5\]"):
        plan(call, wrapper, {**lists, "indptr": lists["indptr"][:-1]})
    with pytest.raises(ValueError, match=r"indices has 5 pages; wanted \d+, as indptr ends"):
        plan(call, wrapper, {**lists, "indices": lists["indices"][:5]})
    call = paged(PREFILL_CASE)
    wrong = lists_of(call)
    with pytest.raises(ValueError, match=r"qo_indptr has shape .*; wanted that of paged_kv_indptr"):
        plan(paged(replace(PREFILL_CASE, lengths=LENGTHS[:2])), wrapper_of(call, "cpu"), wrong)


@pytest.mark.parametrize("case", [PREFILL_CASE, DECODE_CASE], ids=lambda c: type(c).__name__)
def test_runs_refuse_what_was_not_planned(case: Case) -> None:
    call = call_of(case)
    wrapper = planned(call, "cpu")
    tokens = sum(n for n, _ in case.lengths)
    q = tensor_of(call.arrays[0], "cpu")[:tokens]
    cache = tensor_of(call.arrays[1], "cpu")
    for arguments, given, sentence in (
        ((q.half(), cache), {}, "q is torch.float16; wanted torch.bfloat16, the plan's q_data_t"),
        ((q, cache.half()), {}, "paged_kv_cache is torch.float16; wanted torch.bfloat16, the pl"),
        ((q[:, :2], cache), {}, rf"q has shape .*; wanted {case.q_heads} heads of 64, as planned"),
        ((q, cache[:, :, :1]), {}, "wanted pages of 16 tokens and 2 heads, as planned"),
        ((q[:-1], cache), {}, f"q has {tokens - 1} tokens; wanted"),
        ((q, cache, 1.0), {}, "jit_args is .*; wanted None: kernels cannot be customised"),
        ((q, cache), {"kv_cache_sf": cache}, "kv_cache_sf is a Tensor; wanted None"),
        ((q, cache), {"out": q.half()}, "out is torch.float16; wanted torch.bfloat16"),
        ((q, cache), {"window_left": -2}, "window_left is -2; wanted an int"),
        ((q, cache), {"v_scale": float("inf")}, "v_scale is inf; wanted a number"),
    ):
        with pytest.raises(ValueError, match=sentence), emulator.enabled():
            wrapper.run(*arguments, **given)
    with pytest.raises(RuntimeError, match=r"run\(\) came before plan\(\)"):
        wrapper_of(call, "cpu").run(q, cache)
    if case is DECODE_CASE:
        with pytest.raises(ValueError, match="q has 4 tokens; wanted 2 for each of the plan's 4"):
            wrapper.run(q, cache, q_len_per_req=2)
