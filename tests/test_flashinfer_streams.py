"""FlashInfer's functions on PyTorch's streams, in its graphs and on other devices."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

import torch
from cases import Call, Case, paged, ragged
from compare import assert_same_bits
from decode_cases import DecodeCase, decode_call
from flashinfer_calls import FUNCTIONS, arguments, array_of, place_of, words
from mla_cases import MlaCase, mla_call

from cuattn.interop import _torch_stream, flashinfer

ONES = ((1, 1900), (1, 333), (1, 512))
CALLS = [
    ragged(Case(lengths=((20, 300), (64, 200)))),
    paged(Case(lengths=((20, 300), (64, 200)))),
    decode_call(DecodeCase(lengths=ONES)),
    decode_call(DecodeCase(lengths=((4, 2000), (4, 203)), form="tokens")),
    mla_call(MlaCase(lengths=ONES)),
]


def name_of(call: Call) -> str:
    return f"{call.function}-{call.case}"


def ready(gpu: Any, call: Call) -> dict[str, Any]:
    """Arguments on the GPU of a call whose kernel is loaded."""
    capability = gpu.current().capability
    if call.function == "mla_decode" and capability != (9, 0):
        pytest.skip(f"the device has compute capability {capability}; (9, 0) is wanted")
    options = arguments(call, place_of(gpu))
    FUNCTIONS[call.function](**options)
    torch.cuda.synchronize()
    return options


def assert_same(call: Call, one: Any, other: Any) -> None:
    """Demand the same bits of two pairs (out, lse), in the rows that belong to requests."""
    torch.cuda.synchronize()
    rows = np.isfinite(call.reference().out).all(axis=(-1, -2))
    for seen, wanted in zip(one, other, strict=True):
        shape = (*call.arrays[0].shape[:-1], -1)
        first, second = (array_of(x).reshape(shape)[rows] for x in (seen, wanted))
        assert_same_bits(first, second, call.case)


# --- without a GPU: what CuPy is told ------------------------------------------------------------


class FakeCupy:
    """CuPy's current stream, for `_torch_stream`."""

    def __init__(self) -> None:
        self.current = 0
        self.entered: list[int] = []
        stream = SimpleNamespace(from_external=self.stream_of)
        self.cuda = SimpleNamespace(Stream=stream, get_current_stream=self.get_current_stream)

    def get_current_stream(self) -> Any:
        return SimpleNamespace(ptr=self.current)

    @contextmanager
    def stream_of(self, owner: Any) -> Any:
        version, handle = owner.__cuda_stream__()
        assert version == 0
        self.entered.append(handle)
        before, self.current = self.current, handle
        yield
        self.current = before


@pytest.mark.parametrize("device", [0, 1])
def test_cupys_current_stream_is_pytorchs_for_the_call(
    monkeypatch: pytest.MonkeyPatch, device: int
) -> None:
    cupy = FakeCupy()
    now = SimpleNamespace(device=0, stream=0)

    @contextmanager
    def on_device(wanted: Any) -> Any:
        before, now.device = now.device, wanted.index
        yield
        now.device = before

    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now.device)
    monkeypatch.setattr(torch.cuda, "device", on_device)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    _torch_stream._stream.cache_clear()
    query: Any = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=device))
    seen = []

    for stream.cuda_stream in (0, 77):
        with _torch_stream.torch_stream(query):
            seen.append((cupy.current, now.device))
    assert seen == [(0, device), (77, device)]
    assert cupy.entered == [77]  # nothing is entered where they agree
    assert (cupy.current, now.device) == (0, 0)
    _torch_stream._stream.cache_clear()


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_a_captured_call_reads_what_is_there_at_each_replay(gpu: Any, call: Call) -> None:
    """FlashInfer #4609, #4703: calls that read lengths on the host cannot be captured."""
    options, function = ready(gpu, call), FUNCTIONS[call.function]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(**options)
    others = [torch.randn_like(options["query"]) for _ in range(8)]  # would take freed memory
    graph.replay()
    assert_same(call, results, function(**options))
    options["query"].mul_(0.5)
    if call.function != "prefill_ragged":
        options["seq_lens"].sub_(3)
    graph.replay()
    assert_same(call, results, function(**options))
    del others


