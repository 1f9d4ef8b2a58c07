// BitNet b1.58: ternary weights, four to a byte, times int8 activations; one exact integer product.
#pragma once
#include "activations.h"

namespace qg {

// Four vectors of packed bytes' features stand apart: of every QUAD features first those at 0, 4, 8.., then 1, 5, 9..
constexpr int64_t QUAD = 4 * BYTES;

struct BitNet {
  const uint8_t* qweight;  // (N, packed)
  int64_t packed;          // bytes of a row
  IntegerSums integer_sums;
  Output out;

  using Block = IntegerBlock;
  const char* stored(int64_t row, int64_t start) const { return (const char*)qweight + row * packed + start / 4; }
  size_t scratch_bytes() const { return 0; }

  void unpack(int64_t row, int rows, int64_t start, const Unpacked<Integer>& to, Block& block) const {
    const int64_t inside = std::max<int64_t>(0, std::min(to.length / 4, packed - start / 4));
    const int64_t ahead = to.ahead_row * packed + to.ahead_k / 4;
    const I values = repeat_lane(_mm_setr_epi8(-1, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
    const I two_bits = set_bytes(3);
    for (int r = 0; r < rows; r++) {
      const uint8_t* from = qweight + (row + r) * packed + start / 4;
      for (int64_t i = 0; i < inside; i += 64) prefetch(from + ahead + i);
      Integer::B* at = to.row(r);
      Sums sum = {};
      for (int64_t i = 0; i < to.length / 4; i += BYTES) {
        const I bytes = load_bytes(from + i, inside - i, 0x55);  // past the end, four zeros
        for (int shift = 0; shift < 8; shift += 2)
          at = put_int8(at, shuffle_bytes(values, and_i(shift_right_16(bytes, shift), two_bits)), sum);
      }
      block.row_sums[r] += total(sum);
    }
  }

  void finish(int64_t m0, int64_t tokens, int64_t row, int rows, const int32_t* sums, int64_t ld, Block& block) const {
    integer_sums.write(out, m0, tokens, row, rows, sums, ld, block);
  }
};

// x (M, K) -> codes (M, wide) as `BitNet` multiplies them, and a scale for each token.
inline int quantize_bitnet(const Rows& x, int64_t wide, Integer::A* codes, float* act_scale) {
  return each_token(x.m, wide, [=](int64_t t, float* row, int8_t* bytes) {
    prepare_token(x, t, nullptr, wide, false, 0, row);
    act_scale[t] = quantize_token(row, wide, wide, 8, false, bytes);
    Integer::A* to = codes + t * wide;
    for (int64_t i = 0; i < wide; i += QUAD) {
      const I a = load_i(bytes + i), b = load_i(bytes + i + BYTES), c = load_i(bytes + i + 2 * BYTES);
      const I d = load_i(bytes + i + 3 * BYTES);
      const I even[2] = {even_bytes(a, b), even_bytes(c, d)}, odd[2] = {odd_bytes(a, b), odd_bytes(c, d)};
      to = put_codes(put_codes(to, even_bytes(even[0], even[1])), even_bytes(odd[0], odd[1]));
      to = put_codes(put_codes(to, odd_bytes(even[0], even[1])), odd_bytes(odd[0], odd[1]));
    }
  });
}

}  // namespace qg
