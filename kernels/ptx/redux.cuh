// redux.sync: all lanes of a warp combine their values, and each gets the result (sm_80).
#pragma once

#include <core/device.cuh>

// The sum of all lanes' values.
DEVICE uint32 redux_add(uint32 value) {
  uint32 result;
  asm volatile("redux.sync.add.u32 %0, %1, 0xffffffff;" : "=r"(result) : "r"(value));
  return result;
}

// The smallest.
DEVICE uint32 redux_min(uint32 value) {
  uint32 result;
  asm volatile("redux.sync.min.u32 %0, %1, 0xffffffff;" : "=r"(result) : "r"(value));
  return result;
}

// The largest.
DEVICE uint32 redux_max(uint32 value) {
  uint32 result;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(result) : "r"(value));
  return result;
}

// Bits that all have.
DEVICE uint32 redux_and(uint32 value) {
  uint32 result;
  asm volatile("redux.sync.and.b32 %0, %1, 0xffffffff;" : "=r"(result) : "r"(value));
  return result;
}

// Bits that any has.
DEVICE uint32 redux_or(uint32 value) {
  uint32 result;
  asm volatile("redux.sync.or.b32 %0, %1, 0xffffffff;" : "=r"(result) : "r"(value));
  return result;
}

// Bits that an odd number of lanes have.
DEVICE uint32 redux_xor(uint32 value) {
  uint32 result;
  asm volatile("redux.sync.xor.b32 %0, %1, 0xffffffff;" : "=r"(result) : "r"(value));
  return result;
}
