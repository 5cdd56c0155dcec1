"""Order on streams, capture in graphs, and arrays of other frameworks, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import USUAL, Call, Case, batched, numpy_skip, paged, ragged
from compare import NAN_BITS, assert_close, assert_same_bits, bits

pytestmark = pytest.mark.gpu

BUILDERS = [batched, ragged, paged]
SPIN = """
extern "C" __global__ void spin(long long clocks) {
  const long long start = clock64();
  while (clock64() - start < clocks) {}
}
"""


@pytest.fixture(scope="module")
def busy(gpu: Any) -> Callable[[Any], None]:
    """Keeps a stream busy for some 30 ms, so that what does not wait for it shows."""
    import cupy

    spin = cupy.RawKernel(SPIN, "spin")

    def start(stream: Any) -> None:
        with stream:
            spin((1,), (1,), (np.int64(50_000_000),))

    start(cupy.cuda.Stream.null)
    cupy.cuda.Device().synchronize()
    return start


def late(gpu: Any, call: Call) -> tuple[list[Any], list[Any]]:
    """Inputs on the device with zeros in place of q, k and v, and the bits of the real ones."""
    arrays, _ = gpu.arguments(call)
    real = [words(x).copy() for x in arrays[:3]]
    for x in arrays[:3]:
        words(x).fill(0)
    return list(arrays), real


def words(array: Any) -> Any:
    """An array's bits as integers, which CuPy can copy whatever the dtype."""
    return array.view(f"u{array.dtype.itemsize}")


def test_everything_runs_on_the_current_stream(gpu: Any, busy: Any) -> None:
    import cupy

    import cuattn

    call = batched(USUAL)
    wanted = gpu.run(call)
    arrays, real = late(gpu, call)
    cupy.cuda.Device().synchronize()
    side = cupy.cuda.Stream(non_blocking=True)
    busy(side)
    with side:
        for x, y in zip(arrays, real, strict=True):
            words(x)[...] = y
        out = cuattn.prefill(*arrays, **call.options)
        for x in arrays:
            words(x).fill(0)  # must come after the kernel has read
    side.synchronize()
    assert_same_bits(gpu.to_host(out), wanted.out, call.case)


@pytest.mark.parametrize("kind", ["int", "stream", "protocol"])
def test_the_stream_argument_chooses_the_stream(gpu: Any, busy: Any, kind: str) -> None:
    """Inputs are made on that stream; the result can be used on CuPy's current one at once."""
    import cupy

    import cuattn

    class Protocol:
        def __init__(self, handle: int) -> None:
            self.handle = handle

        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, self.handle

    call = batched(USUAL)
    wanted = gpu.run(call)
    arrays, real = late(gpu, call)
    side, current = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    given = {"int": side.ptr, "stream": side, "protocol": Protocol(side.ptr)}[kind]
    cupy.cuda.Device().synchronize()
    busy(side)
    with side:
        for x, y in zip(arrays, real, strict=True):
            words(x)[...] = y
    with current:
        out = cuattn.prefill(*arrays, **call.options, stream=given)
        copy = words(out).copy().view(out.dtype)
    current.synchronize()
    assert_same_bits(gpu.to_host(copy), wanted.out, call.case)


def test_the_stream_argument_waits_for_inputs_of_the_current_stream(gpu: Any, busy: Any) -> None:
    import cupy

    import cuattn

    call = batched(USUAL)
    wanted = gpu.run(call)
    arrays, real = late(gpu, call)
    side, current = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    cupy.cuda.Device().synchronize()
    busy(current)
    with current:
        for x, y in zip(arrays, real, strict=True):
            words(x)[...] = y
        out = cuattn.prefill(*arrays, **call.options, stream=side)
        copy = words(out).copy().view(out.dtype)
    current.synchronize()
    assert_same_bits(gpu.to_host(copy), wanted.out, call.case)


@pytest.mark.parametrize("wrong", ["main", -3, 1.5])
def test_what_is_no_stream_is_refused(gpu: Any, wrong: Any) -> None:
    import cuattn

    call = batched(USUAL)
    arrays, options = gpu.arguments(call)
    with pytest.raises((TypeError, ValueError), match="stream"):
        cuattn.prefill(*arrays, **options, stream=wrong)


class Captured:
    """A call captured on a stream, with its results, ready to be replayed."""

    def __init__(self, gpu: Any, call: Call, on: Any = None, **more: Any) -> None:
        import cupy

        import cuattn

        self.gpu = gpu
        self.arrays, options = gpu.arguments(call)
        self.options = {**options, **more}
        shape = call.arrays[0].shape[:-1]
        self.out = gpu.guarded((*shape, call.case.d_v), call.case.result_dtype).array
        self.lse = gpu.guarded(shape, np.float32).array
        function = getattr(cuattn, call.function)

        def run() -> None:
            function(*self.arrays, **self.options, out=self.out, lse=self.lse)

        self.stream = on or cupy.cuda.Stream(non_blocking=True)
        with self.stream:
            run()  # compiled and loaded before the capture
            self.stream.begin_capture()
            run()
            self.graph = self.stream.end_capture()
        self.stream.synchronize()

    def replay(self) -> tuple[Any, Any]:
        with self.stream:
            for x in (self.out, self.lse):
                words(x).fill(NAN_BITS[x.dtype.itemsize])
            self.graph.launch()
        self.stream.synchronize()
        return self.gpu.to_host(self.out), self.gpu.to_host(self.lse)


