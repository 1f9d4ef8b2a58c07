// W4A16 for a few tokens: see `few.h`. 64 weights are 32 bytes, and two look-ups in the 16 values of their groups.
#pragma once
#include "few_weights.h"
#include "strips.h"

#if QG_BF16
namespace qg {

// SPLIT: the halves of a step may be of two groups. ZERO: there are zero points.
template <bool SPLIT, bool ZERO>
struct W4A16Few : FewW4A16<Bfloat16, ZERO, FEW_STEP> {
  using Steps = typename FewW4A16<Bfloat16, ZERO, FEW_STEP>::Steps;

  static F values(const Steps& steps, int r, int half) {
    const F codes = load_f(CODES);
    return mul(ZERO ? sub(codes, steps.zero(r, half)) : codes, steps.scale(r, half));
  }
  static constexpr int place(int pair) { return 2 * pair; }
  static void unpack_pairs(const uint8_t* at, const Steps& steps, int r, I* to) { unpack(at, steps, r, to); }

  // The low nibbles, then the high ones: activations stand in that order.
  static void unpack(const uint8_t* at, const Steps& steps, int r, I* to) {
    const F low = values(steps, r, 0), high = SPLIT ? values(steps, r, 1) : low;
    const I table = pack_bf16(low, high);
    I index = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)at)), upper = shift_right_16(index, 4);
    if (SPLIT) {
      const I second_half = _mm512_inserti64x4(zero_i(), _mm256_set1_epi16(16), 1);
      index = _mm512_or_si512(and_i(index, set_words(15)), second_half);
      upper = _mm512_or_si512(upper, second_half);
    }
    to[0] = _mm512_permutexvar_epi16(index, table);  // by the lowest five bits; without SPLIT four decide
    to[1] = _mm512_permutexvar_epi16(upper, table);
  }
};

// Smoothed, rotated, rounded and in the order of steps: (tokens, length).
inline int prepare_w4a16_few(const Rows& x, const float* smooth_factor, int64_t padded, int64_t group_size, bool rotate,
                             int64_t length, bf16* act) {
  return each_token(x.m, length, [=](int64_t t, float* row, int8_t*) {
    prepare_token(x, t, smooth_factor, padded, rotate, group_size, row);
    std::fill(row + padded, row + length, 0.0f);
    for (int64_t i = 0; i < length; i += FEW_STEP) {
      const F a = load_f(row + i), b = load_f(row + i + LANES);
      const F c = load_f(row + i + 2 * LANES), d = load_f(row + i + 3 * LANES);
      store_i(act + t * length + i, pack_bf16(even_floats(a, b), even_floats(c, d)));
      store_i(act + t * length + i + 2 * LANES, pack_bf16(odd_floats(a, b), odd_floats(c, d)));
    }
  });
}

int w4a16_few(const W4A16<Bfloat16>& layer, const Rows& x, const float* smooth_factor, bool rotate) {
  const int64_t padded = layer.padded, length = round_up(padded, FEW_STEP);
  const Memory<bf16> act(x.m * length);
  if (!act.data || prepare_w4a16_few(x, smooth_factor, padded, layer.group_size, rotate, length, act.data)) return 1;
  const bool split = layer.group_size % FEW_STEP && layer.padded > layer.group_size;
  const auto run = [&](auto weight) { return few_or_strips(weight, act.data, x.m); };
  if (layer.zero_point) return split ? run(W4A16Few<true, true>{layer}) : run(W4A16Few<false, true>{layer});
  return split ? run(W4A16Few<true, false>{layer}) : run(W4A16Few<false, false>{layer});
}

}  // namespace qg
#endif
