// See bulk.h.  A copy is a list of rows: of a box of a tensor, or one row.
#include "bulk.h"

#include <cstring>

#include "block.h"
#include "mbarrier.h"
#include "memory.h"
#include "race.h"

namespace emulator {
namespace {

// What _tensor_map.py packs: a tensor of up to five axes, the innermost contiguous.
struct TensorMap {
  uint32_t magic, rank, element_bytes, swizzle;  // swizzle: 0, 32, 64 or 128 bytes
  uint64_t pointer;
  uint32_t sizes[5], box[5];
  uint64_t strides[4];  // bytes, of axes 1 to 4
};
static_assert(sizeof(TensorMap) <= 128);
constexpr uint32_t tensor_map_magic = 0x70616d74;

struct Copy {
  bool load;
  TensorMap map;  // rank 0: `bytes` in one piece
  int coordinates[5];
  char* global;
  Word shared, bytes;
  const void* place;
  uint32_t group;            // of a store
  mbarriers::Signal signal;  // of a load
};

std::vector<Copy> loads;                // on their way
std::vector<std::vector<Copy>> stores;  // [thread]
std::vector<uint32_t> open_groups;      // [thread]

// Move 16 bytes or less between a place in shared memory and one in global memory, null: outside.
void move(const Copy& copy, Word shared, char* global, uint32_t bytes) {
  char* there = memory::shared(shared, static_cast<int>(bytes), "bulk copy", 1);
  if (global) memory::check_global(global, bytes, !copy.load);
  if (copy.load && global) memcpy(there, global, bytes);
  if (copy.load && !global) memset(there, 0, bytes);
  if (!copy.load && global) memcpy(global, there, bytes);
}

// One row of the box: elements past the tensor's edges are zeros, and are not stored.
void move_row(const Copy& copy, Word shared, const int64_t* at) {
  const TensorMap& map = copy.map;
  bool inside = true;
  int64_t offset = 0;
  for (uint32_t axis = 1; axis < map.rank; ++axis) {
    inside = inside && 0 <= at[axis] && at[axis] < map.sizes[axis];
    offset += at[axis] * static_cast<int64_t>(map.strides[axis - 1]);
  }
  for (uint32_t x = 0; x < map.box[0]; ++x) {
    const int64_t column = at[0] + x;
    const bool there = inside && 0 <= column && column < map.sizes[0];
    char* global = reinterpret_cast<char*>(map.pointer) + offset + column * map.element_bytes;
    move(copy, swizzled(shared + x * map.element_bytes, map.swizzle), there ? global : nullptr,
         map.element_bytes);
  }
}

// A fault belongs to the line that asked for the copy.
void perform(const Copy& copy) {
  self().place = copy.place;
  if (copy.map.rank == 0) return move(copy, copy.shared, copy.global, copy.bytes);
  const TensorMap& map = copy.map;
  const uint32_t row_bytes = map.box[0] * map.element_bytes;
  uint32_t rows = 1;
  for (uint32_t axis = 1; axis < map.rank; ++axis) rows *= map.box[axis];
  for (uint32_t row = 0; row < rows; ++row) {
    int64_t at[5] = {copy.coordinates[0]};
    for (uint32_t axis = 1, rest = row; axis < map.rank; rest /= map.box[axis++])
      at[axis] = copy.coordinates[axis] + int64_t{rest % map.box[axis]};
    move_row(copy, copy.shared + row * row_bytes, at);
  }
}

// A GPU stops at these with "illegal instruction" (seen on an H200).
void check_coordinates(const Copy& copy, bool load) {
  const int64_t start = int64_t{copy.coordinates[0]} * copy.map.element_bytes;
  if (start % 16 != 0)
    fail("bulk copy at coordinate %d of axis 0, which is %lld bytes and not a multiple of 16",
         copy.coordinates[0], static_cast<long long>(start));
  for (uint32_t axis = 0; !load && axis < copy.map.rank; ++axis)
    if (copy.coordinates[axis] < 0)
      fail("bulk store at coordinate %d of axis %u; wanted none below zero", copy.coordinates[axis],
           axis);
}

Copy tensor_copy(const void* pointer, const int* coordinates, int rank, Word shared, bool load) {
  Copy copy{};
  memcpy(&copy.map, pointer, sizeof(TensorMap));
  if (copy.map.magic != tensor_map_magic) fail("%p holds no tensor map", pointer);
  if (copy.map.rank != uint32_t(rank))
    fail("%d coordinates for a tensor map of %u axes", rank, copy.map.rank);
  memcpy(copy.coordinates, coordinates, sizeof(int) * static_cast<size_t>(rank));
  copy.shared = shared;
  copy.bytes = copy.map.element_bytes;
  for (int axis = 0; axis < rank; ++axis) copy.bytes *= copy.map.box[axis];
  copy.place = self().place;
  check_coordinates(copy, load);
  // The pattern of 128 bytes repeats every 1024 and is one of addresses.
  const int alignment = copy.map.swizzle ? static_cast<int>(copy.map.swizzle) * 8 : 128;
  memory::shared(shared, static_cast<int>(copy.bytes), "bulk copy", alignment);
  return copy;
}

Copy plain_copy(void* global, Word shared, Word bytes) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("bulk copy of %u bytes at %p, not multiples of 16", bytes, global);
  Copy copy{};
  copy.global = global ? static_cast<char*>(global) : nullptr;
  copy.shared = shared;
  copy.bytes = bytes;
  copy.place = self().place;
  memory::shared(shared, static_cast<int>(bytes), "bulk copy", 16);
  return copy;
}

void land(const Copy& copy) {
  perform(copy);
  mbarriers::complete(copy.signal.number, copy.signal.phase, copy.bytes);
}

void issue_load(Copy copy, Word barrier) {
  copy.load = true;
  copy.signal = mbarriers::expect_load(barrier);
  const race::Agent agent = race::loads_of(copy.signal.number, copy.signal.phase);
  race::agent_writes(self(), agent, copy.shared, static_cast<int>(copy.bytes));
  if (lands_at_once()) return land(copy);
  memset(memory::shared(copy.shared, static_cast<int>(copy.bytes), "bulk copy", 1), 0xff,
         copy.bytes);
  loads.push_back(copy);
}

void issue_store(Copy copy) {
  Thread& thread = self();
  copy.group = open_groups[thread.thread];
  const race::Agent agent = race::stores_of(thread, copy.group);
  race::agent_reads(thread, agent, copy.shared, static_cast<int>(copy.bytes));
  if (lands_at_once()) return perform(copy);
  stores[thread.thread].push_back(copy);
}

}  // namespace

