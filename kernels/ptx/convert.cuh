// cvt: two floats to two 16-bit elements in one register, the first in the lower half.
#pragma once

#include <core/types.cuh>

DEVICE uint32 pack(float low, float high, bf16) {
  uint32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

DEVICE uint32 pack(float low, float high, fp16) {
  uint32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
