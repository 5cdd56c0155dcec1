// Absorbed MLA decode, Hopper.  O = softmax(Q Kᵀ · scale) V: K is the cache's rows of 576, latent
// and rope, V their latent 512 columns; one KV head for all query heads.
//
// Work:    an item is 64 rows of one request (query heads × tokens) and one split of its keys
//          (decode_work.cuh), whose tiles of 64 keys mla_item.cuh deals; with chosen keys, of one
//          token and its list (sparse_token.cuh).  Blocks stay and take items one by one; a warp of
//          right finds them (mla_finder.cuh).
// Roles:   three warp-groups.
//            scores   Q in registers but for its last two chunks.  Q Kᵀ of tile i + 1 runs while P
//                     of tile i is stored; then softmax of i + 1
//            left     O columns 0 … 255, P V; its first thread loads tiles
//            right    O columns 256 … 511
//          Chosen keys are gathered by all threads of left and right (mla_gather.cuh).
// Memory:  a tile's latent part is K and V at once: it is loaded once, into one of three stages,
//          freed by both P V; its rope part has one place, free as soon as Q Kᵀ is done; one P.
//          An item's Q passes through a stage before its tiles, and the ring runs on from item to
//          item: so the next one's Q and first tiles are on their way before this one's O is
//          written.
// Waits:   known: what an item is
//          full: a tile is there, or a stage is free for Q │ empty: both P V are done with a tile,
//          or Q is in registers │ rope_full, rope_free
//          p_ready: P and what O shrinks by, or, after the last, what its rows are multiplied by
//          p_free: both P V are done with that; after the last: with the item
// Skips:   the scores' warps vote on a tile together (mla_rows.cuh).  One that is left out has
//          no P: both P V are told so in its turn, and only free its stage.
// Result:  as in decode: O and LSE, or a part that the last split to arrive merges; left and right
//          write it while the scores are at the next item.
#include <attention/config.cuh>
#include <attention/decode_item.cuh>
#include <attention/decode_work.cuh>
#include <attention/mla_finder.cuh>
#include <attention/mla_gather.cuh>
#include <attention/mla_item.cuh>
#include <attention/mla_pages.cuh>
#include <attention/mla_rows.cuh>
#include <attention/online_softmax.cuh>
#include <attention/row_result.cuh>
#include <attention/sparse_token.cuh>
#include <ptx/convert.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/shared.cuh>
#include <ptx/special.cuh>
#include <ptx/stmatrix.cuh>
#include <ptx/sync.cuh>
#include <ptx/wgmma.cuh>
#include <tile/copy.cuh>
#include <tile/descriptor.cuh>
#include <tile/swizzle.cuh>

constexpr MlaConfig config{CUATTN_CONFIG};
using Input = Element<config.element>;
using Output = Element<config.output>;

DEVICE QueryRow row_of(const AttentionParams& params, const DecodeWork& work, int32 row) {
  return row_of<config.sparse>(params, work, row);
}

// The parts of an item's row 0.
DEVICE GlobalParts parts_of(const AttentionParams& params, const Shared& shared,
                            const DecodeWork& work) {
  if (work.splits == 1) return {};
  return parts_of(kept_schedule<config.sparse>(params, shared), work, 0, latent);
}

// --- Scores.

struct Scores {
  uint32 q[q_chunks * 4][4];
  float s[tile_keys / 2];
  uint32 p[tile_keys / 16][4];
  MlaRows<config> rows;
  float scale;
  int32 common_end;  // of the keys that all rows see
};

using FirstTile = SharedTile<block_rows, q_chunks * chunk_columns>;  // of Q
using LastTile = SharedTile<block_rows, 2 * chunk_columns>;

