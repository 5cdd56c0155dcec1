// 16-bit and 8-bit floats to float.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulator {

inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline float float_of_bf16(uint32_t bits) { return float_of_bits(bits << 16); }

// Exponent and fraction move to their places in a float; 2^112 is the difference of the biases.
inline float float_of_fp16(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, magnitude = (bits & 0x7fff) << 13;
  const float value = float_of_bits(magnitude) * 0x1p112f;
  const bool finite = (bits & 0x7c00) != 0x7c00;
  uint32_t pattern;
  memcpy(&pattern, &value, 4);
  if (!finite) pattern = 0x7f800000 | magnitude;
  return float_of_bits(pattern | sign);
}

// e4m3: no infinity; all ones is NaN.
inline float float_of_e4m3(uint32_t bits) {
  if ((bits & 0x7f) == 0x7f) return float_of_bits(0x7fc00000);
  const float value = float_of_bits((bits & 0x7f) << 20) * 0x1p120f;
  return bits & 0x80 ? -value : value;
}

}  // namespace emulator
