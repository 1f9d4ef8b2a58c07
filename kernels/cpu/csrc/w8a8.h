// W8A8: int8 codes on both sides, each with an optional zero point; one exact integer product.
#pragma once
#include "activations.h"

namespace qg {

struct W8A8 {
  const int8_t* qweight;  // (N, K)
  int64_t k;
  IntegerSums integer_sums;
  Output out;

  using Block = IntegerBlock;
  const char* stored(int64_t row, int64_t start) const { return (const char*)qweight + row * k + start; }
  size_t scratch_bytes() const { return 0; }

  void unpack(int64_t row, int rows, int64_t start, const Unpacked<Integer>& to, Block& block) const {
    const int64_t inside = std::max<int64_t>(0, std::min(to.length, k - start));
    const int64_t ahead = to.ahead_row * k + to.ahead_k;
    for (int r = 0; r < rows; r++) {
      const int8_t* codes = qweight + (row + r) * k + start;
      for (int64_t i = 0; i < inside; i += 64) prefetch(codes + ahead + i);
      Integer::B* at = to.row(r);
      Sums sum = {};
      for (int64_t i = 0; i < to.length; i += BYTES) at = put_int8(at, load_bytes(codes + i, inside - i), sum);
      block.row_sums[r] += total(sum);
    }
  }

  void finish(int64_t m0, int64_t tokens, int64_t row, int rows, const int32_t* sums, int64_t ld, Block& block) const {
    integer_sums.write(out, m0, tokens, row, rows, sums, ld, block);
  }
};

// Activations (M, K) as they come, and what is to be done to them: division by smooth_factor (K,), and a
// rotation of every `rotation` of the `padded` features; either may be absent.
struct RawTokens {
  Rows x;
  const float* smooth_factor;
  int64_t padded, rotation;

  void prepare(int64_t t, int64_t wide, float* row) const {
    prepare_token(x, t, smooth_factor, padded, rotation > 0, rotation, row);
    std::fill(row + padded, row + wide, 0.0f);
  }
};

// The tokens -> codes (M, wide) as `Integer` wants them, with their scale and sum for each token. `given` is the
// static scale, or null to take each token's own.
inline int quantize_w8a8(RawTokens tokens, int64_t wide, const float* given, int32_t zero, Integer::A* codes,
                         float* act_scale, int32_t* act_sums) {
  return each_token(tokens.x.m, wide, [=](int64_t t, float* row, int8_t* bytes) {
    const int64_t k = tokens.padded;
    tokens.prepare(t, wide, row);
    if (given) {
      const bool nan = std::any_of(row, row + k, [](float v) { return v != v; });  // which rounding would hide
      act_scale[t] = nan ? NAN : *given;
      const F step = set_f(*given), shift = set_f(float(zero)), least = set_f(-128), most = set_f(127);
      for (int64_t i = 0; i < wide; i += LANES)
        store_int8(bytes + i, min(max(add(round(div(load_f(row + i), step)), shift), least), most));
      std::fill(bytes + k, bytes + wide, int8_t(0));
    } else {
      act_scale[t] = quantize_token(row, wide, wide, 8, false, bytes);
    }
    int32_t sum = 0;
    for (int64_t i = 0; i < k; i++) sum += bytes[i] - zero;
    act_sums[t] = sum;
    Integer::A* to = codes + t * wide;
    for (int64_t i = 0; i < wide; i += BYTES) to = put_codes(to, load_i(bytes + i));
  });
}

}  // namespace qg
