// See faults.h.
#include "faults.h"

#include <dlfcn.h>
#include <sys/time.h>
#include <ucontext.h>

#include <cstdlib>

#include "block.h"
#include "memory.h"

namespace emulator {

namespace faults {
namespace {

void* program_counter(void* context) {
  [[maybe_unused]] auto* machine = &static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  return reinterpret_cast<void*>(machine->gregs[REG_RIP]);
#elif defined(__aarch64__)
  return reinterpret_cast<void*>(machine->pc);
#else
  return nullptr;
#endif
}

#if defined(__aarch64__)
// The syndrome of the fault: one of the records behind the registers, 0 if Linux gave none.
uint64_t syndrome(const mcontext_t& machine) {
  const char* at = reinterpret_cast<const char*>(machine.__reserved);
  for (;;) {
    const auto* record = reinterpret_cast<const _aarch64_ctx*>(at);
    if (record->magic == ESR_MAGIC) return reinterpret_cast<const esr_context*>(record)->esr;
    if (record->magic == 0) return 0;
    at += record->size;
  }
}
#endif

// A load or a store, as far as the machine tells.
const char* kind_of_access([[maybe_unused]] void* context) {
  [[maybe_unused]] const auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  return machine.gregs[REG_ERR] & 2 ? "store" : "load";
#elif defined(__aarch64__)
  if (const uint64_t known = syndrome(machine)) return known >> 6 & 1 ? "store" : "load";
#endif
  return "access";
}

// Whether the address is code of the kernel rather than of the emulator or a library.
bool in_the_kernel(void* address) {
  Dl_info where{}, kernel{};
  return address && dladdr(address, &where) &&
         dladdr(reinterpret_cast<void*>(state.entry), &kernel) &&
         where.dli_fbase == kernel.dli_fbase;
}

void give_up(int number) {
  signal(number, SIG_DFL);
  raise(number);
}

// Runs on a stack of its own, then leaves it for the scheduler; the fiber is abandoned.
void on_fault(int number, siginfo_t* info, void* context) {
  if (!current) return give_up(number);
  void* where = program_counter(context);
  if (in_the_kernel(where)) self().place = static_cast<char*>(where) + 1;
  const void* address = info->si_addr;
  if (number == SIGTRAP || number == SIGILL) fail("the kernel stopped at a trap");
  if (on_a_stack(address)) fail("a thread's stack of 256 KiB overflowed");
  if (!memory::is_global(address)) fail("access to %p, which is in no buffer", address);
  fail("%s out of bounds or to a read-only buffer: %s", kind_of_access(context),
       memory::describe_global(address).c_str());
}

// In the kernel's own code a fiber can be abandoned; elsewhere it notices when it waits next.
void on_alarm(int, siginfo_t*, void* context) {
  state.expired = true;
  void* where = program_counter(context);
  if (!current || !in_the_kernel(where)) return;
  self().place = static_cast<char*>(where) + 1;
  fail("the launch used more than %d s of processor time", state.launch.seconds);
}

char handler_stack[64 << 10];

}  // namespace

Guard::Guard() {
  stack_t stack{};
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof handler_stack;
  sigaltstack(&stack, &stack_);
  struct sigaction action{};
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  action.sa_sigaction = on_fault;
  for (int i = 0; i < signals; ++i) sigaction(numbers[i], &action, &before_[i]);
  action.sa_sigaction = on_alarm;
  sigaction(SIGVTALRM, &action, &alarm_);
  const itimerval timer{{0, 100'000}, {state.launch.seconds, 0}};
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

Guard::~Guard() {
  const itimerval off{};
  setitimer(ITIMER_VIRTUAL, &off, nullptr);
  for (int i = 0; i < signals; ++i) sigaction(numbers[i], &before_[i], nullptr);
  sigaction(SIGVTALRM, &alarm_, nullptr);
  sigaltstack(&stack_, nullptr);
}

}  // namespace faults
}  // namespace emulator
