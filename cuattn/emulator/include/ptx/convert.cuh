// Host twin of kernels/ptx/convert.cuh: round to nearest, ties to even.
#pragma once

#include <core/types.cuh>

// NaN becomes 0x7fff, as cvt has it.
DEVICE uint32 round_to_bf16(float x) {
  const uint32 bits = __builtin_bit_cast(uint32, x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

DEVICE uint32 round_to_fp16(float x) {
  if (x != x) return 0x7fff;
  const uint32 bits = __builtin_bit_cast(uint32, x);
  const uint32 sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above
  if (magnitude < 0x38800000) {                       // below 2^-14: multiples of 2^-24
    // Adding 0.5 leaves such multiples in the last place of the sum.
    const float sum = __builtin_bit_cast(float, magnitude) + 0.5f;
    return sign | (__builtin_bit_cast(uint32, sum) - 0x3f000000);
  }
  const uint32 rebased = magnitude - (112u << 23);  // exponent bias 127 → 15
  return sign | ((rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
}

DEVICE uint32 pack(float low, float high, bf16) {
  return round_to_bf16(low) | round_to_bf16(high) << 16;
}

DEVICE uint32 pack(float low, float high, fp16) {
  return round_to_fp16(low) | round_to_fp16(high) << 16;
}
