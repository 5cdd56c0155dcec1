// What the host headers ask of the emulator: one function for one instruction, more or less.
//
// All are out of line, so that a return address tells the kernel's line, and take plain types, so
// that kernels see no standard header.
#pragma once

namespace emulator {

using Word = unsigned int;
using Wide = unsigned long long;

// Who the running thread is; the emulator points `current` at another one when it switches.
struct Self {
  int thread, block;
  int threads, blocks;
};
extern Self* current;

// --- A warp together: blocks until all lanes of `mask` are there.

enum class Shuffle { from, exclusive_or, up, down };
Wide shuffle(Shuffle kind, Word mask, Wide value, int argument);

Word uniform(Word value);  // the same in all lanes, or an error

enum class Vote { ballot, all, any };
Word vote(Vote kind, Word mask, bool predicate);

enum class Reduction { sum, minimum, maximum, bit_and, bit_or, bit_xor };
Word reduce(Reduction kind, Word mask, Word value);

void sync_warp(Word mask);
bool elect(Word mask);

void load_matrices(Word* fragment, int count, Word row, bool transposed);
void store_matrices(const Word* fragment, int count, Word row, bool transposed);

enum class Operand { bfloat16, float16, e4m3 };
void multiply(float* d, const Word* a, const Word* b, Operand operand);

// --- A block together.

// Barrier `id`; `threads` = 0: all of the block.
void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);

// --- Copies that land later.

void copy_async(Word target, const void* source, int bytes, int read_bytes);
void copy_commit();
void copy_wait(int pending);

// --- mbarrier: phases that end when `count` arrivals and all expected bytes are there.

void mbarrier_init(Word barrier, Word count);
void mbarrier_invalidate(Word barrier);
void mbarrier_arrive(Word barrier, Word count, Word expected_bytes);
void mbarrier_expect(Word barrier, Word bytes);
bool mbarrier_test(Word barrier, Word parity);
void mbarrier_wait(Word barrier, Word parity);  // until the phase of this parity has ended
void fence_mbarrier_init();
void fence_proxy_async();

// --- Bulk copies, by tensor map or in one piece; loads signal an mbarrier, stores form groups.

void tensor_load(Word target, const void* map, const int* coordinates, int rank, Word barrier);
void tensor_store(const void* map, const int* coordinates, int rank, Word source);
void bulk_load(Word target, const void* source, Word bytes, Word barrier);
void bulk_store(void* target, Word source, Word bytes);
void bulk_commit();
void bulk_wait(int pending);

// --- wgmma: one warp-group, four warps.

struct WarpGroupMultiply {
  float* d;       // [columns / 2] of this thread
  const Word* a;  // [4] registers, or null: `a_descriptor`
  Wide a_descriptor, b_descriptor;
  int columns;
  Operand operand;
  bool accumulate, a_transposed, b_transposed;
};
void wgmma(const WarpGroupMultiply& multiply);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

// --- Memory.

// Array number `index` of this thread's carver; `packed` is where it starts on a GPU.
Word carve(int index, int bytes, const char* name, int alignment, Word packed);
constexpr Word shared_start = 1024;  // of dynamic shared memory, aligned to that and no better

void load_shared(void* target, Word address, int bytes);
void store_shared(Word address, const void* source, int bytes);
void atomic_add(Wide* counter, Wide amount);
void atomic_add(Word* counter, Word amount);
Word atomic_count(Word* counter, Word last);  // + 1, after `last` 0; the count before

}  // namespace emulator
