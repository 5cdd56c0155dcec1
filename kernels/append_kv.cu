// Writes new tokens' keys and values into the pages of a cache.
//
// Grid:    one warp for each share of a token's K or V; a share is `vectors` times 32 × 16 bytes.
// Memory:  a share is requested first; where it goes is found while it is on its way.
// Bounds:  a token is dropped if it belongs to no request, if its position is outside of the
//          table, or if its page is outside of the cache.
#include <attention/params.cuh>
#include <core/device.cuh>
#include <core/math.cuh>
#include <core/types.cuh>

struct AppendConfig {
  int32 warps = 4;    // of a block
  int32 vectors = 4;  // that a lane has on their way at once

  DEVICE constexpr int32 threads() const { return warps * warp_size; }
  DEVICE constexpr int32 share() const { return vectors * warp_size; }
};
constexpr AppendConfig config{CUATTN_CONFIG};

// 16 bytes: one load, one store.
struct alignas(16) Vector {
  uint32 words[4];
};

// What the kernel is told at launch (twin: _tool_params.py).  Strides are in vectors.
struct AppendParams {
  Vector* k;                    // [page][slot][kv_heads][k_vectors]
  Vector* v;                    // the same with v_vectors
  const Vector* k_new;          // [request][token][kv_heads][k_vectors], or [token][…]
  const Vector* v_new;          // the same with v_vectors
  const int32* block_tables;    // [batch, max_pages]
  const int32* seq_lens;        // [batch], new tokens included
  const int32* cu_seqlens_new;  // [batch + 1]; null: every request has `tokens_each`
  Strides k_strides, v_strides, k_new_strides, v_new_strides;
  int64 block_table_stride;
  int32 batch, tokens, tokens_each, kv_heads;
  int32 k_vectors, v_vectors;  // of a row
  int32 k_shares, v_shares;    // of a token
  int32 page_shift, pages, max_pages, unused;
};
static_assert(sizeof(AppendParams) == 208);

// A warp's part of one token's K or V: vectors [first, first + config.share()) of all its heads.
struct Share {
  int32 token, first;
  bool of_values;
};

struct Slot {
  int32 page, row;
  bool exists;
};

DEVICE Share find_share(const AppendParams& params) {
  const int32 warp = block_index() * config.warps + warp_index();
  const int32 shares = params.k_shares + params.v_shares;
  const int32 share = warp % shares;
  const bool of_values = share >= params.k_shares;
  return {warp / shares, (share - (of_values ? params.k_shares : 0)) * config.share(), of_values};
}

// The last request whose tokens begin at or before `token`: the lanes look at 32 places at a time.
DEVICE int32 find_request(const int32* begins, int32 batch, int32 token) {
  int32 first = 0, count = batch;  // it is in [first, first + count)
  while (count > 1) {
    const int32 step = ceil_div(count, warp_size);
    const int32 place = lane_index() * step;
    const bool begun = place < count && begins[first + place] <= token;
    const int32 passed = maximum(count_ones(warp_ballot(begun)) - 1, 0) * step;
    first += passed;
    count = minimum(step, count - passed);
  }
  return first;
}

DEVICE Slot find_slot(const AppendParams& params, int32 token) {
  constexpr Slot nowhere{0, 0, false};
  int32 request = token / params.tokens_each;
  int32 from_end = params.tokens_each - token % params.tokens_each;  // 1: the request's last token
  if (params.cu_seqlens_new) {
    request = find_request(params.cu_seqlens_new, params.batch, token);
    const int32 begin = params.cu_seqlens_new[request];
    const int32 end = params.cu_seqlens_new[request + 1];
    if (token < begin || token >= end) return nowhere;
    from_end = end - token;
  }
  const int32 position = maximum(params.seq_lens[request], 0) - from_end;
  const int32 entry = position >> params.page_shift;
  if (position < 0 || entry >= params.max_pages) return nowhere;
  const int32 page = params.block_tables[request * params.block_table_stride + entry];
  const int32 row = position & ((1 << params.page_shift) - 1);
  return {page, row, uint32(page) < uint32(params.pages)};
}

KERNEL void __launch_bounds__(config.threads())
    append_kv(const __grid_constant__ AppendParams params) {
  const Share share = find_share(params);
  if (share.token >= params.tokens) return;
  const int32 row_vectors = share.of_values ? params.v_vectors : params.k_vectors;
  const int32 count = params.kv_heads * row_vectors;

  const Strides& from = share.of_values ? params.v_new_strides : params.k_new_strides;
  const int32 outer = params.cu_seqlens_new ? 0 : share.token / params.tokens_each;
  const int32 row = share.token - outer * params.tokens_each;
  const Vector* source =
      (share.of_values ? params.v_new : params.k_new) + outer * from.outer + row * from.row;
  Vector staged[config.vectors];
#pragma unroll
  for (int32 i = 0; i < config.vectors; ++i) {
    const int32 index = share.first + i * warp_size + lane_index();
    if (index >= count) break;
    staged[i] = source[index / row_vectors * from.head + index % row_vectors];
  }

  const Slot slot = find_slot(params, share.token);
  if (!slot.exists) return;
  const Strides& to = share.of_values ? params.v_strides : params.k_strides;
  Vector* target =
      (share.of_values ? params.v : params.k) + slot.page * to.outer + slot.row * to.row;
#pragma unroll
  for (int32 i = 0; i < config.vectors; ++i) {
    const int32 index = share.first + i * warp_size + lane_index();
    if (index >= count) break;
    target[index / row_vectors * to.head + index % row_vectors] = staged[i];
  }
}
