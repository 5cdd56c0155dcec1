// Sparse attention: every token has a list of keys of its own, and so is a request of its own,
// whose keys are the entries of its list.
//
//   block_tables   [token][params.kv_len]: positions in the cache, page · page_size + slot
//   keys           the first entries, as many as the token would see keys; a position outside of
//                  the cache is none
#pragma once

#include <attention/decode_work.cuh>
#include <attention/row_result.cuh>
#include <attention/split_parts.cuh>

// Stands where DecodeRequest does; `request` there is the number of the token here.
struct SparseToken {
  int32 q_start, q_len, kv_len, keys;  // q_len is 0 for a token of no request

  DEVICE SparseToken(const AttentionParams& params, int32 token) {
    Range tokens{0, params.q_len};
    int32 request = token / params.q_len, index = token % params.q_len;
    if (params.cu_seqlens_q) {
      request = request_of(params, token);
      tokens = tokens_of(params.cu_seqlens_q, request, params.q_len);
      index = tokens.contains(token) ? token - tokens.begin : -1;
    }
    q_start = token;
    q_len = index >= 0;
    const int32 length = maximum(params.seq_lens[request], 0);
    const int32 seen = length - (tokens.end - tokens.begin) + index + 1;
    kv_len = keys = index >= 0 ? minimum(maximum(seen, 0), params.kv_len) : 0;
  }

  template <int32 block_rows>
  DEVICE int32 row_blocks(const AttentionParams& params) const {
    return q_len * ceil_div(params.group, block_rows);
  }

  static constexpr bool may_be_nobody = true;
  static DEVICE int32 count(const AttentionParams& params) {
    return params.cu_seqlens_q ? params.q_len : params.batch * params.q_len;
  }
  static DEVICE int32 tokens(const AttentionParams&) { return 1; }
  static DEVICE bool uneven(const AttentionParams&) { return false; }

  // The request whose tokens end behind `token` first; the last one if none does.
  static DEVICE int32 request_of(const AttentionParams& params, int32 token) {
    int32 first = 0, last = params.batch - 1;
    while (first < last) {
      const int32 middle = first + (last - first) / 2;
      if (params.cu_seqlens_q[middle + 1] > token) {
        last = middle;
      } else {
        first = middle + 1;
      }
    }
    return first;
  }

  // A token's work as its request's, whose number and whole length thresholds and counts go by.
  static DEVICE DecodeWork of_request(const AttentionParams& params, DecodeWork work) {
    const int32 token = work.request;
    work.request = params.cu_seqlens_q ? request_of(params, token) : token / params.q_len;
    work.kv_len = maximum(params.seq_lens[work.request], 0);
    return work;
  }

  // A head's row of such a token.
  static DEVICE QueryRow row(const AttentionParams& params, int32 token, int32 head) {
    if (params.cu_seqlens_q) return {0, token, 0, head};
    return {token / params.q_len, 0, token % params.q_len, head};
  }
};

// What items are cut from: lists of tokens, or the keys of requests.
template <bool sparse>
struct RequestKind {
  using Type = DecodeRequest;
};
template <>
struct RequestKind<true> {
  using Type = SparseToken;
};

// Which row of q an item's row is.
template <bool sparse>
DEVICE QueryRow row_of(const AttentionParams& params, const DecodeWork& work, int32 row) {
  if constexpr (sparse) return SparseToken::row(params, work.request, work.first_row + row);
  return query_row(params, work, row);
}

// The work of an item as its request's, which may be that of a token.
template <bool sparse>
DEVICE DecodeWork of_request(const AttentionParams& params, const DecodeWork& work) {
  if constexpr (sparse) return SparseToken::of_request(params, work);
  return work;
}
