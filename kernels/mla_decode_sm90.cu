// Absorbed MLA decode, Hopper.  O = softmax(Q Kᵀ · scale) V: K is the cache's rows of 576, latent
// and rope, V their latent 512 columns; one KV head for all query heads.
//
// Work:    an item is 64 rows of one request (query heads × tokens) and one split of its keys
//          (decode_work.cuh), whose tiles of 64 keys mla_item.cuh deals; with chosen keys, of one
//          token and its list (sparse_token.cuh).
// Roles:   three warp-groups.
//            scores   Q in registers but for its last two chunks.  Q Kᵀ of tile i + 1 runs while P
//                     of tile i is stored; then softmax of i + 1
//            left     O columns 0 … 255, P V; its first thread loads tiles
//            right    O columns 256 … 511
//          Chosen keys are gathered by all threads of left and right (mla_gather.cuh).
// Memory:  a tile's latent part is K and V at once: it is loaded once, into one of three stages,
//          freed by both P V; its rope part has one place, free as soon as Q Kᵀ is done; one P.
// Waits:   full: a tile is there │ empty: both P V are done with it │ rope_full, rope_free
//          p_ready: P and what O shrinks by │ p_free: both P V are done with them
// Skips:   the scores' warps vote on a tile together (mla_rows.cuh).  One that is left out has
//          no P: both P V are told so in its turn, and only free its stage.
// Result:  as in decode: O and LSE, or a part that the last split to arrive merges.
#include <attention/config.cuh>
#include <attention/decode_item.cuh>
#include <attention/decode_work.cuh>
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
#include <ptx/tma.cuh>
#include <ptx/wgmma.cuh>
#include <tile/copy.cuh>
#include <tile/descriptor.cuh>
#include <tile/swizzle.cuh>

constexpr MlaConfig config{CUATTN_CONFIG};
using Input = Element<config.element>;
using Output = Element<config.output>;
using Schedule = DecodeSchedule<block_rows, RequestKind<config.sparse>::Type>;

DEVICE QueryRow row_of(const AttentionParams& params, const DecodeWork& work, int32 row) {
  return row_of<config.sparse>(params, work, row);
}

// The parts of this item's row 0.
DEVICE GlobalParts parts_of(const AttentionParams& params, const DecodeWork& work) {
  return work.splits == 1 ? GlobalParts{} : parts_of(Schedule(params), work, 0, latent);
}

// All warp-groups, wherever each is in its code.
DEVICE void meet() { named_barrier_sync<2, config.threads()>(); }

// --- Scores.

struct Scores {
  uint32 q[q_chunks * 4][4];
  float s[tile_keys / 2];
  uint32 p[tile_keys / 16][4];
  MlaRows<config> rows;
  float scale;
  int32 common_end;  // of the keys that all rows see
};

// Q's rows, zeros behind the last: its first chunks by way of stage 0 into registers.
DEVICE void load_q(Scores& state, const AttentionParams& params, const Shared& shared,
                   const DecodeWork& work) {
  QueryRow first{work.request, work.q_start, 0, 0};
  if constexpr (config.sparse) first = SparseToken::row(params, work.request, 0);
  GroupRows rows{
      .first = static_cast<const char*>(params.q) + first.in(params.q_strides, params) * 2,
      .row_stride = params.q_strides.row * 2,
      .head_stride = params.q_strides.head * 2,
      .first_row = work.first_row,
      .group = params.group};
  using FirstTile = SharedTile<block_rows, q_chunks * chunk_columns>;
  using LastTile = SharedTile<block_rows, 2 * chunk_columns>;
  request_tile<group_threads>(FirstTile{shared.kv}, rows, 0, {0, work.rows}, FirstTile::columns);
  rows.first += FirstTile::columns * 2;
  request_tile<group_threads>(LastTile{shared.q}, rows, 0, {0, work.rows}, LastTile::columns);
  cp_async_commit();
  cp_async_wait<0>();
  fence_proxy_async();  // for wgmma, and for the tile that will lie where Q does
  named_barrier_sync<1, group_threads>();
  const int32 lane = lane_index(), row = warp_index() * 16 + lane % 16;
#pragma unroll
  for (int32 step = 0; step < q_chunks * 4; ++step)
    ldmatrix_x4(state.q[step], FirstTile{shared.kv}.at(step / 4, row, step % 4 * 2 + lane / 16));
  sync_warp();
  if (lane == 0) mbarrier_arrive(shared.q_read);
}

