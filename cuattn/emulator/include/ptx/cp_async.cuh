// Host twin of kernels/ptx/cp_async.cuh.
#pragma once

#include <core/device.cuh>

DEVICE void cp_async_16(SharedAddress target, const void* source, bool valid) {
  emulator::copy_async(target, source, 16, valid ? 16 : 0);
}

DEVICE void cp_async_commit() { emulator::copy_commit(); }

template <int32 pending>
DEVICE void cp_async_wait() {
  emulator::copy_wait(pending);
}
