// Host twin of kernels/ptx/special.cuh: more exact than the unit, and flushing to zero as it does.
#pragma once

#include <core/types.cuh>

DEVICE float flush_to_zero(float x) { return fabsf(x) < 0x1p-126f ? 0.f * x : x; }

DEVICE float exp2_approximate(float x) { return flush_to_zero(exp2f(flush_to_zero(x))); }

DEVICE float log2_approximate(float x) { return log2f(flush_to_zero(x)); }

DEVICE float reciprocal_approximate(float x) { return flush_to_zero(1.f / flush_to_zero(x)); }
