// Barriers of a whole block, and of parts of it.
#pragma once

#include <core/types.cuh>

// Every thread of the block arrives and waits for all; orders their memory accesses.
DEVICE void sync_block() { asm volatile("barrier.sync 0;" ::: "memory"); }

// Barrier `id` of `threads` threads: those who wait, and those who only arrive.
template <int32 id, int32 threads>
DEVICE void named_barrier_sync() {
  asm volatile("barrier.sync %0, %1;" ::"n"(id), "n"(threads) : "memory");
}
template <int32 id, int32 threads>
DEVICE void named_barrier_arrive() {
  asm volatile("barrier.arrive %0, %1;" ::"n"(id), "n"(threads) : "memory");
}

// True in one lane of the warp (sm_90).
DEVICE bool elect_lane() {
  uint32 elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }"
               : "=r"(elected));
  return elected;
}
