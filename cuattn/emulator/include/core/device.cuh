// Host twin of kernels/core/device.cuh: threads, warps and shared memory of the emulated block.
#pragma once

#include <emulator/api.h>

#include <core/types.cuh>

constexpr int32 warp_size = 32;
constexpr uint32 full_warp = 0xffffffffu;

DEVICE int32 thread_index() { return emulator::current->thread; }
DEVICE int32 block_index() { return emulator::current->block; }
DEVICE int32 grid_size() { return emulator::current->blocks; }
DEVICE int32 lane_index() { return thread_index() % warp_size; }

// Checked: a kernel promises that all lanes have the same value.
DEVICE int32 warp_uniform(int32 value) { return int32(emulator::uniform(uint32(value))); }

DEVICE int32 warp_index() { return warp_uniform(thread_index() / warp_size); }

DEVICE uint32 recomputed(uint32 value) { return value; }

// Values of 4 or 8 bytes travel as one 64-bit number.
template <typename T>
DEVICE T shuffle_bits(emulator::Shuffle kind, T value, int32 argument) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64 bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = emulator::shuffle(kind, full_warp, bits, argument);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
DEVICE T shuffle(T value, int32 source_lane) {
  return shuffle_bits(emulator::Shuffle::from, value, source_lane);
}
template <typename T>
DEVICE T shuffle_xor(T value, int32 mask) {
  return shuffle_bits(emulator::Shuffle::exclusive_or, value, mask);
}
template <typename T>
DEVICE T shuffle_up(T value, int32 distance) {
  return shuffle_bits(emulator::Shuffle::up, value, distance);
}

DEVICE bool warp_all(bool predicate) {
  return emulator::vote(emulator::Vote::all, full_warp, predicate);
}
DEVICE bool warp_any(bool predicate) {
  return emulator::vote(emulator::Vote::any, full_warp, predicate);
}
DEVICE uint32 warp_ballot(bool predicate) {
  return emulator::vote(emulator::Vote::ballot, full_warp, predicate);
}
DEVICE void sync_warp() { emulator::sync_warp(full_warp); }
DEVICE int32 count_ones(uint32 bits) { return __builtin_popcount(bits); }

DEVICE void atomic_add(uint64* counter, uint64 amount) { emulator::atomic_add(counter, amount); }

using SharedAddress = uint32;

// As on the device, but every array is known by name and has a gap behind it.
class SharedCarver {
 public:
  DEVICE SharedAddress take(int32 bytes, const char* name, int32 alignment = 1024) {
    packed_ = (packed_ + alignment - 1) / alignment * alignment;
    const SharedAddress start = emulator::carve(index_++, bytes, name, alignment, packed_);
    packed_ += bytes;
    return start;
  }

 private:
  int32 index_ = 0;
  SharedAddress packed_ = emulator::shared_start;
};
