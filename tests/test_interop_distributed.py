"""Context parallelism against one rank's result: in threads, over gloo, and on a mesh of JAX's.

Ranks in threads take turns, with NumPy arrays in the emulator or CuPy's on a GPU, behind a
communicator that copies; it stands for NCCL, whose own part wants several GPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from compare import assert_close
from conftest import Executor
from numpy.typing import NDArray

import cuattn
from cuattn import reference
from cuattn.interop import _engines
from cuattn.interop.distributed import ContextParallel, plans_of, visible_keys

Array = NDArray[Any]
ROOT = Path(__file__).resolve().parent.parent
PAGE = 16


class Ranks:
    """So many ranks in threads, of which one runs at a time."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.turn = threading.Lock()
        self.meeting = threading.Barrier(count)
        self.brought: dict[int, Any] = {}

    def run(self, work: Callable[[int, ContextParallel], Any]) -> list[Any]:
        """Return what each rank's work returned, or the exception that it raised."""
        results: list[Any] = [None] * self.count

        def thread(rank: int) -> None:
            with self.turn:
                try:
                    results[rank] = work(rank, ContextParallel(Place(self, rank)))
                except Exception as error:
                    results[rank] = error

        threads = [threading.Thread(target=thread, args=(rank,)) for rank in range(self.count)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        return results


class Place:
    """One rank's communicator."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank, self.size = ranks, rank, ranks.count

    def all_gather(self, mine: Any, everyone: Any, count: int) -> None:
        assert mine.size == count and everyone.size == count * self.size
        self.ranks.brought[self.rank] = mine.copy()
        self._meet()
        for rank, brought in self.ranks.brought.items():
            everyone[rank] = brought.reshape(-1)
        self._meet()

    def _meet(self) -> None:
        self.ranks.turn.release()
        self.ranks.meeting.wait(60)
        self.ranks.turn.acquire()


def normal(*shape: int, seed: int = 0) -> Array:
    rng = np.random.default_rng((seed, *shape))
    return rng.standard_normal(shape).astype(np.float16)


# --- prefill -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefill:
    """Keys of each rank, and options."""

    keys: tuple[int, ...]
    q_len: int = 24
    causal: bool = True
    sinks: bool = False

    def __str__(self) -> str:
        words = f"{'+'.join(map(str, self.keys))}keys-{self.q_len}queries"
        return words + "-causal" * self.causal + "-sinks" * self.sinks


PREFILLS = (
    Prefill((33, 24)),  # the last rank holds the queries' own keys
    Prefill((40, 17), sinks=True),  # the cut is among the queries
    Prefill((0, 30, 0, 5), sinks=True),  # ranks without keys, the first and one between
    Prefill((5, 9), sinks=True),  # fewer keys than queries: some see none
    Prefill((20, 31), causal=False, sinks=True),
)


@pytest.mark.parametrize("case", PREFILLS, ids=str)
def test_prefill_is_that_of_one_rank(case: Prefill, device: Executor) -> None:
    q, k, v = (normal(2, n, h, 64, seed=n) for n, h in ((case.q_len, 4), (99, 2), (98, 2)))
    k, v = k[:, : sum(case.keys)].copy(), v[:, : sum(case.keys)].copy()
    sinks = np.array([2.0, -1.0, 0.0, 30.0], np.float32) if case.sinks else None
    ends = np.cumsum([0, *case.keys])
    given = {"causal": case.causal, "soft_cap": 20.0}

    def work(rank: int, group: ContextParallel) -> Any:
        cut = slice(*ends[rank : rank + 2])
        arrays = [device.to_device(x) for x in (q, k[:, cut].copy(), v[:, cut].copy())]
        own = None if sinks is None else device.to_device(sinks)
        results = group.prefill(*arrays, **given, sinks=own, return_lse=True)
        return [device.to_host(x) for x in results]

    expected = reference.prefill(q, k, v, **given, sinks=sinks)
    plain = reference.prefill(q, k, v, **given, sinks=sinks, arithmetic="float32-plain")
    for out, lse in Ranks(len(case.keys)).run(work):
        assert_close(lse, expected.lse, plain.lse, case, "lse", 4)
        assert_close(out, expected.out, plain.out, case, "out", 4)


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)], ids=["no queries", "no requests"])
def test_nothing_to_do_gives_empty_results(shape: tuple[int, int], device: Executor) -> None:
    batch, q_len = shape
    q, k = (device.to_device(normal(batch, n, 2, 64)) for n in (q_len, 5))

    def work(rank: int, group: ContextParallel) -> Any:
        return group.prefill(q, k, k, causal=True, return_lse=True)

    for out, lse in Ranks(2).run(work):
        assert (out.shape, lse.shape) == ((*shape, 2, 64), (*shape, 2))


def test_plans_say_who_sees_what() -> None:
    """Query by query: what pieces let a query see is what a causal mask lets it see."""
    for q_len, keys in ((7, [4, 9]), (7, [9, 4]), (7, [3, 0, 2, 1]), (5, [0, 0]), (0, [3, 3])):
        total, first = sum(keys), 0
        for rank, plan in enumerate(plans_of(q_len, keys, True, True)):
            seen = [
                max(0, min(keys[rank], i + keys[rank] - (piece.end - piece.begin) + 1))
                if piece.causal
                else keys[rank]
                for piece in plan
                for i in range(piece.end - piece.begin)
            ]
            wanted = [max(0, min(keys[rank], i + total - q_len + 1 - first)) for i in range(q_len)]
            assert seen == wanted, f"{q_len} queries, {keys} keys, rank {rank}"
            first += keys[rank]


# --- decode --------------------------------------------------------------------------------------


def test_visible_keys_counts_blocks_dealt_in_turn() -> None:
    owner = np.arange(100) // 8 % 3
    for length in range(101):
        for rank in range(3):
            assert visible_keys(length, rank, 3, 8) == (owner[:length] == rank).sum()
    lengths = np.array([[0, 99], [25, 8]], np.int32)
    dealt = visible_keys(lengths, 1, 3, 8)
    assert dealt.dtype == np.int32
    assert dealt.tolist() == [[0, 32], [8, 0]]


def shard(whole: Array, tables: Array, rank: int, ranks: int, pages: int) -> tuple[Array, Array]:
    """A rank's own cache and tables; stretches of so many pages are dealt in turn."""
    mine = [i for i in range(tables.shape[1]) if i // pages % ranks == rank]
    own = whole[tables[:, mine].reshape(-1)]
    return own, np.arange(len(own), dtype=np.int32).reshape(len(tables), -1)


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("pages", [1, 4], ids=["pages in turn", "contiguous ranges"])
def test_decode_is_that_of_one_rank(q_len: int, pages: int, device: Executor) -> None:
    lengths = np.array([100, 9, 0, 64], np.int32)  # the second has keys on one rank only
    whole = normal(32, 2, 2, PAGE, 64)
    tables = np.random.default_rng(0).permutation(32).astype(np.int32).reshape(4, 8)
    q = normal(4, q_len, 4, 64)
    q = q[:, 0].copy() if q_len == 1 else q
    sinks = np.array([1.0, -1.0, 0.0, 2.0], np.float32)
    seen = lengths[:, None] - q_len + 1 + np.arange(q_len)
    seen = np.maximum(seen, 0).astype(np.int32).reshape(q.shape[:-2])

    def work(rank: int, group: ContextParallel) -> Any:
        own, own_tables = shard(whole, tables, rank, 2, pages)
        held = visible_keys(seen, rank, 2, pages * PAGE)
        arrays = [device.to_device(x) for x in (q, own, own_tables, held, sinks)]
        results = group.decode(*arrays[:4], sinks=arrays[4], return_lse=True)
        again = group.decode(*arrays[:4], sinks=arrays[4], check=False)
        np.testing.assert_array_equal(device.to_host(again), device.to_host(results[0]))
        return [device.to_host(x) for x in results]

    call = (q, whole, tables, lengths)
    expected = reference.decode(*call, sinks=sinks)
    plain = reference.decode(*call, sinks=sinks, arithmetic="float32-plain")
    for out, lse in Ranks(2).run(work):
        assert_close(lse, expected.lse, plain.lse, "decode", "lse", 4)
        assert_close(out, expected.out, plain.out, "decode", "out", 4)


def test_each_rank_skips_by_its_own_keys_and_keeps_the_promise(device: Executor) -> None:
    whole = normal(128, 2, 2, PAGE, 64)
    tables = np.arange(128, dtype=np.int32)[None]
    whole[63, 0, :, -1] = whole[-1, 0, :, -1]
    q = 3 * whole[-1, 0, :, -1][None]  # looks for the last key of either rank
    bound = 0.05

    def work(rank: int, group: ContextParallel) -> Any:
        own, own_tables = shard(whole, tables, rank, 2, 64)
        arrays = [device.to_device(x) for x in (q, own, own_tables, np.array([1024], np.int32))]
        stats = cuattn.SkipStats()
        skip = cuattn.SkipSoftmax(max_dropped_mass=bound, stats=stats)
        _, lse = group.decode(*arrays, skip_softmax=skip, return_lse=True)
        return device.to_host(lse), stats.skipped, stats.visited

    dense = reference.decode(q, whole, tables, np.array([2048])).lse
    for lse, skipped, visited in Ranks(2).run(work):
        assert 0 < skipped < visited
        lost = 1 - np.exp(lse - dense)
        assert (lost > 1e-4).any() and (lost <= bound).all()


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "words"),
    [
        ({"q": normal(1, 7, 4, 64)}, r"rank 1 has q \[1, 7, 4, 64, 'float16'\]; wanted rank 0's"),
        ({"k": normal(1, 9, 1, 64)}, r"rank 1 has k \[1, 64, 'float16'\]; wanted rank 0's \[2,"),
        ({"causal": True}, "rank 1 has causal True; wanted rank 0's False"),
        ({"scale": 0.5}, "rank 1 has scale 0.5; wanted rank 0's None"),
        ({"k": None}, "rank 1 refused its call: k is None; wanted an array"),
        (
            {"skip_softmax": cuattn.SkipSoftmax(threshold=0.1, certificate=True)},
            "rank 1 refused its call: skip_softmax has certificate=True",
        ),
    ],
)
def test_what_differs_is_an_error_of_all(one: dict[str, Any], words: str) -> None:
    same = {"q": normal(1, 8, 4, 64), "k": normal(1, 9, 2, 64), "v": normal(1, 9, 2, 64)}

    def work(rank: int, group: ContextParallel) -> Any:
        return group.prefill(**{**same, **(one if rank == 1 else {})})

    with cuattn.emulator.enabled() as launches:
        first, second = Ranks(2).run(work)
    assert not launches
    assert isinstance(first, ValueError) and isinstance(second, (ValueError, TypeError))
    with pytest.raises(ValueError, match=words):
        raise first


