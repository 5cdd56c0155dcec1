// Absorbed MLA decode, portable, also of chosen keys.  O = softmax(Q Kᵀ · scale) V: K is the
// cache's rows, latent and rope, V their latent columns; one KV head for all query heads.
//
// Work:    an item is a block of rows of one request (query heads × tokens) and one split of its
//          keys (decode_work.cuh); with chosen keys, of one token and its list (sparse_token.cuh).
//          Blocks take items in order.
// Roles:   all warps are alike.  Those with the same rows share out a tile's keys for Q Kᵀ and
//          softmax, and the columns of O for P V; P goes through shared memory.
// Memory:  a tile is K and V at once: it is loaded once, into a ring.  Q stays in shared memory
//          or, where a warp has 16 rows, most of it in registers.
// Waits:   three a tile, of all threads:
//
//            tile i has landed, nobody reads tile i − 1 │ request tile i + stages − 1
//            S = Q Kᵀ │ mask │ largest scores of own keys      wait    of all keys
//            P = softmax                                       wait    O += P V
//
// Skips:   the warps that share rows vote on a tile, each for itself (mla_votes.cuh).  One that is
//          left out has no P V and, unless masses are counted, no softmax.
// Result:  as in decode: O and LSE, or a part that the last split to arrive merges.
#include <attention/config.cuh>
#include <attention/decode_work.cuh>
#include <attention/mask.cuh>
#include <attention/mla_keys.cuh>
#include <attention/mla_shape.cuh>
#include <attention/mla_votes.cuh>
#include <attention/online_softmax.cuh>
#include <attention/sparse_token.cuh>
#include <attention/split_parts.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/shared.cuh>
#include <ptx/sync.cuh>
#include <tile/copy.cuh>
#include <tile/gemm.cuh>

constexpr MlaPortableConfig config{CUATTN_CONFIG};

using Shape = MlaShape<config>;
using Shared = MlaShared<config>;
using Keys = MlaKeys<config>;
using WarpPlace = MlaPlace<config>;

constexpr int32 row_tiles = Shape::row_tiles;
constexpr int32 key_tiles = Shape::key_tiles;
constexpr int32 value_tiles = Shape::value_tiles;
constexpr int32 kept_steps = Shape::kept_steps;

using Input = Element<config.element>;
using Output = Element<config.output>;
using KeptTile = Shape::KeptTile;
using QTile = Shape::QTile;
using KvTile = Shape::KvTile;
using PTile = Shape::PTile;

using Schedule = DecodeSchedule<config.rows, RequestKind<config.sparse>::Type>;

DEVICE QueryRow row_of(const AttentionParams& params, const DecodeWork& work, int32 row) {
  return row_of<config.sparse>(params, work, row);
}
// The work of an item as its request's, which may be that of a token.
DEVICE DecodeWork of_request(const AttentionParams& params, const DecodeWork& work) {
  if constexpr (config.sparse) return SparseToken::of_request(params, work);
  return work;
}

// What one warp carries from tile to tile.
struct WarpState {
  uint32 q[Shape::steps][4];                // the steps that are kept
  float output[row_tiles][value_tiles][4];  // [row of this warp][latent column of its part]
  RowStatistics<row_tiles> rows;            // sums: of its part of the keys
  MlaVotes<config> votes;
  float scale;
};

// --- Q.

struct QueryRows {
  const AttentionParams& params;
  const DecodeWork& work;
  int32 column;  // to begin with

  DEVICE bool exists(int32 row) const { return row < work.rows; }
  DEVICE const char* row(int32 row) const {
    const int64 place = row_of(params, work, row).in(params.q_strides, params);
    return static_cast<const char*>(params.q) + (place + column) * 2;
  }
};

template <typename Tile>
DEVICE void request_columns(Tile tile, const AttentionParams& params, const DecodeWork& work,
                            int32 column) {
  constexpr int32 threads = minimum(config.threads(), config.rows * 8);
  if (thread_index() >= threads) return;
  request_tile<threads>(tile, QueryRows{params, work, column}, 0, {0, work.rows}, Tile::columns);
}

// The steps that are kept go where the last tile of the ring will lie.
DEVICE void request_q(const AttentionParams& params, const Shared& shared, const DecodeWork& work) {
  request_columns(KeptTile{shared.stage(config.stages - 1)}, params, work, 0);
  request_columns(QTile{shared.q}, params, work, KeptTile::columns);
}

DEVICE void keep_q(WarpState& state, const Shared& shared, const WarpPlace& place) {
  const auto q = row_reader(KeptTile{shared.stage(config.stages - 1)}, place.first_row);
#pragma unroll
  for (int32 step = 0; step < kept_steps; ++step) ldmatrix_x4(state.q[step], q.at(0, step));
}

