// Who a thread is, what its warp says, and where its block's shared memory lies.
//
// Shared memory is addressed by 32-bit numbers, as the hardware does it: every access of a kernel
// goes through a wrapper of ptx/, which takes such an address.
#pragma once

#include <core/types.cuh>

constexpr int32 warp_size = 32;
constexpr uint32 full_warp = 0xffffffffu;

DEVICE int32 thread_index() { return threadIdx.x; }
DEVICE int32 block_index() { return blockIdx.x; }
DEVICE int32 grid_size() { return gridDim.x; }  // blocks
DEVICE int32 lane_index() { return threadIdx.x % warp_size; }

// A number that is the same in all lanes, made known to be so: it may then live in a uniform
// register, of which a warp has 63 besides the 255 of each thread.
DEVICE int32 warp_uniform(int32 value) { return __shfl_sync(full_warp, value, 0); }

DEVICE int32 warp_index() { return warp_uniform(threadIdx.x / warp_size); }

// The same value, but the compiler must not know: what is worked out from it inside a loop stays
// there, instead of occupying registers all through the loop; and it is done before the waits that
// follow, not after them.
DEVICE uint32 recomputed(uint32 value) {
  asm volatile("" : "+r"(value));
  return value;
}

template <typename T>
DEVICE T shuffle(T value, int32 source_lane) {
  return __shfl_sync(full_warp, value, source_lane);
}
template <typename T>
DEVICE T shuffle_xor(T value, int32 mask) {
  return __shfl_xor_sync(full_warp, value, mask);
}
// The value of the lane `distance` below; lanes without one get their own.
template <typename T>
DEVICE T shuffle_up(T value, int32 distance) {
  return __shfl_up_sync(full_warp, value, distance);
}
DEVICE bool warp_all(bool predicate) { return __all_sync(full_warp, predicate); }
DEVICE bool warp_any(bool predicate) { return __any_sync(full_warp, predicate); }
DEVICE uint32 warp_ballot(bool predicate) { return __ballot_sync(full_warp, predicate); }
// Orders the lanes' accesses to memory.
DEVICE void sync_warp() { __syncwarp(full_warp); }
DEVICE int32 count_ones(uint32 bits) { return __popc(bits); }

DEVICE void atomic_add(uint64* counter, uint64 amount) { atomicAdd(counter, amount); }

// A 32-bit address in the block's shared memory.
using SharedAddress = uint32;

// Hands out the block's dynamic shared memory, front to back, in the same order in every thread.
class SharedCarver {
 public:
  DEVICE SharedCarver() {
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
    next_ = static_cast<SharedAddress>(__cvta_generic_to_shared(dynamic_shared_memory));
  }
  // `bytes` of memory at a multiple of `alignment`; the name is for the emulator's reports.
  DEVICE SharedAddress take(int32 bytes, const char* /*name*/, int32 alignment = 1024) {
    const SharedAddress start = (next_ + alignment - 1) / alignment * alignment;
    next_ = start + bytes;
    return start;
  }

 private:
  SharedAddress next_;
};