def test_one_ranks_mistakes_are_refused_before_ranks_meet() -> None:
    class Alone:
        rank, size = 0, 1

        def all_gather(self, mine: Any, everyone: Any, count: int) -> None:
            everyone[...] = mine.reshape(1, -1)

    x, lengths = normal(1, 8, 2, 64), np.array([8], np.int32)
    group = ContextParallel(Alone())
    skip = cuattn.SkipSoftmax(threshold_scale_factor=10.0)
    cache, tables = normal(1, 2, 2, PAGE, 64), np.zeros((1, 1), np.int32)
    with cuattn.emulator.enabled() as launches:
        with pytest.raises(ValueError, match=r"threshold_scale_factor=10.0, .* wanted threshold="):
            group.prefill(x, x, x, skip_softmax=skip)
        with pytest.raises(TypeError, match="causal is 1; wanted True or False"):
            group.prefill(x, x, x, causal=1)
        with pytest.raises(ValueError, match=r"seq_lens has shape \(1,\); wanted q's \(1, 8\)"):
            group.decode(x, cache, tables, lengths)
        with pytest.raises(TypeError, match="check is 0; wanted True or False"):
            group.decode(x[:, 0], cache, tables, lengths, check=0)
        with pytest.raises(TypeError, match="skip_softmax is a float; wanted a SkipSoftmax"):
            group.decode(x[:, 0], cache, tables, lengths, skip_softmax=0.1)
    assert not launches
    with pytest.raises(TypeError, match="group is a int; wanted a process group of torch"):
        ContextParallel(3)
    with pytest.raises(ValueError, match="timeout is 0; wanted seconds above 0, or None"):
        ContextParallel(Alone(), timeout=0)
    with pytest.raises(ValueError, match="timeout is 5 with an axis of a mesh"):
        ContextParallel("ranks", timeout=5)


