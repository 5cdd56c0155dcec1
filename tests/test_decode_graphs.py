"""Decode in CUDA graphs and on several streams: always the bits of one eager call alone.

Requests cut into splits meet in a workspace, which is what calls can take from each other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import Call
from compare import NAN_BITS, assert_same_bits
from decode_cases import DecodeCase, decode_call, problem_of_decode
from test_graphs_streams import Captured, words

from cuattn import _heuristics, _workspace

pytestmark = pytest.mark.gpu

ROUNDS = 30


def ones(*kv_lens: int) -> tuple[tuple[int, int], ...]:
    return tuple((1, kv_len) for kv_len in kv_lens)


FLAT = DecodeCase(lengths=ones(1900, 333, 0, 512, 64))
TOKENS = DecodeCase(lengths=((4, 2000), (4, 203)), form="tokens")
RAGGED = DecodeCase(lengths=((1, 1500), (4, 203), (0, 5), (9, 100)), form="ragged")
# Of about the same size, so that in one workspace each would overwrite the other's parts.
RIVALS = (
    DecodeCase(lengths=ones(20000, 9000)),
    DecodeCase(lengths=ones(21000, 8000), window_left=30000),
)


def everywhere(case: DecodeCase) -> Call:
    """The case's call on a cache of which every page may be used."""
    call = decode_call(case)
    q, cache, tables, *others = call.arrays
    cache = case.rng.standard_normal(cache.shape).astype(cache.dtype)
    return replace(call, arrays=(q, cache, tables, *others))


def changed(call: Call, seq_lens: tuple[int, ...], turn: int) -> Call:
    """The call with other lengths, and other pages of the same cache."""
    q, cache, tables, _ = call.arrays
    order = np.roll(call.case.rng.permutation(len(cache)), turn)
    pages = np.resize(order, tables.shape).astype(np.int32)
    return replace(call, arrays=(q, cache, pages, np.array(seq_lens, np.int32)))


def partials(gpu: Any, call: Call) -> tuple[int, int, int]:
    return _heuristics.decode(problem_of_decode(call), gpu.current()).partials


def owned(call: Call, rows: Any) -> Any:
    """Rows of requests: of a ragged call there may be others behind."""
    return rows[: sum(q for q, _ in call.case.lengths)] if call.case.form == "ragged" else rows


def assert_same_rows(call: Call, out: Any, lse: Any, wanted: Any) -> None:
    assert_same_bits(owned(call, out), owned(call, wanted.out), call.case)
    assert_same_bits(owned(call, lse), owned(call, wanted.lse), call.case)


# --- graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [FLAT, TOKENS, RAGGED], ids=str)
def test_a_captured_call_gives_the_bits_of_eager_ones(gpu: Any, case: DecodeCase) -> None:
    call = decode_call(case)
    wanted = gpu.check(call)
    captured = Captured(gpu, call)
    for _ in range(3):
        assert_same_rows(call, *captured.replay(), wanted)


@pytest.mark.parametrize("batch_invariant", [None, True])
def test_lengths_and_tables_may_change_between_replays(
    gpu: Any, batch_invariant: bool | None
) -> None:
    """One request long, then all, then none: splits are worked out anew by every replay."""
    call = everywhere(FLAT)
    captured = Captured(gpu, call, batch_invariant=batch_invariant)
    for turn, seq_lens in enumerate(
        ((333, 5, 1900, 1, 0), (1900,) * 5, (0,) * 5, (1, 1, 1, 1, 1900), (17, 900, 333, 64, 65))
    ):
        other = changed(call, seq_lens, turn)
        for target, source in zip(captured.arrays[2:], other.arrays[2:], strict=True):
            target.set(source)
        wanted = gpu.check(other, batch_invariant=batch_invariant)
        assert_same_rows(call, *captured.replay(), wanted)


def test_numbers_of_tokens_may_change_between_replays(gpu: Any) -> None:
    call = decode_call(RAGGED)
    captured = Captured(gpu, call)
    for q_lens in ((1, 4, 0, 9), (4, 1, 5, 4), (0, 0, 1, 2)):
        ends = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
        options = {**call.options, "cu_seqlens_q": ends}
        captured.options["cu_seqlens_q"].set(ends)
        wanted = gpu.run(replace(call, options=options))
        out, lse = captured.replay()
        tokens = sum(q_lens)
        assert_same_bits(out[:tokens], wanted.out[:tokens], q_lens)
        assert_same_bits(lse[:tokens], wanted.lse[:tokens], q_lens)
        assert (words(lse[tokens:]) == NAN_BITS[4]).all(), "rows of no request were written"


