// See fiber.h.  By hand a switch takes 20 ns; ucontext takes ten times that (two system calls), and
// is for machines other than x86-64 and aarch64.
#include "fiber.h"

namespace emulator {

#ifdef CUATTN_SWITCH_BY_HAND

extern "C" void cuattn_switch_stack(void** from, void* to);

// Onto the stack the registers that a function must keep and the address to return to; then the
// same from the other stack.
#if defined(__x86_64__)

constexpr int frame_words = 8, entry_word = 6;  // the last: an end for stack walkers

asm(R"(
.text
.local cuattn_switch_stack
.type cuattn_switch_stack, %function
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

#else

constexpr int frame_words = 20, entry_word = 11;  // x30; x29 is null, an end for stack walkers

asm(R"(
.text
.local cuattn_switch_stack
.type cuattn_switch_stack, %function
cuattn_switch_stack:
  stp x19, x20, [sp, #-160]!
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp d14, d15, [sp, #144]
  ldp d12, d13, [sp, #128]
  ldp d10, d11, [sp, #112]
  ldp d8, d9, [sp, #96]
  ldp x29, x30, [sp, #80]
  ldp x27, x28, [sp, #64]
  ldp x25, x26, [sp, #48]
  ldp x23, x24, [sp, #32]
  ldp x21, x22, [sp, #16]
  ldp x19, x20, [sp], #160
  ret
.size cuattn_switch_stack, .-cuattn_switch_stack
)");

#endif

// A frame as a switch leaves it.  As ABIs ask, its end is a multiple of 16 on aarch64, and on
// x86-64 the stack pointer is 8 more than one when `entry` starts.
void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** frame = reinterpret_cast<void**>(stack + bytes / 16 * 16) - frame_words;
  for (int word = 0; word < frame_words; ++word) frame[word] = nullptr;
  frame[entry_word] = reinterpret_cast<void*>(entry);
  context.stack_pointer = frame;
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