// --- One tile.

// How this lane reads its warp's keys: 16 of them × 16 columns at a time, or 8 × 32.
DEVICE BlockReader<KvTile> key_reader(SharedAddress stage, int32 part) {
  const KvTile keys{stage + part * Shape::part_keys * row_bytes};
  if constexpr (key_tiles > 1) return column_reader(keys);
  const uint32 lane = recomputed(lane_index());
  return BlockReader<KvTile>(keys, lane % 8, lane / 8);
}

// Q Kᵀ of this warp's rows and keys.
DEVICE void multiply_q(float (&scores)[row_tiles][key_tiles][4], const WarpState& state,
                       const Shared& shared, SharedAddress stage, const WarpPlace& place) {
  // Sums that go on side by side, for a product waits for the one before in its sum.
  constexpr int32 chains = maximum(4 / (row_tiles * key_tiles), 1);
  float sums[chains][row_tiles][key_tiles][4];
#pragma unroll
  for (int32 chain = 0; chain < chains; ++chain) clear(sums[chain]);
  const auto q = row_reader(QTile{shared.q}, place.first_row);
  const auto k = key_reader(stage, place.part);
  uint32 b[4];
#pragma unroll
  for (int32 step = 0; step < Shape::steps; ++step) {
    auto& sum = sums[step % chains];
    uint32 a[row_tiles][4];
#pragma unroll
    for (int32 r = 0; r < row_tiles; ++r) {
      if (step >= kept_steps) ldmatrix_x4(a[r], q.at(r, step - kept_steps));
    }
    const auto multiply = [&](int32 r, int32 tile, uint32 b0, uint32 b1) {
      if (step < kept_steps) {
        mma_m16n8k16(sum[r][tile], state.q[step], b0, b1, Input{});
      } else {
        mma_m16n8k16(sum[r][tile], a[r], b0, b1, Input{});
      }
    };
    if constexpr (key_tiles == 1) {
      if (step % 2 == 0) ldmatrix_x4(b, k.at(0, step));
#pragma unroll
      for (int32 r = 0; r < row_tiles; ++r) multiply(r, 0, b[step % 2 * 2], b[step % 2 * 2 + 1]);
    } else {
#pragma unroll
      for (int32 pair = 0; pair < key_tiles / 2; ++pair) {
        ldmatrix_x4(b, k.at(pair, step));
#pragma unroll
        for (int32 r = 0; r < row_tiles; ++r) {
          multiply(r, 2 * pair, b[0], b[1]);
          multiply(r, 2 * pair + 1, b[2], b[3]);
        }
      }
    }
  }
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 tile = 0; tile < key_tiles; ++tile)
#pragma unroll
      for (int32 i = 0; i < 4; ++i) {
        scores[r][tile][i] = sums[0][r][tile][i];
#pragma unroll
        for (int32 chain = 1; chain < chains; ++chain)
          scores[r][tile][i] += sums[chain][r][tile][i];
      }
}

// Scores of keys that a row does not see, and of chosen keys that are none, become −∞.
DEVICE void mask(float (&scores)[row_tiles][key_tiles][4], const Keys& keys,
                 const RowVisibility& visibility, int32 visit, const WarpPlace& place) {
  const int32 tile = keys.first_key(visit), first_key = tile + place.part * Shape::part_keys;
  if constexpr (config.sparse) {
#pragma unroll
    for (int32 c = 0; c < key_tiles; ++c)
#pragma unroll
      for (int32 i = 0; i < 2; ++i) {
        if (keys.entry(first_key + c * 8 + fragment_column() + i) >= 0) continue;
#pragma unroll
        for (int32 r = 0; r < row_tiles; ++r) scores[r][c][i] = scores[r][c][2 + i] = -infinity();
      }
  } else if (tile + config.block_kv > visibility.keys_of(0).end) {
    mask_scores(scores, visibility, place.first_row, first_key);
  }
}

// The largest scores of this warp's rows in a tile, from those of each warp's keys.
DEVICE void gather_maxima(float (&maxima)[row_tiles][2],
                          const float (&scores)[row_tiles][key_tiles][4], const Shared& shared,
                          const WarpPlace& place) {
  row_maxima(maxima, scores);
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half)
      if (fragment_column() == 0) {
        shared_store(shared.row(shared.maxima, place.part, place.row(r, half)), maxima[r][half]);
      }
  sync_block();  // all parts' maxima are there
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half)
#pragma unroll
      for (int32 part = 0; part < Shape::parts; ++part)
        maxima[r][half] = fmaxf(maxima[r][half],
                                shared_load(shared.row(shared.maxima, part, place.row(r, half))));
}

