// W4A16: int4 weights in groups, dequantized on their way to a float product.
//
// The product is in float32 and the weight exact, but for bfloat16 activations on a machine that multiplies bfloat16:
// there each dequantized weight is rounded to it like the activations, by 2^-9 at most, where int4 has left 10 %.
#pragma once
#include "activations.h"

namespace qg {

// 32 neighbouring features are 16 packed bytes: their even features come first, then the odd ones, as the nibbles do.
constexpr int64_t UNIT = 32;

alignas(64) constexpr float CODES[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};

// What the 16 codes of a group stand for; a register holds it, and looking up is one instruction.
template <class T>
struct Table;

template <>
struct Table<Float32> {
  F low, high;  // with 8 lanes the table takes two registers
  Table(float step, int zero) {
    low = mul(sub(load_f(CODES), set_f(float(zero))), set_f(step));
    high = LANES == 16 ? low : mul(sub(load_f(CODES + 16 - LANES), set_f(float(zero))), set_f(step));
  }
  float* look_up(const uint8_t* packed, float* at) const {
    for (int shift = 0; shift <= 4; shift += 4)
      for (int i = 0; i < 16; i += LANES, at += Unpacked<Float32>::NEXT) {
        const I codes = shift_right_32(widen_uint8(packed + i), shift);
        store_f(at, qg::look_up(low, high, codes));
      }
    return at;
  }
};

#if QG_BF16
template <>
struct Table<Bfloat16> {
  __m256i values;
  Table(float step, int zero) {
    values = (__m256i)_mm512_cvtneps_pbh(mul(sub(load_f(CODES), set_f(float(zero))), set_f(step)));
  }
  bf16* look_up(const uint8_t* packed, bf16* at) const {
    const __m256i codes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)packed));
    _mm256_storeu_si256((__m256i*)at, _mm256_permutexvar_epi16(codes, values));  // by the lowest four bits
    _mm256_storeu_si256((__m256i*)(at + 16), _mm256_permutexvar_epi16(_mm256_srli_epi16(codes, 4), values));
    return at + Unpacked<Bfloat16>::NEXT;
  }
};
#endif

template <class T>
struct W4A16 {
  const uint8_t* qweight;  // (N, padded / 2)
  const void* scale;       // (N, padded / group_size) of scale_type
  Type scale_type;
  const int8_t* zero_point;  // likewise, or null for 0
  int64_t padded, group_size;
  Output out;

  struct Block {
    float* scratch;
  };
  const char* stored(int64_t row, int64_t start) const { return (const char*)qweight + (row * padded + start) / 2; }
  size_t scratch_bytes() const { return out.scratch_bytes(); }

  void unpack(int64_t row, int rows, int64_t start, const Unpacked<T>& to, Block&) const {
    const int64_t units = std::max<int64_t>(0, std::min(to.length, padded - start)) / UNIT;
    const int64_t groups = padded / group_size, ahead = (to.ahead_row * padded + to.ahead_k) / 2;
    for (int r = 0; r < rows; r++) {
      const uint8_t* packed = qweight + ((row + r) * padded + start) / 2;
      for (int64_t i = 0; i < units * UNIT / 2; i += 64) prefetch(packed + ahead + i);
      typename T::B* at = to.row(r);
      for (int64_t unit = 0; unit < units;) {
        const int64_t group = (start + unit * UNIT) / group_size, index = (row + r) * groups + group;
        const int64_t stop = std::min(units, ((group + 1) * group_size - start) / UNIT);
        const Table<T> table(float_at(scale, scale_type, index), zero_point ? zero_point[index] : 0);
        for (; unit < stop; unit++) at = table.look_up(packed + unit * UNIT / 2, at);
      }
    }
  }

  void finish(int64_t m0, int64_t tokens, int64_t row, int rows, const float* sums, int64_t ld, Block& block) const {
    out.write(m0, tokens, row, rows, block.scratch,
              [&](int r, int) { return [=](int64_t m) { return load_f(sums + m * ld + r); }; });
  }
};

inline float* put_activations(float* at, const F* value, Type type) {
  for (int i = 0; i < UNIT / LANES; i++) {
    alignas(64) char rounded[BYTES];
    store(rounded, type, 0, value[i]);
    store_f(at + i * LANES, load(rounded, type, 0));
  }
  return at + UNIT;
}

#if QG_BF16
inline bf16* put_activations(bf16* at, const F* value, Type) {
  store_i(at, pack_bf16(value[0], value[1]));
  return at + UNIT;
}
#endif

// Smoothed, rotated, rounded to `type` (or to codes of act_bits, and back), and in the order of units.
template <class T>
int prepare_w4a16(const Rows& x, const float* smooth_factor, int64_t padded, int64_t group_size, bool rotate,
                  int act_bits, Type type, typename T::A* act) {
  return each_token(x.m, padded, [=](int64_t t, float* row, int8_t* codes) {
    prepare_token(x, t, smooth_factor, padded, rotate, group_size, row);
    if (act_bits) round_groups(row, padded, group_size, act_bits, codes);
    typename T::A* at = act + t * padded;
    for (int64_t i = 0; i < padded; i += UNIT) {
      F value[UNIT / LANES];
      constexpr int HALF = UNIT / LANES / 2;
      for (int j = 0; j < HALF; j++) {
        const F a = load_f(row + i + 2 * j * LANES), b = load_f(row + i + (2 * j + 1) * LANES);
        value[j] = even_floats(a, b);
        value[HALF + j] = odd_floats(a, b);
      }
      at = put_activations(at, value, type);
    }
  });
}

#if QG_BF16
// Up to STRIP_TOKENS tokens in bfloat16; in w4a16_few.cpp.
int w4a16_few(const W4A16<Bfloat16>& layer, const Rows& x, const float* smooth_factor, bool rotate);
#endif

}  // namespace qg
