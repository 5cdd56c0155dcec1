// What the processor refuses, and launches that do not end, become messages of the emulator.
#pragma once

#include <csignal>

namespace emulator::faults {

// While it lives, faults and a timer of processor time are ours.
class Guard {
 public:
  Guard();
  ~Guard();
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

 private:
  // A trap is SIGILL on x86-64, SIGTRAP on aarch64.
  static constexpr int signals = 4, numbers[signals] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  struct sigaction before_[signals], alarm_;
  stack_t stack_;
};

}  // namespace emulator::faults