def test_thresholds_may_change_between_replays(gpu: Any) -> None:
    """Results and counts are those of an eager call with the same live array."""
    import cuattn

    case = DecodeCase(lengths=ones(1500, 900), data="structured", scale=0.25)
    call = decode_call(case)
    live = gpu.to_device(np.zeros((2, 8), np.float32))
    stats, eager = cuattn.SkipStats(), cuattn.SkipStats()
    captured = Captured(gpu, call, skip_softmax=cuattn.SkipSoftmax(threshold=live, stats=stats))
    seen = []
    for level in (0.0, 0.003, 0.9):
        table = np.full((2, 8), level, np.float32)
        table[1, 5] = 0.0
        live.set(table)
        eager.reset()
        wanted = gpu.run(call, skip_softmax=cuattn.SkipSoftmax(threshold=live, stats=eager))
        stats.reset()
        assert_same_rows(call, *captured.replay(), wanted)
        for name, plane in stats.per_head().items():
            np.testing.assert_array_equal(plane, eager.per_head()[name], name)
        seen.append(stats.skipped)
    assert 0 == seen[0] < seen[1] < seen[2] < stats.visited


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the workspaces of the calls of a test begin, in order; none is left of other tests."""
    seen: list[int] = []
    real = _workspace.partials

    def partials(*arguments: Any) -> tuple[int, int, int]:
        pointers = real(*arguments)
        seen.append(pointers[1])
        return pointers

    monkeypatch.setattr(_workspace, "_arenas", {})
    monkeypatch.setattr(_workspace, "partials", partials)
    return seen


def test_graphs_of_one_stream_run_at_once(gpu: Any, places: list[int]) -> None:
    """Captured one after the other, replayed on two streams, with eager calls on the first."""
    import cupy

    import cuattn

    calls = [decode_call(case) for case in RIVALS]
    assert all(any(partials(gpu, call)) for call in calls)
    wanted = [gpu.run(call) for call in calls]
    home, away = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    del places[:]
    graphs = [Captured(gpu, call, on=home) for call in calls]
    assert len(places) == 4 and places[0] == places[2], "eager calls share their stream's memory"
    assert len({*places}) == 3, "graphs share memory with each other or with eager calls"
    arrays, options = gpu.arguments(calls[0])
    cupy.cuda.Device().synchronize()
    eager = []
    for _ in range(ROUNDS):
        for graph, stream in zip(graphs, (home, away), strict=True):
            with stream:
                graph.graph.launch()
        with home:
            eager.append(cuattn.decode(*arrays, **options, return_lse=True))
    cupy.cuda.Device().synchronize()
    for call, graph, right in zip(calls, graphs, wanted, strict=True):
        assert_same_rows(call, gpu.to_host(graph.out), gpu.to_host(graph.lse), right)
    for out, lse in eager:
        assert_same_rows(calls[0], gpu.to_host(out), gpu.to_host(lse), wanted[0])


def test_calls_of_one_graph_follow_each_other(gpu: Any) -> None:
    """Two layers in one capture share its memory, the second after the first."""
    import cupy

    import cuattn

    calls = [decode_call(case) for case in RIVALS]
    wanted = [gpu.run(call) for call in calls]
    given = [gpu.arguments(call) for call in calls]
    rooms = [
        (gpu.guarded(right.out.shape, right.out.dtype), gpu.guarded(right.lse.shape, np.float32))
        for right in wanted
    ]

    def layers() -> None:
        for (arrays, options), (out, lse) in zip(given, rooms, strict=True):
            cuattn.decode(*arrays, **options, out=out.array, lse=lse.array)

    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        layers()
        stream.begin_capture()
        layers()
        graph = stream.end_capture()
        for _ in range(3):
            graph.launch()
    stream.synchronize()
    for call, (out, lse), right in zip(calls, rooms, wanted, strict=True):
        assert_same_rows(call, gpu.to_host(out.array), gpu.to_host(lse.array), right)
        out.check(call.case)
        lse.check(call.case)


# --- streams --------------------------------------------------------------------------------------


def test_eager_calls_run_on_several_streams_at_once(gpu: Any, places: list[int]) -> None:
    import cupy

    import cuattn

    calls = [decode_call(case) for case in (*RIVALS, RIVALS[0])]
    wanted = [gpu.run(call) for call in calls]
    given = [gpu.arguments(call) for call in calls]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in calls]
    cupy.cuda.Device().synchronize()
    del places[:]
    results: list[list[Any]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for found, stream, (arrays, options) in zip(results, streams, given, strict=True):
            with stream:
                found.append(cuattn.decode(*arrays, **options, return_lse=True))
    cupy.cuda.Device().synchronize()
    assert len({*places}) == len(calls), "each stream has a workspace, and keeps it"
    for call, found, right in zip(calls, results, wanted, strict=True):
        for out, lse in found:
            assert_same_rows(call, gpu.to_host(out), gpu.to_host(lse), right)


def test_a_workspace_may_grow_behind_calls_that_still_use_it(gpu: Any, places: list[int]) -> None:
    """Small, large and small again on one stream, none of them waited for."""
    import cupy

    import cuattn

    small = decode_call(DecodeCase(lengths=ones(3000)))
    many = DecodeCase(lengths=ones(*[700] * 12), q_heads=8, kv_heads=8, d_qk=256, d_v=256)
    calls = [small, decode_call(many)]
    sizes = [sum(partials(gpu, call)[:2]) for call in calls]
    assert 0 < sizes[0] <= _workspace._GRANULE < sizes[1]
    wanted = [gpu.check(small), gpu.run(calls[1])]
    given = [gpu.arguments(call) for call in calls]
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    del places[:]
    order = (0, 1, 0, 0, 1, 0)
    with stream:
        results = [
            cuattn.decode(*given[which][0], **given[which][1], return_lse=True) for which in order
        ]
    stream.synchronize()
    assert len({*places}) == 2, "it grows once"
    for which, (out, lse) in zip(order, results, strict=True):
        assert_same_rows(calls[which], gpu.to_host(out), gpu.to_host(lse), wanted[which])


# --- torch ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch() -> Any:
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("torch has no CUDA device")
    return module


def in_torch(torch: Any, gpu: Any, call: Call) -> list[Any]:
    """The call's arrays as torch tensors with memory of their own."""
    return [torch.from_dlpack(x).clone() for x in gpu.arguments(call)[0]]


