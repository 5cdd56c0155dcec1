"""append_kv and merge_states beside a plain copy of as many bytes, and their host time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cuattn._workloads import Stopwatch

from . import host
from .report import Options, Row, cell, say

HEADS, DIM, PAGE_SIZE = 8, 128, 64


@dataclass(frozen=True, slots=True)
class Case:
    """One call, and the bytes that it reads and writes."""

    name: str
    run: Callable[[], object]
    moved: int


def run(options: Options) -> list[Row]:
    """Measure every case asked for."""
    import cupy

    watch, rows = Stopwatch(cupy), []
    say(f"{'case':32}{'MiB moved':>10}{'µs':>9}{'GB/s':>9}{'of a copy':>11}{'host µs':>9}")
    for make in CASES:
        case = make(cupy)
        if options.wants(case.name):
            rows += _measure(case, watch, cupy)
    return rows


def _measure(case: Case, watch: Stopwatch, cupy: Any) -> list[Row]:
    source = cupy.zeros(max(case.moved // 2, 1), cupy.uint8)
    target = cupy.empty_like(source)
    copy = watch.median_ms(lambda: target.data.copy_from_device_async(source.data, source.nbytes))
    ms = watch.median_ms(case.run)
    microseconds = host.host_us(case.run, cupy.cuda.runtime.deviceSynchronize)
    gbps = case.moved / ms * 1e-6
    say(
        f"{case.name:32}{case.moved / 2**20:10.2f}"
        + cell(1e3 * ms, ".1f", 9)
        + cell(gbps, ".0f", 9)
        + cell(copy / ms, ".0%", 11)
        + cell(microseconds, ".1f", 9)
    )
    return [
        Row("tools", case.name, "cuattn", ms=ms, gbps=gbps),
        Row("tools", case.name, "copy", ms=copy, gbps=case.moved / copy * 1e-6),
        Row("tools", f"{case.name}, host", "cuattn", ms=1e-3 * microseconds),
    ]


def _append(name: str, requests: int, each: int, layout: str) -> Callable[[Any], Case]:
    """`requests` of `each` new tokens, behind as many that are in the cache already."""

    def make(cupy: Any) -> Case:
        import cuattn

        tokens, pages_each = requests * each, -(-2 * each // PAGE_SIZE)
        inner = (HEADS, PAGE_SIZE) if layout == "HND" else (PAGE_SIZE, HEADS)
        cache = cupy.zeros((requests * pages_each, 2, *inner, DIM), cupy.float16)
        new = [cupy.ones((tokens, HEADS, DIM), cupy.float16) for _ in range(2)]
        tables = cupy.random.permutation(requests * pages_each).astype("i4")
        tables = tables.reshape(requests, pages_each)
        lengths = cupy.full(requests, 2 * each, "i4")
        ends = cupy.arange(requests + 1, dtype="i4") * each
        return Case(
            name,
            lambda: cuattn.append_kv(cache, *new, tables, lengths, ends, layout=layout),
            2 * sum(x.nbytes for x in new),
        )

    return make


def _merge(name: str, parts: int, tokens: int) -> Callable[[Any], Case]:
    def make(cupy: Any) -> Case:
        import cuattn

        heads = 4 * HEADS
        outs = [cupy.ones((tokens, heads, DIM), cupy.float16) for _ in range(parts)]
        lses = [cupy.zeros((tokens, heads), cupy.float32) for _ in range(parts)]
        moved = (parts + 1) * (outs[0].nbytes + lses[0].nbytes)
        return Case(name, lambda: cuattn.merge_states(outs, lses), moved)

    return make


CASES = (
    _append("append_8k_HND", 1, 8192, "HND"),
    _append("append_8k_NHD", 1, 8192, "NHD"),
    _append("append_64x128_HND", 64, 128, "HND"),
    _append("append_2048x4_HND", 2048, 4, "HND"),
    _append("append_64x1_HND", 64, 1, "HND"),
    _append("append_1x1_HND", 1, 1, "HND"),
    _merge("merge_2_of_8k", 2, 8192),
    _merge("merge_8_of_8k", 8, 8192),
    _merge("merge_40_of_1k", 40, 1024),
    _merge("merge_2_of_64", 2, 64),
)
