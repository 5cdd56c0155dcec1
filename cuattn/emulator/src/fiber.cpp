// See fiber.h.  By hand a switch takes 20 ns; ucontext takes ten times that (two system calls), and
// is for machines other than x86-64.
#include "fiber.h"

namespace emulator {

#ifdef CUATTN_SWITCH_BY_HAND

extern "C" void cuattn_switch_stack(void** from, void* to);

// The six registers that a function must keep, and the address to return to.
asm(R"(
.text
.local cuattn_switch_stack
.type cuattn_switch_stack, @function
cuattn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuattn_switch_stack, .-cuattn_switch_stack
)");

void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  // From the top: an end for stack walkers, where `ret` goes, six registers.  At a function's start
  // the stack pointer is 8 more than a multiple of 16.
  void** top = reinterpret_cast<void**>(stack + bytes / 16 * 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}

void switch_context(Context& from, Context& to) {
  cuattn_switch_stack(&from.stack_pointer, to.stack_pointer);
}

#else

void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#endif

}  // namespace emulator
