// Prefill attention, Hopper.  O = softmax(Q Kᵀ · scale + mask) V, LSE = log Σ exp.
//
// Work:    an item is `consumers` · 64 query rows of one request: tokens of a head or, if they are
//          few, of all heads of a kv head (schedule.cuh).  Blocks stay and take items one by one
//          (ItemOrder).
// Roles:   warp-group 0, its first warp: loads Q, K and V by TMA (prefill_loader.cuh)
//          the others: 64 query rows each, from Q Kᵀ to the last store
// Memory:  Q; K and V tiles, two of each, in a ring that runs on from item to item.
// Waits:   q_full    an item's Q and what it is are there │ q_empty: all have taken them
//          k_full, v_full    a tile is there │ k_empty, v_empty: all have multiplied by it
//          v_landed  values of which the loader still has to clear some
//          once a tile, where tiles may be left out, the warps of a warp-group for their votes
//
//   S = Q Kᵀ of tile 0 │ softmax of tile 0
//   for each tile i > 0:   begin S = Q Kᵀ of i │ begin O += P V of i − 1 │ wait for S │ mask │
//                          vote │ maxima │ first exponentials │ skip? │ wait for V of i and for O │
//                          bring O to the new maxima │ other exponentials
//   O += P V of the last tile │ write O and LSE
#include <attention/certificate.cuh>
#include <attention/config.cuh>
#include <attention/mask.cuh>
#include <attention/online_softmax.cuh>
#include <attention/prefill_loader.cuh>
#include <attention/prefill_rows.cuh>
#include <attention/prefill_shared.cuh>
#include <attention/skip_softmax.cuh>
#include <attention/soft_cap.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/sync.cuh>
#include <ptx/wgmma.cuh>
#include <tile/descriptor.cuh>

constexpr FmhaHopperConfig config{CUATTN_CONFIG};

constexpr int32 key_tiles = config.block_kv / 8, key_steps = config.block_kv / 16;
constexpr int32 value_tiles = config.head_dim_v / 8;
constexpr int32 depth_steps = config.head_dim_qk / 16;
static_assert(config.head_dim_qk % 16 == 0 && config.block_kv % 16 == 0);
static_assert(config.consumers == 2 || config.consumers == 3);

using Input = Element<config.element>;
using Output = Element<config.output>;
using Shared = PrefillShared<config>;

// Registers a thread has: at launch each as many as `__launch_bounds__` allows.
constexpr int32 loader_registers = config.consumers == 2 ? 40 : 32;
constexpr int32 compute_registers = config.consumers == 2 ? 232 : 160;

// Maxima may lag behind by a factor of 2⁸ before sum and output are brought to them, which is
// work.  Weights are then rounded where they are above 1, the heaviest too, which otherwise is
// exactly 1: no worse than the others, but an output that is finer than the weights would show it.
constexpr bool coarse = config.output == config.element || config.output == Dtype::bfloat16;
constexpr float slack = coarse ? 8.f : 0.f;  // log2 units

// What one warp-group carries from tile to tile.
struct State {
  uint32 q[config.q_in_registers ? depth_steps : 1][4];
  float scores[key_tiles * 4];         // S, then its exponentials
  uint32 probabilities[key_steps][4];  // P
  float output[value_tiles * 4];       // O, not yet divided by the row sums
  RowStatistics<1> rows;               // maxima that sum and output are relative to
  // Maxima over all tiles that were not left out.
  float heaviest[1][2] = {{-infinity(), -infinity()}};
  LaneSkipRule skip;
  float squash_factor;  // with a cap, scores are tanh(Q Kᵀ · squash_factor)
  float scale;          // from scores to log2 units
};

// Accumulators as tiles of fragment.cuh: they lie alike.
template <int32 registers>
DEVICE float (&tiles_of(float (&d)[registers]))[1][registers / 4][4] {
  return reinterpret_cast<float (&)[1][registers / 4][4]>(d);
}

// A warp-group's place in its item.
struct Place {
  BlockVisibility visibility;  // rows counted from the warp-group's first
  int32 group, warp_row;
  Range seen_by_all;

