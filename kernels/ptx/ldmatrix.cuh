// ldmatrix: four 8×8 matrices of 16-bit elements from shared memory into mma fragments (sm_75).
//
// Lane l gives the address of row l % 8 of matrix l / 8.  It receives, of matrix i in register i,
// elements 2·(l % 4) and the next of row l / 4; transposed: of column l / 4.
#pragma once

#include <core/device.cuh>

DEVICE void ldmatrix_x4(uint32 (&fragment)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row)
               : "memory");
}

DEVICE void ldmatrix_x4_transposed(uint32 (&fragment)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row)
               : "memory");
}
