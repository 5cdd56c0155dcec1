// Host twin of kernels/ptx/mma.cuh.
#pragma once

#include <core/device.cuh>

DEVICE void mma_m16n8k16(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, bf16) {
  const uint32 b[2] = {b0, b1};
  emulator::multiply(d, a, b, emulator::Operand::bfloat16);
}

DEVICE void mma_m16n8k16(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, fp16) {
  const uint32 b[2] = {b0, b1};
  emulator::multiply(d, a, b, emulator::Operand::float16);
}

DEVICE void mma_m16n8k32(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, e4m3) {
  const uint32 b[2] = {b0, b1};
  emulator::multiply(d, a, b, emulator::Operand::e4m3);
}
