"""cuattn's PyTorch operators on a GPU: streams, CUDA graphs, inductor."""

from __future__ import annotations

from typing import Any

import pytest

import cuattn

torch = pytest.importorskip("torch", reason="the operators are PyTorch's, which is not installed")

from cuattn.interop import torch as attention  # noqa: E402

pytestmark = pytest.mark.gpu


class OnGpu:
    """Prefill and decode on fixed tensors, and new values for them."""

    def __init__(self) -> None:
        random = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> Any:
            return torch.randn(shape, device="cuda", generator=random).bfloat16()

        self.normal = normal
        self.q, self.k, self.v = normal(2, 200, 8, 64), normal(2, 300, 2, 64), normal(2, 300, 2, 64)
        self.cache = normal(8, 2, 2, 64, 64)
        self.token = normal(2, 8, 64)
        self.tables = torch.arange(8, dtype=torch.int32, device="cuda").view(2, 4)
        self.lengths = torch.tensor([250, 77], dtype=torch.int32, device="cuda")
        self.stats = attention.SkipStats()
        self.skip = cuattn.SkipSoftmax(threshold=0.2, stats=self.stats)

    def run(self, q: Any, token: Any) -> tuple[Any, ...]:
        out, lse = attention.prefill(
            q, self.k, self.v, causal=True, skip_softmax=self.skip, return_lse=True
        )
        exact = cuattn.SkipSoftmax(max_dropped_mass=0.05, certificate=True)
        step, lost = attention.decode(
            token, self.cache, self.tables, self.lengths, skip_softmax=exact
        )
        return out + 1, lse, step, lost


def test_torch_graphs_replay_with_new_values() -> None:
    calls = OnGpu()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls.run(calls.q, calls.token)  # compiled and loaded before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = calls.run(calls.q, calls.token)
    for _ in range(2):
        calls.q.copy_(calls.normal(2, 200, 8, 64))
        calls.token.copy_(calls.normal(2, 8, 64))
        calls.lengths.sub_(3)
        calls.stats.reset()
        graph.replay()
        seen, counted = [x.clone() for x in results], calls.stats.per_head()
        calls.stats.reset()
        for x, y in zip(seen, calls.run(calls.q, calls.token), strict=True):
            assert torch.equal(x, y)
        assert (calls.stats.per_head()["visited"] == counted["visited"]).all()
        assert counted["visited"].any()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_compiles_it(mode: str) -> None:
    pytest.importorskip("triton", reason="inductor wants triton, which is not installed")
    calls = OnGpu()
    wanted = calls.run(calls.q, calls.token)  # makes the counters
    torch.compiler.reset()
    compiled = torch.compile(calls.run, fullgraph=True, mode=mode)
    for turn in range(4):  # warm-up, capture, replays
        torch.compiler.cudagraph_mark_step_begin()
        for x, y in zip(compiled(calls.q, calls.token), wanted, strict=True):
            assert torch.equal(x, y), turn
        calls.q, calls.token = calls.normal(2, 200, 8, 64), calls.normal(2, 8, 64)
        wanted = calls.run(calls.q, calls.token)
    assert calls.stats.visited > 0


def test_launches_on_the_current_stream_of_torch() -> None:
    """A result is ordered behind what made its inputs, and before what follows, on one stream."""
    calls = OnGpu()
    wanted = calls.run(calls.q, calls.token)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    late = torch.zeros_like(calls.q)
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # clocks: some 30 ms
        late.copy_(calls.q)
        results = calls.run(late, calls.token)
        late.zero_()
        copies = [x.clone() for x in results]
    side.synchronize()
    for x, y in zip(copies, wanted, strict=True):
        assert torch.equal(x, y)
