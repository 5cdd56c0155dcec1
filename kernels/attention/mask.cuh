// Which keys a query row sees: a range [begin(row), end(row)), both growing with the row.
//
//   causal         end = row + kv_len − q_len + 1      (the last row sees the last key)
//   window_left    begin = row + kv_len − q_len − window_left
#pragma once

#include <attention/params.cuh>
#include <core/math.cuh>
#include <tile/copy.cuh>
#include <tile/fragment.cuh>

struct Visibility {
  int32 q_len, kv_len, causal, window_left;

  // The same with rows counted from `row`.
  DEVICE Visibility from(int32 row) const { return {q_len - row, kv_len, causal, window_left}; }

  // Rows past the last one see nothing.
  DEVICE Range keys_of(int32 row) const {
    if (row >= q_len) return {0, 0};
    const int32 diagonal = row + kv_len - q_len;
    const int32 begin = window_left < 0 ? 0 : maximum(0, diagonal - window_left);
    return {begin, causal ? minimum(kv_len, diagonal + 1) : kv_len};
  }

  // All keys that some row of [first, first + rows) sees.
  DEVICE Range keys_of_rows(int32 first, int32 rows) const {
    const int32 last = minimum(first + rows, q_len) - 1;
    if (last < first) return {0, 0};
    return {keys_of(first).begin, keys_of(last).end};
  }

  // Whether some row of [first, first + rows) sees some key of `keys`.
  DEVICE bool sees_any(int32 first, int32 rows, Range keys) const {
    const Range seen = keys_of_rows(first, rows);
    return seen.begin < keys.end && keys.begin < seen.end;
  }

  // Whether every row of [first, first + rows) sees every key of `keys`.
  DEVICE bool sees_all(int32 first, int32 rows, Range keys) const {
    const int32 last = first + rows - 1;
    return last < q_len && keys_of(last).begin <= keys.begin && keys.end <= keys_of(first).end;
  }
};

// Scores of keys that a row does not see become −∞.
template <int32 row_tiles, int32 key_tiles, typename RowVisibility>
DEVICE void mask_scores(float (&scores)[row_tiles][key_tiles][4], const RowVisibility& visibility,
                        int32 first_row, int32 first_key) {
  const int32 row = first_row + int32(recomputed(fragment_row()));
  const int32 key = first_key + fragment_column();  // of this lane's first score
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const Range keys = visibility.keys_of(row + r * 16 + half * 8);
      const Range columns{keys.begin - key, keys.end - key};
#pragma unroll
      for (int32 c = 0; c < key_tiles; ++c)
#pragma unroll
        for (int32 i = 0; i < 2; ++i) {
          if (!columns.contains(c * 8 + i)) scores[r][c][half * 2 + i] = -infinity();
        }
    }
}
