// See wgmma.h.
//
// At issue the accumulators are put aside and their registers filled with a pattern.  A product is
// computed, and the registers given back, when the last of the warp-group's 128 threads has issued
// it (early), at the wait (late), or at either (random).  Until the wait the registers must stay as
// they are.  So touching accumulators in flight, and reusing operands too early, come to light.
#include "wgmma.h"

#include <algorithm>
#include <cstring>

#include "block.h"
#include "memory.h"
#include "numbers.h"
#include "race.h"

namespace emulator {
namespace {

constexpr int group_threads = 4 * lanes, rows = 64;
constexpr uint32_t in_flight = 0x7fa5a5a5;  // a signalling NaN: arithmetic would make it quiet

struct Product {
  WarpGroupMultiply what;
  Word a[4];
  uint32_t group;
  const void* place;
};

// One accumulator array of a thread while products on it are in flight.
struct Accumulator {
  float* registers;
  std::vector<float> values;
  int products;    // not waited for
  int uncomputed;  // of them; while there are any, the registers hold the pattern
};

struct Issued {
  std::vector<Product> products;  // not waited for
  size_t computed = 0;            // of them, from the front
  std::vector<Accumulator> accumulators;
  uint32_t open_group = 1;
  bool fenced = false;
};

struct Gathering {
  int arrived = 0;
  int64_t done = 0;
};

std::vector<Issued> issued;         // [thread]
std::vector<Gathering> gatherings;  // [warp-group]

// --- Operands in shared memory.

struct Descriptor {
  Word start, leading, stride, swizzle;
};

Descriptor decode(Wide bits) {
  if (bits >> 49 & 7) fail("wgmma descriptor with a base offset, which is not modelled");
  constexpr Word widths[4] = {0, 128, 64, 32};
  return {Word(bits & 0x3fff) << 4, Word(bits >> 16 & 0x3fff) << 4, Word(bits >> 32 & 0x3fff) << 4,
          widths[bits >> 62]};
}

// Visit the 16-byte pieces of [extent of m or n][depth of k]: visit(address, first m or n, first
// k). As it is, 8 rows of k lie together (K-major); transposed, 8 columns of m or n (MN-major).
template <typename F>
void each_piece(const Descriptor& d, int extent, int per_piece, bool transposed, F&& visit) {
  const int depth = 2 * per_piece;
  const Word width = d.swizzle ? d.swizzle : 16, pieces = width / 16;
  if (!transposed) {
    const Word k_step = d.swizzle ? 16 : d.leading;
    for (int r = 0; r < extent; ++r)
      for (int p = 0; p < 2; ++p)
        visit(swizzled(d.start + r / 8 * d.stride + r % 8 * width + p * k_step, d.swizzle), r,
              p * per_piece);
    return;
  }
  const Word mn_step = d.swizzle ? d.leading : d.stride, k_step = d.swizzle ? d.stride : d.leading;
  for (int k = 0; k < depth; ++k)
    for (Word p = 0; p < Word(extent / per_piece); ++p)
      visit(swizzled(
                d.start + p / pieces * mn_step + k / 8 * k_step + k % 8 * width + p % pieces * 16,
                d.swizzle),
            int(p) * per_piece, k);
}

int elements_per_piece(Operand operand) { return operand == Operand::e4m3 ? 16 : 8; }

float element(const char* piece, int i, Operand operand) {
  if (operand == Operand::e4m3) return float_of_e4m3(static_cast<unsigned char>(piece[i]));
  uint16_t bits;
  memcpy(&bits, piece + 2 * i, 2);
  return operand == Operand::bfloat16 ? float_of_bf16(bits) : float_of_fp16(bits);
}

constexpr int max_depth = 32, max_columns = 256;
float a_matrix[rows][max_depth], b_matrix[max_columns][max_depth];
float b_by_depth[max_depth][max_columns], d_matrix[rows][max_columns];

void read_matrix(float (*matrix)[max_depth], Wide descriptor, int extent, bool transposed,
                 Operand operand) {
  const int per_piece = elements_per_piece(operand);
  each_piece(decode(descriptor), extent, per_piece, transposed, [&](Word address, int mn, int k) {
    const char* piece = memory::shared(address, 16, "wgmma operand", 16);
    for (int i = 0; i < per_piece; ++i) {
      if (transposed)
        matrix[mn + i][k] = element(piece, i, operand);
      else
        matrix[mn][k + i] = element(piece, i, operand);
    }
  });
}

// A from the registers of the 128 threads, each warp as in mma.sync.
void read_registers(const Issued* group, size_t number, Operand operand) {
  const int e = operand == Operand::e4m3 ? 4 : 2;
  for (int t = 0; t < group_threads; ++t) {
    const int row = t / lanes * 16 + t % lanes / 4, column = t % 4;
    for (int r = 0; r < 4; ++r) {
      const char* bytes = reinterpret_cast<const char*>(&group[t].products[number].a[r]);
      for (int i = 0; i < e; ++i)
        a_matrix[row + r % 2 * 8][e * column + r / 2 * 4 * e + i] = element(bytes, i, operand);
    }
  }
}

// Where register i of a thread lies in D.
struct Place {
  int row, column;
};
Place held(int t, int i) {
  return {t / lanes * 16 + t % lanes / 4 + i / 2 % 2 * 8, i / 4 * 8 + t % 4 * 2 + i % 2};
}

void check_untouched(const Accumulator& one) {
  for (size_t i = 0; i < one.values.size(); ++i) {
    const void* expected = one.uncomputed ? static_cast<const void*>(&in_flight) : &one.values[i];
    if (memcmp(one.registers + i, expected, 4) != 0)
      fail("accumulator register %zu was written while a wgmma is in flight", i);
  }
}

// The accumulators of a product that is issued leave the kernel's hands.
void take(Issued& thread, const WarpGroupMultiply& what) {
  auto& all = thread.accumulators;
  auto one = std::find_if(all.begin(), all.end(), [&](auto& a) { return a.registers == what.d; });
  if (one == all.end()) one = all.insert(one, {what.d, {what.d, what.d + what.columns / 2}, 0, 0});
  check_untouched(*one);
  ++one->products;
  if (one->uncomputed++ > 0) return;
  for (int i = 0; i < what.columns / 2; ++i) memcpy(what.d + i, &in_flight, 4);
}

Accumulator& accumulator(Issued& thread, const float* registers) {
  for (Accumulator& one : thread.accumulators)
    if (one.registers == registers) return one;
  __builtin_unreachable();
}

// Product `number` of all threads of a warp-group.
void compute(Issued* group, size_t number) {
  const WarpGroupMultiply& what = group[0].products[number].what;
  for (int t = 1; t < group_threads; ++t) {
    const WarpGroupMultiply& other = group[t].products[number].what;
    if (other.b_descriptor != what.b_descriptor || other.a_descriptor != what.a_descriptor ||
        other.columns != what.columns || other.accumulate != what.accumulate)
      fail("threads of a warp-group give one wgmma different descriptors or shapes");
  }
  const int depth = 2 * elements_per_piece(what.operand);
  if (what.a)
    read_registers(group, number, what.operand);
  else
    read_matrix(a_matrix, what.a_descriptor, rows, what.a_transposed, what.operand);
  read_matrix(b_matrix, what.b_descriptor, what.columns, what.b_transposed, what.operand);
  for (int n = 0; n < what.columns; ++n)
    for (int k = 0; k < depth; ++k) b_by_depth[k][n] = b_matrix[n][k];
  for (int t = 0; t < group_threads; ++t) {
    const auto& values = accumulator(group[t], group[t].products[number].what.d).values;
    for (int i = 0; i < what.columns / 2; ++i)
      d_matrix[held(t, i).row][held(t, i).column] = what.accumulate ? values[i] : 0.f;
  }
  for (int m = 0; m < rows; ++m)
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < what.columns; ++n) d_matrix[m][n] += a_matrix[m][k] * b_by_depth[k][n];
  for (int t = 0; t < group_threads; ++t) {
    Accumulator& own = accumulator(group[t], group[t].products[number].what.d);
    check_untouched(own);
    for (int i = 0; i < what.columns / 2; ++i)
      own.values[i] = d_matrix[held(t, i).row][held(t, i).column];
    if (--own.uncomputed == 0) memcpy(own.registers, own.values.data(), own.values.size() * 4);
  }
}

// Compute what is not yet computed of a warp-group's first `count` products.
void land(Issued* group, size_t count) {
  for (size_t number = group[0].computed; number < count; ++number) compute(group, number);
  for (int t = 0; t < group_threads; ++t) group[t].computed = std::max(group[t].computed, count);
}

bool issued_by_all(const Issued* group, size_t count) {
  return std::all_of(group, group + group_threads,
                     [&](const Issued& thread) { return thread.products.size() >= count; });
}

size_t issued_up_to(int64_t last_group, const Issued& thread) {
  size_t count = 0;
  while (count < thread.products.size() && thread.products[count].group <= last_group) ++count;
  return count;
}

// The first `count` products, computed by now, are over.
void finish(Issued& thread, size_t count) {
  for (size_t i = 0; i < count; ++i) --accumulator(thread, thread.products[i].what.d).products;
  thread.products.erase(thread.products.begin(), thread.products.begin() + long(count));
  thread.computed -= count;
  for (const Accumulator& one : thread.accumulators) check_untouched(one);
  std::erase_if(thread.accumulators, [](auto& one) { return one.products == 0; });
}

// Lane 0 for its warp, at issue: 16 rows of A, all of B.
void note_reads(Thread& thread, const Product& product) {
  const WarpGroupMultiply& what = product.what;
  const race::Agent agent = race::wgmmas_of(thread, product.group);
  const int per_piece = elements_per_piece(what.operand), first_row = thread.warp % 4 * 16;
  const auto note = [&](Word address) {
    memory::shared(address, 16, "wgmma operand", 16);
    race::agent_reads(thread, agent, address, 16);
  };
  each_piece(decode(what.b_descriptor), what.columns, per_piece, what.b_transposed,
             [&](Word address, int, int) { note(address); });
  if (what.a) return;
  each_piece(decode(what.a_descriptor), rows, per_piece, what.a_transposed,
             [&](Word address, int row, int) {
               if (row / 16 * 16 == first_row) note(address);
             });
}

}  // namespace