  DEVICE Place(const AttentionParams& params, const Work& work, int32 group)
      : visibility(work.unit_visibility<group_rows>(params, group)),
        group(group),
        warp_row(warp_index() % group_warps * 16),
        seen_by_all{visibility.keys_of(visibility.rows - 1).begin, visibility.keys_of(0).end} {}

  DEVICE bool has_rows() const { return visibility.rows > 0; }

  // Whether row `row` of the warp's exists.
  DEVICE bool has(int32 row) const { return warp_row + row < visibility.rows; }

  // Whether some row does not see all keys of a tile.
  DEVICE bool masks(int32 first_key) const {
    return first_key < seen_by_all.begin || first_key + config.block_kv > seen_by_all.end;
  }
};

DEVICE void release(SharedAddress empty) {
  if (lane_index() == 0) mbarrier_arrive(empty);
}

// The loader may bring the next item's Q, and what comes after the next in place of what this is.
DEVICE void release_item(const Shared& shared) {
  sync_warp();
  release(shared.q_empty);
}

DEVICE State begin(const AttentionParams& params, const Work& work, const Place& place) {
  const float given = params.scale_array ? *params.scale_array : params.scale;
  const float scale = (config.soft_cap ? params.soft_cap : given) * log2_e;
  const auto threshold_of = [&](int32 row) {
    const int32 head = work.head + (place.warp_row + row) % work.pack;
    if (!place.has(row)) return infinity();  // which never objects
    return row_threshold(params, work.request, head, work.kv_len, scale);
  };
  State state{.skip = LaneSkipRule(threshold_of), .scale = scale};
  if constexpr (config.soft_cap) {
    state.squash_factor = given * reciprocal_approximate(params.soft_cap);
  }
  clear(tiles_of(state.output));
  return state;
}

// Rows past the request's end hold queries of the next one, which must not decide when the maxima
// of others rise: theirs are infinite.
DEVICE void ignore_missing_rows(State& state, const Place& place) {
#pragma unroll
  for (int32 half = 0; half < 2; ++half) {
    if (!place.has(half * 8 + fragment_row())) state.rows.maximum[0][half] = infinity();
  }
}

// Q into registers, after which the next item's may come.
DEVICE void load_q(State& state, const Shared& shared, int32 group) {
  if constexpr (config.q_in_registers) {
    const int32 lane = lane_index(), row = warp_index() % group_warps * 16 + lane % 16;
#pragma unroll
    for (int32 step = 0; step < depth_steps; ++step)
      ldmatrix_x4(state.q[step], shared.q_of(group).at(step / 4, row, step % 4 * 2 + lane / 16));
    release_item(shared);
  }
}

// Begin S = Q Kᵀ of a tile.
DEVICE void begin_scores(State& state, const Shared& shared, int32 group, int32 tile) {
  const auto q = shared.q_of(group);
  const uint64 keys = depth_major(recomputed(shared.k.tile(tile).start));
  mbarrier_wait(shared.k_full + shared.stage(tile), shared.phase(tile));
  wgmma_fence();
#pragma unroll
  for (int32 step = 0; step < depth_steps; ++step) {
    const uint64 b = keys + (step / 4 * (Shared::KTile::chunk_bytes >> 4) + step % 4 * 2);
    if constexpr (config.q_in_registers) {
      wgmma_registers<Input, Major::depth>(state.scores, state.q[step], b, step > 0);
    } else {
      const uint64 a = depth_major(q.start + step / 4 * q.chunk_bytes) + step % 4 * 2;
      wgmma_shared<Input, Major::depth, Major::depth>(state.scores, a, b, step > 0);
    }
  }
  wgmma_commit();
}

// Until a tile's values have landed.  Called while the tile is exponentiated, where asking costs no
// time, and not where they are wanted, between two products.
DEVICE void await_values(const Shared& shared, int32 tile) {
  mbarrier_wait(shared.v_full + shared.stage(tile), shared.phase(tile));
}

