// Which rows of which request a block works on, and in which order it visits the keys.
//
// Lengths are read on the device: the grid depends on shapes only, blocks without rows leave.
//
// Packing: a block has the tokens of one query head, or those of all heads of a kv head, which then
// read the keys once.
//
//   rows     row r of a block is of its token r / pack, and of head r % pack of its `pack` heads
//   units    come one after the other in a block, and begin with a token: rows of one that its
//            unit / pack tokens do not fill do not exist
//   blocks   are enumerated by query head; a packed group needs fewer, those of its first heads
#pragma once

#include <attention/mask.cuh>
#include <attention/params.cuh>
#include <core/math.cuh>

// How many heads share a request's blocks: all of a group, if the tokens of one would fill half of
// a block at most.  The request alone decides, so that it is no matter who else is in the batch
// (twin: Geometry.pack in _records.py).
template <int32 block_q, int32 unit>
DEVICE constexpr int32 pack_of(int32 q_len, int32 group) {
  return q_len <= block_q / 2 && group <= unit ? group : 1;
}

// One block's share: tokens from `first_token` on, of one request and of heads [head, head + pack).
struct Work {
  int32 request, head, first_token, pack;
  int32 q_len, kv_len;
  int32 q_start, kv_start;  // the request's first token, where requests lie end to end
  bool exists;

  DEVICE Visibility visibility(const AttentionParams& params) const {
    return {q_len, kv_len, params.causal, params.window_left};
  }

  // What the rows of the block's unit number `index` see.
  template <int32 unit>
  DEVICE BlockVisibility unit_visibility(const AttentionParams& params, int32 index = 0) const {
    const int32 tokens = warp_uniform(unit / pack);
    const Visibility here = visibility(params).from(first_token + index * tokens);
    return {here, minimum(here.q_len, tokens) * pack, pack};
  }

  // All keys that the rows of the block see, which has so many units.
  template <int32 unit>
  DEVICE Range keys(const AttentionParams& params, int32 units) const {
    return visibility(params).from(first_token).keys_of_first(units * (unit / pack));
  }
};

// A request's part [begin, end) of `tokens`, whatever cu_seqlens holds.
DEVICE Range tokens_of(const int32* cu_seqlens, int32 request, int32 tokens) {
  const int32 begin = minimum(maximum(cu_seqlens[request], 0), tokens);
  return {begin, minimum(maximum(cu_seqlens[request + 1], begin), tokens)};
}

// Find the request that owns block `slot` when request i has `blocks_of(i)` of them: the 32 lanes
// look at 32 requests at a time.  `slot` becomes the block inside the request.
template <typename BlocksOf>
DEVICE bool find_request(int32 batch, const BlocksOf& blocks_of, int32& request, int32& slot) {
  for (int32 first = 0; first < batch; first += warp_size) {
    const int32 candidate = first + lane_index();
    const int32 blocks = candidate < batch ? blocks_of(candidate) : 0;
    int32 blocks_so_far = blocks;  // of this lane's request and those before it
#pragma unroll
    for (int32 distance = 1; distance < warp_size; distance *= 2) {
      const int32 below = shuffle_up(blocks_so_far, distance);
      if (lane_index() >= distance) blocks_so_far += below;
    }
    const int32 owner = count_ones(warp_ballot(blocks_so_far <= slot));
    if (owner < warp_size) {
      request = first + owner;
      slot -= shuffle(blocks_so_far - blocks, owner);
      return true;
    }
    slot -= shuffle(blocks_so_far, warp_size - 1);
  }
  return false;
}

