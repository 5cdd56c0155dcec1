// Host twin of kernels/ptx/atomic.cuh: blocks run one after the other, so order is no matter.
#pragma once

#include <emulator/api.h>

#include <core/types.cuh>

DEVICE uint32 atomic_count(uint32* counter, uint32 last) {
  return emulator::atomic_count(counter, last);
}
DEVICE uint32 atomic_take(uint32* counter, uint32 last) {
  return emulator::atomic_count(counter, last);
}
