// Merges attention over disjoint sets of keys.  LSE = log Σ exp LSE_p, O = Σ exp(LSE_p − LSE) O_p.
//
// Grid:    eight columns to a thread; as many whole rows to a block as it has threads for.
// Memory:  a thread has the LSE and O of four parts on their way at once.
// Rounds:  a launch takes up to `most_parts` parts.  Where there are more, it leaves O in float32
//          and LSE, with which the next one begins (`carried`).
#include <attention/params.cuh>
#include <core/device.cuh>
#include <core/math.cuh>
#include <core/types.cuh>
#include <ptx/convert.cuh>
#include <ptx/special.cuh>

struct MergeConfig {
  Dtype element = Dtype::bfloat16;  // of the parts' O
  Dtype output = Dtype::bfloat16;
  bool carried = false;  // there are parts merged before
  int32 threads = 256;   // of a block
};
constexpr MergeConfig config{CUATTN_CONFIG};

constexpr int32 most_parts = 32;
constexpr int32 parts_at_once = 4;
constexpr int32 columns = 8;  // of a thread

using Input = Element<config.element>;
using Output = Element<config.output>;

// What the kernel is told at launch (twin: _tool_params.py).
struct MergeParams {
  const void* outs[most_parts];
  const float* lses[most_parts];
  const float* carried_out;  // [rows][head_dim], packed
  const float* carried_lse;  // [rows]
  void* out;
  float* lse;
  Strides out_parts[most_parts], lse_parts[most_parts];
  Strides out_strides, lse_strides;
  int32 parts, rows;
  int32 inner, heads;  // row number = (outer · inner + row) · heads + head
  int32 row_threads;   // head_dim / columns
  int32 block_rows;
};
static_assert(sizeof(MergeParams) == 2152);

struct Row {
  int32 number, outer, row, head;

  DEVICE int64 at(const Strides& strides) const {
    return outer * strides.outer + row * strides.row + head * strides.head;
  }
};

// Eight columns as they are in memory: 16 bytes at a time.
template <typename T>
struct alignas(16) Packed {
  uint32 words[columns * sizeof(T) / 4];
};

DEVICE float widen(uint32 bits, bf16) { return __builtin_bit_cast(float, bits << 16); }
DEVICE float widen(uint32 bits, fp16) {
  const uint32 sign = (bits & 0x8000) << 16, magnitude = (bits & 0x7fff) << 13;
  const bool finite = magnitude < 0x0f800000;
  const float rebased = __builtin_bit_cast(float, magnitude) * 0x1p112f;  // exponent bias 15 → 127
  const uint32 widened = finite ? __builtin_bit_cast(uint32, rebased) : magnitude | 0x7f800000;
  return __builtin_bit_cast(float, sign | widened);
}

template <typename T>
DEVICE float column(const Packed<T>& packed, int32 c) {
  return widen(packed.words[c / 2] >> (c % 2 * 16) & 0xffff, T{});
}
DEVICE float column(const Packed<float>& packed, int32 c) {
  return __builtin_bit_cast(float, packed.words[c]);
}

template <typename T>
DEVICE Packed<T> narrow(const float (&values)[columns], T type) {
  Packed<T> packed;
#pragma unroll
  for (int32 i = 0; i < columns / 2; ++i) {
    packed.words[i] = pack(values[2 * i], values[2 * i + 1], type);
  }
  return packed;
}
DEVICE Packed<float> narrow(const float (&values)[columns], float) {
  Packed<float> packed;
#pragma unroll
  for (int32 c = 0; c < columns; ++c) packed.words[c] = __builtin_bit_cast(uint32, values[c]);
  return packed;
}

template <typename T>
DEVICE Packed<T> load(const void* array, int64 offset) {
  return *reinterpret_cast<const Packed<T>*>(static_cast<const T*>(array) + offset);
}

// What has been merged so far, relative to the largest LSE.
struct Merged {
  float maximum = -infinity();
  float total = 0.f;    // Σ exp(LSE_p − maximum)
  float sums[columns];  // Σ exp(LSE_p − maximum) O_p
};

DEVICE Merged begin(const MergeParams& params, const Row& row, int32 first_column) {
  Merged merged;
#pragma unroll
  for (int32 c = 0; c < columns; ++c) merged.sums[c] = -0.f;  // a part that is −0 stays so
  if constexpr (config.carried) {
    const int64 start = int64(row.number) * params.row_threads * columns + first_column;
    const auto before = load<float>(params.carried_out, start);
    merged.maximum = params.carried_lse[row.number];
    merged.total = 1.f;
#pragma unroll
    for (int32 c = 0; c < columns; ++c) merged.sums[c] = column(before, c);
  }
  return merged;
}

// Merge parts [first, first + parts_at_once), those of them that there are.
DEVICE void merge_some(Merged& merged, const MergeParams& params, const Row& row, int32 first,
                       int32 first_column) {
  float lses[parts_at_once];
  Packed<Input> outs[parts_at_once] = {};
#pragma unroll
  for (int32 i = 0; i < parts_at_once; ++i) {
    const int32 part = first + i;
    lses[i] = -infinity();
    if (part >= params.parts) continue;
    lses[i] = params.lses[part][row.at(params.lse_parts[part])];
    outs[i] = load<Input>(params.outs[part], row.at(params.out_parts[part]) + first_column);
  }

  const float before = merged.maximum;
#pragma unroll
  for (float lse : lses) merged.maximum = fmaxf(merged.maximum, lse);
  const float reference = merged.maximum == -infinity() ? 0.f : merged.maximum;
  const float shrink = exp2_approximate((before - reference) * log2_e);
  merged.total *= shrink;
#pragma unroll
  for (float& sum : merged.sums) sum *= shrink;
#pragma unroll
  for (int32 i = 0; i < parts_at_once; ++i) {
    const float weight = exp2_approximate((lses[i] - reference) * log2_e);
    if (weight == 0.f) continue;  // whatever its O holds, NaN too
    merged.total += weight;
#pragma unroll
    for (int32 c = 0; c < columns; ++c) {
      merged.sums[c] = fmaf(weight, column(outs[i], c), merged.sums[c]);
    }
  }
}

// Rows that no part has seen a key for are 0, their LSE −∞.
DEVICE void write(const MergeParams& params, Merged& merged, const Row& row, int32 first_column) {
  const bool empty = merged.total == 0.f;
  const float factor = 1.f / merged.total;
#pragma unroll
  for (float& sum : merged.sums) sum = empty ? 0.f : sum * factor;
  Output* out = static_cast<Output*>(params.out) + row.at(params.out_strides) + first_column;
  *reinterpret_cast<Packed<Output>*>(out) = narrow(merged.sums, Output{});
  if (first_column == 0) {
    const float lse = fmaf(log2_approximate(merged.total), ln_2, merged.maximum);
    params.lse[row.at(params.lse_strides)] = empty ? -infinity() : lse;
  }
}

KERNEL void __launch_bounds__(config.threads)
    merge_states(const __grid_constant__ MergeParams params) {
  const int32 block_row = thread_index() / params.row_threads;
  const int32 first_column = thread_index() % params.row_threads * columns;
  const int32 number = block_index() * params.block_rows + block_row;
  if (block_row >= params.block_rows || number >= params.rows) return;
  const int32 token = number / params.heads;
  const Row row{number, token / params.inner, token % params.inner, number % params.heads};

  Merged merged = begin(params, row, first_column);
  for (int32 first = 0; first < params.parts; first += parts_at_once) {
    merge_some(merged, params, row, first, first_column);
  }
  write(params, merged, row, first_column);
}