// Block of rows `slot`, the last rows first, of head `head` of all requests' heads or, where
// requests lie end to end, of one's.
template <int32 block_q, int32 unit>
DEVICE Work work_of(const AttentionParams& params, int32 slot, int32 head) {
  Work work{};
  work.head = head % params.q_heads;
  work.request = head / params.q_heads;
  work.q_len = params.q_len;
  work.kv_len = params.kv_len;
  work.exists = true;
  if (params.cu_seqlens_q) {
    const auto blocks_of = [&](int32 request) {
      const Range tokens = tokens_of(params.cu_seqlens_q, request, params.q_len);
      return ceil_div(tokens.end - tokens.begin, block_q);
    };
    work.exists = find_request(params.batch, blocks_of, work.request, slot);
    if (!work.exists) return work;
    const Range tokens = tokens_of(params.cu_seqlens_q, work.request, params.q_len);
    work.q_start = tokens.begin;
    work.q_len = tokens.end - tokens.begin;
  }
  if (params.cu_seqlens_kv) {
    const Range tokens = tokens_of(params.cu_seqlens_kv, work.request, params.kv_len);
    work.kv_start = tokens.begin;
    work.kv_len = tokens.end - tokens.begin;
  }
  if (params.seq_lens) {
    work.kv_len = minimum(maximum(params.seq_lens[work.request], 0), params.kv_len);
  }
  work.request = warp_uniform(work.request);
  work.q_start = warp_uniform(work.q_start);
  work.kv_start = warp_uniform(work.kv_start);
  work.q_len = warp_uniform(work.q_len);
  work.kv_len = warp_uniform(work.kv_len);
  slot = warp_uniform(slot);
  work.pack = pack_of<block_q, unit>(work.q_len, params.group);
  if (work.pack > 1) {  // each head has one block, of which the group needs the first ones
    slot = work.head % work.pack;
    work.head -= slot;
  }
  // Under a causal mask the last rows have most keys: they start first.
  const int32 tokens = block_q / unit * (unit / work.pack);
  work.first_token = warp_uniform((ceil_div(work.q_len, tokens) - 1 - slot) * tokens);
  work.exists = work.first_token >= 0;
  return work;
}

template <int32 block_q, int32 unit = block_q>
DEVICE Work find_work(const AttentionParams& params, uint32 block) {
  return work_of<block_q, unit>(params, block % params.q_blocks, block / params.q_blocks);
}

// The order of items that blocks take one by one: the longest first, so that the last ones are
// short; but only in sections of heads whose keys and values fit the L2 together, and in these the
// heads take turns.
template <int32 block_q, int32 unit = block_q>
struct ItemOrder {
  static constexpr int32 section_kib = 32 << 10;

  const AttentionParams& params;
  int32 heads, section;  // in all, in one

  DEVICE ItemOrder(const AttentionParams& params) : params(params) {
    const bool ragged = params.cu_seqlens_q;
    heads = ragged ? params.q_heads : params.q_heads * params.batch;
    const int32 tokens = params.cu_seqlens_kv ? params.kv_len / params.batch : params.kv_len;
    const int32 kib = tokens / 512 * (params.head_dim_qk + params.head_dim_v);
    section = minimum(section_kib / maximum(kib, 1), heads) * params.group;
    section = minimum(maximum(section, params.group), heads);
  }

  DEVICE Work find(int32 item) const {
    const int32 first_head = item / (section * params.q_blocks) * section;
    const int32 rest = item - first_head * params.q_blocks;
    const int32 width = minimum(section, heads - first_head);
    return work_of<block_q, unit>(params, rest / width, first_head + rest % width);
  }
};

// Tiles of keys in order: the first, where attention sinks are, then from the last one down,
// because near keys tend to have the largest scores.  Early large maxima let skip-softmax leave out
// more.
struct TileOrder {
  int32 first, count;  // tiles [first, first + count)

  DEVICE TileOrder(Range keys, int32 block_kv)
      : first(keys.begin / block_kv),
        count(keys.empty() ? 0 : ceil_div(keys.end, block_kv) - keys.begin / block_kv) {}

  DEVICE int32 at(int32 step) const { return step == 0 ? first : first + count - step; }
};
