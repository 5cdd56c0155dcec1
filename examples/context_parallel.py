"""Decode over keys that two ranks share, from PyTorch: python examples/context_parallel.py

On two GPUs, over NCCL. With fewer, two processes on the CPU: few keys, in the emulator.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable

import torch
from torch import distributed

import cuattn
from cuattn.interop.distributed import ContextParallel, visible_keys

RANKS, PAGE = 2, 64


def milliseconds(call: Callable[[], object], times: int = 20) -> float:
    """Time of a call, the other rank's included if it takes part."""
    for count in (3, times):  # the first round warms up
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times * 1e3


def work(rank: int, store: str, on_gpu: bool) -> None:
    """One rank: its half of the keys, and all of them to compare with."""
    warnings.filterwarnings("ignore", message="cuattn runs on its emulator")
    device, backend = (f"cuda:{rank}", "nccl") if on_gpu else ("cpu", "gloo")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, init_method=store, rank=rank, world_size=RANKS)
    group = ContextParallel(distributed.group.WORLD)
    random = torch.Generator().manual_seed(0)  # the same numbers on every rank
    heads, kv_heads, dim = (32, 8, 128) if on_gpu else (4, 2, 64)

    for keys in (1 << 17, 1 << 18, 1 << 20) if on_gpu else (2048,):
        pages, half = keys // PAGE, keys // PAGE // RANKS
        kv = torch.randn(2, pages, PAGE, kv_heads, dim, generator=random).half()
        # The query looks for the last key, on rank 1, and rank 0 skips for that, too.
        q = 3 * kv[0, -1, -1].repeat_interleave(heads // kv_heads, 0)[None].to(device)
        whole = tuple(kv.to(device))
        tables = torch.arange(pages, dtype=torch.int32, device=device)[None]
        lengths = torch.full((1,), keys, dtype=torch.int32, device=device)
        one = (q, whole, tables, lengths)
        expected = cuattn.decode(*one, layout="NHD", out=torch.empty_like(q))

        mine = tuple(x[rank * half : (rank + 1) * half] for x in whole)
        held = visible_keys(lengths, rank, RANKS, half * PAGE)  # contiguous halves
        own = (q, mine, tables[:, :half], held)
        out = group.decode(*own, layout="NHD")
        stats = cuattn.SkipStats()
        skip = cuattn.SkipSoftmax(threshold=0.001, stats=stats)
        sparse = group.decode(*own, layout="NHD", skip_softmax=skip)
        error, change = ((x - y).abs().max().item() for x, y in ((out, expected), (sparse, out)))
        assert error < 0.01 and change < 0.2 and stats.rate > 0.3
        if rank == 0:
            print(f"dense: {keys} keys on {RANKS} ranks, at most {error:.4f} from one rank's")
            print(f"skip:  {stats.rate:.0%} of rank 0's tiles, moved by at most {change:.4f}")
        if on_gpu:
            both = milliseconds(lambda x=own: group.decode(*x, layout="NHD", check=False))
            single = milliseconds(lambda x=one: cuattn.decode(*x, layout="NHD"))
            print(f"time:  rank {rank}: {both:.3f} ms, {single:.3f} ms with all keys on one GPU")
    distributed.destroy_process_group()


if __name__ == "__main__":
    enough = torch.cuda.device_count() >= RANKS
    if not enough:
        os.environ |= {"CUATTN_EMULATOR": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (f"file://{folder}/store", enough), nprocs=RANKS)
