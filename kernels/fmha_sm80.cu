// Prefill attention, portable.  O = softmax(Q Kᵀ · scale + mask) V, LSE = log Σ exp.
//
// Grid:    one block for `block_q` query rows of one request: tokens of a head or, where they are
//          few, of all heads of a kv head (schedule.cuh).
// Roles:   every warp owns `rows_per_warp` of the rows, their scores, statistics and output, from
//          Q Kᵀ to the last store; warps share nothing but the tiles of K and V.
// Memory:  Q stays in shared memory; K and V tiles come through a ring of two stages.
// Waits:   once a tile, all threads: tile i has landed, and tile i − 1's stage is free for i + 1.
//
//   request Q and tile 0
//   for each tile i:   wait │ request tile i + 1 │ S = Q Kᵀ │ mask │ skip? │ softmax │ O += P V
//   write O and LSE
#include <attention/certificate.cuh>
#include <attention/config.cuh>
#include <attention/kv_source.cuh>
#include <attention/mask.cuh>
#include <attention/online_softmax.cuh>
#include <attention/params.cuh>
#include <attention/prefill_rows.cuh>
#include <attention/schedule.cuh>
#include <attention/skip_softmax.cuh>
#include <attention/soft_cap.cuh>
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

struct Shared {
  QTile q;
  TileRing<KTile, stages> k;
  TileRing<VTile, stages> v;
  LostWeight<row_tiles> lost;

  DEVICE Shared() {
    SharedCarver carver;
    q.start = carver.take(q.bytes, "q");
    k.start = carver.take(k.bytes, "k");
    v.start = carver.take(v.bytes, "v");
    if constexpr (config.certificate)
      lost.start = carver.take(config.threads() * lost_weight_bytes, "lost", 8);
  }
};

// What one warp carries from tile to tile.
struct WarpState {
  float output[row_tiles][value_tiles][4];  // O, not yet divided by the row sums
  RowStatistics<row_tiles> rows;
  SkipRule<row_tiles> skip;
  float squash_factor;  // with a cap, scores are tanh(Q Kᵀ · squash_factor)
  float scale;          // from scores to log2 units
};

DEVICE WarpState begin(const AttentionParams& params, const Work& work) {
  const float given = params.scale_array ? *params.scale_array : params.scale;
  const float scale = (config.soft_cap ? params.soft_cap : given) * log2_e;
  const int32 first_row = warp_index() * config.rows_per_warp;
  const auto threshold_of = [&](int32 row) {
    const int32 head = work.head + (first_row + row) % work.pack;
    return row_threshold(params, work.request, head, work.kv_len, scale);
  };
  WarpState state{.skip = SkipRule<row_tiles>(threshold_of), .scale = scale};
  if constexpr (config.soft_cap) {
    state.squash_factor = given * reciprocal_approximate(params.soft_cap);
  }
  clear(state.output);
  return state;
}

// One tile of keys for one warp's rows, which start at `warp_row` of the block's.
DEVICE void compute_tile(WarpState& state, const Shared& shared, const BlockVisibility& visibility,
                         int32 step, int32 warp_row, Range keys) {
  float scores[row_tiles][key_tiles][4];  // S
  multiply_qk<config.head_dim_qk, Input>(scores, row_reader(shared.q, warp_row),
                                         column_reader(shared.k.tile(step)));
  if constexpr (config.soft_cap) squash(scores, state.squash_factor);
  if (!visibility.sees_all(warp_row, config.rows_per_warp, keys)) {
    mask_scores(scores, visibility, warp_row, keys.begin);
  }

  float tile_maxima[row_tiles][2];
  row_maxima(tile_maxima, scores);
  if constexpr (config.skip_softmax) {
    if (state.skip.vote(tile_maxima, state.rows.maximum)) {
      if constexpr (config.certificate) {
        // NOTE: `warp_row` again: to keep it up to here takes a register too many at d 128.
        const int32 first_row = recomputed(warp_index()) * config.rows_per_warp;
        shared.lost.add(tile_maxima, visibility, first_row, keys, state.scale);
      }
      return;
    }
  }
  raise_maxima(state.rows, tile_maxima, state.output, state.scale);
  const auto v = row_reader(shared.v.tile(step));
#pragma unroll
  for (int32 key_step = 0; key_step < key_tiles / 2; ++key_step) {
    uint32 probabilities[row_tiles][4];  // P of 16 keys
    exponentiate<Input>(probabilities, state.rows, scores, key_step, state.scale);
    multiply_pv<Input>(state.output, probabilities, v, key_step);
  }
}

