// mbarrier: phases that end when all arrivals and all expected bytes are there (sm_90).
//
// A fresh barrier is in phase 0; a wait for parity 1 passes at once, as if a phase before had
// ended.
#pragma once

#include <core/device.cuh>

// Make the eight bytes at `barrier` an mbarrier of so many arrivals a phase.
DEVICE void mbarrier_init(SharedAddress barrier, uint32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Let the bytes be used for something else.
DEVICE void mbarrier_invalidate(SharedAddress barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Show this thread's mbarrier_init to bulk copies; others need a block barrier besides.
DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

DEVICE void mbarrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Expect so many more bytes in this phase, then arrive.
DEVICE void mbarrier_arrive_expect(SharedAddress barrier, uint32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Wait until the phase of this parity has ended.
DEVICE void mbarrier_wait(SharedAddress barrier, uint32 parity) {
  uint32 ended = 0;
  while (!ended) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}
