// See barriers.h.
#include "barriers.h"

#include <set>
#include <utility>

#include "block.h"
#include "race.h"

namespace emulator {
namespace {

struct Barrier {
  int expected = 0, arrived = 0;
  bool whole_block = false;
  std::vector<Thread*> waiting;
  const void* first_place = nullptr;
  race::Clock clock;  // what those who arrived have seen
};

constexpr int ids = 16;
Barrier all[ids];
std::set<std::pair<const void*, const void*>> compared;

void complete(Barrier& barrier) {
  for (Thread* thread : barrier.waiting) {
    race::acquire(*thread, barrier.clock);
    wake(*thread);
  }
  barrier.waiting.clear();
  barrier.clock.clear();
  barrier.arrived = 0;
}

Barrier& arrive(int id, int threads) {
  Thread& thread = self();
  if (id < 0 || id >= ids) fail("barrier %d; a block has barriers 0 to 15", id);
  if (threads % lanes != 0) fail("barrier %d for %d threads, not a multiple of 32", id, threads);
  const int expected = threads ? threads : state.launch.threads;
  if (!threads && state.live < state.launch.threads) {
    fail("barrier %d is for the whole block, but %d of its threads have left the kernel", id,
         state.launch.threads - state.live);
  }
  Barrier& barrier = all[id];
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.whole_block = threads == 0;
    barrier.first_place = thread.place;
  }
  if (barrier.expected != expected) {
    fail("barrier %d for %d threads, but others wait at it for %d, at %s", id, expected,
         barrier.expected, place_of(barrier.first_place).c_str());
  }
  // Threads of one block meet at one line, unless roles differ; then they name a number of threads.
  if (barrier.whole_block && barrier.first_place != thread.place &&
      compared.insert({barrier.first_place, thread.place}).second) {
    suspect(barrier.first_place, thread.place,
            "threads of a block meet at different barriers\n  " + name_of(thread));
  }
  ++barrier.arrived;
  race::release(thread, barrier.clock);
  return barrier;
}

}  // namespace

void barrier_sync(int id, int threads) {
  ENTER_EMULATOR();
  Barrier& barrier = arrive(id, threads);
  barrier.waiting.push_back(&self());
  if (barrier.arrived == barrier.expected) return complete(barrier);
  static const char* const reasons[ids] = {"barrier 0",  "barrier 1",  "barrier 2",  "barrier 3",
                                           "barrier 4",  "barrier 5",  "barrier 6",  "barrier 7",
                                           "barrier 8",  "barrier 9",  "barrier 10", "barrier 11",
                                           "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
  wait(reasons[id]);
}

void barrier_arrive(int id, int threads) {
  ENTER_EMULATOR();
  Barrier& barrier = arrive(id, threads);
  if (barrier.arrived == barrier.expected) complete(barrier);
}

namespace barriers {

void begin_block() {
  for (Barrier& barrier : all) {
    barrier.waiting.clear();
    barrier.clock.clear();
    barrier.arrived = 0;
  }
  compared.clear();
}

void thread_leaves() {
  for (int id = 0; id < ids; ++id) {
    if (all[id].arrived == 0 || !all[id].whole_block) continue;
    fail("this thread left the kernel while others wait for the whole block in barrier %d, at %s",
         id, place_of(all[id].first_place).c_str());
  }
}

std::string report() {
  std::string text;
  for (int id = 0; id < ids; ++id) {
    if (all[id].arrived == 0) continue;
    text += "\n  barrier " + std::to_string(id) + " has " + std::to_string(all[id].arrived) +
            " of " + std::to_string(all[id].expected) + " threads";
  }
  return text;
}

}  // namespace barriers
}  // namespace emulator