// Ask for an item's rows of Q, zeros behind the last: its first chunks pass through the ring.
DEVICE void request_q(const AttentionParams& params, const Shared& shared, const Turn& turn) {
  named_barrier_sync<1, group_threads>();  // no product reads the Q before any more
  const DecodeWork work = shared.work(turn.number);
  QueryRow first{work.request, work.q_start, 0, 0};
  if constexpr (config.sparse) first = SparseToken::row(params, work.request, 0);
  GroupRows rows{
      .first = static_cast<const char*>(params.q) + first.in(params.q_strides, params) * 2,
      .row_stride = params.q_strides.row * 2,
      .head_stride = params.q_strides.head * 2,
      .first_row = work.first_row,
      .group = params.group};
  const int32 entry = turn.entry(-1);
  shared.wait_full(entry);  // the stage is free
  request_tile<group_threads>(FirstTile{shared.stage(entry)}, rows, 0, {0, work.rows},
                              FirstTile::columns);
  rows.first += FirstTile::columns * 2;
  request_tile<group_threads>(LastTile{shared.q}, rows, 0, {0, work.rows}, LastTile::columns);
  cp_async_commit();
}

// Q into registers, and its stage to the next tile.
DEVICE void take_q(Scores& state, const Shared& shared, const Turn& turn) {
  cp_async_wait<0>();
  fence_proxy_async();  // for wgmma, and for the tile that will lie where Q does
  named_barrier_sync<1, group_threads>();
  const int32 entry = turn.entry(-1), lane = lane_index(), row = warp_index() * 16 + lane % 16;
#pragma unroll
  for (int32 step = 0; step < q_chunks * 4; ++step)
    ldmatrix_x4(state.q[step],
                FirstTile{shared.stage(entry)}.at(step / 4, row, step % 4 * 2 + lane / 16));
  sync_warp();
  if (lane != 0) return;
  for (int32 half = 0; half < 2; ++half)  // as often as warps of both P V
    mbarrier_arrive(shared.empty + entry % stages * 8);
}

// Begin S = Q Kᵀ of a tile.
DEVICE void multiply_q(Scores& state, const Shared& shared, const Turn& turn, int32 step) {
  const int32 entry = turn.entry(step);
  const SharedAddress k = shared.stage(entry);
  shared.wait_full(entry);
  wgmma_fence();
#pragma unroll
  for (int32 i = 0; i < q_chunks * 4; ++i)
    wgmma_registers<Input, Major::depth>(
        state.s, state.q[i], depth_major(k) + i / 4 * (chunk_bytes / 16) + i % 4 * 2, i > 0);
#pragma unroll
  for (int32 i = 0; i < 4; ++i)
    wgmma_shared<Input, Major::depth, Major::depth>(
        state.s, depth_major(shared.q) + i * 2,
        depth_major(k) + q_chunks * (chunk_bytes / 16) + i * 2, true);
  mbarrier_wait(shared.rope_full, turn.tile(step) & 1);
  wgmma_fence();
#pragma unroll
  for (int32 i = 0; i < 4; ++i)
    wgmma_shared<Input, Major::depth, Major::depth>(state.s,
                                                    depth_major(shared.q + chunk_bytes) + i * 2,
                                                    depth_major(shared.rope) + i * 2, true);
  wgmma_commit();
}

// Values past the last key become zeros: whatever is there, a weight of 0 must make nothing of it.
DEVICE void clear_tail(const Shared& shared, const Turn& turn, int32 step, int32 first_key) {
  const int32 keys = shared.work(turn.number).kv_len - first_key;
  if (keys >= tile_keys) return;
  named_barrier_sync<1, group_threads>();  // no product reads the keys any more
  const int32 thread = recomputed(thread_index());
  const int32 column = thread % 64;  // 16 bytes, of all chunks
  const SharedAddress target = shared.stage(turn.entry(step)) + column / 8 * chunk_bytes;
  for (int32 row = keys + thread / 64; row < tile_keys; row += 2)
    shared_store_4(target + row * row_bytes + column % 8 * 16, {0.f, 0.f, 0.f, 0.f});
}

