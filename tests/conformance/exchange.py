"""Instructions by which threads hand numbers to each other: shared memory, counters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .case import Array, Case, Numbers

# Round 0 stores single numbers, round 1 pairs, round 2 fours; all are read singly and by fours.
EXCHANGED = """
#include <ptx/atomic.cuh>
#include <ptx/shared.cuh>
#include <ptx/sync.cuh>

struct Params {
  const float* numbers;  // [64 threads][4]
  float* single;         // [round][64 threads]: the first of the thread opposite
  float* fours;          // [round][64 threads][4]: all of the thread opposite
  uint32* counters;      // [4]
  uint32* before;        // [64 threads]: the count that the thread found, of counter thread % 4
};

KERNEL void conformance(const __grid_constant__ Params params) {
  SharedCarver carver;
  const SharedAddress numbers = carver.take(64 * 16, "numbers");
  const int32 thread = thread_index(), opposite = 63 - thread;
  float own[4];
  for (int32 i = 0; i < 4; ++i) own[i] = params.numbers[thread * 4 + i];
  const SharedAddress target = numbers + thread * 16, source = numbers + opposite * 16;
  for (int32 round = 0; round < 3; ++round) {
    if (round == 0) {
      for (int32 i = 0; i < 4; ++i) shared_store(target + i * 4, own[i]);
    } else if (round == 1) {
      shared_store_2(target, own[2], own[3]);
      shared_store_2(target + 8, own[0], own[1]);
    } else {
      shared_store_4(target, {own[3], own[2], own[1], own[0]});
    }
    sync_block();
    float other[4];
    shared_load_4(other, source);
    params.single[round * 64 + thread] = shared_load(source);
    for (int32 i = 0; i < 4; ++i) params.fours[(round * 64 + thread) * 4 + i] = other[i];
    sync_block();
  }
  for (int32 turn = 0; turn < 64; ++turn) {  // one after the other, so that the order is known
    if (turn == thread) params.before[thread] = atomic_count(params.counters + thread % 4, 6);
    sync_block();
  }
}
"""

TAKEN = """
#include <ptx/atomic.cuh>
#include <ptx/sync.cuh>

struct Params {
  uint32* counters;  // [4]
  uint32* before;    // [64 threads]: the count that the thread found, of counter thread % 4
};

KERNEL void conformance(const __grid_constant__ Params params) {
  const int32 thread = thread_index();
  for (int32 turn = 0; turn < 64; ++turn) {  // one after the other, so that the order is known
    if (turn == thread) params.before[thread] = atomic_take(params.counters + thread % 4, 6);
    sync_block();
  }
}
"""


def _taken(_given: Mapping[str, Array]) -> dict[str, Array]:
    return {
        "counters": np.full(4, 16 % 7, np.uint32),
        "before": (np.arange(64) // 4 % 7).astype(np.uint32),
    }


def _exchanged(given: Mapping[str, Array]) -> dict[str, Array]:
    numbers = given["numbers"].reshape(64, 4)
    rounds = (numbers, numbers[:, [2, 3, 0, 1]], numbers[:, ::-1])
    fours = np.stack([x[::-1] for x in rounds]).astype(np.float32)
    return {
        "single": np.ascontiguousarray(fours[:, :, 0]),
        "fours": np.ascontiguousarray(fours),
        **_taken(given),
    }


CASES = (
    Case(
        "exchange",
        "numbers",
        "shared_store shared_store_2 shared_store_4 shared_load shared_load_4 atomic_count",
        EXCHANGED,
        {"numbers": Numbers(17).uniform(-9, 9, (64, 4)).astype(np.float32)},
        {
            "single": np.zeros((3, 64), np.float32),
            "fours": np.zeros((3, 64, 4), np.float32),
            "counters": np.zeros(4, np.uint32),
            "before": np.zeros(64, np.uint32),
        },
        threads=64,
        expected=_exchanged,
    ),
    Case(
        "exchange",
        "numbers-shared-out",
        "atomic_take",
        TAKEN,
        {},
        {"counters": np.zeros(4, np.uint32), "before": np.zeros(64, np.uint32)},
        threads=64,
        expected=_taken,
    ),
)
