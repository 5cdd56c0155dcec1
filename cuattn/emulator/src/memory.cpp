// See memory.h.
#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "block.h"
#include "race.h"

namespace emulator {
namespace {

// --- Global memory.  A buffer ends where its last page ends, so that whatever lies behind it is
// out of bounds for the processor too; gaps are large enough for a stray row.

constexpr size_t arena_bytes = size_t{1} << 36, gap = 64 << 10;
const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));  // 4, 16 or 64 KiB: divides the gap

struct Buffer {
  std::string name;
  char* start;
  size_t bytes;
  char* pages;
  size_t page_bytes;
  bool writable = true;
};

char* arena = nullptr;
size_t arena_used = 0;
std::map<const char*, Buffer> buffers;  // by start
const Buffer* last_hit = nullptr;

constexpr size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// The buffer that holds `pointer` or, failing that, the nearest.
const Buffer* nearest(const char* pointer) {
  auto above = buffers.upper_bound(pointer);
  const Buffer* after = above == buffers.end() ? nullptr : &above->second;
  const Buffer* before = above == buffers.begin() ? nullptr : &std::prev(above)->second;
  if (!before) return after;
  if (!after || pointer < before->start + before->bytes) return before;
  return pointer - (before->start + before->bytes) < after->start - pointer ? before : after;
}

bool inside(const Buffer& buffer, const char* pointer, size_t bytes) {
  return pointer >= buffer.start && pointer + bytes <= buffer.start + buffer.bytes;
}

// --- Shared memory.

constexpr size_t shared_bytes = 256 << 10;  // addresses have 18 bits, as wgmma descriptors do

struct Array {
  std::string name;
  Word start, bytes, alignment;
};

char* shared_memory = nullptr;
std::vector<Array> arrays;
Word shared_end = 0;

void make_shared_memory() {
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, 2 * shared_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  const auto start = reinterpret_cast<uintptr_t>(memory);
  shared_memory = reinterpret_cast<char*>(round_up(start, shared_bytes));
}

// Odd multiples of the alignment, so that nothing is aligned better than it asks; a gap between.
Word place_array(Word bytes, Word alignment) {
  Word start = shared_start;
  if (!arrays.empty()) {
    start = static_cast<Word>(round_up(arrays.back().start + arrays.back().bytes + 16, alignment));
    if (start % (2 * alignment) == 0) start += alignment;
  }
  if (start + bytes > shared_bytes) fail("%u bytes of shared memory, gaps included", start + bytes);
  return start;
}

}  // namespace

Word carve(int index, int bytes, const char* name, int alignment, Word packed) {
  ENTER_EMULATOR();
  const auto number = static_cast<size_t>(index);
  if (number < arrays.size()) {
    const Array& known = arrays[number];
    if (known.bytes != Word(bytes) || known.alignment != Word(alignment) || known.name != name) {
      fail(
          "threads divide shared memory differently: array %d is %s with %d bytes here, %s with "
          "%u bytes elsewhere",
          index, name, bytes, known.name.c_str(), known.bytes);
    }
    return known.start;
  }
  const uint64_t used = packed + bytes - shared_start;
  if (state.launch.shared_bytes >= 0 && used > uint64_t(state.launch.shared_bytes)) {
    fail("the kernel's shared memory ends at byte %d, but array %s needs %d bytes up to byte %llu",
         state.launch.shared_bytes, name, bytes, static_cast<unsigned long long>(used));
  }
  if (used > state.counts.shared_bytes) state.counts.shared_bytes = used;
  const Word start = place_array(bytes, alignment);
  arrays.push_back({name, start, Word(bytes), Word(alignment)});
  shared_end = start + bytes;
  return start;
}

void load_shared(void* target, Word address, int bytes) {
  ENTER_EMULATOR();
  const char* source = memory::shared(address, bytes, "load", bytes);
  race::reads(self(), address, bytes);
  memcpy(target, source, bytes);
}

void store_shared(Word address, const void* source, int bytes) {
  ENTER_EMULATOR();
  char* target = memory::shared(address, bytes, "store", bytes);
  race::writes(self(), address, bytes);
  memcpy(target, source, bytes);
}

// Fibers are not preempted: a plain addition is atomic.
template <typename T>
void check_counter(T* counter) {
  if (reinterpret_cast<uintptr_t>(counter) % sizeof(T) != 0)
    fail("atomic access at %p, not a multiple of %zu", static_cast<void*>(counter), sizeof(T));
  memory::check_global(counter, sizeof(T), true);
}

void atomic_add(Wide* counter, Wide amount) {
  ENTER_EMULATOR();
  check_counter(counter);
  *counter += amount;
}
void atomic_add(Word* counter, Word amount) {
  ENTER_EMULATOR();
  check_counter(counter);
  *counter += amount;
}
Word atomic_count(Word* counter, Word last) {
  ENTER_EMULATOR();
  check_counter(counter);
  const Word before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}

