// Which accesses to shared memory are ordered, by vector clocks.
//
// Agents: every thread; for every thread the copies and the bulk stores that it sends off; for
// every warp its wgmmas; for every mbarrier the bulk loads that signal it.  A thread's time counts
// its releases, the others' time is a group or a phase.  An access is ordered before another if the
// second agent's clock has reached the first one's time.
//
// Bulk copies and wgmma work in the asynchronous proxy: what threads wrote must also be behind a
// fence.proxy.async before them, for which every thread has a second clock.
#pragma once

#include <emulator/api.h>

#include <cstdint>
#include <vector>

namespace emulator {

struct Thread;

namespace race {

using Clock = std::vector<uint32_t>;  // [2][agent]: seen, and seen by the asynchronous proxy
constexpr int max_mbarriers = 128;

struct Agent {
  uint32_t index, time;
};
Agent copies_of(const Thread& thread, uint32_t group);
Agent stores_of(const Thread& thread, uint32_t group);
Agent wgmmas_of(const Thread& thread, uint32_t group);
Agent loads_of(int mbarrier, uint32_t phase);

void begin_block();

// What `thread` has seen goes into `clock`; what it does from now on does not.
void release(Thread& thread, Clock& clock);
void acquire(Thread& thread, const Clock& clock);
// What the agent did up to its time is over.
void finished(Thread& thread, Agent agent);
void finished(Clock& clock, Agent agent);
void fence_proxy(Thread& thread);

// Accesses to shared memory, in bounds: of a thread, or of an agent that it sends off.
void reads(Thread& thread, Word address, int bytes);
void writes(Thread& thread, Word address, int bytes);
void agent_reads(Thread& thread, Agent agent, Word address, int bytes);
void agent_writes(Thread& thread, Agent agent, Word address, int bytes);

}  // namespace race
}  // namespace emulator
