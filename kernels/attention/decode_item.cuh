// One item of decode as a warp sees it: what its rows see, which tiles are its own, where they lie.
#pragma once

#include <attention/decode_shape.cuh>
#include <attention/decode_work.cuh>
#include <attention/page_walk.cuh>
#include <attention/query_rows.cuh>
#include <tile/copy.cuh>

template <DecodeConfig config>
struct DecodeItem {
  using KTile = DecodeShape<config>::KTile;
  using VTile = DecodeShape<config>::VTile;
  using Shared = DecodeShared<config>;

  const AttentionParams& params;
  const Shared& shared;
  const DecodeWork work;
  const RowVisibility visibility;
  const Range keys;    // that some row sees
  const Range common;  // that all rows see
  const TileDeal deal;
  PageWalk<config.block_kv> walk;

  DEVICE DecodeItem(const AttentionParams& params, const Shared& shared, const DecodeWork& work)
      : params(params),
        shared(shared),
        work(work),
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

  template <typename Tile, typename Source>
  DEVICE void request(int32 slot, const Source& source, int32 tile, int32 columns) const {
    request_tile<warp_size>(Tile{shared.slot(warp_index(), slot)}, source, tile * config.block_kv,
                            keys, columns);
  }
  DEVICE WalkedRows<config.block_kv> walked(const void* array, const Strides& strides,
                                            int32 step) const {
    return {.first = static_cast<const char*>(array) + work.kv_head * strides.head * 2,
            .page_stride = strides.outer * 2,
            .slot_stride = strides.row * 2,
            .walk = walk,
            .step = step};
  }
  DEVICE void request_keys(int32 slot, int32 step) {
    walk.advance(step);
    request<KTile>(slot, walked(params.k, params.k_strides, step), deal.at(step),
                   params.head_dim_qk);
  }
  DEVICE void request_values(int32 slot, int32 step) const {
    request<VTile>(slot, walked(params.v, params.v_strides, step), deal.at(step),
                   params.head_dim_v);
  }
};