// P of this warp's keys, for all warps of its rows; sums are those of this lane.
DEVICE void exponentiate_part(float (&sums)[row_tiles][2], const float (&maxima)[row_tiles][2],
                              const float (&scores)[row_tiles][key_tiles][4], float scale,
                              const Shared& shared, const WarpPlace& place) {
  const PTile p{shared.p};
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const float maximum = maxima[r][half];
      const float shift = maximum == -infinity() ? 0.f : maximum * scale;
#pragma unroll
      for (int32 c = 0; c < key_tiles; ++c) {
        const float (&score)[4] = scores[r][c];
        const float first = exp2_approximate(fmaf(score[half * 2], scale, -shift));
        const float second = exp2_approximate(fmaf(score[half * 2 + 1], scale, -shift));
        sums[r][half] += first + second;
        shared_store(
            p.at(0, place.row(r, half), place.part * key_tiles + c) + fragment_column() * 2,
            pack(first, second, Input{}));
      }
    }
}

// O += P V of this warp's rows and columns.
DEVICE void multiply_v(WarpState& state, const Shared& shared, SharedAddress stage,
                       const WarpPlace& place) {
  const auto p = row_reader(PTile{shared.p}, place.first_row);
  auto v = row_reader(KvTile{stage});
  v.first = v.at(0, place.part * (value_tiles / 2));
#pragma unroll
  for (int32 key_step = 0; key_step < config.block_kv / 16; ++key_step) {
    uint32 a[row_tiles][4];
#pragma unroll
    for (int32 r = 0; r < row_tiles; ++r) ldmatrix_x4(a[r], p.at(r, key_step));
    multiply_pv<Input>(state.output, a, v, key_step);
  }
}

// Leave the sums of this warp's keys for the other warps of its rows.
DEVICE void publish_sums(const RowStatistics<row_tiles>& tile, const Shared& shared,
                         const WarpPlace& place) {
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const float sum = quad_sum(tile.sum[r][half]);
      if (fragment_column() == 0) {
        shared_store(shared.row(shared.sums, place.part, place.row(r, half)), sum);
      }
    }
}

DEVICE void compute_tile(WarpState& state, const AttentionParams& params, const Keys& keys,
                         const RowVisibility& visibility, const Shared& shared, int32 visit) {
  const WarpPlace place;
  const SharedAddress stage = shared.stage(visit);
  float scores[row_tiles][key_tiles][4];
  multiply_q(scores, state, shared, stage, place);
  mask(scores, keys, visibility, visit, place);
  float maxima[row_tiles][2];
  gather_maxima(maxima, scores, shared, place);
  const auto is_kept = [&] {
    return !state.votes.leave_out(state.rows, maxima, params, shared, place, keys.order, visit,
                                  state.scale);
  };
  bool kept = true;
  float shrink[row_tiles][2];
  RowStatistics<row_tiles> tile;
  if constexpr (config.masses) {
    larger(tile.maximum, state.rows.maximum, maxima);
    exponentiate_part(tile.sum, tile.maximum, scores, state.scale, shared, place);
    publish_sums(tile, shared, place);
    sync_block();  // all of P and all sums are there
    kept = is_kept();
    if (kept) raise_maxima(state.rows, shrink, maxima, state.scale);
  } else {
    if constexpr (config.skip_softmax) kept = is_kept();
    if (kept) {
      raise_maxima(state.rows, shrink, maxima, state.scale);
      exponentiate_part(tile.sum, state.rows.maximum, scores, state.scale, shared, place);
    }
  }
  if (kept) {
    add_sums(state.rows, tile);
    if (some_shrink(shrink)) shrink_output(state.output, shrink);
  }
  if constexpr (!config.masses) sync_block();  // all of P is there
  if (kept) multiply_v(state, shared, stage, place);
}

// --- The end of an item.

// Sums over all keys, of this warp's rows.
DEVICE void gather_sums(WarpState& state, const Shared& shared, const WarpPlace& place) {
  if constexpr (config.masses) sync_block();  // nobody reads those of the last tile
  publish_sums(state.rows, shared, place);
  sync_block();  // all parts' sums are there
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      state.rows.sum[r][half] = 0.f;
#pragma unroll
      for (int32 part = 0; part < Shape::parts; ++part)
        state.rows.sum[r][half] += shared_load(shared.row(shared.sums, part, place.row(r, half)));
    }
}

// This warp's columns of one row, to O or to the split's part.
template <typename Target>
DEVICE void store_row(Target* target, const float (&output)[value_tiles][4], int32 half,
                      float factor) {
#pragma unroll
  for (int32 c = 0; c < value_tiles; ++c)
    store_pair(target + c * 8, output[c][half * 2] * factor, output[c][half * 2 + 1] * factor);
}

