// Host twin of kernels/ptx/redux.cuh.
#pragma once

#include <core/device.cuh>

DEVICE uint32 redux_add(uint32 value) {
  return emulator::reduce(emulator::Reduction::sum, full_warp, value);
}

DEVICE uint32 redux_min(uint32 value) {
  return emulator::reduce(emulator::Reduction::minimum, full_warp, value);
}

DEVICE uint32 redux_max(uint32 value) {
  return emulator::reduce(emulator::Reduction::maximum, full_warp, value);
}

DEVICE uint32 redux_and(uint32 value) {
  return emulator::reduce(emulator::Reduction::bit_and, full_warp, value);
}

DEVICE uint32 redux_or(uint32 value) {
  return emulator::reduce(emulator::Reduction::bit_or, full_warp, value);
}

DEVICE uint32 redux_xor(uint32 value) {
  return emulator::reduce(emulator::Reduction::bit_xor, full_warp, value);
}
