// cp.async: between issue and wait the target's bytes are undefined.
#pragma once

namespace emulator::copies {

void begin_block();
// A thread that leaves must have waited for its copies.
void check_drained();

}  // namespace emulator::copies
