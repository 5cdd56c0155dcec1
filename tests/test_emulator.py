"""The emulator itself: a small kernel, right and with one fault at a time, and what is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from cuattn import _sources, emulator

pytestmark = pytest.mark.emulator

# 64 threads copy 64 rows of 16 bytes to shared memory, then each warp reads the other's rows as
# matrices and writes what it got to `out`.
KERNEL = """
#include <ptx/cp_async.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/sync.cuh>

struct Plan {
  bool wait = true, barrier = true, late_barrier = true, all_write = true;
  bool one_warp_at_barrier = false, early_exit = false;
  bool divergent_shuffle = false, divergent_branch = false, not_uniform = false;
  int32 source_offset = 0, target_offset = 0, row_offset = 0, out_offset = 0;
  bool write_input = false, endless = false, deep = false, trap = false;
};
constexpr Plan plan{CUATTN_CONFIG};

struct Params {
  unsigned char* x;  // [64][16 bytes]
  uint32* out;       // [64 threads][4]
};

int32 dig(int32 depth) {
  volatile char room[4096];
  room[depth % 4096] = 1;
  return depth == 0 ? room[0] : dig(depth - 1) + room[1];
}

KERNEL void exchange(const __grid_constant__ Params params) {
  SharedCarver carver;
  const SharedAddress tile = carver.take(1024, "tile", 16);
  const int32 thread = thread_index(), warp = warp_index();
  if (plan.early_exit && warp == 1) return;
  if (plan.all_write || thread < 32) {
    cp_async_16(tile + thread * 16 + plan.target_offset,
                params.x + thread * 16 + plan.source_offset, true);
  }
  cp_async_commit();
  if (plan.wait) cp_async_wait<0>();
  if (plan.one_warp_at_barrier && warp == 0) sync_block();
  if (plan.barrier) sync_block();
  if (plan.not_uniform) warp_uniform(thread);
  if (plan.divergent_shuffle && lane_index() < 16) shuffle(thread, 0);
  if (plan.divergent_branch) {
    if (lane_index() < 16)
      shuffle(thread, 0);
    else
      warp_all(true);
  }
  uint32 fragment[4];
  ldmatrix_x4(fragment, tile + (1 - warp) * 512 + lane_index() * 16 + plan.row_offset);
  if (plan.late_barrier) sync_block();
  // The next round's copy, to the same place.
  cp_async_16(tile + thread * 16, params.x + thread * 16, false);
  cp_async_commit();
  cp_async_wait<0>();
  for (int32 i = 0; i < 4; ++i) params.out[thread * 4 + i + plan.out_offset] = fragment[i];
  if (plan.write_input) params.x[thread] = 1;
  if (plan.trap) __builtin_trap();
  if (plan.deep) params.out[0] = dig(1000);
  while (plan.endless) params.out[0] = thread;
}
"""
LINES = {text.strip(): number for number, text in enumerate(KERNEL.splitlines(), 1)}


def launch(config: str = "", **options: Any) -> tuple[np.ndarray, emulator.Counts]:
    sources = {**_sources.read(), "exchange.cu": KERNEL}
    with emulator.Memory() as memory:
        x = memory.add("x", np.arange(512, dtype=np.uint16).reshape(64, 8))
        out = memory.add("out", np.zeros((64, 4), np.uint32), writable=True)
        params = np.array([x, out], np.uint64).tobytes()
        counts = emulator.run("exchange", config, 1, 64, params, sources=sources, **options)
        return memory["out"].copy(), counts


RACE = {"race": True}
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"schedule": "reverse"},
    {"schedule": 3, "mode": "random"},
    {"mode": "early"},
    {"race": True},
    {"race": True, "schedule": "reverse", "mode": "early"},
]


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_right_kernel(options: dict[str, Any]) -> None:
    out, counts = launch(**options)
    pairs = np.arange(512, dtype=np.uint16).view(np.uint32).reshape(2, 4, 8, 4)[::-1]
    # [warp, matrix, row, pair] → [warp, lane = row and pair, register = matrix]
    want = pairs.transpose(0, 2, 3, 1).reshape(64, 4)
    np.testing.assert_array_equal(out, want)
    assert counts.bank_conflicts == 0
    assert counts.shared_bytes == 1024


@dataclass(frozen=True)
class Fault:
    """A broken kernel and the words of the report that a developer needs."""

    name: str
    config: str
    words: tuple[str, ...]
    options: dict[str, Any]
    line: str = ""


FAULTS = [
    Fault(
        "missing-barrier",
        ".barrier = false",
        ("never written, or not yet", '"tile" byte 512 of 1024'),
        RACE,
        "ldmatrix_x4(fragment, tile + (1 - warp) * 512 + lane_index() * 16 + plan.row_offset);",
    ),
    Fault(
        "missing-wait",
        ".wait = false",
        ("race, read after write", '"tile" byte 0 of 1024', "cp.async of thread 0 (warp 0"),
        RACE,
    ),
    Fault(
        "missing-barrier-before-reuse",
        ".late_barrier = false",
        ("race, read after write", '"tile" byte 512', "cp.async of thread 32 (warp 1"),
        RACE,
        "cp_async_16(tile + thread * 16, params.x + thread * 16, false);",
    ),
    Fault(
        "never-written",
        ".all_write = false",
        ("never written", '"tile" byte 512 of 1024'),
        RACE,
    ),
    Fault("global-load", ".source_offset = 16", ("load of 16", '"x" byte 1024 of 1024'), {}),
    Fault("global-load-before", ".source_offset = -16", ('"x" byte -16 of 1024',), {}),
    Fault("global-load-unaligned", ".source_offset = 2", ("not a multiple of 16",), {}),
    Fault("global-store", ".out_offset = 1024", ("store", '"out" byte', "of 1024"), {}),
    Fault("global-store-by-one", ".out_offset = 1", ("store", '"out" byte 1024 of 1024'), {}),
    Fault(
        "global-store-race",
        ".out_offset = 1",
        ("store of 4 bytes", '"out" byte 1024 of 1024'),
        RACE,
        "for (int32 i = 0; i < 4; ++i) params.out[thread * 4 + i + plan.out_offset] = fragment[i];",
    ),
    Fault("global-store-before", ".out_offset = -1", ('"out" byte -4 of 1024',), RACE),
    Fault("read-only", ".write_input = true", ("store", "read-only", '"x" byte'), RACE),
    Fault("read-only-plain", ".write_input = true", ("store", "read-only", '"x" byte'), {}),
    Fault("shared-write", ".target_offset = 16", ("out of bounds", '"tile" byte 1024'), {}),
    Fault("shared-read", ".row_offset = 16", ("ldmatrix", "out of bounds", '"tile" byte 1024'), {}),
    Fault("shared-unaligned", ".row_offset = 8", ("ldmatrix", "not a multiple of 16"), {}),
    Fault(
        "barrier-of-one-warp",
        ".one_warp_at_barrier = true",
        ("threads of a block meet at different barriers",),
        {},
        "if (plan.one_warp_at_barrier && warp == 0) sync_block();",
    ),
    Fault("exit-before-barrier", ".early_exit = true", ("whole block",), {}),
    Fault(
        "half-a-shuffle",
        ".divergent_shuffle = true",
        ("the warp has diverged", "shuffle", "ldmatrix"),
        {},
        "if (plan.divergent_shuffle && lane_index() < 16) shuffle(thread, 0);",
    ),
    Fault("two-branches", ".divergent_branch = true", ("diverged", "vote", "shuffle"), {}),
    Fault(
        "not-uniform",
        ".not_uniform = true",
        ("warp_uniform of 32 in lane 0, but 33 in lane 1",),
        {},
    ),
    Fault("endless", ".endless = true", ("more than 1 s of processor time",), {"seconds": 1}),
    Fault(
        "trap",
        ".trap = true",
        ("the kernel stopped at a trap",),
        {},
        "if (plan.trap) __builtin_trap();",
    ),
    Fault("stack-overflow", ".deep = true", ("stack of 256 KiB overflowed",), {}),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_reported(fault: Fault) -> None:
    with pytest.raises(emulator.EmulatorError) as caught:
        launch(fault.config, **fault.options)
    text = str(caught.value)
    for word in fault.words:
        assert word in text, text
    assert "exchange.cu:" in text or fault.name == "stack-overflow"
    assert "thread" in text
    if fault.line:
        assert f"exchange.cu:{LINES[fault.line]}" in text, text
    launch()  # and the next launch is none the worse


def test_missing_wait_shows_as_nan_without_race_mode() -> None:
    out, _ = launch(".wait = false")
    assert (out == 0xFFFFFFFF).any()


@pytest.mark.parametrize("schedule", [1, 2, 3])
def test_random_schedules_repeat(schedule: int) -> None:
    first, again = (launch(schedule=schedule, mode="random")[1] for _ in range(2))
    assert first == again
