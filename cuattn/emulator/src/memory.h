// Global memory: named buffers far apart.  Shared memory: one block's arrays, by name.
#pragma once

#include <emulator/api.h>

#include <cstddef>
#include <string>

namespace emulator {

// TMA's and wgmma's swizzle of `width` bytes (0: none): address bits 4 to 6, as far as they lie
// inside the width, exclusive or with bits 7 to 9.
inline Word swizzled(Word address, Word width) {
  return width ? address ^ ((address >> 7 & (width / 16 - 1)) << 4) : address;
}

namespace memory {

void begin_block();

// Where `bytes` bytes at `address` lie; fails if they are not inside one array of the block.
char* shared(Word address, int bytes, const char* what, int alignment);
std::string describe_shared(Word address);
bool is_shared(const void* pointer);
Word shared_address(const void* pointer);

// Fails if a kernel may not access that; says nothing of addresses outside the arena of buffers.
void check_global(const void* pointer, size_t bytes, bool write);
bool is_global(const void* pointer);
std::string describe_global(const void* pointer);

}  // namespace memory
}  // namespace emulator
