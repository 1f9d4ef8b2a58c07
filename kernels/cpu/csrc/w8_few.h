// int8 weights for a few tokens: see `few.h`. Activations stay in the order of features.
#pragma once
#include "few_weights.h"
#include "strips.h"

#if QG_BF16
namespace qg {

constexpr float MAGIC = 1 << 23;  // whose last bit counts ones

// Bytes 0 to 3 of the 32-bit words at p, as signed numbers plus MAGIC + 128 - `zero`. Beside the product this costs
// nothing: shifts, bits and subtractions have units of their own, and multiplications, shuffles and loads have not.
inline void bytes_to_floats(const uint8_t* p, F zero, F* to) {
  const I codes = xor_i(load_i(p), set_bytes(-128));
  const I ones = _mm512_castps_si512(set_f(MAGIC)), mask = _mm512_set1_epi32(255);
  for (int i = 0; i < 4; i++) {
    const I one = _mm512_ternarylogic_epi32(shift_right_32(codes, 8 * i), mask, ones, 0xEA);  // a & b | c
    to[i] = sub(_mm512_castsi512_ps(one), zero);
  }
}

// W8A16: codes are exact in bfloat16, and the scale comes last.
struct W8Few : FewW8<Bfloat16, FEW_STEP> {
  static constexpr int place(int pair) { return pair % 2 * int(FEW_UNIT) + pair / 2 * 2; }
  // Even pairs, then odd ones.
  static void unpack_pairs(const uint8_t* at, const Steps&, int, I* to) {
    F of_byte[4];
    bytes_to_floats(at, set_f(MAGIC + 128), of_byte);
    for (int i = 0; i < 2; i++)
      to[i] = _mm512_or_si512(shift_right_32((I)of_byte[2 * i], 16), (I)of_byte[2 * i + 1]);
  }

  static void unpack(const uint8_t* at, const Steps&, int, I* to) {
    for (int half = 0; half < 2; half++) {
      const int8_t* codes = (const int8_t*)at + half * FEW_UNIT;
      to[half] = pack_bf16(float_of_int8(codes), float_of_int8(codes + LANES));
    }
  }
};

template <bool ZERO>
struct W8GroupFew : FewW8Group<Bfloat16, ZERO, FEW_STEP> {
  using Steps = typename FewW8Group<Bfloat16, ZERO, FEW_STEP>::Steps;
  static constexpr int place(int pair) {
    const int word = pair / 2;
    return word / 4 % 2 * int(FEW_UNIT) + (word / 8 + pair % 2 * 2) * 8 + word % 4 * 2;
  }
  static void unpack_pairs(const uint8_t* at, const Steps& steps, int r, I* to) {
    const auto halves = [](F a, F b) { return _mm512_mask_blend_ps(0xFF00, a, b); };
    const F step = halves(steps.scale(r, 0), steps.scale(r, 1)), shift = set_f(MAGIC + 128);
    F of_byte[4];
    bytes_to_floats(at, ZERO ? add(shift, halves(steps.zero(r, 0), steps.zero(r, 1))) : shift, of_byte);
    for (F& value : of_byte) value = mul(value, step);
    const I even = pack_bf16(of_byte[0], of_byte[2]), odd = pack_bf16(of_byte[1], of_byte[3]);
    to[0] = _mm512_unpacklo_epi16(even, odd);
    to[1] = _mm512_unpackhi_epi16(even, odd);
  }

  static void unpack(const uint8_t* at, const Steps& steps, int r, I* to) {
    for (int half = 0; half < 2; half++) {
      const int8_t* codes = (const int8_t*)at + half * FEW_UNIT;
      const F step = steps.scale(r, half), zero = ZERO ? steps.zero(r, half) : zero_f();
      using Values = W8Group<Bfloat16>;
      to[half] = pack_bf16(Values::value<ZERO>(codes, zero, step), Values::value<ZERO>(codes + LANES, zero, step));
    }
  }
};

// x is bfloat16.
template <class Weight>
int w8_few(const Weight& weight, const Rows& x) {
  const Whole<Bfloat16> act(x, FEW_STEP);
  return act.data ? few_or_strips(weight, act.data, x.m) : 1;
}

}  // namespace qg
#endif
