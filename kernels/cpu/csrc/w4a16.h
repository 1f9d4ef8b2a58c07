// W4A16: int4 weights in groups, dequantized on their way to a float product.
//
// For a few tokens the product is in float32, and the weight exact. For many, where the machine multiplies bfloat16,
// each dequantized weight is rounded to bfloat16 like the activations: 2^-9 of it, where int4 has left 10 %.
#pragma once
#include "activations.h"

namespace qg {

// 32 neighbouring features are 16 packed bytes: their even features come first, then the odd ones, as the nibbles do.
constexpr int64_t UNIT = 32;

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
        const F step = set_f(scalar(scale, scale_type, index)), zero = set_f(8 + (zero_point ? zero_point[index] : 0));
        for (; unit < stop; unit++) at = put_unit(at, packed + unit * UNIT / 2, step, zero);
      }
    }
  }

  static float scalar(const void* p, Type type, int64_t index) {
    float all[LANES];
    store_f(all, load_some(p, type, index, 1));
    return all[0];
  }

  static typename T::B* put_unit(typename T::B* at, const uint8_t* packed, F step, F zero) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)packed), mask = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    alignas(16) int8_t codes[2][16];  // plus 8, to have no sign: the even ones, the odd ones
    _mm_store_si128((__m128i*)codes[0], _mm_xor_si128(_mm_and_si128(bytes, mask), eight));
    _mm_store_si128((__m128i*)codes[1], _mm_xor_si128(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask), eight));
    F value[UNIT / LANES];
    for (int i = 0; i < UNIT / LANES; i++)
      value[i] = mul(sub(float_of_int8(codes[0] + i * LANES), zero), step);
    return put(at, value);
  }

  static float* put(float* at, const F* value) {
    for (int i = 0; i < UNIT / LANES; i++, at += Unpacked<T>::NEXT) store_f(at, value[i]);
    return at;
  }
#if QG_BF16
  static bf16* put(bf16* at, const F* value) {
    store_i(at, pack_bf16(value[0], value[1]));
    return at + Unpacked<T>::NEXT;
  }
#endif

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

// Smoothed, rotated, rounded to the type that the activations came in, and in the order of units.
template <class T>
int prepare_w4a16(const float* x, const float* smooth_factor, int64_t m, int64_t k, int64_t padded, int64_t group_size,
                  bool rotate, Type type, typename T::A* act) {
  int failed = 0;
#pragma omp parallel for if (m > 1 && m * k > PARALLEL_WORK / 16)
  for (int64_t t = 0; t < m; t++) {
    float* row = (float*)scratch<0>(sizeof(float) * padded);
    if (!row) {
#pragma omp atomic write
      failed = 1;
      continue;
    }
    prepare_token(x + t * k, smooth_factor, k, padded, rotate, group_size, row);
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
  }
  return failed;
}

}  // namespace qg
