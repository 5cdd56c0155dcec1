"""What no kernel uses yet, and the slow way of switching threads."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuattn import _sources, emulator

pytestmark = pytest.mark.emulator

# Two warps.  Lanes of a warp pass numbers on through shared memory; warp 0 tells warp 1 by a named
# barrier that its part is there.
KERNEL = """
#include <core/device.cuh>
#include <ptx/sync.cuh>

struct Plan {
  bool sync_warp = true, arrive = true;
};
constexpr Plan plan{CUATTN_CONFIG};

struct Params {
  const uint32* a;   // [32][4]
  const uint32* b;   // [32][2]
  float* d;          // [32][4]
  uint32* reduced;   // [sum, min, max, and, or, xor][32]
  uint32* elected;   // [32]
  uint32* passed;    // [64]
  uint64* total;     // [1]
};

KERNEL void instructions(const __grid_constant__ Params params) {
  SharedCarver carver;
  const SharedAddress row = carver.take(256, "row", 16);
  const int32 lane = lane_index(), thread = thread_index();
  const uint32 value = lane * 37 % 64 + 64;
  for (int32 kind = 0; kind < 6; ++kind) {
    const uint32 reduced = emulator::reduce(emulator::Reduction(kind), full_warp, value);
    if (thread < 32) params.reduced[kind * 32 + lane] = reduced;
  }
  const bool elected = elect_lane();
  if (thread < 32) params.elected[lane] = elected;

  emulator::store_shared(row + thread * 4, &value, 4);
  if (plan.sync_warp) sync_warp();
  uint32 neighbour;
  emulator::load_shared(&neighbour, row + (thread ^ 1) * 4, 4);
  params.passed[thread] = neighbour;
  if (warp_index() == 0) {
    if (plan.arrive) named_barrier_arrive<3, 64>();
  } else {
    named_barrier_sync<3, 64>();
    uint32 other;
    emulator::load_shared(&other, row + lane * 4, 4);
    params.passed[thread] += other << 16;
  }
  atomic_add(params.total, uint64(value));

  float d[4] = {1.f, 2.f, 3.f, 4.f};
  uint32 a[4], b[2];
  for (int32 i = 0; i < 4; ++i) a[i] = params.a[lane * 4 + i];
  for (int32 i = 0; i < 2; ++i) b[i] = params.b[lane * 2 + i];
  emulator::multiply(d, a, b, emulator::Operand::e4m3);
  if (thread < 32) {
    for (int32 i = 0; i < 4; ++i) params.d[lane * 4 + i] = d[i];
  }
}
"""
LANE = np.arange(32)
VALUE = (LANE * 37 % 64 + 64).astype(np.uint32)


def launch(config: str = "", **options: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    fp8 = ml_dtypes.float8_e4m3fn
    inputs = {"a": rng.integers(-4, 5, (32, 16)), "b": rng.integers(-4, 5, (32, 8))}
    results = {
        "d": np.zeros((32, 4), np.float32),
        "reduced": np.zeros((6, 32), np.uint32),
        "elected": np.zeros(32, np.uint32),
        "passed": np.zeros(64, np.uint32),
        "total": np.zeros(1, np.uint64),
    }
    with emulator.Memory() as memory:
        pointers = [memory.add(name, x.astype(fp8)) for name, x in inputs.items()]
        pointers += [memory.add(name, x, writable=True) for name, x in results.items()]
        params = np.array(pointers, np.uint64).tobytes()
        sources = {**_sources.read(), "instructions.cu": KERNEL}
        emulator.run("instructions", config, 1, 64, params, sources=sources, **options)
        return {**inputs, **{name: memory[name].copy() for name in results}}


@pytest.mark.parametrize("schedule", ["forward", "reverse", 5])
def test_instructions(schedule: Any) -> None:
    seen = launch(schedule=schedule, race=True)
    reductions = [VALUE.sum(), VALUE.min(), VALUE.max()]
    reductions += [f.reduce(VALUE) for f in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)]
    np.testing.assert_array_equal(seen["reduced"], np.array(reductions)[:, None] + 0 * LANE)
    assert seen["elected"].sum() == 1
    swapped = VALUE[LANE ^ 1]
    np.testing.assert_array_equal(seen["passed"], np.r_[swapped, swapped + (VALUE << 16)])
    assert seen["total"] == 2 * VALUE.sum()

    a, b, d = np.zeros((16, 32)), np.zeros((32, 8)), np.zeros((16, 8))
    for i in range(4):
        for r in range(4):
            a[LANE // 4 + r % 2 * 8, LANE % 4 * 4 + i + r // 2 * 16] = seen["a"][:, 4 * r + i]
        for r in range(2):
            b[LANE % 4 * 4 + i + r * 16, LANE // 4] = seen["b"][:, 4 * r + i]
        d[LANE // 4 + i // 2 * 8, LANE % 4 * 2 + i % 2] = i + 1
    d += a @ b
    for i in range(4):
        held = d[LANE // 4 + i // 2 * 8, LANE % 4 * 2 + i % 2]
        np.testing.assert_array_equal(seen["d"][:, i], held)


def test_missing_sync_of_a_warp_is_a_race() -> None:
    with pytest.raises(emulator.EmulatorError, match=r"race, read after write|never written"):
        launch(".sync_warp = false", race=True)


def test_named_barrier_that_nobody_arrives_at() -> None:
    with pytest.raises(emulator.EmulatorError, match="deadlock") as caught:
        launch(".arrive = false")
    text = str(caught.value)
    assert "warp 0 has left the kernel" in text
    assert "warp 1, all lanes: wait for barrier 3 at instructions.cu:" in text
    assert "barrier 3 has 32 of 64 threads" in text


def test_without_the_switch_in_assembly() -> None:
    """Threads switched by ucontext, as on machines without a switch here; in its own process."""
    script = (
        "import conftest\nfrom cuattn.emulator import _build\n"
        "_build.CORE_OPTIONS += ('-DCUATTN_UCONTEXT',)\n"
        "from test_emulator_instructions import test_instructions\n"
        "test_instructions('forward')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{script}"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr


def test_printf_works_as_on_a_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    kernel = """
    #include <core/device.cuh>
    struct Params {
      const int32* x;
    };
    KERNEL void say(const __grid_constant__ Params params) {
      if (thread_index() == 3) printf("thread %d has %d\\n", thread_index(), params.x[3]);
    }
    """
    with emulator.Memory() as memory:
        x = memory.add("x", np.arange(32, dtype=np.int32) * 7)
        params = np.uint64(x).tobytes()
        emulator.run("say", "", 1, 32, params, sources={**_sources.read(), "say.cu": kernel})
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "thread 3 has 21\n"
