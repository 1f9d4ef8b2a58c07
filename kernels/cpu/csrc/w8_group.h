// int8 weights with a scale, and maybe a zero point, for each group of features: dequantized on their way to a float
// product, as in w4a16.h.
#pragma once
#include "w8.h"

namespace qg {

template <class T>
struct W8Group {
  const int8_t* qweight;     // (N, K)
  const float* scale;        // (N, groups)
  const int8_t* zero_point;  // likewise, or null for 0
  int64_t k, group_size, groups;
  Output out;

  struct Block {
    float* scratch;
  };
  const char* stored(int64_t row, int64_t start) const { return (const char*)qweight + row * k + start; }
  size_t scratch_bytes() const { return out.scratch_bytes(); }

  void unpack(int64_t row, int rows, int64_t start, const Unpacked<T>& to, Block&) const {
    constexpr int64_t STEP = T::STEP, NEXT = Unpacked<T>::NEXT;
    const int64_t inside = std::min(to.length, k - start), ahead = to.ahead_row * k + to.ahead_k;
    for (int r = 0; r < rows; r++) {
      const int8_t* codes = qweight + (row + r) * k + start;
      typename T::B* at = to.row(r);
      for (int64_t i = 0; i < inside; i += 64) prefetch(codes + ahead + i);
      for (int64_t i = 0; i < inside;) {  // a step never crosses the end of a group: groups are whole units
        const int64_t group = (start + i) / group_size, index = (row + r) * groups + group;
        const int64_t stop = std::min(inside, (group + 1) * group_size - start);
        const F step = set_f(scale[index]), zero = set_f(zero_point ? float(zero_point[index]) : 0.f);
        for (; i < stop; i += STEP, at += NEXT) {
          if (inside - i >= STEP) {
            put(codes + i, zero, step, at);
          } else {
            int8_t rest[BYTES] = {};
            memcpy(rest, codes + i, inside - i);
            put(rest, zero, step, at);  // what comes after the end is multiplied by zeros of x
          }
        }
      }
    }
  }

  static F value(const int8_t* codes, F zero, F step) { return mul(sub(float_of_int8(codes), zero), step); }
  static void put(const int8_t* codes, F zero, F step, float* to) { store_f(to, value(codes, zero, step)); }
#if QG_BF16
  static void put(const int8_t* codes, F zero, F step, bf16* to) {
    store_i(to, pack_bf16(value(codes, zero, step), value(codes + LANES, zero, step)));
  }
#endif

  void finish(int64_t m0, int64_t tokens, int64_t row, int rows, const float* sums, int64_t ld, Block& block) const {
    out.write(m0, tokens, row, rows, block.scratch,
              [&](int r, int) { return [=](int64_t m) { return load_f(sums + m * ld + r); }; });
  }
};

}  // namespace qg
