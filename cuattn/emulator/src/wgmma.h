// wgmma: products of a warp-group, computed at the wait or as soon as all its threads issued them.
#pragma once

namespace emulator {

struct Thread;

namespace wgmmas {

void begin_block();
void check_drained();
// Fails if the thread may not access these registers of its own, as a wgmma is in flight on them.
void check_access(const Thread& thread, const void* pointer, bool write);

}  // namespace wgmmas
}  // namespace emulator
