// Host twin of kernels/ptx/shared.cuh.
#pragma once

#include <core/device.cuh>

DEVICE void shared_store(SharedAddress target, float value) {
  emulator::store_shared(target, &value, 4);
}

DEVICE void shared_store(SharedAddress target, uint32 value) {
  emulator::store_shared(target, &value, 4);
}

DEVICE void shared_store_2(SharedAddress target, float first, float second) {
  const float values[2] = {first, second};
  emulator::store_shared(target, values, 8);
}

DEVICE void shared_store_4(SharedAddress target, const float (&values)[4]) {
  emulator::store_shared(target, values, 16);
}

DEVICE float shared_load(SharedAddress source) {
  float value;
  emulator::load_shared(&value, source, 4);
  return value;
}

DEVICE void shared_load_4(float (&values)[4], SharedAddress source) {
  emulator::load_shared(values, source, 16);
}
