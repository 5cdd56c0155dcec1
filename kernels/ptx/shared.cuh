// ld.shared and st.shared: numbers that threads hand to each other.
#pragma once

#include <core/device.cuh>

// Aligned to their size.
DEVICE void shared_store(SharedAddress target, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(target), "f"(value) : "memory");
}

DEVICE void shared_store(SharedAddress target, uint32 value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(target), "r"(value) : "memory");
}

DEVICE void shared_store_2(SharedAddress target, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(target), "f"(first), "f"(second)
               : "memory");
}

DEVICE void shared_store_4(SharedAddress target, const float (&values)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(target), "f"(values[0]),
               "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}

DEVICE float shared_load(SharedAddress source) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(source) : "memory");
  return value;
}

DEVICE void shared_load_4(float (&values)[4], SharedAddress source) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
               : "r"(source)
               : "memory");
}
