// What a kernel is told at launch, by value (twin: _params.py, byte for byte).
#pragma once

#include <core/types.cuh>

// Distances in elements.  `outer` is a request or a page, `row` a token or a slot of a page.
struct Strides {
  int64 outer, row, head;
};

// Into how many parts the keys of a request are cut (twin: SplitRule in _records.py): into parts of
// the load that all blocks at work have on average, or of `smallest` keys if that is more.
struct SplitRule {
  float share;     // of a block in the keys of all: kv heads / blocks at work at a time
  int32 smallest;  // keys
  int32 alone;     // the load is that of the request alone
};

// Of every attention kernel; what one has no use for is null or 0.  Tensor maps may follow.
struct alignas(64) AttentionParams {
  const void* q;               // [batch, q_len, q_heads, head_dim_qk] or [tokens, …]
  const void* k;               // [batch, kv_len, kv_heads, head_dim_qk], [tokens, …] or pages
  const void* v;               // the same with head_dim_v
  const int32* cu_seqlens_q;   // [batch + 1]; null: every request has q_len tokens
  const int32* cu_seqlens_kv;  // [batch + 1]; null: every request has kv_len tokens, or is paged
  const int32* seq_lens;       // [batch], paged only
  const int32* block_tables;   // [batch, max_pages], paged only
  const float* sinks;          // [q_heads]; may be null
  const float* scale_array;    // one number that replaces `scale`; may be null
  const float* out_scale_array;
  const float* thresholds;  // [batch, q_heads] by strides; may be null
  const float* seeds;       // as lse, packed; decode only; may be null
  void* out;                // as q, with head_dim_v
  float* lse;               // [batch, q_len, q_heads] or [tokens, q_heads]; may be null
  uint64* skip_counts;      // [visited, skipped, ineligible][batch][q_heads]; may be null
  float* dropped_mass;      // as lse; may be null
  float* partial_out;       // [item][row][head_dim_v], decode only
  void* partial_rows;       // PartialRow [item][row], decode only
  uint32* arrivals;  // [q_blocks][kv_heads] and one of items, zero between calls, decode only
  alignas(16) Strides q_strides;
  Strides k_strides, v_strides, out_strides, lse_strides;
  int64 block_table_stride;     // from request to request
  int64 threshold_strides[2];   // request, head
  int32 batch, q_heads, group;  // group: q heads to a kv head
  int32 q_len, kv_len;          // of every request; of all together where they differ
  int32 q_blocks;               // grid: blocks of rows a head and request, or a head
  int32 head_dim_qk, head_dim_v;
  int32 page_shift, pages;    // page_size = 1 << page_shift
  int32 causal, window_left;  // window_left < 0: no window
  SplitRule splits;           // decode only
  int32 kv_heads;             // decode only, as what follows
  int32 items;                // at most
  int32 splitting;            // 0: no request is cut; splits are merged by 1: the last, 2: a kernel
  float scale, out_scale, soft_cap;
  float threshold;             // λ, or λ · kv_len, or the largest mass that a row may lose
  int32 threshold_per_length;  // λ = threshold / kv_len
  int32 unsafe;                // λ ≥ 1 is meant
};

static_assert(sizeof(Strides) == 24 && sizeof(AttentionParams) == 448);
