"""FlashInfer's four functions against the reference, and its issues, each a test of ours."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

import torch
from cases import Call, Case, numpy_skip, paged, ragged
from compare import assert_close, assert_same_bits
from conftest import Outcome
from decode_cases import LONG, DecodeCase, call_of, decode_call
from flashinfer_calls import FUNCTIONS, arguments, array_of, ask, check, place_of
from mla_cases import MlaCase, mla_call
from skip_checks import threshold_for

import cuattn

LN2 = math.log(2)
RAGGED = Case(lengths=((7, 64), (33, 100), (0, 5), (5, 0), (1, 129)))
DECODE = DecodeCase(lengths=((1, 100), (1, 203)))
TOKENS = DecodeCase(lengths=((4, 100), (4, 203)), form="tokens")
UNEVEN = DecodeCase(lengths=((1, 200), (5, 203), (3, 64), (0, 9)), form="ragged")
MLA = MlaCase()
MLA_TOKENS = MlaCase(lengths=((2, 65), (2, 130)), form="tokens")
MLA_UNEVEN = MlaCase(lengths=((1, 64), (4, 130), (0, 5), (2, 65)), form="ragged")

FORMS = [
    ragged(RAGGED),
    paged(RAGGED),
    decode_call(DECODE),
    decode_call(TOKENS),
    decode_call(UNEVEN),
    mla_call(MLA),
    mla_call(MLA_TOKENS),
    mla_call(MLA_UNEVEN),
]
ONE_EACH = [FORMS[0], FORMS[1], FORMS[3], FORMS[6]]


def name_of(call: Call) -> str:
    return f"{call.function}-{call.case}"


def on(call: Call, device: Any) -> Any:
    """The device, if the call's kernel is for it."""
    capability = device.current().capability
    if call.function == "mla_decode" and capability != (9, 0):
        pytest.skip(f"the device has compute capability {capability}; (9, 0) is wanted")
    return device


def rows_of(call: Call) -> Any:
    """Which rows belong to requests."""
    return np.isfinite(call.reference().out).all(axis=(-1, -2))


def assert_same(one: Outcome, other: Outcome, call: Call) -> None:
    rows = rows_of(call)
    assert_same_bits(one.out[rows], other.out[rows], call.case)
    assert_same_bits(one.lse[rows], other.lse[rows], call.case)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", FORMS, ids=name_of)
def test_matches_reference(device: Any, call: Call) -> None:
    """NaN in padding, unused pages and slots; table entries that must not be followed.

    FlashInfer #941, #945: what must not be read poisons a result; #2856: an `out` of one's own.
    """
    check(on(call, device), call)


@pytest.mark.parametrize(
    "call",
    [
        ragged(replace(RAGGED, window_left=20, sinks=True)),
        ragged(replace(RAGGED, causal=False, scale=0.3, out_scale=2.5, device_scalars=True)),
        paged(replace(RAGGED, layout="NHD", pair=True, sinks=True)),
        paged(replace(RAGGED, layout="NHD", causal=False, window_left=20)),
        paged(replace(RAGGED, scale=0.3, out_scale=2.5, device_scalars=True)),
        decode_call(replace(TOKENS, layout="NHD", window_left=40, sinks=True)),
        decode_call(replace(DECODE, pair=True, scale=0.3, out_scale=0.125)),
        decode_call(replace(UNEVEN, scale=0.3, out_scale=2.5, device_scalars=True)),
        mla_call(replace(MLA, sinks=True, head_axis="before")),
        mla_call(replace(MLA_TOKENS, scale=0.05, out_scale=2.5, device_scalars=True)),
    ],
    ids=name_of,
)
def test_options_match_reference(device: Any, call: Call) -> None:
    check(on(call, device), call)