def test_torch_captures_a_call(gpu: Any, torch: Any) -> None:
    """Replayed with other lengths and tables, copied by torch."""
    import cupy

    import cuattn

    call = everywhere(FLAT)
    tensors = in_torch(torch, gpu, call)
    out = torch.zeros((*call.arrays[0].shape[:-1], FLAT.d_v), dtype=tensors[0].dtype, device="cuda")
    cuattn.decode(*tensors, **call.options, out=out)
    torch.cuda.synchronize()
    out.zero_()
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    cupy.get_default_memory_pool().free_all_blocks()  # nothing in stock for the workspace
    with cupy.cuda.Stream.from_external(side), torch.cuda.graph(graph, stream=side):
        cuattn.decode(*tensors, **call.options, out=out)
    torch.cuda.synchronize()
    assert not out.any(), "the capture must not run anything"
    for turn, seq_lens in enumerate(((1900, 333, 0, 512, 64), (5, 1900, 1900, 0, 1))):
        other = changed(call, seq_lens, turn)
        for target, source in zip(tensors[2:], other.arrays[2:], strict=True):
            target.copy_(torch.from_numpy(source))
        graph.replay()
        torch.cuda.synchronize()
        seen = gpu.to_host(cupy.from_dlpack(out))
        assert_same_bits(seen, gpu.run(other).out, seq_lens)


def test_torch_captures_a_call_whose_results_are_new(gpu: Any, torch: Any) -> None:
    """CuPy has nothing in stock for them, and torch's capture forbids to allocate."""
    import cupy

    import cuattn

    call = everywhere(FLAT)
    tensors = in_torch(torch, gpu, call)
    skip = cuattn.SkipSoftmax(max_dropped_mass=0.05, certificate=True)
    options = {**call.options, "return_lse": True, "skip_softmax": skip}
    wanted = cuattn.decode(*tensors, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    cupy.get_default_memory_pool().free_all_blocks()
    with cupy.cuda.Stream.from_external(side), torch.cuda.graph(graph, stream=side):
        results = cuattn.decode(*tensors, **options)
    for x in results:
        words(x).fill(0)
    graph.replay()
    torch.cuda.synchronize()
    for seen, x in zip(results, wanted, strict=True):
        assert_same_bits(gpu.to_host(seen), gpu.to_host(x), FLAT)


def test_decode_runs_on_the_current_stream_of_torch(gpu: Any, torch: Any) -> None:
    """Inputs made late on a side stream are waited for, and may be overwritten after the call."""
    import cupy

    import cuattn

    call = everywhere(FLAT)
    wanted = gpu.run(call)
    real = in_torch(torch, gpu, call)
    tensors = [torch.zeros_like(x) for x in real]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    current = cupy.cuda.Stream(non_blocking=True)
    with torch.cuda.stream(side), current:
        torch.cuda._sleep(50_000_000)  # some 30 ms
        for x, y in zip(tensors, real, strict=True):
            x.copy_(y)
        out, lse = cuattn.decode(*tensors, **call.options, return_lse=True)
        for x in tensors:
            x.zero_()
        copies = [words(x).copy().view(x.dtype) for x in (out, lse)]
    current.synchronize()
    assert_same_rows(call, *(gpu.to_host(x) for x in copies), wanted)
