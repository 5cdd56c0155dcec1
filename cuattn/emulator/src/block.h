// The block model: threads as fibers, warps, and who runs next.
//
// A fiber runs until it waits for others; nothing is preempted.  So warps drift as far apart as the
// kernel's own synchronisation allows, which is what brings a missing one to light.
#pragma once

#include <emulator/api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "fiber.h"

namespace emulator {

constexpr int lanes = 32;

// Run what a warp does together; `mask` names the lanes that have `arguments`.
using Action = void (*)(void* const* arguments, uint32_t mask);

// Lanes that come together for one instruction.
struct Meeting {
  const char* name;
  Action action;
  uint32_t mask, arrived;
  void* arguments[lanes];
};

struct Thread : Self {
  Context context;
  int warp, lane;
  bool exited;
  const char* waits_for;  // in words; null while it can run
  const void* place;      // where the kernel last called the emulator
};

struct Warp {
  uint32_t runnable, live;
  std::vector<Meeting> meetings;  // more than one only where masks do not overlap
};

enum class Schedule { forward, reverse, random };
enum class Landing { late, early, random };  // when asynchronous work takes effect

struct Launch {
  int grid, threads;
  int shared_bytes;  // -1: as many as the kernel takes
  int schedule, landing;
  int race;       // check the order of accesses to shared memory
  int seconds;    // of processor time, then it is stopped
  uint64_t seed;  // of everything random
};

struct Counts {
  uint64_t switches, ldmatrix_rows, ldmatrix_wavefronts, ldmatrix_ideal;
  uint64_t shared_bytes;  // the most a block carved, packed as on a GPU
};

struct State {
  Launch launch;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int live;  // threads that have not left
  Context scheduler;
  void (*entry)(void** arguments);
  void** arguments;
  Counts counts;
  uint64_t random;  // state of the generator
  bool expired;
};
extern State state;

inline Thread& self() { return *static_cast<Thread*>(current); }
inline bool in_a_kernel() { return current != nullptr; }

// Uniform in [0, bound).
uint32_t draw(uint32_t bound);
bool lands_at_once();

// Note where the kernel is: first line of every function of api.h.
#define ENTER_EMULATOR() (self().place = __builtin_return_address(0))

// Sleep until `wake`; `reason` is for the deadlock report.
void wait(const char* reason);
void wake(Thread& thread);
void wake(int warp, uint32_t mask);

// Wait for the lanes of `mask`; the last of them performs `action` for all.
void meet(const char* name, uint32_t mask, Action action, void* argument);

// Abandon the launch with this message, the place and the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// A line for the report that is only worth reading if the two places differ.
void suspect(const void* one, const void* other, const std::string& message);

std::string place_of(const void* address);  // as the runner's Python expects it
std::string name_of(const Thread& thread);
bool on_a_stack(const void* address);

}  // namespace emulator
