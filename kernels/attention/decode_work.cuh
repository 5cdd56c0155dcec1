// Paged decode: which rows of which request a block works on, and which tiles of keys its warps do.
//
//   rows     row = token · group + head of the group: all that one kv head serves, cut into blocks
//            of `block_rows`
//   splits   the keys of a request are shared out among blocks, if it has more of them than a block
//            has to do on average
//   items    one block of rows, one kv head, one split; numbered by request, split, head, rows
//   tiles    counted from the last one down, tile i goes to split i % splits and, there, to warp
//            i / splits % warps: heavy tiles lie together, and so everybody has some of them
#pragma once

#include <attention/mask.cuh>
#include <attention/schedule.cuh>

// A request's tokens and keys, as they are now on the device.
struct DecodeRequest {
  int32 q_start, q_len, kv_len;  // q_start: tokens of the requests before
  int32 keys;                    // that its tokens see

  DEVICE DecodeRequest(const AttentionParams& params, int32 request) {
    q_start = request * params.q_len;
    q_len = params.q_len;
    if (params.cu_seqlens_q) {
      const Range tokens = tokens_of(params.cu_seqlens_q, request, params.tokens);
      q_start = tokens.begin;
      q_len = tokens.end - tokens.begin;
    }
    kv_len = minimum(maximum(params.seq_lens[request], 0), params.kv_len);
    const Visibility visibility{q_len, kv_len, params.causal, params.window_left};
    keys = q_len > 0 ? kv_len - visibility.keys_of(0).begin : 0;
  }

  template <int32 block_rows>
  DEVICE int32 row_blocks(const AttentionParams& params) const {
    return ceil_div(q_len * params.group, block_rows);
  }
};

// Keys times blocks of rows, of all requests.
template <int32 block_rows>
DEVICE int64 total_load(const AttentionParams& params) {
  int64 load = 0;
#pragma unroll 4
  for (int32 request = lane_index(); request < params.batch; request += warp_size) {
    const DecodeRequest here(params, request);
    load += int64(here.keys) * here.row_blocks<block_rows>(params);
  }
#pragma unroll
  for (int32 distance = 16; distance > 0; distance /= 2) load += shuffle_xor(load, distance);
  return load;
}

DEVICE int32 splits_of(const SplitRule& rule, int32 keys, int64 load) {
  return maximum(keys / maximum(rule.smallest, int32(float(load) * rule.share)), 1);
}

// What a row of a block sees, rows counted from the block's first.
struct RowVisibility {
  Visibility tokens;
  int32 first_row, group;

  DEVICE Range keys_of(int32 row) const { return tokens.keys_of((first_row + row) / group); }
};

// One item: a block's share.
struct DecodeWork {
  int32 request, kv_head, split, splits;
  int32 first_row, rows;         // of the block; the first counted in the request
  int32 q_start, q_len, kv_len;  // of the request
  int32 item, split_stride;      // its number; how many further on the next split's is
  bool exists;

  DEVICE RowVisibility visibility(const AttentionParams& params) const {
    return {{q_len, kv_len, params.causal, params.window_left}, first_row, params.group};
  }
};

// Find item number `item`; `load` is the total, if requests may be cut.
template <int32 block_rows>
DEVICE DecodeWork find_decode_work(const AttentionParams& params, int32 item, int64 load) {
  const int32 kv_heads = params.q_heads / params.group;
  const auto splits = [&](const DecodeRequest& here) {
    if (!params.splitting) return 1;
    const int64 own = int64(here.keys) * here.row_blocks<block_rows>(params);
    return splits_of(params.splits, here.keys, params.splits.alone ? own : load);
  };
  const auto items_of = [&](int32 request) {
    const DecodeRequest here(params, request);
    return here.row_blocks<block_rows>(params) * splits(here) * kv_heads;
  };
  DecodeWork work{.item = item};
  int32 slot = item;  // inside the request
  if (!params.splitting && !params.cu_seqlens_q) {
    const int32 items = ceil_div(params.q_len * params.group, block_rows) * kv_heads;
    work.request = item / items;
    slot = item % items;
    work.exists = work.request < params.batch;
  } else {
    work.exists = find_request(params.batch, items_of, work.request, slot);
  }
  if (!work.exists) return work;
  work.request = warp_uniform(work.request);
  slot = warp_uniform(slot);
  const DecodeRequest here(params, work.request);
  work.q_start = warp_uniform(here.q_start);
  work.q_len = warp_uniform(here.q_len);
  work.kv_len = warp_uniform(here.kv_len);
  work.splits = warp_uniform(splits(here));
  // Blocks of rows that read the same keys lie next to each other, then heads, then splits.
  const int32 rows = work.q_len * params.group, row_blocks = ceil_div(rows, block_rows);
  work.first_row = slot % row_blocks * block_rows;
  work.rows = minimum(rows - work.first_row, block_rows);
  work.kv_head = slot / row_blocks % kv_heads;
  work.split = slot / row_blocks / kv_heads;
  work.split_stride = row_blocks * kv_heads;
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