// Write this warp's rows, and its counts.
DEVICE void finish(const AttentionParams& params, const Shared& shared, const WarpState& state) {
  // NOTE: looked up again: to keep it through the loop of tiles would cost registers there.
  const Work work = find_work<config.block_q>(params, recomputed(block_index()));
  const int32 first_row = warp_index() * config.rows_per_warp;
  const auto rows = PrefillRows::of_unit<config.block_q>(params, work);
  write_rows<Output>(rows, state.output, state.rows, state.scale, first_row);
  if constexpr (config.certificate) shared.lost.write(rows, state.rows, state.scale, first_row);
  if constexpr (config.skip_softmax) {
    if (!params.skip_counts) return;
    const BlockVisibility visibility = work.unit_visibility<config.block_q>(params);
    const Range keys = visibility.keys_of_rows(first_row, config.rows_per_warp);
    const Voters voters{work.request, work.kv_len,
                        work.head,    work.pack,
                        first_row,    minimum(rows.end - first_row, config.rows_per_warp)};
    report_votes<false, warp_size>(params, voters, TileOrder(keys, config.block_kv).count,
                                   state.skip.skipped, lane_index());
  }
}

KERNEL void __launch_bounds__(config.threads())
    fmha_sm80(const __grid_constant__ AttentionParams params) {
  const Work work = find_work<config.block_q>(params, block_index());
  if (!work.exists) return;
  const Shared shared;
  const BlockVisibility visibility = work.unit_visibility<config.block_q>(params);
  const TileOrder order(visibility.keys_of_rows(0, config.block_q), config.block_kv);

  const Place keys{params.cu_seqlens_kv ? 0 : work.request, work.kv_start,
                   warp_uniform(work.head / params.group), work.kv_len};
  const QueryRow first{work.request, work.q_start, work.first_token, work.head};
  const GroupRows q_source{
      .first = static_cast<const char*>(params.q) + first.in(params.q_strides, params) * 2,
      .row_stride = params.q_strides.row * 2,
      .head_stride = params.q_strides.head * 2,
      .first_row = 0,
      .group = work.pack};
  const auto k_source = Source<config.paged>::of(params.k, params.k_strides, params, keys);
  const auto v_source = Source<config.paged>::of(params.v, params.v_strides, params, keys);
  const auto request_keys = [&](int32 step) {
    // NOTE: worked out again for every tile, as below: to keep it would cost registers.
    const Range seen = visibility.keys_of_rows(recomputed(0), config.block_q);
    const int32 first_key = TileOrder(seen, config.block_kv).at(step) * config.block_kv;
    request_tile<config.threads()>(shared.k.tile(step), k_source, first_key, seen,
                                   params.head_dim_qk);
    request_tile<config.threads()>(shared.v.tile(step), v_source, first_key, seen,
                                   params.head_dim_v);
  };

  WarpState state = begin(params, work);
  if constexpr (config.certificate) shared.lost.begin();
  if (order.count > 0) {
    request_tile<config.threads()>(shared.q, q_source, 0, {0, visibility.rows}, params.head_dim_qk);
    request_keys(0);
    cp_async_commit();
  }
  for (int32 step = 0; step < order.count; ++step) {
    cp_async_wait<0>();  // this thread's part of tile `step` has landed
    sync_block();        // everyone's has, and nobody reads tile `step − 1` any more
    if (step + 1 < order.count) request_keys(step + 1);
    cp_async_commit();
    const int32 warp = warp_uniform(recomputed(thread_index()) / warp_size);
    const int32 warp_row = warp * config.rows_per_warp;
    const TileOrder again(visibility.keys_of_rows(recomputed(0), config.block_q), config.block_kv);
    const int32 first_key = again.at(step) * config.block_kv;
    const Range tile{first_key, first_key + config.block_kv};
    if (visibility.sees_any(warp_row, config.rows_per_warp, tile)) {
      compute_tile(state, shared, visibility, step, warp_row, tile);
    }
  }
  finish(params, shared, state);
}
