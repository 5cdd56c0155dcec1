// Prefill attention, portable.  O = softmax(Q Kᵀ · scale + mask) V, LSE = log Σ exp.
//
// Grid:    one block for `block_q` query rows of one head of one request (schedule.cuh).
// Roles:   every warp owns `rows_per_warp` of the rows, their scores, statistics and output, from
//          Q Kᵀ to the last store; warps share nothing but the tiles of K and V.
// Memory:  Q stays in shared memory; K and V tiles come through a ring of two stages.
// Waits:   once a tile, all threads: tile i has landed, and tile i − 1's stage is free for i + 1.
//
//   request Q and tile 0
//   for each tile i:   wait │ request tile i + 1 │ S = Q Kᵀ │ mask │ skip? │ softmax │ O += P V
//   write O and LSE
#include <attention/config.cuh>
#include <attention/kv_source.cuh>
#include <attention/mask.cuh>
#include <attention/online_softmax.cuh>
#include <attention/output.cuh>
#include <attention/params.cuh>
#include <attention/schedule.cuh>
#include <attention/skip_softmax.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/sync.cuh>
#include <tile/copy.cuh>
#include <tile/gemm.cuh>
#include <tile/swizzle.cuh>

constexpr FmhaConfig config{CUATTN_CONFIG};

constexpr int32 stages = 2;
constexpr int32 row_tiles = config.rows_per_warp / 16;
constexpr int32 key_tiles = config.block_kv / 8;
constexpr int32 value_tiles = config.head_dim_v / 8;
static_assert(config.head_dim_qk % 16 == 0 && config.head_dim_v % 16 == 0, "mma takes 16 columns");
static_assert(config.block_kv % 16 == 0, "P V takes 16 keys at a time");

using Input = Element<config.element>;
using Output = Element<config.output>;
using QTile = SharedTile<config.block_q, config.head_dim_qk>;
using KTile = SharedTile<config.block_kv, config.head_dim_qk>;
using VTile = SharedTile<config.block_kv, config.head_dim_v>;
using Source = KvSource<config.paged>;

struct Shared {
  QTile q;
  TileRing<KTile, stages> k;
  TileRing<VTile, stages> v;

  DEVICE Shared() {
    SharedCarver carver;
    q.start = carver.take(q.bytes, "q");
    k.start = carver.take(k.bytes, "k");
    v.start = carver.take(v.bytes, "v");
  }
};

// What one warp carries from tile to tile.
struct WarpState {
  float output[row_tiles][value_tiles][4];  // O, not yet divided by the row sums
  RowStatistics<row_tiles> rows;
};

// One tile of keys for one warp's rows.
DEVICE void compute_tile(WarpState& state, SkipRule& skip, const Shared& shared, int32 step,
                         const Visibility& visibility, int32 warp_row, int32 first_row, Range keys,
                         float squash_factor, float scale) {
  float scores[row_tiles][key_tiles][4];  // S
  multiply_qk<config.head_dim_qk, Input>(scores, row_reader(shared.q, warp_row),
                                         column_reader(shared.k.tile(step)));
  if constexpr (config.soft_cap) squash(scores, squash_factor);
  if (!visibility.sees_all(first_row, config.rows_per_warp, keys)) {
    mask_scores(scores, visibility, first_row, keys.begin);
  }

  float tile_maxima[row_tiles][2];
  row_maxima(tile_maxima, scores);
  if constexpr (config.skip_softmax) {
    if (skip.vote(tile_maxima, state.rows.maximum)) return;
  }
  raise_maxima(state.rows, tile_maxima, state.output, scale);
  const auto v = row_reader(shared.v.tile(step));
#pragma unroll
  for (int32 key_step = 0; key_step < key_tiles / 2; ++key_step) {
    uint32 probabilities[row_tiles][4];  // P of 16 keys
    exponentiate<Input>(probabilities, state.rows, scores, key_step, scale);
    multiply_pv<Input>(state.output, probabilities, v, key_step);
  }
}

