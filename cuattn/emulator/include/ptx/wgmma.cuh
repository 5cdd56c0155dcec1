// Host twin of kernels/ptx/wgmma.cuh.
#pragma once

#include <core/device.cuh>

DEVICE void wgmma_fence() { emulator::wgmma_fence(); }

DEVICE void wgmma_commit() { emulator::wgmma_commit(); }

template <int32 pending>
DEVICE void wgmma_wait() {
  emulator::wgmma_wait(pending);
}

template <int32 pending, int32 registers>
DEVICE void wgmma_wait(float (&)[registers]) {
  emulator::wgmma_wait(pending);
}

enum class Major { depth, width };

template <typename T>
constexpr emulator::Operand wgmma_operand = emulator::Operand::bfloat16;
template <>
constexpr emulator::Operand wgmma_operand<fp16> = emulator::Operand::float16;
template <>
constexpr emulator::Operand wgmma_operand<e4m3> = emulator::Operand::e4m3;

// The widths that the device's header has, and what its instruction allows of 8-bit elements.
template <typename T, int32 half_columns, Major... majors>
constexpr void check_wgmma() {
  constexpr int32 columns = 2 * half_columns;
  static_assert(columns == 64 || columns == 80 || columns == 96 || columns == 128 ||
                columns == 192 || columns == 256);
  static_assert(sizeof(T) == 2 || ((majors == Major::depth) && ...));
}

template <typename T, Major a_major, Major b_major, int32 half>
DEVICE void wgmma_shared(float (&d)[half], uint64 a, uint64 b, bool accumulate) {
  check_wgmma<T, half, a_major, b_major>();
  emulator::wgmma({d, nullptr, a, b, 2 * half, wgmma_operand<T>, accumulate,
                   a_major == Major::width, b_major == Major::width});
}

template <typename T, Major b_major, int32 half>
DEVICE void wgmma_registers(float (&d)[half], const uint32 (&a)[4], uint64 b, bool accumulate) {
  check_wgmma<T, half, b_major>();
  emulator::wgmma(
      {d, a, 0, b, 2 * half, wgmma_operand<T>, accumulate, false, b_major == Major::width});
}

// Registers a thread may use: nothing to do here.
template <int32 registers>
DEVICE void registers_decrease() {}
template <int32 registers>
DEVICE void registers_increase() {}
