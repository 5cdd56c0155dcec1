// Paged decode: which rows of which request a block works on, and which tiles of keys its warps do.
//
//   rows     row = token · group + head of the group: all that one kv head serves, cut into blocks
//            of `block_rows`
//   splits   the keys of a request are shared out among as many blocks as its length asks for
//   tiles    counted from the last one down, tile i goes to split i % splits and, there, to warp
//            i / splits % warps: heavy tiles lie together, and so everybody has some of them
#pragma once

#include <attention/mask.cuh>
#include <attention/schedule.cuh>

DEVICE int32 splits_of(const SplitRule& rule, int32 keys) {
  const int32 by_target = minimum(rule.target, ceil_div(keys, rule.smallest));
  const int32 by_largest = ceil_div(keys, rule.largest);
  return maximum(1, minimum(maximum(by_target, by_largest), rule.most));
}

// A request's tokens and keys, as they are now on the device.
struct DecodeRequest {
  int32 q_start, q_len, kv_len;  // q_start: tokens of the requests before
  int32 splits;

  DEVICE DecodeRequest(const AttentionParams& params, int32 request) {
    q_start = request * params.q_len;
    q_len = params.q_len;
    if (params.cu_seqlens_q) {
      const Range tokens = tokens_of(params.cu_seqlens_q, request, params.tokens);
      q_start = tokens.begin;
      q_len = tokens.end - tokens.begin;
    }
    kv_len = minimum(maximum(params.seq_lens[request], 0), params.kv_len);
    splits = splits_of(params.splits, kv_len - visibility(params).keys_of(0).begin);
  }

  DEVICE Visibility visibility(const AttentionParams& params) const {
    return {q_len, kv_len, params.causal, params.window_left};
  }
};

// What a row of a block sees, rows counted from the block's first.
struct RowVisibility {
  Visibility tokens;
  int32 first_row, group;

  DEVICE Range keys_of(int32 row) const { return tokens.keys_of((first_row + row) / group); }
};

// One block's share.
struct DecodeWork {
  int32 request, kv_head, split, splits;
  int32 first_row, rows;         // of the block; the first counted in the request
  int32 q_start, q_len, kv_len;  // of the request
  bool exists;

  DEVICE RowVisibility visibility(const AttentionParams& params) const {
    return {{q_len, kv_len, params.causal, params.window_left}, first_row, params.group};
  }
};

template <int32 block_rows>
DEVICE DecodeWork find_decode_work(const AttentionParams& params, int32 item) {
  const int32 kv_heads = params.q_heads / params.group;
  const auto items_of = [&](int32 request) {
    const DecodeRequest here(params, request);
    return ceil_div(here.q_len * params.group, block_rows) * here.splits * kv_heads;
  };
  DecodeWork work{};
  work.exists = find_request(params.batch, items_of, work.request, item);
  if (!work.exists) return work;
  work.request = warp_uniform(work.request);
  item = warp_uniform(item);
  const DecodeRequest here(params, work.request);
  work.q_start = warp_uniform(here.q_start);
  work.q_len = warp_uniform(here.q_len);
  work.kv_len = warp_uniform(here.kv_len);
  work.splits = warp_uniform(here.splits);
  // Blocks of rows that read the same keys lie next to each other, then heads, then splits.
  const int32 rows = work.q_len * params.group, row_blocks = ceil_div(rows, block_rows);
  work.first_row = item % row_blocks * block_rows;
  work.rows = minimum(rows - work.first_row, block_rows);
  work.kv_head = item / row_blocks % kv_heads;
  work.split = item / row_blocks / kv_heads;
  return work;
}

// One warp's tiles, in its order.
struct TileDeal {
  int32 first, last;   // tiles that some row of the block sees; none: last < first
  int32 rank, stride;  // step s of this warp is tile last − rank − s · stride
  int32 count;         // steps

  DEVICE TileDeal(Range keys, int32 block_kv, int32 rank, int32 workers)
      : first(keys.begin / block_kv),
        last(keys.empty() ? first - 1 : (keys.end - 1) / block_kv),
        rank(rank),
        stride(workers),
        count(ceil_div(maximum(last - first + 1 - rank, 0), workers)) {}

  DEVICE int32 tiles() const { return last - first + 1; }
  DEVICE int32 at(int32 step) const { return last - rank - step * stride; }
};
