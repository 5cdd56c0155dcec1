// Host twin of kernels/ptx/mbarrier.cuh.
#pragma once

#include <core/device.cuh>

DEVICE void mbarrier_init(SharedAddress barrier, uint32 arrivals) {
  emulator::mbarrier_init(barrier, arrivals);
}

DEVICE void mbarrier_invalidate(SharedAddress barrier) { emulator::mbarrier_invalidate(barrier); }

DEVICE void fence_mbarrier_init() { emulator::fence_mbarrier_init(); }

DEVICE void mbarrier_arrive(SharedAddress barrier) { emulator::mbarrier_arrive(barrier, 1, 0); }

DEVICE void mbarrier_arrive_expect(SharedAddress barrier, uint32 bytes) {
  emulator::mbarrier_arrive(barrier, 1, bytes);
}

DEVICE void mbarrier_wait(SharedAddress barrier, uint32 parity) {
  emulator::mbarrier_wait(barrier, parity);
}
