// Barriers of a whole block.
#pragma once

#include <core/types.cuh>

// Every thread of the block arrives and waits for all; orders their memory accesses.
DEVICE void sync_block() { asm volatile("barrier.sync 0;" ::: "memory"); }
