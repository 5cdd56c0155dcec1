// What the lanes of a warp do together, but for the matrix products (multiply.cpp).
//
// Each lane leaves its arguments; the last to come computes for all.  Shuffles and votes order no
// memory accesses; only `sync_warp` does.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "memory.h"
#include "race.h"

namespace emulator {
namespace {

template <typename F>
void each_lane(uint32_t mask, F&& visit) {
  for (; mask; mask &= mask - 1) visit(__builtin_ctz(mask));
}

struct Shuffled {
  Shuffle kind;
  int argument;
  Wide value, result;
};

int source_lane(const Shuffled& lane, int own) {
  switch (lane.kind) {
    case Shuffle::from:
      return lane.argument % lanes;
    case Shuffle::exclusive_or:
      return (own ^ lane.argument) < lanes ? own ^ lane.argument : own;
    case Shuffle::up:
      return own >= lane.argument ? own - lane.argument : own;
    case Shuffle::down:
      return own + lane.argument < lanes ? own + lane.argument : own;
  }
  __builtin_unreachable();
}

void shuffle_all(void* const* arguments, uint32_t mask) {
  each_lane(mask, [&](int l) {
    auto& lane = *static_cast<Shuffled*>(arguments[l]);
    const int source = source_lane(lane, l);
    if (!(mask >> source & 1)) fail("shuffle from lane %d, which is not in mask %#x", source, mask);
    lane.result = static_cast<Shuffled*>(arguments[source])->value;
  });
}

void check_uniform(void* const* arguments, uint32_t mask) {
  const Word first = *static_cast<Word*>(arguments[0]);
  each_lane(mask, [&](int l) {
    const Word value = *static_cast<Word*>(arguments[l]);
    if (value != first)
      fail("warp_uniform of %d in lane 0, but %d in lane %d", int(first), int(value), l);
  });
}

struct Voted {
  Vote kind;
  bool predicate;
  Word result;
};

void vote_all(void* const* arguments, uint32_t mask) {
  Word ballot = 0;
  each_lane(mask,
            [&](int l) { ballot |= Word(static_cast<Voted*>(arguments[l])->predicate) << l; });
  each_lane(mask, [&](int l) {
    auto& lane = *static_cast<Voted*>(arguments[l]);
    const Vote kind = lane.kind;
    lane.result = kind == Vote::ballot ? ballot : kind == Vote::all ? ballot == mask : ballot != 0;
  });
}

struct Reduced {
  Reduction kind;
  Word value;
};

Word combine(Reduction kind, Word a, Word b) {
  switch (kind) {
    case Reduction::sum:
      return a + b;
    case Reduction::minimum:
      return std::min(a, b);
    case Reduction::maximum:
      return std::max(a, b);
    case Reduction::bit_and:
      return a & b;
    case Reduction::bit_or:
      return a | b;
    case Reduction::bit_xor:
      return a ^ b;
  }
  __builtin_unreachable();
}

void reduce_all(void* const* arguments, uint32_t mask) {
  Reduced total = *static_cast<Reduced*>(arguments[__builtin_ctz(mask)]);
  each_lane(mask & (mask - 1), [&](int l) {
    total.value = combine(total.kind, total.value, static_cast<Reduced*>(arguments[l])->value);
  });
  each_lane(mask, [&](int l) { static_cast<Reduced*>(arguments[l])->value = total.value; });
}

void sync_all(void* const*, uint32_t mask) {
  race::Clock clock;
  Thread* warp = &self() - self().lane;
  each_lane(mask, [&](int l) { race::release(warp[l], clock); });
  each_lane(mask, [&](int l) { race::acquire(warp[l], clock); });
}

// Any lane may be elected; a kernel must not care which.
void elect_one(void* const* arguments, uint32_t mask) {
  const bool reverse = state.launch.schedule == static_cast<int>(Schedule::reverse);
  const int elected = reverse ? 31 - __builtin_clz(mask) : __builtin_ctz(mask);
  each_lane(mask, [&](int l) { *static_cast<bool*>(arguments[l]) = l == elected; });
}

// --- ldmatrix and stmatrix: matrices of 8 rows of 16 bytes; lane 8·i + r has the address of row r
// of matrix i.

struct Matrices {
  Word* fragment;
  int count;
  Word row;
  bool transposed;
  char* bytes;  // of the row
};

// The element (row, column) of a matrix that lane `l` holds in half `i` of its register.
struct Place {
  int row, column;
};
Place held(int l, int i, bool transposed) {
  const int along = l % 4 * 2 + i, across = l / 4;
  return transposed ? Place{along, across} : Place{across, along};
}

// Eight rows are read at once if they lie in different banks.
void count_wavefronts(const Matrices* const* rows, int count) {
  for (int m = 0; m < count; ++m) {
    int used[8] = {};  // times that each group of four banks is needed
    for (int r = 0; r < 8; ++r) ++used[rows[m * 8 + r]->row / 16 % 8];
    state.counts.ldmatrix_wavefronts += *std::max_element(used, used + 8);
    state.counts.ldmatrix_rows += 8;
    ++state.counts.ldmatrix_ideal;
  }
}

template <bool store>
void move_matrices(void* const* arguments, uint32_t) {
  Matrices* const* rows = reinterpret_cast<Matrices* const*>(arguments);
  Thread* warp = &self() - self().lane;
  const int count = rows[0]->count;
  for (int l = 0; l < count * 8; ++l) {
    Matrices& lane = *rows[l];
    lane.bytes = memory::shared(lane.row, 16, store ? "stmatrix" : "ldmatrix", 16);
    if (store) {
      race::writes(warp[l], lane.row, 16);
    } else {
      race::reads(warp[l], lane.row, 16);
    }
  }
  if (!store) count_wavefronts(rows, count);
  for (int l = 0; l < lanes; ++l) {
    for (int m = 0; m < count; ++m) {
      for (int i = 0; i < 2; ++i) {
        const Place place = held(l, i, rows[l]->transposed);
        char* element = rows[m * 8 + place.row]->bytes + place.column * 2;
        char* half = reinterpret_cast<char*>(rows[l]->fragment + m) + i * 2;
        memcpy(store ? element : half, store ? half : element, 2);
      }
    }
  }
}

}  // namespace

Wide shuffle(Shuffle kind, Word mask, Wide value, int argument) {
  ENTER_EMULATOR();
  Shuffled lane{kind, argument, value, 0};
  meet("shuffle", mask, shuffle_all, &lane);
  return lane.result;
}

Word uniform(Word value) {
  ENTER_EMULATOR();
  meet("warp_uniform", ~0u, check_uniform, &value);
  return value;
}

Word vote(Vote kind, Word mask, bool predicate) {
  ENTER_EMULATOR();
  Voted lane{kind, predicate, 0};
  meet("vote", mask, vote_all, &lane);
  return lane.result;
}

Word reduce(Reduction kind, Word mask, Word value) {
  ENTER_EMULATOR();
  Reduced lane{kind, value};
  meet("redux", mask, reduce_all, &lane);
  return lane.value;
}

void sync_warp(Word mask) {
  ENTER_EMULATOR();
  meet("syncwarp", mask, sync_all, nullptr);
}

bool elect(Word mask) {
  ENTER_EMULATOR();
  bool elected = false;
  meet("elect", mask, elect_one, &elected);
  return elected;
}

void load_matrices(Word* fragment, int count, Word row, bool transposed) {
  ENTER_EMULATOR();
  Matrices lane{fragment, count, row, transposed, nullptr};
  meet("ldmatrix", ~0u, move_matrices<false>, &lane);
}

void store_matrices(const Word* fragment, int count, Word row, bool transposed) {
  ENTER_EMULATOR();
  Matrices lane{const_cast<Word*>(fragment), count, row, transposed, nullptr};
  meet("stmatrix", ~0u, move_matrices<true>, &lane);
}

}  // namespace emulator
