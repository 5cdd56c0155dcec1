// Paged decode: which rows of which request a block works on, and which tiles of keys its warps do.
//
//   rows     row = token · group + head of the group: all that one kv head serves, cut into blocks
//            of `block_rows`
//   splits   the keys of a request are shared out among blocks, if it has more of them than a block
//            has to do on average
//   items    one block of rows, one kv head, one split: first all with split 0, which are found at
//            once, then what the other splits of long requests add
//   tiles    counted from the last one down, tile i goes to split i % splits and, there, to warp
//            i / splits % warps: heavy tiles lie together, and so everybody has some of them
#pragma once

#include <attention/mask.cuh>
#include <attention/schedule.cuh>
#include <ptx/redux.cuh>

// A request's tokens and keys, as they are now on the device.
struct DecodeRequest {
  int32 q_start, q_len, kv_len;  // q_start: tokens of the requests before
  int32 keys;                    // that its tokens see

  DEVICE DecodeRequest(const AttentionParams& params, int32 request) {
    q_start = request * params.q_len;
    q_len = params.q_len;
    if (params.cu_seqlens_q) {
      const Range tokens = tokens_of(params.cu_seqlens_q, request, params.q_len);
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

  static constexpr bool may_be_nobody = false;
  static DEVICE int32 count(const AttentionParams& params) { return params.batch; }
  static DEVICE int32 tokens(const AttentionParams& params) { return params.q_len; }  // if even
  static DEVICE bool uneven(const AttentionParams& params) { return params.cu_seqlens_q; }
};

// Keys times blocks of rows, of all requests.
template <int32 block_rows, typename Request>
DEVICE int64 total_load(const AttentionParams& params) {
  int64 load = 0;
#pragma unroll 4
  for (int32 request = lane_index(); request < Request::count(params); request += warp_size) {
    const Request here(params, request);
    load += int64(here.keys) * here.template row_blocks<block_rows>(params);
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
  int32 place;                   // of its rows and kv head among all
  bool exists;

  DEVICE RowVisibility visibility(const AttentionParams& params) const {
    return {{q_len, kv_len, params.causal, params.window_left}, first_row, params.group};
  }
};

// How requests are cut, which no block decides alone.
template <int32 block_rows, typename Request = DecodeRequest>
struct DecodeSchedule {
  const AttentionParams& params;
  const int64 load;  // of all requests

  DEVICE DecodeSchedule(const AttentionParams& params)
      : params(params),
        load(params.splitting && !params.splits.alone ? total_load<block_rows, Request>(params)
                                                      : 0) {}
  // The same with a load that is known.
  DEVICE DecodeSchedule(const AttentionParams& params, int64 load) : params(params), load(load) {}

  // With split 0; where requests have unequal lengths, some do not exist.
  DEVICE int32 first_items() const { return params.q_blocks * params.kv_heads; }

  DEVICE int32 row_blocks(const Request& request) const {
    return request.template row_blocks<block_rows>(params);
  }
  DEVICE int32 splits(const Request& request) const {
    if (!params.splitting) return 1;
    const int64 own = int64(request.keys) * row_blocks(request);
    return splits_of(params.splits, request.keys, params.splits.alone ? own : load);
  }
  // Items of a request beyond those with split 0.
  DEVICE int32 more_items(int32 request) const {
    const Request here(params, request);
    return row_blocks(here) * params.kv_heads * (splits(here) - 1);
  }
  // The same of all requests before.
  DEVICE int32 more_items_before(int32 request) const {
    int32 items = 0;
    for (int32 other = lane_index(); other < request; other += warp_size)
      items += more_items(other);
    return redux_add(items);
  }

  // How many items with split 0 exist, and how many in all.
  DEVICE int32 existing_first_items() const {
    if (!Request::uneven(params)) return first_items();
    int32 items = 0;
    for (int32 request = lane_index(); request < Request::count(params); request += warp_size)
      items += row_blocks(Request(params, request)) * params.kv_heads;
    return redux_add(items);
  }
  DEVICE int32 existing_items(int32 existing_first) const {
    return existing_first + (params.splitting ? more_items_before(Request::count(params)) : 0);
  }

  DEVICE DecodeWork find(int32 item) const {
    DecodeWork work{.exists = true};
    int32 slot = item, heads = params.kv_heads;  // slot: inside the request
    const bool more = item >= first_items();
    if (more || Request::uneven(params)) {
      const auto items_of = [&](int32 request) {
        return more ? more_items(request) : row_blocks(Request(params, request)) * params.kv_heads;
      };
      slot -= more ? first_items() : 0;
      work.exists = find_request(Request::count(params), items_of, work.request, slot);
      if (!work.exists) return work;
      work.request = warp_uniform(work.request);
      slot = warp_uniform(slot);
    } else {
      heads = ceil_div(Request::tokens(params) * params.group, block_rows) * params.kv_heads;
      work.request = slot / heads;
      slot %= heads;
    }
    const Request here(params, work.request);
    if constexpr (Request::may_be_nobody) {
      work.exists = here.q_len > 0;
      if (!work.exists) return work;
    }
    work.q_start = warp_uniform(here.q_start);
    work.q_len = warp_uniform(here.q_len);
    work.kv_len = warp_uniform(here.kv_len);
    work.splits = warp_uniform(splits(here));
    // Blocks of rows that read the same keys lie next to each other, then heads, then splits.
    const int32 blocks = row_blocks(here), block = slot % blocks, rest = slot / blocks;
    work.kv_head = rest % params.kv_heads;
    work.split = rest / params.kv_heads + more;
    work.first_row = block * block_rows;
    work.rows = minimum(work.q_len * params.group - work.first_row, block_rows);
    // Requests of unequal lengths have a block more than their rows fill, at most.
    const int32 before = Request::uneven(params)
                             ? work.q_start * params.group / block_rows + work.request
                             : work.request * blocks;
    work.place = (before + block) * params.kv_heads + work.kv_head;
    return work;
  }
};

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