void tensor_load(Word target, const void* map, const int* coordinates, int rank, Word barrier) {
  ENTER_EMULATOR();
  issue_load(tensor_copy(map, coordinates, rank, target, true), barrier);
}

void tensor_store(const void* map, const int* coordinates, int rank, Word source) {
  ENTER_EMULATOR();
  issue_store(tensor_copy(map, coordinates, rank, source, false));
}

void bulk_load(Word target, const void* source, Word bytes, Word barrier) {
  ENTER_EMULATOR();
  memory::check_global(source, bytes, false);
  issue_load(plain_copy(const_cast<void*>(source), target, bytes), barrier);
}

void bulk_store(void* target, Word source, Word bytes) {
  ENTER_EMULATOR();
  memory::check_global(target, bytes, true);
  issue_store(plain_copy(target, source, bytes));
}

void bulk_commit() {
  ENTER_EMULATOR();
  ++open_groups[self().thread];
}

// With and without `.read`: the later of two allowed moments is not told apart.
void bulk_wait(int pending) {
  ENTER_EMULATOR();
  Thread& thread = self();
  const int64_t done = int64_t{open_groups[thread.thread]} - 1 - pending;
  std::vector<Copy>& queue = stores[thread.thread];
  size_t count = 0;
  while (count < queue.size() && queue[count].group <= done) perform(queue[count++]);
  queue.erase(queue.begin(), queue.begin() + static_cast<long>(count));
  if (done > 0) race::finished(thread, race::stores_of(thread, static_cast<uint32_t>(done)));
}

namespace bulk {

void begin_block() {
  loads.clear();
  stores.assign(state.threads.size(), {});
  open_groups.assign(state.threads.size(), 1);
}

// In the order of issue, the reverse, or any.
bool land_one() {
  if (loads.empty()) return false;
  size_t chosen = 0;
  if (state.launch.schedule == static_cast<int>(Schedule::reverse)) chosen = loads.size() - 1;
  if (state.launch.schedule == static_cast<int>(Schedule::random))
    chosen = draw(static_cast<uint32_t>(loads.size()));
  const Copy copy = loads[chosen];
  loads.erase(loads.begin() + static_cast<long>(chosen));
  land(copy);
  return true;
}

bool in_flight() { return !loads.empty(); }

void check_drained() {
  const std::vector<Copy>& queue = stores[self().thread];
  if (queue.empty()) return;
  fail("this thread left the kernel with %zu bulk stores in flight, the first from %s",
       queue.size(), place_of(queue[0].place).c_str());
}

}  // namespace bulk
}  // namespace emulator
