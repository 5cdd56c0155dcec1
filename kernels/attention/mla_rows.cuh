// What the scores' warp-group of MLA decode keeps of its rows, and which tiles it leaves out.
//
//   reference   the larger of a row's running maximum and that of the seeds, whose ever they are
//   skip        ⇔  for all 64 rows:  tile maximum − reference < ln λ;  or all can afford the loss
//
// As in decode (seeded_skip.cuh, dropped_mass.cuh), but that four warps vote together.
#pragma once

#include <attention/config.cuh>
#include <attention/dropped_mass.cuh>
#include <attention/mla_item.cuh>
#include <attention/online_softmax.cuh>
#include <attention/row_result.cuh>
#include <attention/seeded_skip.cuh>
#include <attention/sparse_token.cuh>
#include <ptx/shared.cuh>
#include <ptx/sync.cuh>

// The largest score of each row of a tile, log2 units.
DEVICE void tile_maxima(float (&top)[1][2], const float (&s)[tile_keys / 2], float scale) {
#pragma unroll
  for (int32 half = 0; half < 2; ++half) {
    float value = -infinity();
#pragma unroll
    for (int32 c = 0; c < 8; ++c)
      value = fmaxf(value, fmaxf(s[c * 4 + half * 2], s[c * 4 + half * 2 + 1]));
    top[0][half] = quad_maximum(value) * scale;
  }
}

// S → P and its sums, relative to the maxima in `tile`.
template <typename Input>
DEVICE void exponentiate(uint32 (&p)[tile_keys / 16][4], RowStatistics<1>& tile,
                         const float (&s)[tile_keys / 2], float scale) {
#pragma unroll
  for (int32 half = 0; half < 2; ++half) {
    const float maximum = tile.maximum[0][half];
    const float shift = maximum == -infinity() ? 0.f : maximum;
    float sum = 0.f;
#pragma unroll
    for (int32 c = 0; c < 8; ++c) {
      const float first = exp2_approximate(fmaf(s[c * 4 + half * 2], scale, -shift));
      const float second = exp2_approximate(fmaf(s[c * 4 + half * 2 + 1], scale, -shift));
      sum += first + second;
      p[c / 2][c % 2 * 2 + half] = pack(first, second, Input{});
    }
    tile.sum[0][half] = sum;
  }
}

template <MlaConfig config>
struct MlaRows {
  RowStatistics<1> kept;  // maxima in log2 units
  float alpha[1][2];      // what O shrinks by
  int32 skipped = 0;
  bool left_out = false;  // the newest tile

  // What else is known of a row waits in shared memory.
  struct Record {
    int32 end;        // of the keys it sees
    float threshold;  // log2 λ
    float seed;       // maximum of the seeds of other splits, and of what is known from elsewhere
  };
  static DEVICE Record record(const Shared& shared, int32 row) {
    float x[4];
    shared_load_4(x, shared.rows + row * 16);
    return {__builtin_bit_cast(int32, x[0]), x[1], x[2]};
  }
  static DEVICE int32 row_of(int32 half) { return warp_index() * 16 + half * 8 + fragment_row(); }