@pytest.mark.parametrize("call", FORMS, ids=name_of)
def test_results_are_the_same_however_they_are_asked_for(device: Any, call: Call) -> None:
    """New tensors or given ones, with LSE or without: the same bits, of the documented shapes."""
    options = arguments(call, place_of(on(call, device)))
    function, query, rows = FUNCTIONS[call.function], options["query"], rows_of(call).reshape(-1)
    wanted = ask(call, options)
    tokens, heads = query.shape[:-1].numel() // query.shape[-2], query.shape[-2]

    def same(seen: torch.Tensor, expected: Any) -> None:
        assert seen.device == query.device and not seen.requires_grad
        flat = array_of(seen).reshape(tokens, heads, -1)
        assert_same_bits(flat[rows], expected.reshape(flat.shape)[rows], call.case)

    out, lse = function(**options)
    assert out.shape == (*query.shape[:-1], call.case.d_v) and out.dtype is query.dtype
    assert lse.shape == (tokens, heads) and lse.dtype is torch.float32
    same(out, wanted.out)
    same((lse.double() * LN2).float(), wanted.lse)
    options["return_lse"] = False
    alone = function(**options)
    same(alone, wanted.out)
    wide = torch.full((tokens, 2 * heads), torch.nan, device=query.device)
    strided = wide[:, ::2]
    same(function(**options, lse=strided), wanted.out)
    same((strided.double() * LN2).float(), wanted.lse)
    assert wide[:, 1::2].isnan().all()


def test_the_output_has_the_dtype_that_was_asked_for(device: Any) -> None:
    call = decode_call(replace(DECODE, out_dtype="float16"))
    outcome = check(device, call)  # by the dtype of `out`
    out, _ = FUNCTIONS["decode"](**arguments(call, place_of(device)), out_dtype=torch.float16)
    assert out.dtype is torch.float16
    assert_same_bits(array_of(out), outcome.out, call.case)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_one_axis_of_keys_and_values_means_that_they_are_the_same(device: Any, layout: str) -> None:
    for call in (
        paged(replace(RAGGED, layout=layout)),
        decode_call(replace(DECODE, layout=layout)),
    ):
        options = arguments(call, place_of(device))
        cache = options["kv_cache"]
        twice = torch.stack([cache[:, 0], cache[:, 0]], dim=1)
        wanted = ask(call, options | {"kv_cache": twice})
        assert_same(ask(call, options | {"kv_cache": cache[:, :1]}), wanted, call)
        assert np.abs(wanted.out[rows_of(call)].astype(np.float32)).max() > 0.1


def test_a_scale_times_log2_e_wins(device: Any) -> None:
    call = decode_call(replace(DECODE, scale=0.3))
    options = arguments(call, place_of(device))
    log2_scale = torch.full((1,), 0.3 / LN2, device=options["query"].device)
    outcome = ask(call, options | {"bmm1_scale": 7.0, "bmm1_scale_log2": log2_scale})
    device.compare(call, outcome)


# --- skipping -------------------------------------------------------------------------------------


SKIPPING = [
    ragged(Case(lengths=((64, 400), (20, 300)), data="structured", scale=0.25)),
    paged(Case(lengths=((64, 400), (20, 300)), data="structured", scale=0.25)),
    decode_call(replace(LONG, lengths=((1, 900), (1, 500)), kv_heads=4)),
    mla_call(MlaCase(lengths=((1, 900), (1, 500)), data="structured")),
]


@pytest.mark.parametrize("call", SKIPPING, ids=name_of)
def test_a_factor_skips_what_the_rule_says(device: Any, call: Call) -> None:
    """The result is that of the rule replayed at factor / length, and not the dense one."""
    longest = max(n for _, n in call.case.lengths)
    geometry = on(call, device).geometry(call, threshold_scale_factor=1.0)
    votes = call.votes(geometry).statistics
    if call.function == "mla_decode":
        votes = votes.max(axis=1)  # all heads vote together
    factor = 0.6 * longest * threshold_for(votes[np.isfinite(votes)], 0.4)
    skip = numpy_skip(threshold_scale_factor=factor)
    expected = call.reference(geometry=geometry, skip_softmax=skip)
    assert expected.margin > 1e-4 and 0 < expected.skipped.sum() < expected.visited.sum()
    options = arguments(call, place_of(device))
    dense = ask(call, options)
    outcome = ask(call, options | {"skip_softmax_threshold_scale_factor": factor})
    device.compare(call, outcome, geometry=geometry, skip_softmax=skip)
    rows = rows_of(call)
    gone = np.isfinite(dense.lse[rows])
    assert (outcome.lse[rows] <= dense.lse[rows] + 1e-5)[gone].all()
    assert (outcome.lse[rows] < dense.lse[rows] - 1e-5).any(), "nothing was skipped"


