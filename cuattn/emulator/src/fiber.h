// Switching between stacks: every CUDA thread is a fiber, all on one thread of the system.
#pragma once

#include <cstddef>

#if (defined(__x86_64__) || defined(__aarch64__)) && !defined(CUATTN_UCONTEXT)
#define CUATTN_SWITCH_BY_HAND 1
#else
#include <ucontext.h>
#endif

namespace emulator {

// A place to come back to.
struct Context {
#ifdef CUATTN_SWITCH_BY_HAND
  void* stack_pointer;
#else
  ucontext_t state;
#endif
};

// Make `context` start `entry` on a stack of its own.  `entry` must not return.
void prepare(Context& context, char* stack, size_t bytes, void (*entry)());

// Leave here for `to`; returns when somebody switches back to `from`.
void switch_context(Context& from, Context& to);

}  // namespace emulator