// Begin O += P V of a tile.
DEVICE void begin_output(State& state, const Shared& shared, int32 tile) {
  const auto v = shared.v.tile(tile);
  wgmma_fence();
#pragma unroll
  for (int32 step = 0; step < key_steps; ++step)
    wgmma_registers<Input, Major::width>(state.output, state.probabilities[step],
                                         width_major<config.block_kv>(v.start) + step * 128, true);
  wgmma_commit();
}

// S as softmax wants it, and the largest of each row in this lane's columns.
DEVICE void finish_scores(State& state, float (&found)[1][2], const Place& place, int32 first_key,
                          bool masked) {
  auto& scores = tiles_of(state.scores);
  if constexpr (config.soft_cap) squash(scores, state.squash_factor);
  if (masked) mask_scores(scores, place.visibility, place.warp_row, first_key);
  lane_maxima(found, scores);
}

// Take new maxima into the statistics; whether the output is to shrink, too.  A row grows if one of
// its lanes finds it so: only then do lanes ask each other by how much.
DEVICE bool raise(State& state, float (&shrink)[1][2], const float (&found)[1][2]) {
  bool grown = false;
#pragma unroll
  for (int32 half = 0; half < 2; ++half)
    grown |= (found[0][half] - state.rows.maximum[0][half]) * state.scale > slack;
  const bool raised = warp_any(grown);
  if (raised) {
    float tile_maxima[1][2];
    quad_maxima(tile_maxima, found);
    raise_maxima(state.rows, shrink, tile_maxima, state.scale);
  }
  return raised;
}

// Scores of keys 16 · [begin, end) become probabilities relative to the rows' maxima, which are
// added to the rows' sums.
template <int32 begin, int32 end>
DEVICE void exponentiate(State& state) {
#pragma unroll
  for (int32 half = 0; half < 2; ++half) {
    const float maximum = state.rows.maximum[0][half];
    const float shift = maximum == -infinity() ? 0.f : maximum * state.scale;
#pragma unroll
    for (int32 c = 2 * begin; c < 2 * end; ++c) {
      float (&score)[4] = tiles_of(state.scores)[0][c];
      score[half * 2] = exp2_approximate(fmaf(score[half * 2], state.scale, -shift));
      score[half * 2 + 1] = exp2_approximate(fmaf(score[half * 2 + 1], state.scale, -shift));
      state.rows.sum[0][half] += score[half * 2] + score[half * 2 + 1];
    }
  }
}

DEVICE void pack_probabilities(State& state) {
  const auto& tiles = tiles_of(state.scores)[0];
#pragma unroll
  for (int32 c = 0; c < key_tiles; ++c)
#pragma unroll
    for (int32 half = 0; half < 2; ++half)
      state.probabilities[c / 2][c % 2 * 2 + half] =
          pack(tiles[c][half * 2], tiles[c][half * 2 + 1], Input{});
}

// The warps of a warp-group, of which a block has up to three.
DEVICE void meet(int32 group) {
  if (group == 0) named_barrier_sync<1, group_threads>();
  if (group == 1) named_barrier_sync<2, group_threads>();
  if (config.consumers > 2 && group == 2) named_barrier_sync<3, group_threads>();
}

// Where the warps of a warp-group leave their votes on a tile.
DEVICE SharedAddress votes_of(const Shared& shared, int32 group, uint32 tile) {
  return shared.votes + (group * 2 + tile % 2) * 16;
}

// Say whether this warp's rows agree to leave a tile out.
DEVICE void cast_vote(const State& state, const float (&found)[1][2], const Shared& shared,
                      const Place& place, int32 tile) {
  float voters[1][2];  // rows that do not exist have no say
#pragma unroll
  for (int32 half = 0; half < 2; ++half)
    voters[0][half] = place.has(half * 8 + fragment_row()) ? found[0][half] : -infinity();
  const bool willing = warp_all(state.skip.willing(voters, state.heaviest));
  const SharedAddress own = votes_of(shared, place.group, tile) + place.warp_row / 16 * 4;
  if (lane_index() == 0) shared_store(own, willing ? 1.f : 0.f);
}

