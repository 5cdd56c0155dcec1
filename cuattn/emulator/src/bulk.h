// Bulk copies (TMA): loads land when no thread can run, stores read when they are waited for.
#pragma once

namespace emulator::bulk {

void begin_block();
// Let one load land; false if none is on its way.  A fiber that has nothing else to do calls it.
bool land_one();
bool in_flight();
void check_drained();

}  // namespace emulator::bulk