DEVICE void write_rows(const WarpState& state, const AttentionParams& params,
                       const DecodeWork& work, const GlobalParts& parts, const WarpPlace& place) {
  Finish finish{.scale = 1.f,
                .out_scale = params.out_scale_array ? *params.out_scale_array : params.out_scale,
                .has_sink = params.sinks != nullptr,
                .sink = 0.f};
  const bool leads = place.part == 0 && fragment_column() == 0;
  const int32 column = place.part * Shape::part_columns + fragment_column();
#pragma unroll
  for (int32 r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const int32 row = place.row(r, half);
      PartialRow own{state.rows.maximum[r][half] * state.scale, state.rows.sum[r][half],
                     -infinity(), 0.f};
      if constexpr (config.masses) {
        state.votes.account(own, r, half, state.scale);
      }
      if (row >= work.rows) continue;
      if (work.splits > 1) {
        const int64 part = parts.row(work.split) + row;
        if (leads) parts.rows[part] = own;
        store_row(parts.out + part * config.latent + column, state.output[r], half, 1.f);
        continue;
      }
      const QueryRow query = row_of(params, work, row);
      if (params.sinks) finish.sink = params.sinks[query.head] * log2_e;
      const RowResult result = finish_row(own.maximum, own.sum, finish);
      const int64 statistic = query.in(params.lse_strides, params);
      if (leads && params.lse) params.lse[statistic] = result.lse;
      if (config.masses && leads && params.dropped_mass) {
        params.dropped_mass[statistic] = dropped_share(own, finish);
      }
      Output* out = static_cast<Output*>(params.out) + query.in(params.out_strides, params);
      store_row(out + column, state.output[r], half, result.factor);
    }
}

// The last split of an item's rows to arrive merges all; `parts` are those of its row 0.
DEVICE void merge_all(const AttentionParams& params, const Shared& shared, const DecodeWork& work,
                      const GlobalParts& parts) {
  sync_block();  // this split's part is written
  if (thread_index() == 0) shared_store(shared.said, arrives_last(params, work) ? 1.f : 0.f);
  sync_block();  // the answer is there
  if (shared_load(shared.said) == 0.f) return;
  for (int32 row = warp_index(); row < work.rows; row += config.warps) {
    GlobalParts own = parts;
    own.first += row;
    own.second += row;
    write_row<Output>(params, row_of(params, work, row),
                      merge_row<config.latent>(own, work.splits));
  }
}

// --- One item.

DEVICE void run(const AttentionParams& params, const Shared& shared, const Schedule& schedule,
                const DecodeWork& work) {
  const RowVisibility visibility = work.visibility(params);
  const Keys keys(params, work, visibility.keys_of(work.rows - 1).end);
  MlaLoader<config, KvTile> loader(keys);
  request_q(params, shared, work);
  cp_async_commit();
#pragma unroll
  for (int32 stage = 0; stage < config.stages - 1; ++stage) {
    loader.request({shared.stage(stage)});
    cp_async_commit();
  }
  WarpState state;
  state.scale = (params.scale_array ? *params.scale_array : params.scale) * log2_e;
  clear(state.output);
  if constexpr (config.skip_softmax) {
    state.votes.begin(state.rows, params, of_request(params, work), WarpPlace(), state.scale);
  }
  cp_async_wait<config.stages - 1>();  // this thread's part of Q has landed
  sync_block();                        // everyone's has, and nobody reads sums of the item before
  keep_q(state, shared, WarpPlace());
  for (int32 visit = 0; visit < keys.visits(); ++visit) {
    cp_async_wait<config.stages - 2>();  // this thread's part of the tile has landed
    sync_block();  // everyone's has, and nobody reads the tile before, or Q in its place
    loader.request({shared.stage(visit + config.stages - 1)});
    cp_async_commit();
    compute_tile(state, params, keys, visibility, shared, visit);
  }
  const WarpPlace place;
  if constexpr (config.skip_softmax) {
    state.votes.report(params, of_request(params, work), place, keys.order.deal.count);
  }
  gather_sums(state, shared, place);
  if (work.splits == 1) {
    write_rows(state, params, work, {}, place);
    return;
  }
  const GlobalParts parts = parts_of(schedule, work, 0, config.latent);
  write_rows(state, params, work, parts, place);
  if (merged_by_block(params)) merge_all(params, shared, work, parts);
}

KERNEL void __launch_bounds__(config.threads(), 1)
    mla_decode_sm80(const __grid_constant__ AttentionParams params) {
  const Shared shared;
  const Schedule schedule(params);
  for (int32 item = block_index(); item < params.items; item += grid_size()) {
    const DecodeWork work = schedule.find(item);
    if (work.exists) run(params, shared, schedule, work);
  }
}
