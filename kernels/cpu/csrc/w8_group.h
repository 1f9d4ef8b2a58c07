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
    if (zero_point) unpack<true>(row, rows, start, to);
    else unpack<false>(row, rows, start, to);
  }

  template <bool ZERO>
  void unpack(int64_t row, int rows, int64_t start, const Unpacked<T>& to) const {
    constexpr int64_t STEP = T::STEP, NEXT = Unpacked<T>::NEXT;
    const int64_t inside = std::min(to.length, k - start), ahead = to.ahead_row * k + to.ahead_k;
    const int64_t first = start / group_size;  // a division takes as long as unpacking a group of 32
    // A row's scales are too few for the processor to fetch by itself.
    for (int64_t i = 0; start == 0 && i < rows * groups; i += 64) {
      for (int64_t j = 0; j < 64; j += 16) prefetch_far(scale + row * groups + i + j);
      if (ZERO) prefetch_far(zero_point + row * groups + i);
    }
    for (int r = 0; r < rows; r++) {
      const int8_t* codes = qweight + (row + r) * k + start;
      typename T::B* at = to.row(r);
      for (int64_t i = 0; i < inside; i += 64) prefetch(codes + ahead + i);
      int64_t index = (row + r) * groups + first;
      int64_t stop = (first + 1) * group_size - start;  // a step never crosses it: groups are whole units
      for (int64_t i = 0; i < inside; index++, stop += group_size) {
        const F step = set_f(scale[index]), zero = ZERO ? set_f(zero_point[index]) : zero_f();
        const int64_t end = std::min(inside, stop);
        for (; i + STEP <= end; i += STEP, at += NEXT) put<ZERO>(codes + i, zero, step, at);
        if (i < end) {
          int8_t rest[BYTES] = {};
          memcpy(rest, codes + i, end - i);
          put<ZERO>(rest, zero, step, at);  // what comes after the end is multiplied by zeros of x
          i = end;
        }
      }
    }
  }

  template <bool ZERO>
  static F value(const int8_t* codes, F zero, F step) {
    const F code = float_of_int8(codes);
    return mul(ZERO ? sub(code, zero) : code, step);
  }
  template <bool ZERO>
  static void put(const int8_t* codes, F zero, F step, float* to) {
    store_f(to, value<ZERO>(codes, zero, step));
  }
#if QG_BF16
  template <bool ZERO>
  static void put(const int8_t* codes, F zero, F step, bf16* to) {
    store_i(to, pack_bf16(value<ZERO>(codes, zero, step), value<ZERO>(codes + LANES, zero, step)));
  }
#endif

  void finish(int64_t m0, int64_t tokens, int64_t row, int rows, const float* sums, int64_t ld, Block& block) const {
    out.write(m0, tokens, row, rows, block.scratch,
              [&](int r, int) { return [=](int64_t m) { return load_f(sums + m * ld + r); }; });
  }
};

}  // namespace qg