// S → P, maxima and sums, if the tile is kept.
DEVICE void soften(Scores& state, const AttentionParams& params, const Shared& shared,
                   const Turn& turn, int32 step, int32 first_key) {
  auto& rows = state.rows;
  if constexpr (config.sparse) {
    rows.mask_chosen(state.s, shared, turn.entry(step));
  } else if (first_key + tile_keys > state.common_end) {
    rows.mask(state.s, shared, first_key);
  }
  float top[1][2];
  tile_maxima(top, state.s, state.scale);
  if constexpr (config.skip_softmax && !config.masses) {
    rows.left_out = rows.leave_out(params, shared, shared.item(turn.number), step, top, rows.kept);
    if (rows.left_out) return;
  }
  RowStatistics<1> tile;
  larger(tile.maximum, rows.kept.maximum, top);
  exponentiate<Input>(state.p, tile, state.s, state.scale);
  if constexpr (config.masses) {
    rows.left_out = rows.leave_out(params, shared, shared.item(turn.number), step, top, tile);
    if (rows.left_out) return;
  }
  raise_maxima(rows.kept, rows.alpha, top, 1.f);
  add_sums(rows.kept, tile);
}

// What both P V are told of a tile.
enum class Word { add, shrink, leave_out };  // O += P V │ the same after O *= alpha │ nothing

// P, and what O shrinks by, to both P V.
DEVICE void publish(const Scores& state, const Shared& shared, int32 message) {
  const int32 lane = lane_index(), warp = warp_index();
  const float (&alpha)[2] = state.rows.alpha[0];
  mbarrier_wait(shared.p_free, (message & 1) ^ 1);
  Word word = Word::leave_out;
  if (!config.skip_softmax || !state.rows.left_out) {
    const int32 row = warp * 16 + lane % 16;
#pragma unroll
    for (int32 i = 0; i < 4; ++i)
      stmatrix_x4(SharedTile<block_rows, tile_keys>{shared.p}.at(0, row, 2 * i + lane / 16),
                  state.p[i]);
    if (lane % 4 == 0) {
      shared_store(shared.alpha + (warp * 16 + lane / 4) * 4, alpha[0]);
      shared_store(shared.alpha + (warp * 16 + 8 + lane / 4) * 4, alpha[1]);
    }
    word = warp_any(alpha[0] != 1.f || alpha[1] != 1.f) ? Word::shrink : Word::add;
    fence_proxy_async();
  }
  if (lane == 0) shared_store(shared.words + warp * 4, float(word));
  sync_warp();
  if (lane == 0) mbarrier_arrive(shared.p_ready);
}

// Statistics of this lane's rows: to LSE and the factors of O, or to the split's part.
DEVICE void conclude(const Scores& state, const AttentionParams& params, const Shared& shared,
                     const DecodeWork& work, int32 message) {
  const GlobalParts parts = parts_of(params, shared, work);
  const Finish finish{
      .scale = 1.f,
      .out_scale = params.out_scale_array ? *params.out_scale_array : params.out_scale,
      .has_sink = params.sinks != nullptr,
      .sink = 0.f};
  const int32 part_row = parts.row(work.split);
  mbarrier_wait(shared.p_free, (message & 1) ^ 1);  // every alpha has been read
  if (thread_index() == 0) shared_store(shared.part, uint32(part_row));
#pragma unroll
  for (int32 half = 0; half < 2; ++half) {
    const PartialRow part = state.rows.part(shared, half);
    const int32 row = warp_index() * 16 + half * 8 + fragment_row();
    if (fragment_column() != 0) continue;
    const QueryRow place = row_of(params, work, row);
    Finish of_row = finish;
    if (params.sinks && row < work.rows) of_row.sink = params.sinks[place.head] * log2_e;
    const RowResult result = finish_row(part.maximum, part.sum, of_row);
    shared_store(shared.alpha + row * 4, work.splits == 1 ? result.factor : 1.f);
    if (row >= work.rows) continue;
    if (work.splits > 1) {
      parts.rows[part_row + row] = part;
      continue;
    }
    const int64 statistic = place.in(params.lse_strides, params);
    if (params.lse) params.lse[statistic] = result.lse;
    if (config.masses && params.dropped_mass) {
      params.dropped_mass[statistic] = dropped_share(part, of_row);
    }
  }
  sync_warp();
  if (lane_index() == 0) mbarrier_arrive(shared.p_ready);
}

