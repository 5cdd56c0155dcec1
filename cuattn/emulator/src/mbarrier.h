// mbarriers, by their address in shared memory.
//
// Their state lies in a table beside the memory, so that misuse has a name: use before init, init
// twice, too many arrivals, no fence between init and the asynchronous proxy.
#pragma once

#include <emulator/api.h>

#include <string>

namespace emulator::mbarriers {

void begin_block();
std::string report();  // who is missing, for the deadlock report

// A bulk load is on its way to `barrier`; the number and phase under which it signals.
struct Signal {
  int number;
  unsigned phase;
};
Signal expect_load(Word barrier);
// `bytes` have landed.
void complete(int number, unsigned phase, Word bytes);

}  // namespace emulator::mbarriers