// Whether all warps of the warp-group agree to leave a tile out; if not, its maxima count from now
// on.
DEVICE bool count_votes(State& state, const float (&found)[1][2], const Shared& shared,
                        const Place& place, int32 tile, int32 first_key) {
  meet(place.group);
  const uint32 warp = lane_index() % group_warps;
  const bool skip = warp_all(shared_load(votes_of(shared, place.group, tile) + warp * 4) != 0.f);
  const Range keys{first_key, first_key + config.block_kv};
  state.skip.skipped += skip && place.visibility.sees_any(0, group_rows, keys);
  float tile_maxima[1][2];
  quad_maxima(tile_maxima, found);
  if (!skip) larger(state.heaviest, state.heaviest, tile_maxima);
  return skip;
}

// Wait for something of which nothing is wanted, all lanes before any of them may say so.
DEVICE void pass(SharedAddress full, uint32 phase) {
  mbarrier_wait(full, phase);
  sync_warp();
}

// Tiles of an item in which this warp-group has no rows.
DEVICE void pass_over(const Shared& shared, int32 first_tile, int32 count) {
  for (int32 tile = first_tile; tile < first_tile + count; ++tile) {
    pass(shared.k_full + shared.stage(tile), shared.phase(tile));
    release(shared.k_empty + shared.stage(tile));
    pass(shared.v_full + shared.stage(tile), shared.phase(tile));
    release(shared.v_empty + shared.stage(tile));
  }
}

// The first tile of an item, which is never left out: up to its P.
DEVICE void attend_first(State& state, const Shared& shared, const Place& place, int32 tile,
                         int32 first_key) {
  const bool masked = recomputed(place.masks(first_key));
  float found[1][2], shrink[1][2];
  begin_scores(state, shared, place.group, tile);
  wgmma_wait<0>(state.scores);
  release(shared.k_empty + shared.stage(tile));
  finish_scores(state, found, place, first_key, masked);
  raise(state, shrink, found);
  if constexpr (config.skip_softmax) quad_maxima(state.heaviest, found);
  exponentiate<0, key_steps>(state);
  pack_probabilities(state);
  await_values(shared, tile);
}

// S to P of one tile while O takes up the one before it.
DEVICE void attend_next(State& state, const Shared& shared, const Place& place, int32 tile,
                        int32 first_key) {
  const bool masked = recomputed(place.masks(first_key));
  float found[1][2], shrink[1][2];
  begin_scores(state, shared, place.group, tile);
  begin_output(state, shared, tile - 1);
  wgmma_wait<1>(state.scores);
  release(shared.k_empty + shared.stage(tile));
  finish_scores(state, found, place, first_key, masked);
  const bool raised = raise(state, shrink, found);
  exponentiate<0, key_steps / 2>(state);
  // NOTE: a loop, which ptxas moves nothing across.  Without one here it puts the wait for O before
  // all exponentials, and none of them runs beside P V.
  await_values(shared, tile);
  wgmma_wait<0>(state.output);
  release(shared.v_empty + shared.stage(tile - 1));
  if (raised) shrink_output(tiles_of(state.output), shrink);
  exponentiate<key_steps / 2, key_steps>(state);
  pack_probabilities(state);
}

// The same where tiles may be left out: `pending` says whether the one before it has a P, and the
// result whether this one has.  Half of the exponentials would hide more of P V, but are lost where
// a tile is left out; a quarter takes as long as the votes.
DEVICE bool attend_or_skip(State& state, const Shared& shared, const Place& place, int32 tile,
                           int32 first_key, bool pending) {
  const bool masked = recomputed(place.masks(first_key));
  float found[1][2], shrink[1][2];
  begin_scores(state, shared, place.group, tile);
  // NOTE: waits stand in both branches, or ptxas lets the products wait for each other.
  if (pending) {
    begin_output(state, shared, tile - 1);
    wgmma_wait<1>(state.scores);
  } else {
    wgmma_wait<0>(state.scores);
  }
  release(shared.k_empty + shared.stage(tile));
  finish_scores(state, found, place, first_key, masked);
  cast_vote(state, found, shared, place, tile);
  // As if the tile were kept, while the other warps vote.
  const RowStatistics<1> before = state.rows;
  const bool raised = raise(state, shrink, found);
  exponentiate<0, key_steps / 4>(state);
  const bool skip = count_votes(state, found, shared, place, tile, first_key);
  await_values(shared, tile);
  wgmma_wait<0>(state.output);
  release(shared.v_empty + shared.stage(tile - 1));
  if (skip) {
    state.rows = before;
    if constexpr (config.certificate) {
      float tile_maxima[1][2];
      quad_maxima(tile_maxima, found);
      const Range keys{first_key, first_key + config.block_kv};
      shared.lost.add(tile_maxima, place.visibility, place.warp_row, keys, state.scale);
    }
    return false;
  }
  if (raised) shrink_output(tiles_of(state.output), shrink);
  exponentiate<key_steps / 4, key_steps>(state);
  pack_probabilities(state);
  return true;
}

