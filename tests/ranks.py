"""One of two ranks of `torch.distributed` over gloo: python ranks.py RANK STORE-FILE

`test_interop_distributed` starts one process for each.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import distributed

import cuattn
from cuattn import reference
from cuattn.interop.distributed import ContextParallel, visible_keys

PAGE = 16
SHAPES = {"q": (2, 20, 4, 64), "k": (2, 45, 2, 64), "v": (2, 45, 2, 64)}


def numbers() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float16) for name, shape in SHAPES.items()}


def agree(rank: int, ranks: int, group: ContextParallel) -> None:
    """Prefill with keys cut where queries are, and decode with pages dealt in turn."""
    arrays = numbers()
    q, k, v = (torch.from_numpy(x) for x in arrays.values())
    cut = slice(0, 38) if rank == 0 else slice(38, 45)
    out, lse = group.prefill(q, k[:, cut], v[:, cut], causal=True, return_lse=True)
    expected = reference.prefill(*arrays.values(), causal=True)
    assert isinstance(out, torch.Tensor) and out.dtype == torch.float16
    assert abs(out.numpy() - expected.out).max() < 2e-3, "prefill"
    assert abs(lse.numpy() - expected.lse).max() < 2e-6, "prefill's lse"

    pages = -(-45 // PAGE)
    mine = [page for page in range(pages) if page % ranks == rank]
    caches = []
    for x in (k, v):
        padded = torch.zeros((2, pages * PAGE, 2, 64), dtype=x.dtype)
        padded[:, :45] = x
        paged = padded.reshape(2, pages, PAGE, 2, 64)[:, mine]
        caches.append(paged.reshape(-1, PAGE, 2, 64).contiguous())
    tables = torch.arange(2 * len(mine), dtype=torch.int32).reshape(2, -1)
    seen = torch.arange(45 - 3, 45, dtype=torch.int32).expand(2, 3) + 1  # the last three tokens
    lengths = visible_keys(seen, rank, ranks, PAGE)
    for check in (True, False):
        out = group.decode(q[:, -3:], tuple(caches), tables, lengths, layout="NHD", check=check)
        assert abs(out.numpy() - expected.out[:, -3:]).max() < 2e-3, "decode"


def share(rank: int, ranks: int, group: ContextParallel) -> None:
    """Equal keys but for the first, on rank 0: rank 1 keeps its seed tiles alone, for that."""
    keys, columns = 1024, 64
    cache = torch.zeros(keys // PAGE, 2, PAGE, 2, columns, dtype=torch.float16)
    cache[:, 1] = 1.0 - 2.0 * rank
    if rank == 0:
        cache[0, 0, 0] = 1.0  # a score of 8; of the others 0
    q = torch.ones(1, 4, columns, dtype=torch.float16)
    tables = torch.arange(keys // PAGE, dtype=torch.int32)[None]
    lengths = torch.full((1,), keys, dtype=torch.int32)
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=math.exp(-6), stats=stats)
    out, lse = group.decode(
        q, cache, tables, lengths, layout="NHD", skip_softmax=skip, return_lse=True
    )
    assert 0 < stats.skipped < stats.visited
    tile = keys * 4 // stats.visited
    seeds = (stats.visited - stats.skipped) // 4 * tile
    weight = math.exp(8) + ranks * seeds - 1
    assert abs(lse.numpy() - math.log(weight)).max() < 1e-5, "shared lse"
    assert abs(out.numpy() - (1 - 2 * seeds / weight)).max() < 1e-3, "shared"


def differ(rank: int, ranks: int, group: ContextParallel) -> None:
    """Ranks that were asked for different things, then one that refuses its call."""
    q, k, v = (torch.from_numpy(x) for x in numbers().values())
    try:
        group.prefill(q[:, rank:], k, v)
    except ValueError as error:
        assert "rank 1 has q [2, 19, 4, 64, 'float16']; wanted rank 0's [2, 20" in str(error), error
    try:
        group.prefill(q, k, v if rank == 0 else "nothing")
    except (TypeError, ValueError) as error:
        assert ("rank 1 refused its call: v is a str" in str(error)) == (rank == 0), error


def leave(rank: int, ranks: int, group: ContextParallel) -> None:
    """Rank 1 is busy elsewhere; rank 0 says so after its timeout, and stays out of use."""
    if rank == 1:
        time.sleep(3)
        return
    q, k, v = (torch.from_numpy(x) for x in numbers().values())
    for _ in range(2):
        try:
            group.prefill(q, k, v)
        except RuntimeError as error:
            assert "rank 0 of 2 has no answer from all others" in str(error), error
            assert "lost, or in another call" in str(error), error
        else:
            raise AssertionError("rank 0 had an answer")


def main() -> None:
    rank, store, ranks = int(sys.argv[1]), sys.argv[2], 2
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    with cuattn.emulator.enabled():
        for task, timeout in ((agree, 60.0), (share, 60.0), (differ, 60.0), (leave, 1.0)):
            task(rank, ranks, ContextParallel(distributed.group.WORLD, timeout=timeout))
            print(task.__name__)


if __name__ == "__main__":
    main()