// One item, whose Q is on its way; whether another one follows, whose Q then is.
DEVICE bool score_item(const AttentionParams& params, const Shared& shared, Turn& turn) {
  const DecodeWork work = shared.work(turn.number);
  const int32 count = shared.item(turn.number).count;
  Scores state{.rows{params, shared, work}};
  state.scale = (params.scale_array ? *params.scale_array : params.scale) * log2_e;
  state.common_end = work.visibility(params).keys_of(0).end;
  take_q(state, shared, turn);
  for (int32 step = 0; step < count; ++step) {
    multiply_q(state, shared, turn, step);
    const Item item = shared.item(turn.number);
    const int32 first_key = item.first_key(step);
    const bool is_last = step == item.foreign;  // of the keys, of which tiles count down
    if (step > 0) publish(state, shared, turn.message(step - 1));  // while the products run
    wgmma_wait<0>();
    sync_warp();  // this warp reads the rope part no more
    if (lane_index() == 0) mbarrier_arrive(shared.rope_free);
    if (!config.sparse && is_last) clear_tail(shared, turn, step, first_key);
    soften(state, params, shared, turn, step, first_key);
  }
  if (count > 0) publish(state, shared, turn.message(count - 1));
  const Turn next = turn.after(count);
  shared.wait_known(next.number);
  const bool follows = shared.work(next.number).exists;
  if (follows) request_q(params, shared, next);
  const Item item = shared.item(turn.number);
  conclude(state, params, shared, item.work, turn.message(count));
  if constexpr (config.skip_softmax) {
    const DecodeWork whole = of_request<config.sparse>(params, item.work);
    if (params.skip_counts)
      report_block<config.mass_rule, group_threads>(params, whole, item.own, state.rows.skipped);
  }
  turn = next;
  return follows;
}

DEVICE void score(const AttentionParams& params, const Shared& shared) {
  Turn turn;
  shared.wait_known(0);
  if (!shared.work(0).exists) return;
  request_q(params, shared, turn);
  while (score_item(params, shared, turn)) {
  }
}

// --- O.

// This warp-group's 256 columns of O: this lane's rows, times what `score` left for them;
// `meanwhile` is done between the two.
template <typename Meanwhile>
DEVICE void write_half(const float (&o)[128], const AttentionParams& params, const Shared& shared,
                       const DecodeWork& work, const Meanwhile& meanwhile) {
#pragma unroll
  for (int32 h = 0; h < 2; ++h) {
    if (h == 1) meanwhile();
    const int32 row = warp_index() % 4 * 16 + h * 8 + fragment_row();
    if (row >= work.rows) continue;
    const float factor = shared_load(shared.alpha + row * 4);
    const int32 thread = recomputed(thread_index());
    const int32 column = (thread / group_threads - 1) * 256 + thread % 4 * 2;
    const QueryRow place = row_of(params, work, row);
    Output* out = static_cast<Output*>(params.out) + place.in(params.out_strides, params) + column;
    const int64 part_row = __builtin_bit_cast(int32, shared_load(shared.part)) + row;
    float* part = params.partial_out + part_row * latent + column;
#pragma unroll
    for (int32 c = 0; c < 32; ++c) {
      const float first = o[c * 4 + h * 2] * factor, second = o[c * 4 + h * 2 + 1] * factor;
      if (work.splits == 1) {
        store_pair(out + c * 8, first, second);
      } else {
        store_pair(part + c * 8, first, second);
      }
    }
  }
}

// O *= alpha of its rows.
DEVICE void shrink(float (&o)[128], const Shared& shared) {
  const int32 row = warp_index() % 4 * 16 + fragment_row();
  const float first = shared_load(shared.alpha + row * 4);
  const float second = shared_load(shared.alpha + (row + 8) * 4);
#pragma unroll
  for (int32 i = 0; i < 128; ++i) o[i] *= i % 4 < 2 ? first : second;
}

// O += P V; `meanwhile` is done while the products run.
template <typename Meanwhile>
DEVICE void add_values(float (&o)[128], const Shared& shared, int32 entry, int32 half,
                       const Meanwhile& meanwhile) {
  shared.wait_full(entry);
  wgmma_fence();
  const SharedAddress v = shared.stage(entry) + half * 4 * chunk_bytes;
#pragma unroll
  for (int32 i = 0; i < 4; ++i)
    wgmma_shared<Input, Major::depth, Major::width>(o, depth_major(shared.p) + i * 2,
                                                    width_major<tile_keys>(v) + i * 128, true);
  wgmma_commit();
  meanwhile();
  wgmma_wait<0>();
}

