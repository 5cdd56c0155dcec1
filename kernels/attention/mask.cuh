// Which keys a query token sees: a range [begin(token), end(token)), both growing with the token.
//
//   causal         end = token + kv_len − q_len + 1      (the last token sees the last key)
//   window_left    begin = token + kv_len − q_len − window_left
#pragma once

#include <attention/params.cuh>
#include <core/math.cuh>
#include <tile/copy.cuh>
#include <tile/fragment.cuh>

struct Visibility {
  int32 q_len, kv_len, causal, window_left;

  // The same with tokens counted from `token`.
  DEVICE Visibility from(int32 token) const { return {q_len - token, kv_len, causal, window_left}; }

  // Tokens past the last one see nothing.
  DEVICE Range keys_of(int32 token) const {
    return token < q_len ? keys_of_existing(token) : Range{0, 0};
  }
  DEVICE Range keys_of_existing(int32 token) const {
    const int32 diagonal = token + kv_len - q_len;
    const int32 begin = window_left < 0 ? 0 : maximum(0, diagonal - window_left);
    return {begin, causal ? minimum(kv_len, diagonal + 1) : kv_len};
  }

  // All keys that some of the first `count` tokens sees, of which there is one.
  DEVICE Range keys_of_first(int32 count) const {
    return {keys_of(0).begin, keys_of(minimum(count, q_len) - 1).end};
  }
};

// What a block's rows see, where each token has `pack` of them: row r is of token r / pack.
struct BlockVisibility {
  Visibility tokens;  // counted from the first row's
  int32 rows;         // that exist
  uint32 inverse;     // 2¹⁶ / pack, rounded up: of fewer than 256 rows, a product divides exactly

  DEVICE BlockVisibility(const Visibility& tokens, int32 rows, int32 pack)
      : tokens(tokens), rows(warp_uniform(rows)), inverse(warp_uniform(ceil_div(1 << 16, pack))) {}

  // Rows that do not exist see nothing.
  DEVICE Range keys_of(int32 row) const {
    if (row >= rows) return {0, 0};
    return tokens.keys_of_existing(uint32(row) * inverse >> 16);
  }

  // All keys that some row of [first, first + count) sees.
  DEVICE Range keys_of_rows(int32 first, int32 count) const {
    const int32 last = minimum(first + count, rows) - 1;
    if (last < first) return {0, 0};
    return {keys_of(first).begin, keys_of(last).end};
  }

  // Whether some row of [first, first + count) sees some key of `keys`.
  DEVICE bool sees_any(int32 first, int32 count, Range keys) const {
    const Range seen = keys_of_rows(first, count);
    return seen.begin < keys.end && keys.begin < seen.end;
  }

  // Whether every row of [first, first + count) sees every key of `keys`.
  DEVICE bool sees_all(int32 first, int32 count, Range keys) const {
    const int32 last = first + count - 1;
    return last < rows && keys_of(last).begin <= keys.begin && keys.end <= keys_of(first).end;
  }
};

// Scores of keys that a row does not see become −∞.
template <int32 row_tiles, int32 key_tiles, typename Rows>
DEVICE void mask_scores(float (&scores)[row_tiles][key_tiles][4], const Rows& visibility,
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
