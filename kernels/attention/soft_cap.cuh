// A cap on the logits: cap · tanh(s / cap).
#pragma once

#include <core/math.cuh>
#include <ptx/special.cuh>
#include <tile/fragment.cuh>

// tanh x = 1 − 2 / (1 + exp(2x)); near 0, where that cancels, a polynomial in x² (relative error
// below 2^-22 in both parts: half of a logit's last bit would show in LSE).
DEVICE float hyperbolic_tangent(float x) {
  const float square = x * x;
  float series = fmaf(square, 0.01560795f, -0.05220784f);
  series = fmaf(square, series, 0.1331301f);
  series = fmaf(square, series, -0.33332589f) * square;
  const float near_zero = fmaf(series, x, x);
  const float grown = exp2_approximate(x * (2.f * log2_e));
  const float elsewhere = 1.f - 2.f * reciprocal_approximate(1.f + grown);
  return square < 0.36f ? near_zero : elsewhere;
}

// scores → tanh(scores · factor); the cap itself then is part of the scale.
template <int32 row_tiles, int32 key_tiles>
DEVICE void squash(float (&scores)[row_tiles][key_tiles][4], float factor) {
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 c = 0; c < key_tiles; ++c)
#pragma unroll
      for (int32 i = 0; i < 4; ++i) scores[r][c][i] = hyperbolic_tangent(scores[r][c][i] * factor);
}