  DEVICE MlaRows(const AttentionParams& params, const Shared& shared, const DecodeWork& work) {
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const int32 row = row_of(half);
      const bool exists = row < work.rows;
      // A row that does not exist has an infinite maximum: no key of it counts.
      kept.maximum[0][half] = exists ? -infinity() : infinity();
      alpha[0][half] = 1.f;
      float threshold = 0.f, seed = -infinity();
      if constexpr (config.skip_softmax && !config.mass_rule) {
        const int32 head = (work.first_row + row) % params.group;
        const DecodeWork whole = of_request<config.sparse>(params, work);
        if (exists) {
          threshold = row_threshold(params, whole.request, head, whole.kv_len, 1.f);
          seed = given_seed(params, work, row);
        }
      }
      const int32 end = work.visibility(params).keys_of(row).end;
      if (fragment_column() == 0) {
        shared_store_4(shared.rows + row * 16,
                       {__builtin_bit_cast(float, end), threshold, seed, 0.f});
        if constexpr (config.masses) {
          shared_store_4(shared.accounts + row * 16, {kept.maximum[0][half], 0.f, 0.f, 0.f});
        }
      }
    }
  }

  // Scores of keys that a row does not see become −∞.
  static DEVICE void mask(float (&s)[tile_keys / 2], const Shared& shared, int32 first_key) {
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const int32 end = record(shared, row_of(half)).end - first_key;
#pragma unroll
      for (int32 c = 0; c < 8; ++c)
#pragma unroll
        for (int32 i = 0; i < 2; ++i)
          if (c * 8 + fragment_column() + i >= end) s[c * 4 + half * 2 + i] = -infinity();
    }
  }

  // The same of chosen keys that are none.
  static DEVICE void mask_chosen(float (&s)[tile_keys / 2], const Shared& shared, int32 entry) {
    const SharedAddress chosen = shared.chosen + entry % stages * chosen_bytes;
#pragma unroll
    for (int32 four = 0; four < 2; ++four) {
      float words[4];
      shared_load_4(words, chosen + four * 16);
#pragma unroll
      for (int32 c = 0; c < 4; ++c) {
        const uint32 bits = __builtin_bit_cast(uint32, words[c]) >> fragment_column();
#pragma unroll
        for (int32 i = 0; i < 4; ++i)
          if (!(bits >> i % 2 & 1)) s[(four * 4 + c) * 4 + i] = -infinity();
      }
    }
  }

  // Whether a tile is left out: it has the maxima `top` and, for masses, the sums in `tile`.
  DEVICE bool leave_out(const AttentionParams& params, const Shared& shared, const Item& item,
                        int32 step, const float (&top)[1][2], const RowStatistics<1>& tile) {
    const bool is_seed = step < item.seeds();
    bool willing = !is_seed;
    if constexpr (!config.mass_rule) {
      float reference[1][2], threshold[1][2];
#pragma unroll
      for (int32 half = 0; half < 2; ++half) {
        const Record row = record(shared, row_of(half));
        reference[0][half] = fmaxf(kept.maximum[0][half], row.seed);
        threshold[0][half] = row.threshold;
      }
      willing &= vote_seeded(top, reference, threshold);
    }
    float mass[1][2];
    bool raised = false;
    MassLedger<1> ledger;  // log2 units too, so that their scale is 1
    if constexpr (config.masses) {
      ledger = accounts(shared);
      raised = ledger.raise(top, 1.f);
      ledger.weigh(mass, tile, 1.f);
    }
    if constexpr (config.mass_rule) {
      willing &= !raised && ledger.affordable(mass, params.threshold * mass_margin);
      willing = warp_all(willing);
    }
    if (!is_seed) willing = all_agree(shared, step, willing);
    if constexpr (config.masses) {
      if (is_seed) {  // which this split counts its share of
        const float share = float(item.own) * reciprocal_approximate(float(item.tiles));
        mass[0][0] *= share;
        mass[0][1] *= share;
      }
      ledger.add(mass, false, willing);
      keep_accounts(shared, ledger);
    }
    skipped += willing;
    alpha[0][0] = alpha[0][1] = 1.f;  // the old ones need not be kept
    if (step >= item.foreign) return willing;
    take_seed(shared, top);
    return true;
  }

  // What its rows know of masses, which only a vote wants.
  static DEVICE MassLedger<1> accounts(const Shared& shared) {
    MassLedger<1> ledger;
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      float x[4];
      shared_load_4(x, shared.accounts + row_of(half) * 16);
      ledger.reference[0][half] = x[0];
      ledger.known[0][half] = x[1];
      ledger.dropped[0][half] = x[2];
    }
    return ledger;
  }
  static DEVICE void keep_accounts(const Shared& shared, const MassLedger<1>& ledger) {
    sync_warp();  // the old ones have been read
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const SharedAddress target = shared.accounts + row_of(half) * 16;
      if (fragment_column() == 0) {
        shared_store_4(target, {ledger.reference[0][half], ledger.known[0][half],
                                ledger.dropped[0][half], 0.f});
      }
    }
    sync_warp();
  }

  // Take the maxima of another split's seed into the records.
  static DEVICE void take_seed(const Shared& shared, const float (&top)[1][2]) {
    sync_warp();  // the records have been read
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
      const int32 row = row_of(half);
      if (fragment_column() != 0) continue;
      shared_store(shared.rows + row * 16 + 8, fmaxf(record(shared, row).seed, top[0][half]));
    }
    sync_warp();
  }

  // Whether all warps of the group do.  Two places take turns: who is slow still reads the other.
  static DEVICE bool all_agree(const Shared& shared, int32 step, bool willing) {
    const SharedAddress votes = shared.votes + step % 2 * 16;
    const SharedAddress own = votes + warp_index() * 4;
    if (lane_index() == 0) shared_store(own, willing ? 1.f : 0.f);
    named_barrier_sync<1, group_threads>();
    return warp_all(shared_load(votes + lane_index() % 4 * 4) != 0.f);
  }

  // One row's result, by the four lanes that share it.
  DEVICE PartialRow part(const Shared& shared, int32 half) const {
    PartialRow row{kept.maximum[0][half], quad_sum(kept.sum[0][half]), -infinity(), 0.f};
    if constexpr (config.masses) {
      const MassLedger<1> ledger = accounts(shared);
      row.reference = ledger.reference[0][half];
      row.dropped = ledger.dropped[0][half];
    }
    return row;
  }
};
