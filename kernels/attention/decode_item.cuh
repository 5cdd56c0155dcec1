// One item of decode as a warp sees it: what its rows see, which tiles are its own, where they lie.
#pragma once

#include <attention/decode_shape.cuh>
#include <attention/decode_work.cuh>
#include <attention/kv_source.cuh>
#include <attention/page_walk.cuh>
#include <tile/copy.cuh>

// Rows of Q as they lie: all heads of a group, token after token.
struct GroupRows {
  const char* first;              // token 0, first head of the group
  int64 row_stride, head_stride;  // bytes
  int32 first_row, group;

  DEVICE SourceRow row(int32 index) const {
    const int32 token = (first_row + index) / group, head = (first_row + index) % group;
    return {first + token * row_stride + head * head_stride, true};
  }
};

template <DecodeConfig config>
struct DecodeItem {
  using Shape = DecodeShape<config>;
  using KTile = Shape::KTile;
  using VTile = Shape::VTile;
  using Shared = DecodeShared<config>;

  DecodeWork work;
  RowVisibility visibility;
  Range keys;    // that some row sees
  Range common;  // that all rows see
  TileDeal deal;
  PageWalk<config.block_kv> walk;

  DEVICE DecodeItem(const AttentionParams& params, const DecodeWork& work)
      : work(work),
        visibility(work.visibility(params)),
        keys{visibility.keys_of(0).begin, visibility.keys_of(work.rows - 1).end},
        common{visibility.keys_of(work.rows - 1).begin, visibility.keys_of(0).end},
        deal(keys, config.block_kv, work.split + work.splits * warp_index(),
             work.splits * config.warps),
        walk{.table = params.block_tables + work.request * params.block_table_stride,
             .page_shift = params.page_shift,
             .pages = params.pages,
             .deal = deal,
             .keys = keys} {}

  DEVICE Range tile_keys(int32 tile) const {
    return {tile * config.block_kv, (tile + 1) * config.block_kv};
  }

  DEVICE void request_q(const AttentionParams& params, SharedAddress target) const {
    constexpr int32 threads = minimum(config.threads(), config.rows * 8);
    if (thread_index() >= threads) return;
    const int32 outer = params.cu_seqlens_q ? 0 : work.request;
    const int32 row = params.cu_seqlens_q ? work.q_start : 0;
    const int64 start = outer * params.q_strides.outer + row * params.q_strides.row +
                        work.kv_head * params.group * params.q_strides.head;
    const GroupRows rows{.first = static_cast<const char*>(params.q) + start * 2,
                         .row_stride = params.q_strides.row * 2,
                         .head_stride = params.q_strides.head * 2,
                         .first_row = work.first_row,
                         .group = params.group};
    request_tile<threads>(typename Shape::QTile{target}, rows, 0, {0, work.rows},
                          params.head_dim_qk);
  }

  // A tile outside of this warp's deal.
  DEVICE void request_seed(const AttentionParams& params, SharedAddress target, int32 tile) const {
    const Place place{work.request, 0, work.kv_head, work.kv_len};
    request<KTile>(target, Source<true>::of(params.k, params.k_strides, params, place), tile,
                   params.head_dim_qk);
  }
  DEVICE void request_keys(const AttentionParams& params, SharedAddress target, int32 step) {
    walk.advance(step);
    request<KTile>(target, walked(params.k, params.k_strides, step), deal.at(step),
                   params.head_dim_qk);
  }
  DEVICE void request_values(const AttentionParams& params, SharedAddress target,
                             int32 step) const {
    request<VTile>(target, walked(params.v, params.v_strides, step), deal.at(step),
                   params.head_dim_v);
  }

 private:
  template <typename Tile, typename Source>
  DEVICE void request(SharedAddress target, const Source& source, int32 tile, int32 columns) const {
    request_tile<warp_size>(Tile{target}, source, tile * config.block_kv, keys, columns);
  }
  DEVICE WalkedRows<config.block_kv> walked(const void* array, const Strides& strides,
                                            int32 step) const {
    return {.first = static_cast<const char*>(array) + work.kv_head * strides.head * 2,
            .page_stride = strides.outer * 2,
            .slot_stride = strides.row * 2,
            .walk = walk,
            .step = step};
  }
};