KERNEL void __launch_bounds__(config.threads())
    fmha_sm80(const __grid_constant__ FmhaParams params) {
  const Work work = find_work<config.block_q>(params);
  if (!work.exists || work.first_row < 0) return;
  const Shared shared;
  const int32 kv_head = work.head / params.group;
  const int32 outer_q = params.cu_seqlens_q ? 0 : work.request;
  const int32 outer_kv = params.cu_seqlens_kv ? 0 : work.request;

  // With a cap, scores are tanh(Q Kᵀ · scale / cap) and their unit is the cap.
  const float given_scale = params.scale_array ? *params.scale_array : params.scale;
  const float squash_factor =
      config.soft_cap ? given_scale * reciprocal_approximate(params.soft_cap) : 0.f;
  const float scale = (config.soft_cap ? params.soft_cap : given_scale) * log2_e;

  const Visibility visibility{work.q_len, work.kv_len, params.causal, params.window_left};
  const Range block_keys = visibility.keys_of_rows(work.first_row, config.block_q);
  const TileOrder order(block_keys, config.block_kv);
  const auto k_source = Source::make(params.k, params.k_strides, params, outer_kv, work.kv_start,
                                     kv_head, work.kv_len);
  const auto v_source = Source::make(params.v, params.v_strides, params, outer_kv, work.kv_start,
                                     kv_head, work.kv_len);
  const StridedRows q_source = KvSource<false>::make(params.q, params.q_strides, params, outer_q,
                                                     work.q_start, work.head, 0);

  const auto request_keys = [&](int32 step) {
    const int32 first_key = order.at(step) * config.block_kv;
    request_tile<config.threads()>(shared.k.tile(step), k_source, first_key, block_keys,
                                   params.head_dim_qk);
    request_tile<config.threads()>(shared.v.tile(step), v_source, first_key, block_keys,
                                   params.head_dim_v);
  };

  WarpState state;
  clear(state.output);
  SkipRule skip(params, work.request, work.head, work.kv_len, scale);

  request_tile<config.threads()>(shared.q, q_source, work.first_row, {0, work.q_len},
                                 params.head_dim_qk);
  if (order.count > 0) request_keys(0);
  cp_async_commit();
  for (int32 step = 0; step < order.count; ++step) {
    cp_async_wait<0>();  // this thread's part of tile `step` has landed
    sync_block();        // everyone's has, and nobody reads tile `step − 1` any more
    if (step + 1 < order.count) request_keys(step + 1);
    cp_async_commit();
    const int32 warp_row = recomputed(warp_index()) * config.rows_per_warp;
    const int32 first_row = work.first_row + warp_row;
    const int32 first_key = order.at(step) * config.block_kv;
    const Range keys{first_key, first_key + config.block_kv};
    if (visibility.sees_any(first_row, config.rows_per_warp, keys)) {
      compute_tile(state, skip, shared, step, visibility, warp_row, first_row, keys, squash_factor,
                   scale);
    }
  }
  cp_async_wait<0>();

  const bool has_sink = params.sinks != nullptr;
  const float sink = has_sink ? params.sinks[work.head] * log2_e : 0.f;
  const float out_scale = params.out_scale_array ? *params.out_scale_array : params.out_scale;
  Output* out = static_cast<Output*>(params.out) + outer_q * params.out_strides.outer +
                work.q_start * params.out_strides.row + work.head * params.out_strides.head;
  float* lse = params.lse;
  if (lse) {
    lse += outer_q * params.lse_strides.outer + work.q_start * params.lse_strides.row +
           work.head * params.lse_strides.head;
  }
  const int32 first_row = work.first_row + warp_index() * config.rows_per_warp;
  write_rows(params, out, lse, state.output, state.rows, first_row, work.q_len, scale, has_sink,
             sink, out_scale);
  if constexpr (config.skip_softmax) skip.report(params, work.request, work.head);
}
