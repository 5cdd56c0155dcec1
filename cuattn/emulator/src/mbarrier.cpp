// See mbarrier.h.
#include "mbarrier.h"

#include "block.h"
#include "memory.h"
#include "race.h"

namespace emulator {
namespace {

struct Barrier {
  Word address;
  bool valid = true, fenced = false;
  Thread* maker;
  Word count, pending;  // arrivals of a phase, and those still missing
  int64_t bytes = 0;    // expected and not yet landed
  uint32_t phase = 0;
  race::Clock open, closed;  // seen by those who arrived in this phase and before; in ended phases
  std::vector<Thread*> waiting;
  const void* place;
};

std::vector<Barrier> barriers;

Barrier* find(Word address) {
  for (Barrier& barrier : barriers)
    if (barrier.address == address && barrier.valid) return &barrier;
  return nullptr;
}

// The init must be ordered before: it wrote the eight bytes.
Barrier& used(Word address, const char* what) {
  memory::shared(address, 8, what, 8);
  Barrier* barrier = find(address);
  if (!barrier)
    fail("%s of an mbarrier that was not initialised: %s", what,
         memory::describe_shared(address).c_str());
  race::reads(self(), address, 8);
  return *barrier;
}

void end_phase(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.closed = barrier.open;
  for (Thread* thread : barrier.waiting) {
    race::acquire(*thread, barrier.closed);
    wake(*thread);
  }
  barrier.waiting.clear();
}

bool ended(const Barrier& barrier, Word parity) { return (barrier.phase & 1) != parity; }

}  // namespace

void mbarrier_init(Word address, Word count) {
  ENTER_EMULATOR();
  memory::shared(address, 8, "mbarrier.init", 8);
  race::writes(self(), address, 8);
  if (const Barrier* old = find(address)) {
    fail("mbarrier.init of an mbarrier that lives already: %s, made at %s",
         memory::describe_shared(address).c_str(), place_of(old->place).c_str());
  }
  if (count == 0 || count >= 1 << 20) fail("mbarrier.init for %u arrivals", count);
  if (barriers.size() == race::max_mbarriers) fail("more than %zu mbarriers", barriers.size());
  Barrier barrier{};
  barrier.address = address;
  barrier.maker = &self();
  barrier.count = barrier.pending = count;
  barrier.place = self().place;
  barriers.push_back(std::move(barrier));
}

void mbarrier_invalidate(Word address) {
  ENTER_EMULATOR();
  Barrier& barrier = used(address, "mbarrier.inval");
  if (!barrier.waiting.empty())
    fail("mbarrier.inval while %zu threads wait", barrier.waiting.size());
  barrier.valid = false;
}

void mbarrier_arrive(Word address, Word count, Word expected_bytes) {
  ENTER_EMULATOR();
  Barrier& barrier = used(address, "mbarrier.arrive");
  if (count > barrier.pending) {
    fail("more arrivals than mbarrier %s counts in a phase: %u of %u are missing, %u come",
         memory::describe_shared(address).c_str(), barrier.pending, barrier.count, count);
  }
  race::release(self(), barrier.open);
  barrier.bytes += expected_bytes;
  barrier.pending -= count;
  end_phase(barrier);
}

void mbarrier_expect(Word address, Word bytes) {
  ENTER_EMULATOR();
  used(address, "mbarrier.expect_tx").bytes += bytes;
}

bool mbarrier_test(Word address, Word parity) {
  ENTER_EMULATOR();
  Barrier& barrier = used(address, "mbarrier.test_wait");
  if (!ended(barrier, parity)) return false;
  race::acquire(self(), barrier.closed);
  return true;
}

void mbarrier_wait(Word address, Word parity) {
  ENTER_EMULATOR();
  Barrier& barrier = used(address, "mbarrier.try_wait");
  if (ended(barrier, parity)) return race::acquire(self(), barrier.closed);
  barrier.waiting.push_back(&self());
  wait("an mbarrier");
}

void fence_mbarrier_init() {
  ENTER_EMULATOR();
  for (Barrier& barrier : barriers)
    if (barrier.maker == &self()) barrier.fenced = true;
}

void fence_proxy_async() {
  ENTER_EMULATOR();
  race::fence_proxy(self());
  for (Barrier& barrier : barriers)
    if (barrier.maker == &self()) barrier.fenced = true;
}

namespace mbarriers {

void begin_block() { barriers.clear(); }

Signal expect_load(Word address) {
  Barrier& barrier = used(address, "bulk load");
  if (!barrier.fenced) {
    fail("bulk load to mbarrier %s without fence.mbarrier_init after its init at %s",
         memory::describe_shared(address).c_str(), place_of(barrier.place).c_str());
  }
  return {static_cast<int>(&barrier - barriers.data()), barrier.phase + 1};
}

// Runs between fibers as well.
void complete(int number, unsigned phase, Word bytes) {
  Barrier& barrier = barriers[static_cast<size_t>(number)];
  barrier.bytes -= bytes;
  race::finished(barrier.open, race::loads_of(number, phase));
  end_phase(barrier);
}

std::string report() {
  std::string text;
  for (const Barrier& barrier : barriers) {
    if (barrier.waiting.empty()) continue;
    text += "\n  mbarrier " + memory::describe_shared(barrier.address) + ": phase " +
            std::to_string(barrier.phase) + ", " + std::to_string(barrier.pending) + " of " +
            std::to_string(barrier.count) + " arrivals and " + std::to_string(barrier.bytes) +
            " bytes missing, " + std::to_string(barrier.waiting.size()) + " threads wait";
  }
  return text;
}

}  // namespace mbarriers
}  // namespace emulator