@pytest.mark.parametrize("call", SKIPPING, ids=name_of)
def test_factors_that_skip_nothing(device: Any, call: Call) -> None:
    """None, 0 and 1e-30 give the same bits, and so do requests whose λ is 1 and more."""
    options = arguments(call, place_of(on(call, device)))
    dense = ask(call, options)
    for factor in (0, 0.0, 1e-30, 1e6):
        outcome = ask(call, options | {"skip_softmax_threshold_scale_factor": factor})
        assert_same(outcome, dense, call)


@pytest.mark.parametrize("function", ["prefill_ragged", "prefill_paged", "decode", "mla_decode"])
def test_a_skip_factor_is_never_ignored(device: Any, function: str) -> None:
    """Half of the tiles of keys are 9 below the others: without them LSE is lower."""
    keys = 2048 if function == "decode" else 512
    if function == "mla_decode":
        case: Any = MlaCase(lengths=((1, keys),), scale=1.0)
        call = mla_call(case)
    elif function == "decode":
        case = DecodeCase(lengths=((1, keys),), scale=1.0)
        call = decode_call(case)
    else:
        case = Case(lengths=((64, keys),), causal=False, scale=1.0, poison="huge")
        call = (ragged if function == "prefill_ragged" else paged)(case)
    options = arguments(call, place_of(on(call, device)))
    tile = device.geometry(call, threshold=0.1).block_kv
    low = torch.arange(keys, device=options["query"].device) // tile % 2 == 1
    level = torch.where(low, -9.0 / case.d_qk, 0.0)
    options["query"].fill_(1)
    if function == "prefill_ragged":
        options["key"][:keys] = level[:, None, None].to(torch.bfloat16)
    else:
        pages = options["block_tables"][0, : keys // case.page_size].long()
        by_page = level.reshape(len(pages), case.page_size).to(torch.bfloat16)
        if function == "mla_decode":
            options["kv_cache"][pages] = by_page[..., None]
        else:
            options["kv_cache"][pages, 0] = by_page[:, None, :, None]
    factor = keys * math.exp(-5.0)
    dense = ask(call, options)
    outcome = ask(call, options | {"skip_softmax_threshold_scale_factor": factor})
    rows = np.s_[:64] if function.startswith("prefill") else np.s_[:]
    all_keys = math.log(keys / 2 * (1 + math.exp(-9)))
    np.testing.assert_allclose(dense.lse[rows], all_keys, rtol=1e-5)
    lost = dense.lse[rows].astype(np.float64) - outcome.lse[rows]
    most = math.log1p(math.exp(-9))  # if every low tile goes
    assert (lost > most / 3).all() and (lost < 1.1 * most).all()


# --- FlashInfer's issues --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        ragged(Case(lengths=((20, 7), (5, 40)))),
        paged(Case(lengths=((20, 7), (5, 40)), sinks=True)),
        decode_call(DecodeCase(lengths=((5, 3), (5, 0)), form="tokens", sinks=True)),
        mla_call(MlaCase(lengths=((4, 3), (4, 0)), form="tokens", sinks=True)),
    ],
    ids=name_of,
)
def test_rows_without_keys_give_zero_and_minus_infinity(device: Any, call: Call) -> None:
    """FlashInfer #4452: a finite LSE for rows that see no key."""
    outcome = check(on(call, device), call)
    none = np.isneginf(outcome.lse)
    assert none.any() and not none.all()
    assert not outcome.out[none].any()