def compare(call: Call, results: tuple[Any, Any], **replay: Any) -> None:
    """Results of a replay against the reference, in the rows that belong to requests."""
    expected, plain = call.reference(**replay), call.plain(**replay)
    owned = np.isfinite(expected.out).all(axis=(-1, -2))
    for name, seen in zip(("out", "lse"), results, strict=True):
        right, rough = getattr(expected, name), getattr(plain, name)
        assert_close(seen[owned], right[owned], rough[owned], call.case, name)
        rest = bits(seen[~owned])
        assert (rest == NAN_BITS[seen.dtype.itemsize]).all(), "rows of no request were written"


@pytest.mark.parametrize("build", BUILDERS, ids=lambda f: f.__name__)
def test_a_captured_call_replays(gpu: Any, build: Any) -> None:
    call = build(USUAL)
    captured = Captured(gpu, call)
    for _ in range(2):
        compare(call, captured.replay())


def test_new_numbers_are_seen_by_a_replay(gpu: Any) -> None:
    call = batched(replace(USUAL, device_scalars=True, scale=0.2, out_scale=1.0, memory="packed"))
    captured = Captured(gpu, call)
    compare(call, captured.replay())
    other = replace(
        call,
        arrays=tuple(x[::-1].copy() for x in call.arrays),
        options={**call.options, "scale": np.float32(0.05), "out_scale": np.float32(2.0)},
    )
    for target, source in zip(captured.arrays, other.arrays, strict=True):
        words(target)[...] = words(gpu.to_device(source))
    captured.options["scale"].fill(0.05)
    captured.options["out_scale"].fill(2.0)
    compare(other, captured.replay())


def test_ragged_lengths_may_change_between_replays(gpu: Any) -> None:
    call = ragged(Case(lengths=((60, 100), (53, 103), (40, 40))))
    captured = Captured(gpu, call)
    compare(call, captured.replay())
    for q_lens, kv_lens in (
        ((1, 1, 1), (200, 1, 42)),
        ((0, 153, 0), (0, 243, 0)),
        ((20, 0, 100), (3, 100, 140)),
        ((0, 0, 0), (100, 100, 43)),
    ):
        cu = [np.concatenate([[0], np.cumsum(n)]).astype(np.int32) for n in (q_lens, kv_lens)]
        for target, source in zip(captured.arrays[3:], cu, strict=True):
            target.set(source)
        if any(q_lens):
            compare(replace(call, arrays=(*call.arrays[:3], *cu)), captured.replay())
        else:
            assert (bits(captured.replay()[1]) == NAN_BITS[4]).all()


def test_lengths_and_tables_may_change_between_replays(gpu: Any) -> None:
    case = Case(lengths=((20, 200), (64, 333), (3, 90)))
    call = paged(case)
    q, cache, tables, *lengths = call.arrays
    cache = case.rng.standard_normal(cache.shape).astype(cache.dtype)  # every page can be used
    call = replace(call, arrays=(q, cache, tables, *lengths))
    captured = Captured(gpu, call)
    compare(call, captured.replay())
    order = case.rng.permutation(len(cache))
    for seq_lens, q_lens in (((333, 20, 0), (40, 20, 10)), ((5, 1, 340), (5, 1, 80))):
        table = np.resize(order, tables.shape).astype(np.int32)
        cu_q = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
        changed = (table, np.array(seq_lens, np.int32), cu_q)
        for target, source in zip(captured.arrays[2:], changed, strict=True):
            target.set(source)
        compare(replace(call, arrays=(q, cache, *changed)), captured.replay())
        order = order[::-1]


def test_thresholds_may_change_between_replays(gpu: Any) -> None:
    """Counts and results follow the live array; the counters add up over replays."""
    import cuattn

    call = batched(Case(lengths=((200, 500),) * 2, data="structured", scale=0.25))
    live = gpu.to_device(np.full((2, 4), 0.1, np.float32))
    stats = cuattn.SkipStats()
    captured = Captured(gpu, call, skip_softmax=cuattn.SkipSoftmax(threshold=live, stats=stats))
    geometry = gpu.geometry(call)
    votes = call.votes(geometry).statistics
    seen = []
    for share in (0.0, 0.2, 0.5):
        table = np.zeros((2, 4), np.float32)
        if share:
            finite = np.sort(votes[np.isfinite(votes) & (votes < -0.1)])
            around = np.arange(int(share * len(finite)), int((share + 0.2) * len(finite)))
            widest = around[np.argmax(np.diff(finite)[around])]
            table[:] = np.exp((finite[widest] + finite[widest + 1]) / 2)
            table[1, 2] = 0.0
        live.set(table)
        before = {name: array.copy() for name, array in stats.per_head().items()}
        skip = numpy_skip(threshold=table)
        compare(call, captured.replay(), geometry=geometry, skip_softmax=skip)
        expected = call.reference(geometry=geometry, skip_softmax=skip)
        for name, array in stats.per_head().items():
            np.testing.assert_array_equal(array - before[name], getattr(expected, name), name)
        seen.append(int(expected.skipped.sum()))
    assert 0 == seen[0] < seen[1] < seen[2] < expected.visited.sum()


