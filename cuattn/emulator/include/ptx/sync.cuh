// Host twin of kernels/ptx/sync.cuh.
#pragma once

#include <core/device.cuh>

DEVICE void sync_block() { emulator::barrier_sync(0, 0); }

// Barrier `id` of `threads` threads: those who wait, and those who only arrive.
template <int32 id, int32 threads>
DEVICE void named_barrier_sync() {
  emulator::barrier_sync(id, threads);
}
template <int32 id, int32 threads>
DEVICE void named_barrier_arrive() {
  emulator::barrier_arrive(id, threads);
}

DEVICE bool elect_lane() { return emulator::elect(full_warp); }
