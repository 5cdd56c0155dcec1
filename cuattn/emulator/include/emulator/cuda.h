// Read before a kernel (g++ -include): the CUDA words that g++ does not know, and the few functions
// of the C library that CUDA has without a header.  No standard header, so no foreign names.
#pragma once

#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

extern "C" {
float fmaxf(float, float);
float fminf(float, float);
float fmaf(float, float, float);
float fabsf(float);
float exp2f(float);
float log2f(float);
int printf(const char*, ...);
}
