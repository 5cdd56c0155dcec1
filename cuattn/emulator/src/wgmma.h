// wgmma: products of a warp-group that are computed when they are waited for.
#pragma once

namespace emulator::wgmmas {

void begin_block();
void check_drained();

}  // namespace emulator::wgmmas
