// Softmax over keys that arrive tile by tile: a running maximum and a running sum for each row.
//
// Scores stay in the units of Q Kᵀ; `scale` (with log2 e in it) enters where they are
// exponentiated:
//   p = exp2(scale · s − scale · m)       m = the row's maximum so far
// When m grows, what was summed before is too large by exp2(scale · (m_new − m)).
#pragma once

#include <core/math.cuh>
#include <ptx/convert.cuh>
#include <ptx/special.cuh>
#include <tile/fragment.cuh>

template <int32 row_tiles>
struct RowStatistics {
  float maximum[row_tiles][2];  // [row tile][half], equal in the four lanes of a quad
  float sum[row_tiles][2];      // of this lane's columns only, until `finish`

  DEVICE RowStatistics() {
#pragma unroll
    for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
      for (int32 half = 0; half < 2; ++half) {
        maximum[r][half] = -infinity();
        sum[r][half] = 0.f;
      }
  }
};

// The largest score of each row of a tile in this lane's columns.
template <int32 row_tiles, int32 key_tiles>
DEVICE void lane_maxima(float (&maxima)[row_tiles][2],
                        const float (&scores)[row_tiles][key_tiles][4]) {
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      float value = -infinity();
#pragma unroll
      for (int32 c = 0; c < key_tiles; ++c)
        value = fmaxf(value, fmaxf(scores[r][c][half * 2], scores[r][c][half * 2 + 1]));
      maxima[r][half] = value;
    }
}

// The largest of each row, of what the lanes of its quad have found.
template <int32 row_tiles>
DEVICE void quad_maxima(float (&maxima)[row_tiles][2], const float (&found)[row_tiles][2]) {
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) maxima[r][half] = quad_maximum(found[r][half]);
}

// The largest score of each row of a tile.
template <int32 row_tiles, int32 key_tiles>
DEVICE void row_maxima(float (&maxima)[row_tiles][2],
                       const float (&scores)[row_tiles][key_tiles][4]) {
  lane_maxima(maxima, scores);
  quad_maxima(maxima, maxima);
}

// Whether some row of the warp has a new maximum.
template <int32 row_tiles>
DEVICE bool some_grow(const RowStatistics<row_tiles>& rows, const float (&maxima)[row_tiles][2]) {
  bool grown = false;
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) grown |= maxima[r][half] > rows.maximum[r][half];
  return warp_any(grown);
}

// Take a new maximum into one row's statistics; what was summed before shrinks by the result.
template <int32 row_tiles>
DEVICE float raise_maximum(RowStatistics<row_tiles>& rows, int32 r, int32 half, float maximum,
                           float scale) {
  const float old_maximum = rows.maximum[r][half];
  const float new_maximum = fmaxf(old_maximum, maximum);
  // A row that has seen no key yet has nothing to shrink (and −∞ − −∞ is not a number).
  const float shrink =
      old_maximum == new_maximum ? 1.f : exp2_approximate((old_maximum - new_maximum) * scale);
  rows.maximum[r][half] = new_maximum;
  rows.sum[r][half] *= shrink;
  return shrink;
}

// Take new maxima into the statistics and bring sum and output to them.
template <int32 row_tiles, int32 value_tiles>
DEVICE void raise_maxima(RowStatistics<row_tiles>& rows, const float (&maxima)[row_tiles][2],
                         float (&output)[row_tiles][value_tiles][4], float scale) {
  // NOTE: after a few tiles maxima hardly grow; without this test every tile pays for the output.
  if (!some_grow(rows, maxima)) return;
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const float shrink = raise_maximum(rows, r, half, maxima[r][half], scale);
#pragma unroll
      for (int32 c = 0; c < value_tiles; ++c) {
        output[r][c][half * 2] *= shrink;
        output[r][c][half * 2 + 1] *= shrink;
      }
    }
}

// The same where the output is brought to them later.
template <int32 row_tiles>
DEVICE void raise_maxima(RowStatistics<row_tiles>& rows, float (&shrink)[row_tiles][2],
                         const float (&maxima)[row_tiles][2], float scale) {
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half)
      shrink[r][half] = raise_maximum(rows, r, half, maxima[r][half], scale);
}

// The larger of two maxima of each row.
template <int32 row_tiles>
DEVICE void larger(float (&maxima)[row_tiles][2], const float (&first)[row_tiles][2],
                   const float (&second)[row_tiles][2]) {
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) maxima[r][half] = fmaxf(first[r][half], second[r][half]);
}

// Add the sums of one tile, which are relative to the same maxima.
template <int32 row_tiles>
DEVICE void add_sums(RowStatistics<row_tiles>& rows, const RowStatistics<row_tiles>& tile) {
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) rows.sum[r][half] += tile.sum[r][half];
}

// Whether some row of the warp shrinks.
template <int32 row_tiles>
DEVICE bool some_shrink(const float (&shrink)[row_tiles][2]) {
  bool some = false;
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) some |= shrink[r][half] != 1.f;
  return warp_any(some);
}

// Bring what was summed into `output` to new maxima.
template <int32 row_tiles, int32 value_tiles>
DEVICE void shrink_output(float (&output)[row_tiles][value_tiles][4],
                          const float (&shrink)[row_tiles][2]) {
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 c = 0; c < value_tiles; ++c)
#pragma unroll
      for (int32 i = 0; i < 4; ++i) output[r][c][i] *= shrink[r][i / 2];
}

// The scores of keys 16·step … become probabilities relative to the rows' maxima, which are added
// to the rows' sums and packed as operand A of P V: accumulators lie where that operand wants them.
template <typename Element, int32 row_tiles, int32 key_tiles>
DEVICE void exponentiate(uint32 (&probabilities)[row_tiles][4], RowStatistics<row_tiles>& rows,
                         const float (&scores)[row_tiles][key_tiles][4], int32 step, float scale) {
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const float maximum = rows.maximum[r][half];
      const float shift = maximum == -infinity() ? 0.f : maximum * scale;
#pragma unroll
      for (int32 c = 0; c < 2; ++c) {
        const float (&score)[4] = scores[r][step * 2 + c];
        const float first = exp2_approximate(fmaf(score[half * 2], scale, -shift));
        const float second = exp2_approximate(fmaf(score[half * 2 + 1], scale, -shift));
        rows.sum[r][half] += first + second;
        probabilities[r][c * 2 + half] = pack(first, second, Element{});
      }
    }
}
