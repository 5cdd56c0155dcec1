// See race.h.
//
// The shadow of shared memory has a cell for every 16 bytes: who wrote and who read which of them,
// as far as later accesses must be ordered after that.  A cell that is full forgets an access, so a
// race may be missed there, but none is made up.
#include "race.h"

#include <algorithm>

#include "block.h"
#include "memory.h"

namespace emulator::race {
namespace {

struct Access {
  uint32_t agent, time;
  uint32_t bytes;  // a bit for each of the cell's 16
  const void* place;
};

constexpr int room = 8;

struct Accesses {
  int count = 0, oldest = 0;
  Access entries[room];
};

struct Cell {
  uint32_t block = 0;    // serial number of the block that the rest is about
  uint32_t written = 0;  // a bit for each byte
  Accesses writers, readers;
};

constexpr size_t cells = (256 << 10) / 16;
std::vector<Cell> shadow;
uint32_t serial = 0;
uint32_t agents = 0;
std::vector<uint32_t>
    seen;  // [thread][2][agent]: up to which time of the agent this thread is after it

// Where agents of a kind begin: threads, their copies, their stores, warps, mbarriers.
uint32_t threads() { return uint32_t(state.launch.threads); }
uint32_t first_warp() { return 3 * threads(); }
uint32_t first_mbarrier() { return first_warp() + threads() / lanes; }
bool in_async_proxy(uint32_t agent) { return agent >= 2 * threads(); }

uint32_t* clock_of(const Thread& thread) { return &seen[size_t(thread.thread) * 2 * agents]; }

std::string thread_name(uint32_t thread) {
  return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / lanes) +
         " lane " + std::to_string(thread % lanes) + ")";
}

std::string agent_name(const Access& access) {
  const uint32_t thread = access.agent % threads();
  const std::string group = ", group " + std::to_string(access.time - 1) + ",";
  if (access.agent < threads()) return thread_name(thread);
  if (access.agent < 2 * threads()) return "cp.async of " + thread_name(thread) + group;
  if (access.agent < first_warp()) return "bulk store of " + thread_name(thread) + group;
  if (access.agent < first_mbarrier())
    return "wgmma of warp " + std::to_string(access.agent - first_warp()) + group;
  return "bulk load that signals mbarrier " + std::to_string(access.agent - first_mbarrier()) +
         ", phase " + std::to_string(access.time - 1) + ",";
}

[[noreturn]] void report(const char* what, Word address, const Access& earlier,
                         const Access& later) {
  fail(
      "race, %s: shared memory %s\n  earlier, with nothing to order it before: %s at %s\n"
      "  now: %s",
      what, memory::describe_shared(address).c_str(), agent_name(earlier).c_str(),
      place_of(earlier.place).c_str(), agent_name(later).c_str());
}

constexpr const char* write_after_read = "write after read";
constexpr const char* write_after_write = "write after write";
constexpr const char* read_after_write = "read after write";

bool ordered(const Access& earlier, const uint32_t* clock) {
  return clock[earlier.agent] >= earlier.time;
}

// Every earlier access to the bytes of `later` must be ordered before it; between proxies writes of
// threads must have passed a fence too.
void demand_order(const Accesses& earlier, const Access& later, const uint32_t* clock, Word address,
                  const char* what) {
  const bool writes = what != write_after_read, async = in_async_proxy(later.agent);
  for (int i = 0; i < earlier.count; ++i) {
    const Access& access = earlier.entries[i];
    const uint32_t common = access.bytes & later.bytes;
    if (common && !ordered(access, clock))
      report(what, address / 16 * 16 + Word(__builtin_ctz(common)), access, later);
    if (common && async && writes && !in_async_proxy(access.agent) &&
        !ordered(access, clock + agents)) {
      report("no fence.proxy.async between a thread's write and an asynchronous access",
             address / 16 * 16 + Word(__builtin_ctz(common)), access, later);
    }
  }
}

// Accesses to `bytes` need not be remembered any more.
void forget(Accesses& accesses, uint32_t bytes) {
  int kept = 0;
  for (int i = 0; i < accesses.count; ++i) {
    Access access = accesses.entries[i];
    access.bytes &= ~bytes;
    if (access.bytes) accesses.entries[kept++] = access;
  }
  accesses.count = kept;
}

void remember(Accesses& accesses, const Access& access) {
  for (int i = 0; i < accesses.count; ++i) {
    Access& entry = accesses.entries[i];
    if (entry.agent == access.agent && (entry.bytes & ~access.bytes) == 0) {
      entry = access;
      return;
    }
  }
  if (accesses.count < room) {
    accesses.entries[accesses.count++] = access;
  } else {
    accesses.entries[accesses.oldest++ % room] = access;
  }
}

template <typename F>
void each_cell(Word address, int bytes, F&& visit) {
  for (Word at = address; at < address + Word(bytes);) {
    const Word first = at % 16, count = std::min(16 - first, address + Word(bytes) - at);
    Cell& cell = shadow[at / 16];
    if (cell.block != serial) cell = Cell{serial, 0, {}, {}};
    visit(cell, ((1u << count) - 1) << first, at);
    at += count;
  }
}

void write(Thread& thread, Agent agent, Word address, int bytes) {
  const uint32_t* clock = clock_of(thread);
  each_cell(address, bytes, [&](Cell& cell, uint32_t mask, Word at) {
    const Access access{agent.index, agent.time, mask, thread.place};
    demand_order(cell.readers, access, clock, at, write_after_read);
    demand_order(cell.writers, access, clock, at, write_after_write);
    forget(cell.readers, mask);
    forget(cell.writers, mask);
    remember(cell.writers, access);
    cell.written |= mask;
  });
}

void read(Thread& thread, Agent agent, Word address, int bytes) {
  const uint32_t* clock = clock_of(thread);
  each_cell(address, bytes, [&](Cell& cell, uint32_t mask, Word at) {
    const Access access{agent.index, agent.time, mask, thread.place};
    demand_order(cell.writers, access, clock, at, read_after_write);
    if (const uint32_t missing = mask & ~cell.written) {
      fail("read of shared memory that was never written, or not yet: %s",
           memory::describe_shared(at / 16 * 16 + Word(__builtin_ctz(missing))).c_str());
    }
    remember(cell.readers, access);
  });
}

Agent myself(const Thread& thread) {
  return {uint32_t(thread.thread), clock_of(thread)[thread.thread]};
}

void raise(uint32_t* clock, const uint32_t* other) {
  for (uint32_t a = 0; a < 2 * agents; ++a) clock[a] = std::max(clock[a], other[a]);
}

// In both clocks: what an agent of the asynchronous proxy does is visible there.
void raise(uint32_t* clock, Agent agent) {
  for (uint32_t* one : {clock + agent.index, clock + agents + agent.index})
    *one = std::max(*one, agent.time);
}

}  // namespace

