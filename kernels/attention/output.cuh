// From a warp's accumulators to O and LSE in global memory.
#pragma once

#include <attention/online_softmax.cuh>
#include <attention/params.cuh>
#include <ptx/convert.cuh>

DEVICE void store_pair(bf16* target, float first, float second) {
  *reinterpret_cast<uint32*>(target) = pack(first, second, bf16{});
}
DEVICE void store_pair(fp16* target, float first, float second) {
  *reinterpret_cast<uint32*>(target) = pack(first, second, fp16{});
}
struct alignas(8) FloatPair {
  float first, second;
};
DEVICE void store_pair(float* target, float first, float second) {
  *reinterpret_cast<FloatPair*>(target) = {first, second};
}

struct alignas(16) FourFloats {
  float values[4];
};
struct alignas(8) TwoWords {
  uint32 first, second;
};

// Four neighbouring columns.
DEVICE void store_four(float* target, const float (&x)[4]) {
  *reinterpret_cast<FourFloats*>(target) = {{x[0], x[1], x[2], x[3]}};
}
template <typename Output>
DEVICE void store_four(Output* target, const float (&x)[4]) {
  *reinterpret_cast<TwoWords*>(target) = {pack(x[0], x[1], Output{}), pack(x[2], x[3], Output{})};
}

// What turns a row's maximum and sum into its result.
struct Finish {
  float scale;      // of the scores, log2 e included
  float out_scale;  // multiplies O
  bool has_sink;
  float sink;  // log2 units: one more logit in the denominator
};

// What a row's output is multiplied by, and its log-sum-exp.
struct RowResult {
  float factor, lse;
};

// A row that saw no key is 0, its LSE −∞, sink or not.
DEVICE RowResult finish_row(float maximum, float sum, const Finish& finish) {
  if (maximum == -infinity()) return {0.f, -infinity()};
  const float row_maximum = maximum * finish.scale;
  const float reference = finish.has_sink ? fmaxf(row_maximum, finish.sink) : row_maximum;
  const float shrink = exp2_approximate(row_maximum - reference);
  const float sink = finish.has_sink ? exp2_approximate(finish.sink - reference) : 0.f;
  const float total = fmaf(sum, shrink, sink);
  return {shrink * finish.out_scale * reciprocal_approximate(total),
          (reference + log2_approximate(total)) * ln_2};
}
