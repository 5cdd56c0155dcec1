// cp.async: copies from global to shared memory that do not pass through registers (sm_80).
#pragma once

#include <core/device.cuh>

// Copy 16 bytes, past L1; when `valid` is false nothing is read and 16 zero bytes are written.
DEVICE void cp_async_16(SharedAddress target, const void* source, bool valid) {
  const int32 bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(bytes)
               : "memory");
}

// Close this thread's current group of copies.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most `pending` of this thread's copy groups are in flight.
template <int32 pending>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