Agent copies_of(const Thread& thread, uint32_t group) {
  return {threads() + uint32_t(thread.thread), group};
}
Agent stores_of(const Thread& thread, uint32_t group) {
  return {2 * threads() + uint32_t(thread.thread), group};
}
Agent wgmmas_of(const Thread& thread, uint32_t group) {
  return {first_warp() + uint32_t(thread.warp), group};
}
Agent loads_of(int mbarrier, uint32_t phase) {
  return {first_mbarrier() + uint32_t(mbarrier), phase};
}

void begin_block() {
  if (!state.launch.race) return;
  if (shadow.empty()) shadow.resize(cells);
  ++serial;
  agents = first_mbarrier() + max_mbarriers;
  seen.assign(size_t(threads()) * 2 * agents, 0);
  for (const Thread& thread : state.threads) clock_of(thread)[thread.thread] = 1;
}

void release(Thread& thread, Clock& clock) {
  if (!state.launch.race) return;
  clock.resize(2 * agents, 0);
  uint32_t* own = clock_of(thread);
  raise(clock.data(), own);
  ++own[thread.thread];
}

void acquire(Thread& thread, const Clock& clock) {
  if (!state.launch.race || clock.empty()) return;
  raise(clock_of(thread), clock.data());
}

void finished(Thread& thread, Agent agent) {
  if (!state.launch.race) return;
  uint32_t* own = clock_of(thread);
  if (in_async_proxy(agent.index)) return raise(own, agent);
  own[agent.index] = std::max(own[agent.index], agent.time);
}

void finished(Clock& clock, Agent agent) {
  if (!state.launch.race) return;
  clock.resize(2 * agents, 0);
  raise(clock.data(), agent);
}

// All that this thread is after, its own accesses included.
void fence_proxy(Thread& thread) {
  if (!state.launch.race) return;
  uint32_t* own = clock_of(thread);
  std::copy(own, own + agents, own + agents);
  ++own[thread.thread];  // what it does from now on is not behind the fence
}

void reads(Thread& thread, Word address, int bytes) {
  if (state.launch.race) read(thread, myself(thread), address, bytes);
}
void writes(Thread& thread, Word address, int bytes) {
  if (state.launch.race) write(thread, myself(thread), address, bytes);
}
void agent_reads(Thread& thread, Agent agent, Word address, int bytes) {
  if (state.launch.race) read(thread, agent, address, bytes);
}
void agent_writes(Thread& thread, Agent agent, Word address, int bytes) {
  if (state.launch.race) write(thread, agent, address, bytes);
}

}  // namespace emulator::race
