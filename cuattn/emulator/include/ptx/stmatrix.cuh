// Host twin of kernels/ptx/stmatrix.cuh.
#pragma once

#include <core/device.cuh>

DEVICE void stmatrix_x4(SharedAddress row, const uint32 (&fragment)[4]) {
  emulator::store_matrices(fragment, 4, row, false);
}

DEVICE void stmatrix_x4_transposed(SharedAddress row, const uint32 (&fragment)[4]) {
  emulator::store_matrices(fragment, 4, row, true);
}