// Begin S = Q Kᵀ of a tile.
DEVICE void multiply_q(Scores& state, const Shared& shared, int32 step) {
  const SharedAddress k = shared.kv + step % stages * stage_bytes;
  mbarrier_wait(shared.full + step % stages * 8, step / stages & 1);
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
  mbarrier_wait(shared.rope_full, step & 1);
  wgmma_fence();
#pragma unroll
  for (int32 i = 0; i < 4; ++i)
    wgmma_shared<Input, Major::depth, Major::depth>(state.s,
                                                    depth_major(shared.q + chunk_bytes) + i * 2,
                                                    depth_major(shared.rope) + i * 2, true);
  wgmma_commit();
}

// Values past the last key become zeros: whatever is there, a weight of 0 must make nothing of it.
DEVICE void clear_tail(const Shared& shared, const Item& item, int32 step) {
  const int32 first = kept_work(shared).kv_len - item.first_key(step);
  if (first >= tile_keys) return;
  named_barrier_sync<1, group_threads>();    // no product reads the keys any more
  const int32 column = thread_index() % 64;  // 16 bytes, of all chunks
  const SharedAddress target = shared.kv + step % stages * stage_bytes + column / 8 * chunk_bytes;
  for (int32 row = first + thread_index() / 64; row < tile_keys; row += 2)
    shared_store_4(target + row * row_bytes + column % 8 * 16, {0.f, 0.f, 0.f, 0.f});
}

// S → P, maxima and sums, if the tile is kept.
DEVICE void soften(Scores& state, const AttentionParams& params, const Shared& shared,
                   const Item& item, int32 step) {
  auto& rows = state.rows;
  const int32 first_key = item.first_key(step);
  if constexpr (config.sparse) {
    rows.mask_chosen(state.s, shared, step);
  } else if (first_key + tile_keys > state.common_end) {
    rows.mask(state.s, shared, first_key);
  }
  float top[1][2];
  tile_maxima(top, state.s, state.scale);
  if constexpr (config.skip_softmax && !config.masses) {
    rows.left_out = rows.leave_out(params, shared, item, step, top, rows.kept);
    if (rows.left_out) return;
  }
  RowStatistics<1> tile;
  larger(tile.maximum, rows.kept.maximum, top);
  exponentiate<Input>(state.p, tile, state.s, state.scale);
  if constexpr (config.masses) {
    rows.left_out = rows.leave_out(params, shared, item, step, top, tile);
    if (rows.left_out) return;
  }
  raise_maxima(rows.kept, rows.alpha, top, 1.f);
  add_sums(rows.kept, tile);
}

// What both P V are told of a tile.
enum class Word { add, shrink, leave_out };  // O += P V │ the same after O *= alpha │ nothing

// P, and what O shrinks by, to both P V.
DEVICE void publish(const Scores& state, const Shared& shared, int32 step) {
  const int32 lane = lane_index(), warp = warp_index();
  const float (&alpha)[2] = state.rows.alpha[0];
  mbarrier_wait(shared.p_free, (step & 1) ^ 1);
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
                     const DecodeWork& work, const Finish& finish) {
  const GlobalParts parts = parts_of(params, work);
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
      parts.rows[parts.row(work.split) + row] = part;
      continue;
    }
    const int64 statistic = place.in(params.lse_strides, params);
    if (params.lse) params.lse[statistic] = result.lse;
    if (config.masses && params.dropped_mass) {
      params.dropped_mass[statistic] = dropped_share(part, of_row);
    }
  }
}

DEVICE void score(const AttentionParams& attention, const Shared& shared, const Item& item) {
  Scores state{.rows{attention, shared, item.work}};
  state.scale = (attention.scale_array ? *attention.scale_array : attention.scale) * log2_e;
  state.common_end = item.work.visibility(attention).keys_of(0).end;
  load_q(state, attention, shared, item.work);
  for (int32 step = 0; step < item.count; ++step) {
    multiply_q(state, shared, step);
    if (step > 0) publish(state, shared, step - 1);  // while the products run
    wgmma_wait<0>();
    sync_warp();  // this warp reads the rope part no more
    if (lane_index() == 0) mbarrier_arrive(shared.rope_free);
    if (!config.sparse && step == item.foreign) clear_tail(shared, item, step);
    soften(state, attention, shared, item, step);
  }
  if (item.count > 0) publish(state, shared, item.count - 1);
  meet();  // every alpha has been read
  const Finish finish{
      .scale = 1.f,
      .out_scale = attention.out_scale_array ? *attention.out_scale_array : attention.out_scale,
      .has_sink = attention.sinks != nullptr,
      .sink = 0.f};
  const DecodeWork work = kept_work(shared);
  conclude(state, attention, shared, work, finish);
  if constexpr (config.skip_softmax) {
    const int32 own = Item(attention, work, false).own;
    const DecodeWork whole = of_request<config.sparse>(attention, work);
    if (attention.skip_counts)
      report_block<config.mass_rule, group_threads>(attention, whole, own, state.rows.skipped);
  }
  meet();
}

