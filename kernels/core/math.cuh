// Small arithmetic that needs no instruction of its own.
#pragma once

#include <core/types.cuh>

constexpr float log2_e = 1.4426950408889634f;
constexpr float ln_2 = 0.6931471805599453f;

DEVICE constexpr float infinity() { return __builtin_bit_cast(float, 0x7f800000u); }

template <typename T>
DEVICE constexpr T minimum(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
DEVICE constexpr T maximum(T a, T b) {
  return a > b ? a : b;
}

// The logarithm of a power of two.
DEVICE constexpr int32 shift_of(int32 power) {
  int32 shift = 0;
  while (1 << shift < power) ++shift;
  return shift;
}

// The smallest multiple count: blocks of `size` that cover `n` things.
DEVICE constexpr int32 ceil_div(int32 n, int32 size) { return (n + size - 1) / size; }