// All tiles of an item.
DEVICE void attend(State& state, const Shared& shared, const Place& place, const TileOrder& order,
                   int32 first_tile) {
  bool pending = true;
  attend_first(state, shared, place, first_tile, order.at(0) * config.block_kv);
  for (int32 step = 1; step < order.count; ++step) {
    const int32 tile = first_tile + step, first_key = order.at(step) * config.block_kv;
    if constexpr (config.skip_softmax) {
      pending = attend_or_skip(state, shared, place, tile, first_key, pending);
    } else {
      attend_next(state, shared, place, tile, first_key);
    }
  }
  if constexpr (!config.q_in_registers) release_item(shared);
  const int32 last = first_tile + order.count - 1;
  if (pending) {
    begin_output(state, shared, last);
    wgmma_wait<0>(state.output);
  }
  release(shared.v_empty + shared.stage(last));
}

DEVICE void finish(State& state, const AttentionParams& params, const Shared& shared,
                   const Work& work, const Place& place) {
  const auto rows = PrefillRows::of_unit<group_rows>(params, work, place.group);
  if constexpr (sizeof(Output) == 2) {
    write_wide_rows<Output>(rows, tiles_of(state.output), state.rows, state.scale, place.warp_row);
  } else {
    write_rows<Output>(rows, tiles_of(state.output), state.rows, state.scale, place.warp_row);
  }
  if constexpr (config.certificate)
    shared.lost.write(rows, state.rows, state.scale, place.warp_row);
  if constexpr (config.skip_softmax) {
    if (!params.skip_counts || warp_index() % group_warps != 0) return;
    const Range keys = place.visibility.keys_of_rows(0, group_rows);
    const Voters voters{work.request, work.kv_len, work.head, work.pack, 0, rows.end};
    report_votes<false, warp_size>(params, voters, TileOrder(keys, config.block_kv).count,
                                   state.skip.skipped, lane_index());
  }
}

DEVICE void compute(const AttentionParams& params, const Shared& shared, int32 group) {
  int32 first_tile = 0;
  for (int32 turn = 0;; ++turn) {
    mbarrier_wait(shared.q_full, turn & 1);
    const Work work = shared.work(turn);
    if (!work.exists) return;
    const Place place(params, work, group);
    State state = begin(params, work, place);
    ignore_missing_rows(state, place);
    if constexpr (config.certificate) shared.lost.begin();
    load_q(state, shared, group);
    const TileOrder order(work.keys<group_rows>(params, config.consumers), config.block_kv);
    if (order.count > 0 && place.has_rows()) {
      attend(state, shared, place, order, first_tile);
    } else {
      if constexpr (!config.q_in_registers) release_item(shared);
      pass_over(shared, first_tile, order.count);
    }
    if (place.has_rows()) finish(state, params, shared, shared.work(turn), place);
    first_tile += order.count;
  }
}

KERNEL void __launch_bounds__(config.threads(), 1)
    fmha_sm90(const __grid_constant__ FmhaHopperParams params) {
  const Shared shared;
  if (thread_index() == 0) shared.begin();
  sync_block();
  const int32 group = warp_index() / group_warps;
  if (group == 0) {
    registers_decrease<loader_registers>();
    if (warp_index() == 0) PrefillLoader<config>(params, shared).run();
  } else {
    registers_increase<compute_registers>();
    compute(params.attention, shared, group - 1);
  }
}
