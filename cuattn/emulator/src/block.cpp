// See block.h.
#include "block.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "barriers.h"
#include "bulk.h"
#include "copies.h"
#include "faults.h"
#include "mbarrier.h"
#include "memory.h"
#include "race.h"
#include "wgmma.h"

namespace emulator {

Self* current = nullptr;
State state;

namespace {

std::string message;     // of the last launch that failed
std::string suspicions;  // of the last launch, failed or not

}  // namespace

uint32_t draw(uint32_t bound) {
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  state.random ^= state.random << 17;
  return static_cast<uint32_t>((state.random >> 32) * bound >> 32);
}

bool lands_at_once() {
  const auto landing = static_cast<Landing>(state.launch.landing);
  return landing == Landing::early || (landing == Landing::random && draw(2) == 0);
}

// --- Reports.

std::string place_of(const void* address) {
  Dl_info info{};
  if (!address || !dladdr(address, &info) || !info.dli_fname) return "an unknown place";
  char text[32];
  const auto offset = static_cast<const char*>(address) - static_cast<char*>(info.dli_fbase);
  snprintf(text, sizeof text, "+%#tx]]", offset - 1);  // inside the call, not behind it
  return std::string("[[") + info.dli_fname + text;
}

std::string name_of(const Thread& thread) {
  return "block " + std::to_string(thread.block) + " thread " + std::to_string(thread.thread) +
         " (warp " + std::to_string(thread.warp) + " lane " + std::to_string(thread.lane) + ")";
}

void suspect(const void* one, const void* other, const std::string& text) {
  if (suspicions.size() > 1 << 16) return;
  suspicions += place_of(one) + "\t" + place_of(other) + "\t" + text + "\x1e";
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  char text[4096];
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  message = text;
  Context nowhere;
  if (current) {
    const Thread& thread = self();
    message += "\n  at " + place_of(thread.place) + "\n  " + name_of(thread);
  }
  current = nullptr;
  switch_context(nowhere, state.scheduler);
  __builtin_unreachable();
}

// --- Who runs next.

namespace {

// The bit of `mask` to take after `last` in the order of the launch.
int next_bit(uint32_t mask, int last) {
  switch (static_cast<Schedule>(state.launch.schedule)) {
    case Schedule::forward: {
      const uint32_t above = last < 31 ? mask & ~0u << (last + 1) : 0;
      return __builtin_ctz(above ? above : mask);
    }
    case Schedule::reverse: {
      const uint32_t below = mask & ((1u << last) - 1);
      return 31 - __builtin_clz(below ? below : mask);
    }
    default: {
      int skip = static_cast<int>(draw(__builtin_popcount(mask)));
      while (skip-- > 0) mask &= mask - 1;
      return __builtin_ctz(mask);
    }
  }
}

uint32_t runnable_warps() {
  uint32_t mask = 0;
  for (size_t w = 0; w < state.warps.size(); ++w) mask |= (state.warps[w].runnable != 0) << w;
  return mask;
}

// Stay in the warp (-1: none yet) while it has lanes to run; a random order leaves it now and then.
Thread* choose(int warp, int lane) {
  const bool reverse = state.launch.schedule == static_cast<int>(Schedule::reverse);
  const bool stray = state.launch.schedule == static_cast<int>(Schedule::random) && draw(8) == 0;
  if (warp < 0 || !state.warps[warp].runnable || stray) {
    const uint32_t warps = runnable_warps();
    if (!warps) return nullptr;
    warp = next_bit(warps, warp >= 0 ? warp : reverse ? 0 : 31);
    lane = reverse ? 0 : 31;
  }
  lane = next_bit(state.warps[warp].runnable, lane);
  return &state.threads[warp * lanes + lane];
}

void switch_to_next(Thread& from) {
  Thread* next = choose(from.warp, from.lane);
  while (!next && bulk::land_one()) next = choose(from.warp, from.lane);
  if (next == &from) return;
  ++state.counts.switches;
  current = next;
  switch_context(from.context, next ? next->context : state.scheduler);
}

// A fiber's whole life: one thread of the kernel.
void run_thread() {
  state.entry(state.arguments);
  Thread& thread = self();
  copies::check_drained();
  bulk::check_drained();
  wgmmas::check_drained();
  barriers::thread_leaves();
  Warp& warp = state.warps[thread.warp];
  for (const Meeting& meeting : warp.meetings) {
    if (meeting.mask >> thread.lane & 1)
      fail("this lane left the kernel while others wait for it in %s", meeting.name);
  }
  thread.exited = true;
  warp.live &= ~(1u << thread.lane);
  warp.runnable &= ~(1u << thread.lane);
  --state.live;
  switch_to_next(thread);
  __builtin_unreachable();
}

std::string lane_list(uint32_t mask) {
  if (mask == ~0u) return "all lanes";
  char text[32];
  snprintf(text, sizeof text, "lanes %#x", mask);
  return text;
}

// Every warp's lanes, grouped by what they wait for and where.
std::string deadlock_report() {
  std::string report =
      "deadlock in block " + std::to_string(state.threads[0].block) + ": no thread can run";
  for (size_t w = 0; w < state.warps.size(); ++w) {
    uint32_t left = state.warps[w].live;
    if (!left) report += "\n  warp " + std::to_string(w) + " has left the kernel";
    while (left) {
      const Thread& first = state.threads[w * lanes + __builtin_ctz(left)];
      uint32_t same = 0;
      for (int l = 0; l < lanes; ++l) {
        const Thread& other = state.threads[w * lanes + l];
        if (left >> l & 1 && other.waits_for == first.waits_for && other.place == first.place)
          same |= 1u << l;
      }
      report += "\n  warp " + std::to_string(w) + ", " + lane_list(same) + ": wait for " +
                (first.waits_for ? first.waits_for : "nothing") + " at " + place_of(first.place);
      left &= ~same;
    }
  }
  return report + barriers::report() + mbarriers::report();
}

}  // namespace

void wait(const char* reason) {
  Thread& thread = self();
  if (state.expired) fail("the launch used more than %d s of processor time", state.launch.seconds);
  thread.waits_for = reason;
  state.warps[thread.warp].runnable &= ~(1u << thread.lane);
  switch_to_next(thread);
}

void wake(int warp, uint32_t mask) {
  state.warps[warp].runnable |= mask;
  for (; mask; mask &= mask - 1)
    state.threads[warp * lanes + __builtin_ctz(mask)].waits_for = nullptr;
}

void wake(Thread& thread) { wake(thread.warp, 1u << thread.lane); }

void meet(const char* name, uint32_t mask, Action action, void* argument) {
  Thread& thread = self();
  Warp& warp = state.warps[thread.warp];
  const uint32_t bit = 1u << thread.lane;
  if (!(mask & bit)) fail("%s with mask %#x, which leaves out the calling lane", name, mask);
  if (mask & ~warp.live) fail("%s waits for lanes %#x, which have left", name, mask & ~warp.live);
  size_t place = 0;
  for (; place < warp.meetings.size(); ++place) {
    const Meeting& other = warp.meetings[place];
    if (!(other.mask & mask)) continue;
    if (other.mask == mask && other.action == action) break;
    const Thread& first = state.threads[thread.warp * lanes + __builtin_ctz(other.arrived)];
    fail("the warp has diverged: %s with mask %#x meets %s with mask %#x of lane %d at %s", name,
         mask, other.name, other.mask, first.lane, place_of(first.place).c_str());
  }
  if (place == warp.meetings.size()) warp.meetings.push_back({name, action, mask, 0, {}});
  Meeting& meeting = warp.meetings[place];
  meeting.arrived |= bit;
  meeting.arguments[thread.lane] = argument;
  if (meeting.arrived != mask) return wait(name);
  action(meeting.arguments, mask);
  warp.meetings.erase(warp.meetings.begin() + static_cast<long>(place));
  wake(thread.warp, mask);
}

// --- A launch.

namespace {

constexpr size_t stack_bytes = 256 << 10;
char* stacks = nullptr;  // 1024 of them; the lowest page of each is out of bounds

bool make_stacks() {
  if (stacks) return true;
  constexpr size_t all = 1024 * stack_bytes;
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, all, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) return false;
  stacks = static_cast<char*>(memory);
  for (size_t i = 0; i < 1024; ++i) mprotect(stacks + i * stack_bytes, 4096, PROT_NONE);
  return true;
}

void begin_block(int block) {
  const int threads = state.launch.threads;
  state.live = threads;
  for (Warp& warp : state.warps) {
    warp.runnable = warp.live = ~0u;
    warp.meetings.clear();
  }
  for (int t = 0; t < threads; ++t) {
    Thread& thread = state.threads[t];
    static_cast<Self&>(thread) = {t, block, threads, state.launch.grid};
    thread.warp = t / lanes;
    thread.lane = t % lanes;
    thread.exited = false;
    thread.waits_for = nullptr;
    thread.place = nullptr;
    prepare(thread.context, stacks + t * stack_bytes, stack_bytes, run_thread);
  }
  memory::begin_block();
  copies::begin_block();
  barriers::begin_block();
  mbarriers::begin_block();
  bulk::begin_block();
  wgmmas::begin_block();
  race::begin_block();
}

void run_block(int block) {
  begin_block(block);
  while (state.live > 0) {
    Thread* next = choose(-1, 0);
    if (!next) {
      message = deadlock_report();
      return;
    }
    current = next;
    switch_context(state.scheduler, next->context);
    if (!message.empty()) return;
  }
  if (bulk::in_flight()) message = "the block ended with bulk loads in flight";
}

std::vector<int> block_order() {
  std::vector<int> order(state.launch.grid);
  for (int i = 0; i < state.launch.grid; ++i) order[i] = i;
  if (state.launch.schedule == static_cast<int>(Schedule::reverse))
    std::reverse(order.begin(), order.end());
  if (state.launch.schedule == static_cast<int>(Schedule::random)) {
    for (int i = state.launch.grid; i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
  }
  return order;
}

}  // namespace

bool on_a_stack(const void* address) {
  const auto distance = static_cast<const char*>(address) - stacks;
  return stacks && distance >= 0 && static_cast<size_t>(distance) < 1024 * stack_bytes;
}

extern "C" {

// Run a kernel; 0 if it came to its end, else `emulator_message` says why not.
int emulator_launch(void (*entry)(void**), void** arguments, const Launch* launch) {
  message.clear();
  suspicions.clear();
  if (!make_stacks()) {
    message = "no memory for the threads' stacks";
    return 1;
  }
  state.launch = *launch;
  state.entry = entry;
  state.arguments = arguments;
  state.counts = {};
  state.expired = false;
  state.random = (launch->seed + 1) * 0x9e3779b97f4a7c15ull;
  state.threads.resize(launch->threads);
  state.warps.resize(launch->threads / lanes);
  faults::Guard guard;
  for (const int block : block_order()) {
    run_block(block);
    current = nullptr;
    if (!message.empty()) return 1;
  }
  return 0;
}

const char* emulator_message() { return message.c_str(); }
const char* emulator_suspicions() { return suspicions.c_str(); }
Counts emulator_counts() { return state.counts; }
}

}  // namespace emulator