def test_nccl_is_given_up_when_its_time_is_over() -> None:
    """What stands for a rank that is lost: an event that never comes."""
    aborted = []
    communicator = SimpleNamespace(abort=lambda: aborted.append(True))
    place = SimpleNamespace(rank=0, size=2, all_gather=None, _comm=communicator)
    nccl = _engines.engine_of(place, 0.01)
    assert isinstance(nccl, _engines._Nccl)
    with pytest.raises(RuntimeError, match=r"rank 0 of 2 has no answer .*\(waited 0.01 s\)"):
        nccl._wait(SimpleNamespace(done=False), 0.01)
    assert aborted
    with pytest.raises(RuntimeError, match="wanted a new group, since this one is of no use"):
        nccl.agree({})


# --- frameworks ----------------------------------------------------------------------------------


def started(*command: str, **environment: str) -> subprocess.Popen[str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
    )


@pytest.mark.emulator
def test_two_processes_over_gloo(tmp_path: Path) -> None:
    """Right results, an error where ranks differ, and one instead of waiting for ever."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    script, store = Path(__file__).with_name("ranks.py"), tmp_path / "store"
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [started(str(script), str(rank), str(store), **loopback) for rank in range(2)]
    for process in processes:
        said, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert said.split() == ["agree", "share", "differ", "leave"]


@pytest.mark.gpu
def test_nccl_of_cupy_with_one_rank() -> None:
    import cupy
    from cupy.cuda import nccl

    if not nccl.available:
        pytest.skip("CuPy finds no NCCL")
    from cupyx import distributed

    x = cupy.asarray(normal(1, 100, 2, 64))
    communicator = distributed.init_process_group(1, 0)
    try:
        out = ContextParallel(communicator).prefill(x, x, x, causal=True)
        expected = cuattn.prefill(x, x, x, causal=True)
        np.testing.assert_array_equal(out.get(), expected.get())
    finally:
        communicator.stop()


MESH = """
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import cuattn
from cuattn import reference
from cuattn.interop.distributed import ContextParallel, visible_keys

