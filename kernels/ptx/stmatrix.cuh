// stmatrix: four 8×8 matrices of 16-bit elements from mma fragments to shared memory (sm_90).
//
// The mirror of ldmatrix: lane l gives the address of row l % 8 of matrix l / 8 and holds the same
// elements.
#pragma once

#include <core/device.cuh>

DEVICE void stmatrix_x4(SharedAddress row, const uint32 (&fragment)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
}

DEVICE void stmatrix_x4_transposed(SharedAddress row, const uint32 (&fragment)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
}