// The last split of an item's rows to arrive merges all.
DEVICE void merge_all(const AttentionParams& params, const Shared& shared, const DecodeWork& work) {
  constexpr int32 threads = 2 * group_threads;
  named_barrier_sync<2, threads>();  // this split's part is written
  if (thread_index() == group_threads) {
    shared_store(shared.last, arrives_last(params, work) ? 1.f : 0.f);
  }
  named_barrier_sync<2, threads>();
  if (shared_load(shared.last) == 0.f) return;
  const GlobalParts parts = parts_of(params, shared, work);
  for (int32 row = warp_index() - 4; row < work.rows; row += threads / warp_size) {
    GlobalParts own = parts;
    own.first += row;
    own.second += row;
    write_row<Output>(params, row_of(params, work, row), merge_row<latent>(own, work.splits));
  }
}

// One item; returns the turn of the next.  `loader` brings tiles, asked for between its threads'
// other work; `find` finds out what comes next.
template <typename Loader, typename Find>
DEVICE Turn weigh_item(const AttentionParams& params, const Shared& shared, const Turn& turn,
                       int32 half, Loader& loader, const Find& find) {
  const int32 lane = lane_index();
  float o[128];
#pragma unroll
  for (int32 i = 0; i < 128; ++i) o[i] = 0.f;
  for (int32 step = 0;; ++step) {
    const int32 count = shared.item(turn.number).count;
    if (step == maximum(count - stages, 0)) find();  // before the next one's Q wants a stage
    mbarrier_wait(shared.p_ready, turn.message(step) & 1);
    if (step == count) break;
    const int32 entry = turn.entry(step);
    const int32 warp = int32(recomputed(thread_index())) / warp_size % 4;
    const Word word = Word(int32(shared_load(shared.words + warp * 4)));
    const auto beside = [&] { loader.beside_products(turn, step); };
    if (config.skip_softmax && word == Word::leave_out) {
      beside();
    } else {
      if (word == Word::shrink) shrink(o, shared);
      add_values(o, shared, entry, half, beside);
    }
    sync_warp();
    if (lane == 0) {
      mbarrier_arrive(shared.p_free);
      mbarrier_arrive(shared.empty + entry % stages * 8);
    }
    loader.after_products(turn, step);
  }
  const Item item = shared.item(turn.number);
  const DecodeWork& work = item.work;
  const Turn next = turn.after(item.count);
  write_half(o, params, shared, work, [&] { loader.beside_output(next); });
  if (work.splits > 1 && merged_by_block(params)) merge_all(params, shared, work);
  sync_warp();
  if (lane == 0) mbarrier_arrive(shared.p_free);  // done with the item
  return next;
}

template <typename Loader>
DEVICE void weigh(const AttentionParams& params, const Shared& shared, int32 half, Loader loader) {
  const ItemFinder<config.sparse> finder{params, shared, config.skip_softmax};
  const auto finds = [] { return warp_index() == 8; };  // the first of right
  if (finds()) finder.begin();
  for (Turn turn;;) {
    shared.wait_known(turn.number);
    if (!shared.work(turn.number).exists) return;
    if (turn.number == 0) loader.begin(turn);
    loader.begin_short(turn);
    turn = weigh_item(params, shared, turn, half, loader, [&] {
      if (!config.sparse && finds()) finder.next(turn.number + 1);
    });
  }
}

KERNEL void __launch_bounds__(config.threads(), 1)
    mla_decode_sm90(const __grid_constant__ MlaParams params) {
  const Shared shared;
  if (thread_index() == 0) shared.begin(config.sparse ? gathering_warps : 1);
  sync_block();
  const AttentionParams& attention = params.attention;
  const int32 group = warp_index() / 4;
  if (group == 0) {
    registers_increase<184>();
    score(attention, shared);
  } else {
    registers_decrease<160>();
    if constexpr (config.sparse) {
      weigh(attention, shared, group - 1, KeyGather(attention, shared));
    } else {
      weigh(attention, shared, group - 1, PageLoads<config>(params, shared));
    }
  }
}