void wgmma(const WarpGroupMultiply& what) {
  ENTER_EMULATOR();
  Thread& thread = self();
  Issued& own = issued[thread.thread];
  if (state.launch.threads % group_threads) fail("wgmma in a block that is not all warp-groups");
  if (!own.fenced) fail("wgmma without a wgmma.fence since the last wait");
  if (what.columns % 8 || what.columns > max_columns) fail("wgmma of %d columns", what.columns);
  take(own, what);
  Product product{what, {}, own.open_group, thread.place};
  if (what.a) memcpy(product.a, what.a, sizeof product.a);
  own.products.push_back(product);
  if (thread.lane == 0) note_reads(thread, product);
  const size_t count = own.products.size();
  Issued* group = &issued[thread.thread / group_threads * group_threads];
  if (issued_by_all(group, count) && lands_at_once()) land(group, count);
}

void wgmma_fence() {
  ENTER_EMULATOR();
  issued[self().thread].fenced = true;
}

void wgmma_commit() {
  ENTER_EMULATOR();
  ++issued[self().thread].open_group;
}

void wgmma_wait(int pending) {
  ENTER_EMULATOR();
  Thread& thread = self();
  Issued& own = issued[thread.thread];
  const int64_t done = int64_t{own.open_group} - 1 - pending;
  if (done > 0) race::finished(thread, race::wgmmas_of(thread, uint32_t(done)));
  own.fenced = false;
  const int number = thread.thread / group_threads;
  Gathering& gathering = gatherings[number];
  if (gathering.arrived == 0) gathering.done = done;
  if (gathering.done != done) fail("warps of a warp-group wait for different wgmma groups");
  if (++gathering.arrived < group_threads) return wait("the warp-group in wgmma.wait_group");
  gathering.arrived = 0;
  Issued* group = &issued[number * group_threads];
  const size_t count = issued_up_to(done, own);
  for (int t = 0; t < group_threads; ++t) {
    if (issued_up_to(done, group[t]) != count)
      fail("threads of a warp-group issued different numbers of wgmmas");
  }
  land(group, count);
  for (int t = 0; t < group_threads; ++t) finish(group[t], count);
  for (int w = 0; w < 4; ++w) wake(number * 4 + w, ~0u);
}

namespace wgmmas {

void begin_block() {
  issued.assign(state.threads.size(), {});
  gatherings.assign(state.threads.size() / group_threads + 1, {});
}

void check_access(const Thread& thread, const void* pointer, bool write) {
  const char* at = static_cast<const char*>(pointer);
  for (const Accumulator& one : issued[thread.thread].accumulators) {
    const auto distance = at - reinterpret_cast<const char*>(one.registers);
    if (distance >= 0 && size_t(distance) < one.values.size() * 4)
      fail("accumulator register %zu was %s while a wgmma is in flight", size_t(distance) / 4,
           write ? "written" : "read");
  }
}

void check_drained() {
  const Issued& own = issued[self().thread];
  if (own.products.empty()) return;
  fail("this thread left the kernel with %zu wgmmas in flight, the first from %s",
       own.products.size(), place_of(own.products[0].place).c_str());
}

}  // namespace wgmmas
}  // namespace emulator