namespace memory {

void begin_block() {
  if (!shared_memory) make_shared_memory();
  if (shared_end) memset(shared_memory, 0xff, shared_end);
  if (!shared_end) memset(shared_memory, 0xff, shared_bytes);
  shared_end = 0;
  arrays.clear();
}

char* shared(Word address, int bytes, const char* what, int alignment) {
  if (address % alignment != 0) {
    fail("%s of %d bytes at shared address %#x (%s), not a multiple of %d", what, bytes, address,
         describe_shared(address).c_str(), alignment);
  }
  for (const Array& array : arrays) {
    if (address >= array.start && address + bytes <= array.start + array.bytes)
      return shared_memory + address;
  }
  fail("%s of %d bytes out of bounds at shared address %#x (%s)", what, bytes, address,
       describe_shared(address).c_str());
}

std::string describe_shared(Word address) {
  const Array* best = nullptr;
  long best_distance = 0;
  int number = 0, best_number = 0;
  for (const Array& array : arrays) {
    const long before = static_cast<long>(array.start) - static_cast<long>(address);
    const long behind =
        static_cast<long>(address) - static_cast<long>(array.start + array.bytes) + 1;
    const long distance = std::max(0l, std::max(before, behind));
    if (!best || distance < best_distance) {
      best = &array;
      best_distance = distance;
      best_number = number;
    }
    ++number;
  }
  if (!best) return "the block has no shared arrays";
  const long offset = static_cast<long>(address) - static_cast<long>(best->start);
  return "array " + std::to_string(best_number) + " \"" + best->name + "\" byte " +
         std::to_string(offset) + " of " + std::to_string(best->bytes);
}

bool is_shared(const void* pointer) {
  const auto distance = static_cast<const char*>(pointer) - shared_memory;
  return shared_memory && distance >= 0 && static_cast<size_t>(distance) < shared_bytes;
}

Word shared_address(const void* pointer) {
  return static_cast<Word>(static_cast<const char*>(pointer) - shared_memory);
}

bool is_global(const void* pointer) {
  const auto distance = static_cast<const char*>(pointer) - arena;
  return arena && distance >= 0 && static_cast<size_t>(distance) < arena_bytes;
}

std::string describe_global(const void* pointer) {
  const Buffer* buffer = nearest(static_cast<const char*>(pointer));
  if (!buffer) return "there are no buffers";
  const long offset = static_cast<const char*>(pointer) - buffer->start;
  return "buffer \"" + buffer->name + "\" byte " + std::to_string(offset) + " of " +
         std::to_string(buffer->bytes);
}

void check_global(const void* pointer, size_t bytes, bool write) {
  const char* first = static_cast<const char*>(pointer);
  if (!last_hit || !inside(*last_hit, first, bytes)) {
    if (!is_global(pointer)) return;
    const Buffer* buffer = nearest(first);
    if (!buffer || !inside(*buffer, first, bytes)) {
      fail("%s of %zu bytes out of bounds: %s", write ? "store" : "load", bytes,
           describe_global(pointer).c_str());
    }
    last_hit = buffer;
  }
  if (write && !last_hit->writable) {
    fail("store of %zu bytes to read-only %s", bytes, describe_global(pointer).c_str());
  }
}

}  // namespace memory

extern "C" {

// A new buffer, writable, filled with 0xff (NaN in every float format); null if there is no room.
void* emulator_allocate(const char* name, size_t bytes) {
  if (!arena) {
    constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, arena_bytes, PROT_NONE, flags, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    arena = static_cast<char*>(memory);
  }
  if (buffers.empty()) arena_used = 0;
  const size_t page_bytes = round_up(bytes ? bytes : 1, page);
  if (arena_used + gap + page_bytes + gap > arena_bytes) return nullptr;
  char* pages = arena + arena_used + gap;
  if (mprotect(pages, page_bytes, PROT_READ | PROT_WRITE) != 0) return nullptr;
  arena_used = round_up(arena_used + gap + page_bytes, gap);
  memset(pages, 0xff, page_bytes);
  char* start = pages + page_bytes - round_up(bytes, 16);
  buffers[start] = {name, start, bytes, pages, page_bytes};
  return start;
}

// No kernel may write to it from now on.
void emulator_protect(void* start) {
  Buffer& buffer = buffers.at(static_cast<char*>(start));
  buffer.writable = false;
  mprotect(buffer.pages, buffer.page_bytes, PROT_READ);
}

void emulator_release(void* start) {
  const auto found = buffers.find(static_cast<char*>(start));
  madvise(found->second.pages, found->second.page_bytes, MADV_DONTNEED);
  mprotect(found->second.pages, found->second.page_bytes, PROT_NONE);
  buffers.erase(found);
  last_hit = nullptr;
}
}

}  // namespace emulator