@pytest.mark.parametrize("function", ["prefill_paged", "decode"])
def test_a_captured_run_follows_later_plans(gpu: Any, function: str) -> None:
    from test_flashinfer_wrappers import call_of, lists_of, plan

    place = place_of(gpu)
    kind, lengths = DecodeCase, (((1, 30), (1, 203)), ((1, 250), (1, 70)))
    if function == "prefill_paged":
        kind, lengths = Case, (((20, 30), (5, 203)), ((3, 250), (22, 70)))
    cases = [kind(lengths=each, memory="packed", q_heads=8) for each in lengths]
    calls = [call_of(case) for case in cases]
    sizes = {"indptr": 3, "indices": 40, "last_page_len": 2}
    buffers = [torch.zeros(size, dtype=torch.int32, device=place) for size in sizes.values()]
    workspace = torch.zeros(8, device=place)
    if function == "prefill_paged":
        ends = torch.zeros(3, dtype=torch.int32, device=place)
        wrapper: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            workspace, "HND", True, ends, *buffers
        )
    else:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", True, True, *buffers
        )
    tokens = sum(n for n, _ in cases[0].lengths)
    given = [arguments(call, place) for call in calls]
    q = given[0]["query"][:tokens].clone()
    cache = torch.zeros(40, 2, 2, 16, 64, device=place)
    cache = cache.to(q.dtype)

    def fill(which: int) -> None:
        q.copy_(given[which]["query"][:tokens])
        source = given[which]["kv_cache"]
        words(cache[: len(source)]).copy_(words(source))
        plan(calls[which], wrapper, lists_of(calls[which]))

    fill(0)
    wrapper.run(q, cache, return_lse=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = wrapper.run(q, cache, return_lse=True)
    for which in (0, 1, 0):
        fill(which)
        graph.replay()
        wanted = wrapper.run(q, cache, return_lse=True)
        torch.cuda.synchronize()
        for seen, expected in zip(results, wanted, strict=True):
            assert_same_bits(array_of(seen), array_of(expected), cases[which])


def test_two_streams_may_share_a_dirty_workspace(gpu: Any) -> None:
    """FlashInfer #1463, #1584: results that depend on what the workspace holds."""
    calls = [decode_call(DecodeCase(lengths=((1, n), (1, 9000)))) for n in (20000, 21000)]
    given = [ready(gpu, call) for call in calls]
    given[1]["workspace_buffer"] = given[0]["workspace_buffer"]
    wanted = [FUNCTIONS["decode"](**options) for options in given]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    results: list[list[Any]] = [[], []]
    for _ in range(10):
        for stream, options, seen in zip(streams, given, results, strict=True):
            with torch.cuda.stream(stream):
                seen.append(FUNCTIONS["decode"](**options))
    for call, seen, right in zip(calls, results, wanted, strict=True):
        for pair in seen:
            assert_same(call, pair, right)


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_a_second_device_works_while_the_first_is_current(gpu: Any, call: Call) -> None:
    """FlashInfer #924: illegal access on cuda:1."""
    options = ready(gpu, call)
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device; two are wanted")
    wanted = FUNCTIONS[call.function](**options)
    far = arguments(call, "cuda:1")
    for stream in (torch.cuda.current_stream(1), torch.cuda.Stream(1)):
        torch.cuda.synchronize(1)
        with torch.cuda.stream(stream), torch.cuda.device(0):
            results = FUNCTIONS[call.function](**far)
            assert torch.cuda.current_device() == 0
        torch.cuda.synchronize(1)
        assert all(x.device.index == 1 for x in results)
        assert_same(call, results, wanted)


@pytest.mark.parametrize("call", CALLS[1:], ids=name_of)
def test_pages_beyond_32_bit_offsets_and_scattered(gpu: Any, huge: Any, call: Call) -> None:
    """FlashInfer #3130, #3136, #3219: pages far apart in a large pool, NaN everywhere else."""
    options = ready(gpu, call)
    wanted = FUNCTIONS[call.function](**options)
    small, tables = options["kv_cache"], options["block_tables"]
    pool = torch.from_dlpack(huge).view(small.dtype)
    pages = len(pool) // small[0].numel()
    pool = pool[: pages * small[0].numel()].view(pages, *small.shape[1:])
    places = np.linspace(7, pages - 1, len(small)).astype(np.int64)
    places = torch.from_numpy(call.case.rng.permutation(places)).to(small.device)
    assert int(places.max()) * small[0].numel() > 2**32
    words(pool)[places] = words(small)
    used = (tables >= 0) & (tables < len(small))
    far = torch.where(used, places[torch.where(used, tables, 0).long()].int(), tables)
    options |= {"kv_cache": pool, "block_tables": far}
    assert_same(call, FUNCTIONS[call.function](**options), wanted)
