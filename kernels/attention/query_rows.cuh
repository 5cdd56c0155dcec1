// Rows of queries, and where they lie: row r is of token r / pack, of head r % pack of `pack`
// heads.
#pragma once

#include <attention/params.cuh>

// A row of q: token `token` of request `request`, whose tokens follow `q_start` others.
struct QueryRow {
  int32 request, q_start, token, head;

  // Where it lies in an array of that form.
  DEVICE int64 in(const Strides& strides, const AttentionParams& params) const {
    const bool ragged = params.cu_seqlens_q;
    return (ragged ? 0 : request) * strides.outer +
           (ragged ? q_start + token : token) * strides.row + head * strides.head;
  }
};

// Rows of the tokens from one on.
struct TokenRows {
  QueryRow first;
  int32 pack;

  DEVICE QueryRow at(int32 row) const {
    return {first.request, first.q_start, first.token + row / pack, first.head + row % pack};
  }
};

// Rows of Q as they lie: all heads of a group, token after token.
struct GroupRows {
  const char* first;              // token 0, first head of the group
  int64 row_stride, head_stride;  // bytes
  int32 first_row, group;

  DEVICE const char* row(int32 index) const {
    const int32 token = (first_row + index) / group, head = (first_row + index) % group;
    return first + token * row_stride + head * head_stride;
  }
  DEVICE bool exists(int32) const { return true; }
};