mesh = jax.make_mesh((2,), ("ranks",))
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, n, 2, 64)).astype(np.float16) for n in (24, 32, 32))
sinks = np.array([3.0, -1.0], np.float32)
apart = partial(jax.shard_map, mesh=mesh, out_specs=P(), check_vma=False)

@jax.jit
@partial(apart, in_specs=(P(), P(None, "ranks"), P(None, "ranks"), P()))
def prefill(*arrays):
    group = ContextParallel("ranks")
    return group.prefill(*arrays[:3], causal=True, sinks=arrays[3], return_lse=True)

@jax.jit
@partial(apart, in_specs=(P(), P("ranks"), P("ranks"), P()))
def decode(q, k, v, length):
    tables = jnp.arange(1, dtype=jnp.int32)[None]  # a page of 16 keys on each rank
    mine = visible_keys(length, jax.lax.axis_index("ranks"), 2, 16)
    return ContextParallel("ranks").decode(q, (k, v), tables, mine, layout="NHD")

@jax.jit
@partial(apart, in_specs=(P(), P("ranks"), P()))
def latent(q, cache, length):
    tables = jnp.arange(cache.shape[0], dtype=jnp.int32)[None]
    mine = visible_keys(length, jax.lax.axis_index("ranks"), 2, 640)
    skip = cuattn.SkipSoftmax(threshold=0.01)
    given = {"scale": 0.125, "skip_softmax": skip, "return_lse": True}
    return ContextParallel("ranks").mla_decode(q, cache, tables, mine, **given)

def cut(x, *axes):
    return jax.device_put(x, NamedSharding(mesh, P(*axes)))

out, lse = prefill(q, cut(k, None, "ranks"), cut(v, None, "ranks"), sinks)
expected = reference.prefill(q, k, v, causal=True, sinks=sinks)
assert abs(np.asarray(out) - expected.out).max() < 2e-3
assert abs(np.asarray(lse) - expected.lse).max() < 2e-6
pages = [cut(x.reshape(2, 16, 2, 64), "ranks") for x in (k, v)]
for length in (9, 30):
    out = decode(q[:, -1], *pages, np.array([length], np.int32))
    expected = reference.prefill(q[:, -1:], k[:, :length], v[:, :length])
    assert abs(np.asarray(out) - expected.out[:, 0]).max() < 2e-3


# Ten tiles a rank of equal keys, but that the first key, on rank 0, outweighs the others by 8: each
# rank keeps its first and last tile, rank 1 because it knows of that key.
cache, q = np.zeros((20, 64, 576), np.float16), np.zeros((1, 16, 576), np.float16)
cache[..., :512] = 1
q[..., 512:] = cache[0, 0, 512:] = 1
cache[0, 0, :512] = 0
out, lse = latent(q, cut(cache, "ranks"), np.array([1280], np.int32))
weight = np.exp(8) + 4 * 64 - 1
assert abs(np.asarray(lse) - np.log(weight)).max() < 1e-5
assert abs(np.asarray(out) - (4 * 64 - 1) / weight).max() < 1e-3
print("same")
"""


@pytest.mark.emulator
def test_two_devices_of_a_mesh() -> None:
    pytest.importorskip("jax", reason="JAX is not installed")
    devices = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "CUATTN_EMULATOR": "1",
    }
    process = started("-c", MESH, **devices)
    said, errors = process.communicate(timeout=120)
    assert said == "same\n", errors
