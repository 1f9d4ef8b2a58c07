// W8A32 and W8A16: int8 weights, exact in float32 and in bfloat16, times float activations; the scale comes last.
#pragma once
#include "activations.h"

namespace qg {

// Activations as T multiplies them: of its type, in rows of whole vectors (or steps of so many features) with zeros at
// the end. A copy, unless they come like that; `data` is null if there is no memory.
template <class T>
struct Whole {
  using A = typename T::A;
  int64_t k;
  bool as_they_come;
  Memory<A> copy;
  const A* data;

  explicit Whole(const Rows& x, int64_t step = T::STEP)
      : k(round_up(x.k, step)),
        as_they_come(k == x.k && x.type == (std::is_same_v<A, float> ? FLOAT32 : BFLOAT16)),
        copy(as_they_come ? 0 : x.m * k),
        data(as_they_come ? (const A*)x.data : copy.data) {
    if (as_they_come || !data) return;
#pragma omp parallel for if (x.m * k > PARALLEL_WORK / 16)
    for (int64_t t = 0; t < x.m; t++) {
      A* row = copy.data + t * k;
      if constexpr (std::is_same_v<A, float>) to_floats(x, t * x.k, x.k, row);
      else memcpy(row, (const A*)x.data + t * x.k, sizeof(A) * x.k);
      std::fill(row + x.k, row + k, A(0));
    }
  }
};

template <class T>
struct W8 {
  const int8_t* qweight;  // (N, K)
  const float* scale;     // (N,)
  int64_t k;
  Output out;

  struct Block {
    float* scratch;
  };
  const char* stored(int64_t row, int64_t start) const { return (const char*)qweight + row * k + start; }
  size_t scratch_bytes() const { return 0; }

  void unpack(int64_t row, int rows, int64_t start, const Unpacked<T>& to, Block&) const {
    constexpr int64_t STEP = T::STEP, NEXT = Unpacked<T>::NEXT;
    const int64_t inside = std::min(to.length, k - start), whole = inside / STEP;
    const int64_t ahead = to.ahead_row * k + to.ahead_k;
    for (int r = 0; r < rows; r++) {
      const int8_t* codes = qweight + (row + r) * k + start;
      typename T::B* at = to.row(r);
      for (int64_t i = 0; i < inside; i += 64) prefetch(codes + ahead + i);
      for (int64_t i = 0; i < whole; i++) widen(codes + i * STEP, at + i * NEXT);
      if (inside % STEP) {
        int8_t rest[BYTES] = {};
        memcpy(rest, codes + whole * STEP, inside % STEP);
        widen(rest, at + whole * NEXT);
      }
    }
  }

  static void widen(const int8_t* codes, float* to) { store_f(to, float_of_int8(codes)); }
#if QG_BF16
  static void widen(const int8_t* codes, bf16* to) {
    store_i(to, pack_bf16(float_of_int8(codes), float_of_int8(codes + LANES)));
  }
#endif

  void finish(int64_t m0, int64_t tokens, int64_t row, int rows, const float* sums, int64_t ld, Block& block) const {
    out.write(m0, tokens, row, rows, block.scratch, [&](int r, int count) {
      const F step = load_some(scale, FLOAT32, row + r, count);
      return [=](int64_t m) { return mul(load_f(sums + m * ld + r), step); };
    });
  }
};

}  // namespace qg
