// Host twin of kernels/ptx/ldmatrix.cuh.
#pragma once

#include <core/device.cuh>

DEVICE void ldmatrix_x4(uint32 (&fragment)[4], SharedAddress row) {
  emulator::load_matrices(fragment, 4, row, false);
}

DEVICE void ldmatrix_x4_transposed(uint32 (&fragment)[4], SharedAddress row) {
  emulator::load_matrices(fragment, 4, row, true);
}
