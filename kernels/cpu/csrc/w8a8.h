// W8A8: int8 codes on both sides, each with an optional zero point; one exact integer product.
#pragma once
#include "activations.h"

namespace qg {

struct W8A8 {
  const int8_t* qweight;     // (N, K)
  const float* scale;        // (N,)
  const int8_t* zero_point;  // (N,), or null for 0
  const float* act_scale;    // (M,)
  const int32_t* act_sums;   // (M,), of codes minus their zero point; read if there is a zero_point
  int32_t act_zero_point;
  int64_t k;
  Output out;

  using Block = IntegerBlock;
  size_t scratch_bytes() const { return 0; }

  void unpack(int64_t row, int rows, int64_t start, const Unpacked<Integer>& to, Block& block) const {
    const int64_t inside = std::max<int64_t>(0, std::min(to.length, k - start));
    const int64_t ahead = to.ahead_row * k + to.ahead_k;
    for (int r = 0; r < rows; r++) {
      const int8_t* codes = qweight + (row + r) * k + start;
      for (int64_t i = 0; i < inside; i += 64) prefetch(codes + ahead + i);
      Integer::B* at = to.row(r);
      Sums sum = {};
      for (int64_t i = 0; i < to.length; i += BYTES) {
        if (i + BYTES <= inside) {
          at = put_int8(at, load_i(codes + i), sum);
        } else {
          int8_t rest[BYTES] = {};
          if (i < inside) memcpy(rest, codes + i, inside - i);
          at = put_int8(at, load_i(rest), sum);
        }
      }
      block.row_sums[r] += total(sum);
    }
  }

  // sum (qa - za) (qw - zw) = sum qa qw - za sum qw - zw sum (qa - za)
  void finish(int64_t m0, int64_t tokens, int64_t row, int rows, const int32_t* sums, int64_t ld, Block& block) const {
    out.write(m0, tokens, row, rows, block.scratch, [&](int r, int count) {
      const F step = load_some(scale, FLOAT32, row + r, count);
      const Sums offset = block.offset(r, count, Integer::OFFSET + act_zero_point);
      Sums zero = {};
      for (int i = 0; i < count && zero_point; i++) zero[i] = zero_point[row + r + i];
      return [=](int64_t m) {
        Sums exact = load_sums(sums + m * ld + r) - offset;
        if (zero_point) exact -= zero * act_sums[m0 + m];
        return mul(mul(to_float(exact), set_f(act_scale[m0 + m])), step);
      };
    });
  }
};

// x (M, K) float32 -> codes (M, wide) as `Integer` wants them, with their scale and sum for each token. `given` is the
// static scale, or null to take each token's own.
inline int quantize_w8a8(const float* x, int64_t m, int64_t k, int64_t wide, const float* given, int32_t zero,
                         Integer::A* codes, float* act_scale, int32_t* act_sums) {
  int failed = 0;
#pragma omp parallel for if (m > 1 && m * k > PARALLEL_WORK / 16)
  for (int64_t t = 0; t < m; t++) {
    float* row = (float*)scratch<0>(sizeof(float) * wide);
    int8_t* bytes = (int8_t*)scratch<1>(wide);
    if (!row || !bytes) {
#pragma omp atomic write
      failed = 1;
      continue;
    }
    memcpy(row, x + t * k, sizeof(float) * k);
    std::fill(row + k, row + wide, 0.0f);
    if (given) {
      const bool nan = std::any_of(row, row + k, [](float v) { return v != v; });  // which rounding would hide
      act_scale[t] = nan ? NAN : *given;
      const F step = set_f(*given), shift = set_f(float(zero)), least = set_f(-128), most = set_f(127);
      for (int64_t i = 0; i < wide; i += LANES)
        store_int8(bytes + i, min(max(add(round(div(load_f(row + i), step)), shift), least), most));
      std::fill(bytes + k, bytes + wide, int8_t(0));
    } else {
      act_scale[t] = quantize_token(row, wide, wide, 8, bytes);
    }
    int32_t sum = 0;
    for (int64_t i = 0; i < k; i++) sum += bytes[i] - zero;
    act_sums[t] = sum;
    Integer::A* to = codes + t * wide;
    for (int64_t i = 0; i < wide; i += BYTES) to = put_codes(to, load_i(bytes + i));
  }
  return failed;
}

}  // namespace qg
