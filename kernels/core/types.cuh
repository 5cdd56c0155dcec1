// The words every kernel is written in: integers of fixed width and small storage types.
#pragma once

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__

using int32 = int;
using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using int64 = long long;
using uint64 = unsigned long long;

static_assert(sizeof(int32) == 4 && sizeof(uint16) == 2 && sizeof(int64) == 8);

// Storage only: arithmetic happens in float, conversion in ptx/convert.cuh.
struct bf16 {
  uint16 bits;
};
struct fp16 {
  uint16 bits;
};
struct e4m3 {
  uint8 bits;
};

// What the elements of an array are; the host names one of them in a configuration.
enum class Dtype { bfloat16, float16, float32 };

template <Dtype dtype>
struct element_of;
template <>
struct element_of<Dtype::bfloat16> {
  using type = bf16;
};
template <>
struct element_of<Dtype::float16> {
  using type = fp16;
};
template <>
struct element_of<Dtype::float32> {
  using type = float;
};
template <Dtype dtype>
using Element = typename element_of<dtype>::type;