// --- O.

// Columns 256 · half … of O: this lane's rows, times what `score` left for them.
DEVICE void write_half(const float (&o)[128], const AttentionParams& params, const Shared& shared,
                       const Item& item, const GlobalParts& parts, int32 half) {
  const DecodeWork& work = item.work;
#pragma unroll
  for (int32 h = 0; h < 2; ++h) {
    const int32 row = warp_index() % 4 * 16 + h * 8 + fragment_row();
    if (row >= work.rows) continue;
    const float factor = shared_load(shared.alpha + row * 4);
    const int32 column = half * 256 + fragment_column();
    const QueryRow place = row_of(params, work, row);
    Output* out = static_cast<Output*>(params.out) + place.in(params.out_strides, params) + column;
    float* part = parts.out + (parts.row(work.split) + row) * latent + column;
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
DEVICE void add_values(float (&o)[128], const Shared& shared, int32 step, int32 half,
                       const Meanwhile& meanwhile) {
  const int32 stage = step % stages;
  mbarrier_wait(shared.full + stage * 8, step / stages & 1);
  wgmma_fence();
  const SharedAddress v = shared.kv + stage * stage_bytes + half * 4 * chunk_bytes;
#pragma unroll
  for (int32 i = 0; i < 4; ++i)
    wgmma_shared<Input, Major::depth, Major::width>(o, depth_major(shared.p) + i * 2,
                                                    width_major<tile_keys>(v) + i * 128, true);
  wgmma_commit();
  meanwhile();
  wgmma_wait<0>();
}

// `loader` brings the tiles, asked for between its threads' other work.
template <typename Loader>
DEVICE void weigh(const AttentionParams& params, const Shared& shared, const Item& item, int32 half,
                  Loader loader) {
  const int32 lane = lane_index(), warp = warp_index() % 4;
  loader.begin();
  float o[128];
#pragma unroll
  for (int32 i = 0; i < 128; ++i) o[i] = 0.f;
  for (int32 step = 0; step < item.count; ++step) {
    const int32 stage = step % stages;
    mbarrier_wait(shared.p_ready, step & 1);
    const Word word = Word(int32(shared_load(shared.words + warp * 4)));
    if (config.skip_softmax && word == Word::leave_out) {
      loader.beside_products(step);
    } else {
      if (word == Word::shrink) shrink(o, shared);
      add_values(o, shared, step, half, [&] { loader.beside_products(step); });
    }
    sync_warp();
    if (lane == 0) {
      mbarrier_arrive(shared.p_free);
      mbarrier_arrive(shared.empty + stage * 8);
    }
    loader.after_products(step);
  }
  meet();  // every alpha has been read
  meet();  // factors are there
  write_half(o, params, shared, item, parts_of(params, item.work), half);
}

// --- An item.

// The last split of an item's rows to arrive merges all.
DEVICE void merge_all(const AttentionParams& params, const Shared& shared, const DecodeWork& work) {
  meet();  // this split's part is written
  if (thread_index() == 0) shared_store(shared.last, arrives_last(params, work) ? 1.f : 0.f);
  meet();
  if (shared_load(shared.last) == 0.f) return;
  const GlobalParts parts = parts_of(params, work);
  for (int32 row = warp_index(); row < work.rows; row += config.threads() / warp_size) {
    GlobalParts own = parts;
    own.first += row;
    own.second += row;
    write_row<Output>(params, row_of(params, work, row), merge_row<latent>(own, work.splits));
  }
}

KERNEL void __launch_bounds__(config.threads(), 1)
    mla_decode_sm90(const __grid_constant__ MlaParams params) {
  const DecodeWork work = Schedule(params.attention).find(block_index());
  if (!work.exists) return;
  const Shared shared;
  if (thread_index() == 0) {
    shared.begin(config.sparse ? gathering_warps : 1);
    keep_work(shared, work);
  }
  meet();
  const AttentionParams& attention = params.attention;
  const Item item(attention, work, config.skip_softmax);
  const int32 group = warp_index() / 4;
  if (group == 0) {
    registers_increase<184>();
    score(attention, shared, item);
  } else {
    registers_decrease<160>();
    if constexpr (config.sparse) {
      weigh(attention, shared, item, group - 1, KeyGather(attention, shared, item));
    } else {
      weigh(attention, shared, item, group - 1, PageLoads<config>(params, shared, item));
    }
  }
  // Without counters of arrivals, a kernel of its own does it.
  const DecodeWork done = kept_work(shared);
  if (done.splits > 1 && attention.arrivals) merge_all(attention, shared, done);
}
