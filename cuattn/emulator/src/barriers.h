// Barriers of a block: 0 for all of its threads, 1 to 15 for as many as the kernel says.
#pragma once

#include <string>

namespace emulator::barriers {

void begin_block();
// A thread must not leave while others wait for the whole block.
void thread_leaves();
// Who is missing, for the deadlock report.
std::string report();

}  // namespace emulator::barriers