@pytest.mark.parametrize(
    "call",
    [
        ragged(Case(lengths=((20, 70),), scale=4000.0)),
        paged(Case(lengths=((20, 70),), scale=2500.0, data="negative")),
        decode_call(DecodeCase(lengths=((1, 100),), scale=4000.0)),
        mla_call(MlaCase(lengths=((1, 100),), scale=1000.0)),
    ],
    ids=name_of,
)
def test_large_logits_are_not_mistaken_for_masked(device: Any, call: Call) -> None:
    """FlashInfer #4267, #4401: a finite number in place of minus infinity."""
    outcome = check(on(call, device), call)
    assert np.nanmax(np.abs(outcome.lse)) > 3e3


@pytest.mark.parametrize("call", ONE_EACH, ids=name_of)
def test_bounds_decide_nothing(device: Any, call: Call) -> None:
    """FlashInfer #4647: bits that depend on max_seq_len. Ours do not, right or wrong."""
    options = arguments(call, place_of(on(call, device)))
    wanted = ask(call, options)
    for bound in (1, 1 << 20):
        bounds = {
            name: bound for name in options if name.startswith("max_") and name != "max_q_len"
        }
        assert bounds
        assert_same(ask(call, options | bounds), wanted, call)


@pytest.mark.parametrize("call", ONE_EACH, ids=name_of)
def test_lse_has_base_two(device: Any, call: Call) -> None:
    """FlashInfer #4485, #2113: scores of 0 give log2 of the number of keys."""
    options = arguments(call, place_of(on(call, device)))
    options["query"].fill_(0)
    _, lse = FUNCTIONS[call.function](**options)
    wanted = [
        math.log2(kv_len - q_len + 1 + i) if kv_len - q_len + 1 + i > 0 else -math.inf
        for q_len, kv_len in call.case.lengths
        for i in range(q_len)
    ]
    for seen, number in zip(array_of(lse), wanted, strict=False):  # rows of no request are behind
        np.testing.assert_allclose(seen, number, rtol=1e-6)


def test_parts_merge_to_the_whole_by_lse(device: Any) -> None:
    """Pages of a request in two calls, by LSE to base 2 made natural for `merge_states`."""
    call = decode_call(DecodeCase(lengths=((1, 300), (1, 300)), out_dtype="float32"))
    options = arguments(call, place_of(device)) | {"out_dtype": torch.float32}
    outs, lses = [], []
    for first, last in ((0, 12), (12, 19)):
        keys = options["seq_lens"].clone().fill_(min(16 * last, 300) - 16 * first)
        part = options | {
            "block_tables": options["block_tables"][:, first:last],
            "seq_lens": keys,
        }
        out, lse = FUNCTIONS["decode"](**part)
        outs.append(out)
        lses.append(lse * LN2)
    out, lse = cuattn.merge_states(outs, lses)
    expected, plain = call.reference(), call.plain()
    assert_close(device.to_host(lse), expected.lse, plain.lse, call.case, "lse")
    assert_close(device.to_host(out), expected.out, plain.out, call.case)


@pytest.mark.parametrize("build", [ragged, paged], ids=lambda f: f.__name__)
def test_empty_requests_in_any_position(device: Any, build: Any) -> None:
    """FlashInfer #3779: rows of requests without keys were NaN or not written."""
    for order in itertools.permutations(((0, 40), (30, 0), (17, 65))):
        outcome = check(device, build(Case(lengths=order)))
        start = sum(q_len for q_len, _ in order[: order.index((30, 0))])
        assert not outcome.out[start : start + 30].any()
        assert np.isneginf(outcome.lse[start : start + 30]).all()


