// Atomics by which blocks agree, and the order that they give to other accesses.
#pragma once

#include <core/types.cuh>

// Count one more, from 0 up to `last` and then from 0 again; returns the count before.  What this
// thread, and those it met at a barrier, wrote before can be read by whoever counts later.
DEVICE uint32 atomic_count(uint32* counter, uint32 last) {
  uint32 before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(last)
               : "memory");
  return before;
}

// The same, but gives no order to anything: for blocks that share out numbers.
DEVICE uint32 atomic_take(uint32* counter, uint32 last) {
  uint32 before;
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(last)
               : "memory");
  return before;
}
