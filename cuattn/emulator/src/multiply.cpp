// mma.sync m16n8k16 (two elements to a register) and m16n8k32 (four): D += A · B, one warp.
//
// Lane l holds, with e elements to a register,
//   A [16 × 8e]:  rows l/4 and + 8, columns e·(l%4), … and + 4e      registers (0,0) (1,0) (0,1)
//   (1,1) B [8e × 8]:   rows e·(l%4), … and + 4e of column l/4 D [16 × 8]:   rows l/4 and + 8,
//   columns 2·(l%4) and the next
// Sums are float, in the order of k; the hardware's order and its rounding in between differ.
#include "block.h"
#include "numbers.h"

namespace emulator {
namespace {

struct Operands {
  float* d;
  const Word* a;
  const Word* b;
};

template <Operand operand>
float decode(Word word, int i) {
  if constexpr (operand == Operand::e4m3) return float_of_e4m3(word >> 8 * i & 0xff);
  const Word half = word >> 16 * i & 0xffff;
  return operand == Operand::bfloat16 ? float_of_bf16(half) : float_of_fp16(half);
}

template <Operand operand>
void multiply_all(void* const* arguments, uint32_t) {
  constexpr int e = operand == Operand::e4m3 ? 4 : 2, depth = 8 * e;
  float a[16][depth], b[depth][8], d[16][8];
  for (int l = 0; l < lanes; ++l) {
    const auto& lane = *static_cast<Operands*>(arguments[l]);
    const int row = l / 4, column = l % 4;
    for (int i = 0; i < e; ++i) {
      for (int r = 0; r < 4; ++r)
        a[row + r % 2 * 8][e * column + r / 2 * 4 * e + i] = decode<operand>(lane.a[r], i);
      for (int r = 0; r < 2; ++r)
        b[e * column + r * 4 * e + i][row] = decode<operand>(lane.b[r], i);
    }
    for (int i = 0; i < 4; ++i) d[row + i / 2 * 8][2 * column + i % 2] = lane.d[i];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int l = 0; l < lanes; ++l) {
    const auto& lane = *static_cast<Operands*>(arguments[l]);
    for (int i = 0; i < 4; ++i) lane.d[i] = d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  }
}

}  // namespace

void multiply(float* d, const Word* a, const Word* b, Operand operand) {
  ENTER_EMULATOR();
  Operands lane{d, a, b};
  switch (operand) {
    case Operand::bfloat16:
      return meet("mma", ~0u, multiply_all<Operand::bfloat16>, &lane);
    case Operand::float16:
      return meet("mma", ~0u, multiply_all<Operand::float16>, &lane);
    case Operand::e4m3:
      return meet("mma", ~0u, multiply_all<Operand::e4m3>, &lane);
  }
}

}  // namespace emulator
