"""Sparse and skipping MLA decode by FlashInfer's names: what reaches ours, and the results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

import torch
from cases import Call
from flashinfer_calls import arguments, ask, check, place_of
from mla_cases import MlaCase, mla_call

import cuattn
from cuattn.interop.flashinfer import mla

TOP_K = 64
CASES = [
    MlaCase(lengths=((2, 65), (2, 130)), form="tokens"),
    MlaCase(lengths=((4, 3), (4, 40)), form="tokens", sinks=True),  # fewer keys than indices
    MlaCase(lengths=((1, 64), (4, 130), (0, 5), (2, 65)), form="ragged"),
]


def sparse_call(case: MlaCase) -> Call:
    """The case's call on TOP_K keys of each request, in random order."""
    call = mla_call(case)
    q, _, tables, _ = call.arrays
    indices = np.full((*q.shape[:-2], TOP_K), 2147480000, np.int32)
    by_token = indices.reshape(-1, TOP_K)
    token = 0
    for request, (q_len, kv_len) in enumerate(case.lengths):
        for i in range(q_len):
            keys = call.case.rng.permutation(max(kv_len - q_len + i + 1, 0))[:TOP_K]
            pages = tables[request, keys // case.page_size]
            by_token[token, : len(keys)] = pages * case.page_size + keys % case.page_size
            token += 1
    return replace(call, options={**call.options, "sparse_indices": indices})


def recorded(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, Any]:
    """What `cuattn.mla_decode` would be called with."""
    seen: list[Any] = []
    monkeypatch.setattr(mla, "mla_decode", lambda *arrays, **more: seen.append((arrays, more)))
    mla.trtllm_batch_decode_with_kv_cache_mla(**options)
    (call,) = seen
    return call


def test_indices_reach_ours_in_place_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    options = arguments(sparse_call(CASES[0]), "cpu")
    arrays, more = recorded(monkeypatch, **options)
    assert more["sparse_indices"] is options["block_tables"]
    assert arrays[2] is None and arrays[3] is options["seq_lens"]
    assert "skip_softmax" not in more


def test_a_factor_reaches_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    options = arguments(mla_call(CASES[0]), "cpu")
    _, more = recorded(monkeypatch, **options, skip_softmax_threshold_scale_factor=100)
    assert more["skip_softmax"] == cuattn.SkipSoftmax(threshold_scale_factor=100.0)
    assert "sparse_indices" not in more
    for factor in (None, 0):
        _, more = recorded(monkeypatch, **options, skip_softmax_threshold_scale_factor=factor)
        assert "skip_softmax" not in more


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(device: Any, case: MlaCase) -> None:
    call = sparse_call(case)
    outcome = check(device, call)
    rows = np.isfinite(outcome.lse)
    nowhere = arguments(call, place_of(device))
    nowhere["block_tables"] = torch.full_like(nowhere["block_tables"], -1)
    outcome = ask(call, nowhere)
    assert rows.any() and not outcome.out[rows].any() and np.isneginf(outcome.lse[rows]).all()