def test_an_early_token_does_not_see_the_later_ones(device: Any) -> None:
    """FlashInfer #4198, #4199: q_len_per_req above 1 without a mask of its own."""
    call = decode_call(TOKENS)
    options = arguments(call, place_of(device))
    wanted = ask(call, options)
    cache = options["kv_cache"].clone()
    for request, (_, kv_len) in enumerate(TOKENS.lengths):
        for key in range(kv_len - 3, kv_len):
            cache[options["block_tables"][request, key // 16], :, :, key % 16] = 50
    changed = ask(call, options | {"kv_cache": cache})
    assert_same_bits(changed.out[:, 0], wanted.out[:, 0], TOKENS)
    assert_same_bits(changed.lse[:, 0], wanted.lse[:, 0], TOKENS)
    assert (changed.lse[:, 1:] != wanted.lse[:, 1:]).all()


@pytest.mark.parametrize(
    "call",
    [
        ragged(replace(RAGGED, q_heads=5, kv_heads=1, causal=False, poison="huge")),
        paged(replace(RAGGED, q_heads=3, kv_heads=1, causal=False, poison="huge")),
        decode_call(replace(TOKENS, q_heads=7, kv_heads=1, poison="huge")),
        mla_call(replace(MLA_TOKENS, q_heads=20, poison="huge")),
    ],
    ids=name_of,
)
def test_rows_that_only_fill_a_tile_have_no_say(device: Any, call: Call) -> None:
    """FlashInfer #3716: odd groups, large numbers in whatever lies beside them."""
    check(on(call, device), call)


@pytest.mark.parametrize("call", ONE_EACH, ids=name_of)
def test_strides_are_followed(device: Any, call: Call) -> None:
    """FlashInfer #1341, #2236: queries of a larger tensor, a slice of a larger cache."""
    options = arguments(call, place_of(on(call, device)))
    wanted = ask(call, options)
    query = options["query"]
    wide = torch.full((*query.shape[:-2], 2 * query.shape[-2], query.shape[-1]), torch.nan)
    wide = wide.to(query.device, query.dtype)
    wide[..., : query.shape[-2], :] = query
    changes = {"query": wide[..., : query.shape[-2], :]}
    if "kv_cache" in options:
        cache = options["kv_cache"]
        pool = torch.full((cache.shape[0], 3, *cache.shape[1:]), torch.nan)
        pool = pool.to(cache.device, cache.dtype)
        pool[:, 1] = cache
        changes["kv_cache"] = pool[:, 1]
    assert not changes["query"].is_contiguous()
    assert_same(ask(call, options | changes), wanted, call)


@pytest.mark.parametrize("call", [ragged(RAGGED), paged(RAGGED)], ids=name_of)
def test_a_request_has_the_same_bits_alone_and_in_a_batch(device: Any, call: Call) -> None:
    """FlashInfer #2270, #2424, #1675; of decode see the wrapper's fixed_split_size."""
    options = arguments(call, place_of(device))
    together = ask(call, options)
    ends = options["cum_seq_lens_q"].tolist()
    pick = slice(ends[1], ends[2])
    case = replace(RAGGED, lengths=RAGGED.lengths[1:2])
    one = {
        "query": options["query"][pick],
        "batch_size": 1,
        "cum_seq_lens_q": torch.tensor([0, 33], dtype=torch.int32).to(options["query"].device),
        "seq_lens": options["seq_lens"].flatten()[1:2],
    }
    if call.function == "prefill_ragged":
        first, last = options["cum_seq_lens_kv"].tolist()[1:3]
        one["key"], one["value"] = (options[name][first:last] for name in ("key", "value"))
        one["cum_seq_lens_kv"] = one["cum_seq_lens_q"] * 0
        one["cum_seq_lens_kv"][1] = last - first
    else:
        one["block_tables"] = options["block_tables"][1:2]
    q = call.arrays[0][pick]
    alone = ask(Call(case, call.function, (q,)), options | one)
    assert_same_bits(alone.out, together.out[pick], case)
    assert_same_bits(alone.lse, together.lse[pick], case)


def test_equal_logits_of_any_head_dim_average_the_values(device: Any) -> None:
    """FlashInfer #1193, #760: one answer for every kernel, here the mean of V."""
    case = DecodeCase(lengths=((1, 1000),), scale=1.0)
    values = case.rng.standard_normal((1000, 2, 64)) + 3
    call = call_of(case, [(np.ones((1, 8, 64)), np.ones((1000, 2, 64)), values)])
    outcome = check(device, call)
    means = np.repeat(values.mean(axis=0), 4, axis=0)
    np.testing.assert_allclose(outcome.out[0].astype(np.float64), means, rtol=0.01)
