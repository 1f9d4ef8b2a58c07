// The end of every layer: sums times scales, plus the low-rank branch, plus the bias, rounded to the output's type.
#pragma once
#include "gemm.h"

namespace qg {

struct Output {
  void* y;  // (M, N) of type
  Type type;
  int64_t n;
  const void* bias;  // (N,) of bias_type, or null
  Type bias_type;
  const float* lora = nullptr;  // (M, rank)
  const void* up = nullptr;     // (N, rank) of up_type
  Type up_type = FLOAT32;
  int64_t rank = 0;

  static constexpr int AT_ONCE = 4;  // tokens
  size_t scratch_bytes() const { return sizeof(float) * rank * LANES; }

  // Writes tokens [m0, m0 + tokens) of rows [row, row + rows). values_of(r, count) -> a function of a token (counted
  // from m0) that gives its LANES values from row + r on, `count` of them real.
  template <class Values>
  void write(int64_t m0, int64_t tokens, int64_t row, int rows, float* scratch, const Values& values_of) const {
    for (int r = 0; r < rows; r += LANES) {
      const int count = std::min(LANES, rows - r);
      const F shift = bias ? load_some(bias, bias_type, row + r, count) : zero_f();
      const auto value_of = values_of(r, count);
      const bool turned = rank && tokens > AT_ONCE;
      if (turned) turn_up(row + r, count, scratch);
      for (int64_t m = 0; m < tokens; m += AT_ONCE) {
        const int here = int(std::min<int64_t>(AT_ONCE, tokens - m));
        F value[AT_ONCE];
        for (int t = 0; t < AT_ONCE; t++) value[t] = value_of(m + std::min(t, here - 1));
        if (turned) add_branch(m0 + m, here, scratch, value);
        else if (rank) add_branch_by_rows(m0 + m, here, row + r, count, value);
        for (int t = 0; t < here; t++) {
          const int64_t at = (m0 + m + t) * n + row + r;
          if (count == LANES) store(y, type, at, add(value[t], shift));
          else store_some(y, type, at, add(value[t], shift), count);
        }
      }
    }
  }

  // Rows of `up`, turned to have the outputs side by side, (rank, LANES): what every token reads.
  void turn_up(int64_t row, int count, float* turned) const {
    if (count < LANES) std::fill(turned, turned + rank * LANES, 0.0f);
    for (int i = 0; i < count; i++)
      for (int64_t q = 0; q < rank; q += LANES) {
        const int some = int(std::min<int64_t>(LANES, rank - q));
        const int64_t at = (row + i) * rank + q;
        float values[LANES];
        store_f(values, some == LANES ? load(up, up_type, at) : load_some(up, up_type, at, some));
        for (int j = 0; j < some; j++) turned[(q + j) * LANES + i] = values[j];
      }
  }

  // For so few tokens turning costs more than adding up along the rank.
  void add_branch_by_rows(int64_t token, int here, int64_t row, int count, F* value) const {
    const auto piece = [](const void* p, Type of, int64_t at, int64_t left) {
      return left >= LANES ? load(p, of, at) : load_some(p, of, at, int(left));
    };
    for (int t = 0; t < here; t++) {
      alignas(64) float sums[LANES] = {};
      for (int i = 0; i < count; i += 4) {
        F acc[4] = {zero_f(), zero_f(), zero_f(), zero_f()};
        for (int64_t q = 0; q < rank; q += LANES) {
          const F act = piece(lora, FLOAT32, (token + t) * rank + q, rank - q);
          for (int j = 0; j < 4; j++)
            acc[j] = fma(piece(up, up_type, (row + std::min(i + j, count - 1)) * rank + q, rank - q), act, acc[j]);
        }
        _mm_storeu_ps(sums + i, sum_of_4(acc[0], acc[1], acc[2], acc[3]));
      }
      value[t] = add(value[t], load_f(sums));
    }
  }

  void add_branch(int64_t token, int here, const float* turned, F* value) const {
    const float* act[AT_ONCE];
    for (int t = 0; t < AT_ONCE; t++) act[t] = lora + (token + std::min(t, here - 1)) * rank;
    F sums[AT_ONCE] = {zero_f(), zero_f(), zero_f(), zero_f()};
    for (int64_t q = 0; q < rank; q++) {
      const F weights = load_f(turned + q * LANES);
      for (int t = 0; t < AT_ONCE; t++) sums[t] = fma(set_f(act[t][q]), weights, sums[t]);
    }
    for (int t = 0; t < AT_ONCE; t++) value[t] = add(value[t], sums[t]);
  }
};

// The sums of the rows of a block, which an offset of the activations adds to integer products.
struct IntegerBlock {
  float* scratch;
  int32_t row_sums[ROWS_MANY] = {};
};

// The end of an integer product: act_scale scale (sums - offset sum qw - zw act_sums), then the branch and the bias.
struct IntegerSums {
  const float* scale;      // (N,)
  const float* act_scale;  // (M,)
  int32_t offset;          // of the codes of activations: what the product adds, and their zero point
  const int8_t* zero_point = nullptr;  // of the weight, (N,); null for 0
  const int32_t* act_sums = nullptr;   // of each token's codes less their zero point, (M,)

  void write(const Output& out, int64_t m0, int64_t tokens, int64_t row, int rows, const int32_t* sums, int64_t ld,
             const IntegerBlock& block) const {
    out.write(m0, tokens, row, rows, block.scratch, [&](int r, int count) {
      const F step = load_some(scale, FLOAT32, row + r, count);
      Sums added = {}, zero = {};
      for (int i = 0; i < count; i++) {
        // It may wrap around, and so may the sums: the difference is right.
        added[i] = int32_t(uint32_t(offset) * uint32_t(block.row_sums[r + i]));
        if (zero_point) zero[i] = zero_point[row + r + i];
      }
      return [=](int64_t m) {
        Sums exact;
        memcpy(&exact, sums + m * ld + r, sizeof exact);
        exact -= added;
        if (zero_point) exact -= zero * act_sums[m0 + m];
        return mul(mul(to_float(exact), set_f(act_scale[m0 + m])), step);
      };
    });
  }
};

inline int32_t total(Sums sum) {
  int32_t out = 0;
  for (int i = 0; i < LANES; i++) out += sum[i];
  return out;
}

// One vector of int8 weights -> as `Integer` multiplies them, their sum added to `sum`; where the next one goes.
inline Integer::B* put_int8(Integer::B* to, I weights, Sums& sum) {
#if QG_VNNI
  store_i(to, weights);
  sum = dot_bytes(sum, set_bytes(1), weights);
  return to + Unpacked<Integer>::NEXT;
#else
  alignas(64) int8_t bytes[BYTES];
  store_i(bytes, weights);
  for (int half = 0; half < 2; half++) {
    const I wide = widen_int8(bytes + half * BYTES / 2);
    store_i(to, wide);
    sum += madd_16(wide, set_words(1));
    to += Unpacked<Integer>::NEXT;
  }
  return to;
#endif
}

// One vector of int8 codes of activations -> as `Integer` multiplies them; where the next one goes.
inline Integer::A* put_codes(Integer::A* to, I codes) {
#if QG_VNNI
  store_i(to, xor_i(codes, set_bytes(-128)));
  return to + BYTES;
#else
  alignas(64) int8_t bytes[BYTES];
  store_i(bytes, codes);
  for (int half = 0; half < 2; half++) store_i(to + half * BYTES / 2, widen_int8(bytes + half * BYTES / 2));
  return to + BYTES;
#endif
}

}  // namespace qg