def test_counters_may_be_reset_between_replays(gpu: Any) -> None:
    """A graph keeps the counters' address: a reset must not take it away."""
    import cuattn

    call = batched(Case(lengths=((200, 500),) * 2, data="structured", scale=0.25))
    stats = cuattn.SkipStats()
    captured = Captured(gpu, call, skip_softmax=cuattn.SkipSoftmax(threshold=0.3, stats=stats))
    stats.reset()
    captured.replay()
    once = (stats.visited, stats.skipped)
    captured.replay()
    assert (stats.visited, stats.skipped) == (2 * once[0], 2 * once[1])
    stats.reset()
    captured.replay()
    assert (stats.visited, stats.skipped) == once
    assert 0 < once[1] < once[0]


# --- other frameworks ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch() -> Any:
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("torch has no CUDA device")
    return module


def in_torch(torch: Any, gpu: Any, call: Call) -> list[Any]:
    """q, k, v and index arrays as torch tensors with memory of their own."""
    return [torch.from_dlpack(x).clone() for x in gpu.arguments(call)[0]]


@pytest.mark.parametrize("build", BUILDERS, ids=lambda f: f.__name__)
def test_torch_tensors_give_the_same_bits(gpu: Any, torch: Any, build: Any) -> None:
    import cupy

    import cuattn

    call = build(USUAL)
    wanted = gpu.run(call)
    torch.cuda.synchronize()
    tensors = in_torch(torch, gpu, call)
    out = getattr(cuattn, call.function)(*tensors, **call.options)
    assert isinstance(out, cupy.ndarray)
    room = torch.empty(out.shape, dtype=tensors[0].dtype, device="cuda")
    assert getattr(cuattn, call.function)(*tensors, **call.options, out=room) is room
    tokens = sum(q for q, _ in call.case.lengths)
    for result in (out, cupy.from_dlpack(room)):
        flat = gpu.to_host(result).reshape(-1, 4, 64)[:tokens]
        assert_same_bits(flat, wanted.out.reshape(-1, 4, 64)[:tokens], call.case)


def test_torch_inputs_made_on_a_side_stream_are_waited_for(gpu: Any, torch: Any, busy: Any) -> None:
    """The launch goes to torch's current stream; the result is ordered on CuPy's."""
    import cupy

    import cuattn

    call = batched(USUAL)
    wanted = gpu.run(call)
    real = in_torch(torch, gpu, call)
    tensors = [torch.zeros_like(x) for x in real]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    current = cupy.cuda.Stream(non_blocking=True)
    with torch.cuda.stream(side), current:
        busy(cupy.cuda.Stream.from_external(side))
        for x, y in zip(tensors, real, strict=True):
            x.copy_(y)
        out = cuattn.prefill(*tensors, **call.options)
        for x in tensors:
            x.zero_()
        copy = words(out).copy().view(out.dtype)
    current.synchronize()
    assert_same_bits(gpu.to_host(copy), wanted.out, call.case)


def test_torch_captures_a_call(gpu: Any, torch: Any) -> None:
    import cupy

    import cuattn

    call = batched(replace(USUAL, memory="packed"))
    wanted = gpu.run(call)
    tensors = in_torch(torch, gpu, call)
    out = torch.zeros(wanted.out.shape, dtype=tensors[0].dtype, device="cuda")
    cuattn.prefill(*tensors, **call.options, out=out)
    torch.cuda.synchronize()
    out.zero_()
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with cupy.cuda.Stream.from_external(side), torch.cuda.graph(graph, stream=side):
        cuattn.prefill(*tensors, **call.options, out=out)
    torch.cuda.synchronize()
    assert not out.any(), "the capture must not run anything"
    for sign in (1, -1):
        tensors[2].mul_(sign)
        graph.replay()
        torch.cuda.synchronize()
        seen = gpu.to_host(cupy.from_dlpack(out))
        assert_same_bits(seen, (sign * wanted.out).astype(wanted.out.dtype), call.case)


def test_jax_arrays_give_the_same_bits(gpu: Any) -> None:
    import cuattn

    jax = pytest.importorskip("jax")
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"JAX has no CUDA device: {error}")
    call = batched(replace(USUAL, memory="packed"))
    wanted = gpu.run(call)
    arrays = [jax.device_put(x, device) for x in call.arrays]
    out = cuattn.prefill(*arrays, **call.options)
    assert_same_bits(gpu.to_host(out), wanted.out, call.case)
    made_late = [(x.astype("float32") * 2).astype(x.dtype) * 0.5 for x in arrays]
    out = cuattn.prefill(*made_late, **call.options)  # not blocked until ready
    del made_late, arrays
    assert_same_bits(gpu.to_host(out), wanted.out, call.case)
