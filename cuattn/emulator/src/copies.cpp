// See copies.h.  A copy lands when it is waited for (late), at once (early), or either (random);
// until then its target reads as NaN.
#include "copies.h"

#include <cstring>

#include "block.h"
#include "memory.h"
#include "race.h"

namespace emulator {
namespace {

struct Copy {
  Word target;
  const void* source;
  int bytes, read_bytes;
  const void* place;
  uint32_t group;
};

struct Queue {
  std::vector<Copy> copies;  // in the order of issue
  uint32_t open_group = 1;   // the one that new copies join
};

std::vector<Queue> queues;  // by thread

// The source is read now; a fault belongs to the line that asked for the copy.
void land(const Copy& copy) {
  Thread& thread = self();
  const void* place = thread.place;
  thread.place = copy.place;
  char* target = memory::shared(copy.target, copy.bytes, "cp.async", copy.bytes);
  if (copy.read_bytes) memcpy(target, copy.source, copy.read_bytes);
  memset(target + copy.read_bytes, 0, copy.bytes - copy.read_bytes);
  thread.place = place;
}

}  // namespace

void copy_async(Word target, const void* source, int bytes, int read_bytes) {
  ENTER_EMULATOR();
  Thread& thread = self();
  Queue& queue = queues[thread.thread];
  char* bytes_there = memory::shared(target, bytes, "cp.async", bytes);
  if (read_bytes) {
    if (reinterpret_cast<uintptr_t>(source) % bytes != 0) {
      fail("cp.async of %d bytes from %p (%s), not a multiple of %d", bytes, source,
           memory::describe_global(source).c_str(), bytes);
    }
    if (!memory::is_global(source)) fail("cp.async from %p, which is in no buffer", source);
    memory::check_global(source, read_bytes, false);
  }
  race::agent_writes(thread, race::copies_of(thread, queue.open_group), target, bytes);
  const Copy copy{target, source, bytes, read_bytes, thread.place, queue.open_group};
  if (lands_at_once()) return land(copy);
  memset(bytes_there, 0xff, bytes);
  queue.copies.push_back(copy);
}

void copy_commit() {
  ENTER_EMULATOR();
  ++queues[self().thread].open_group;
}

void copy_wait(int pending) {
  ENTER_EMULATOR();
  Thread& thread = self();
  Queue& queue = queues[thread.thread];
  const int64_t landed = int64_t{queue.open_group} - 1 - pending;  // groups up to this one
  size_t count = 0;
  while (count < queue.copies.size() && queue.copies[count].group <= landed)
    land(queue.copies[count++]);
  queue.copies.erase(queue.copies.begin(), queue.copies.begin() + static_cast<long>(count));
  if (landed > 0) race::finished(thread, race::copies_of(thread, static_cast<uint32_t>(landed)));
}

namespace copies {

void begin_block() {
  queues.resize(state.threads.size());
  for (Queue& queue : queues) {
    queue.copies.clear();
    queue.open_group = 1;
  }
}

void check_drained() {
  const Queue& queue = queues[self().thread];
  if (queue.copies.empty()) return;
  fail("this thread left the kernel with %zu copies in flight, the first from %s",
       queue.copies.size(), place_of(queue.copies[0].place).c_str());
}

}  // namespace copies
}  // namespace emulator
