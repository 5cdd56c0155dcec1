// What g++ -fsanitize=thread calls at every load and store of a kernel, here the emulator's own.
//
// Stacks are private and only accumulators in flight are of interest there.  Global memory is
// checked to the byte; shared memory, where a kernel reaches it by pointer, also for order.
// Anything else is the kernel's constants and parameters.
#include <cstddef>

#include "block.h"
#include "memory.h"
#include "race.h"
#include "wgmma.h"

namespace emulator {

namespace {

void check(void* pointer, size_t bytes, bool write, const void* place) {
  if (!in_a_kernel()) return;
  Thread& thread = self();
  thread.place = place;
  if (on_a_stack(pointer)) return wgmmas::check_access(thread, pointer, write);
  if (memory::is_global(pointer)) return memory::check_global(pointer, bytes, write);
  if (!memory::is_shared(pointer)) return;
  const Word address = memory::shared_address(pointer);
  memory::shared(address, int(bytes), write ? "store" : "load", 1);
  if (write) {
    race::writes(thread, address, int(bytes));
  } else {
    race::reads(thread, address, int(bytes));
  }
}

}  // namespace
}  // namespace emulator

#define HOOK(name, bytes, write)                                         \
  extern "C" void name(void* pointer) {                                  \
    emulator::check(pointer, bytes, write, __builtin_return_address(0)); \
  }
#define HOOKS(bytes)                               \
  HOOK(__tsan_read##bytes, bytes, false)           \
  HOOK(__tsan_write##bytes, bytes, true)           \
  HOOK(__tsan_unaligned_read##bytes, bytes, false) \
  HOOK(__tsan_unaligned_write##bytes, bytes, true) \
  HOOK(__tsan_volatile_read##bytes, bytes, false)  \
  HOOK(__tsan_volatile_write##bytes, bytes, true)

HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

extern "C" {

void __tsan_read_range(void* pointer, size_t bytes) {
  emulator::check(pointer, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* pointer, size_t bytes) {
  emulator::check(pointer, bytes, true, __builtin_return_address(0));
}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
