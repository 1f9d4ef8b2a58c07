// The product for a few tokens in float32, with the 16 registers of AVX2: see `few.h`.
#pragma once
#include "few_weights.h"

#if !QG_AVX512
namespace qg {

// Tokens of a tile: with four rows their sums fill the registers. Beyond FLOAT_TOKENS it is faster to unpack into
// the cache than again.
constexpr int FLOAT_TILE_TOKENS = 3;
constexpr int64_t FLOAT_TOKENS = 6;

// weight: see `few_tasks`. A step is one unit of features, and
//   unpack(at, steps, r, j, to) its vectors j and j + 2
template <class Weight>
struct FewFloats {
  const Weight& weight;
  const float* act;
  int64_t tokens;
  using Steps = typename Weight::Steps;

  // Sums (M, FEW_ROWS) of the rows of a tile with M tokens.
  template <int M>
  void tile(const float* x, const uint8_t* const* rows, Steps steps, float* sums) const {
    constexpr int R = FEW_TILE_ROWS;
    const int64_t length = weight.length();
    const uint8_t* at[R];
    for (int r = 0; r < R; r++) at[r] = rows[r];
    uint8_t rest[R][Weight::STEP_BYTES];
    F acc[R][M] = {};
    for (int64_t i = 0, left = weight.bytes; i < length; i += FEW_UNIT, left -= Weight::STEP_BYTES) {
      if (left < Weight::STEP_BYTES) rest_of_rows(at, left, rest);
      steps.next();
      for (int r = 0; r < R; r++) {
        prefetch(at[r] + FEW_TILE_ROWS * weight.bytes);
        for (int j = 0; j < 2; j++) {
          F w[2];
          Weight::unpack(at[r], steps, r, j, w);
          for (int h = 0; h < 2; h++)
            for (int m = 0; m < M; m++)
              acc[r][m] = fma(w[h], load_f(x + m * length + i + (j + 2 * h) * LANES), acc[r][m]);
        }
        at[r] += Weight::STEP_BYTES;
      }
    }
    for (int m = 0; m < M; m++)
      _mm_storeu_ps(sums + m * FEW_ROWS, sum_of_4(acc[0][m], acc[1][m], acc[2][m], acc[3][m]));
  }

  int run() const {
    return few_tasks<float>(weight, act, tokens, FLOAT_TILE_TOKENS,
                            [&](int64_t many, const float* x, const uint8_t* const* rows, const Steps& steps,
                                float* sums, auto&, int) {
                              if (many == 1) tile<1>(x, rows, steps, sums);
                              else if (many == 2) tile<2>(x, rows, steps, sums);
                              else tile<3>(x, rows, steps, sums);
                            });
  }
};

// act (tokens, length()), in the order in which weights are unpacked.
template <class Weight>
int few_floats(const Weight& weight, const float* act, int64_t tokens) {
  return FewFloats<Weight>{weight, act, tokens}.run();
}

struct W8Floats : FewW8<Float32, FEW_UNIT> {
  static void unpack(const uint8_t* at, const Steps&, int, int j, F* to) {
    for (int h = 0; h < 2; h++) to[h] = float_of_int8((const int8_t*)at + (j + 2 * h) * LANES);
  }
};

template <bool ZERO>
struct W8GroupFloats : FewW8Group<Float32, ZERO, FEW_UNIT> {
  using Steps = typename FewW8Group<Float32, ZERO, FEW_UNIT>::Steps;
  static void unpack(const uint8_t* at, const Steps& steps, int r, int j, F* to) {
    const F step = steps.scale(r, 0), zero = ZERO ? steps.zero(r, 0) : zero_f();
    for (int h = 0; h < 2; h++)
      to[h] = W8Group<Float32>::value<ZERO>((const int8_t*)at + (j + 2 * h) * LANES, zero, step);
  }
};

// The low nibbles of a unit are its first two vectors.
template <bool ZERO>
struct W4A16Floats : FewW4A16<Float32, ZERO, FEW_UNIT> {
  using Steps = typename FewW4A16<Float32, ZERO, FEW_UNIT>::Steps;
  static void unpack(const uint8_t* at, const Steps& steps, int r, int j, F* to) {
    const F step = steps.scale(r, 0), zero = ZERO ? steps.zero(r, 0) : zero_f();
    const I both = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(at + j * LANES)));
    const I low = _mm256_srai_epi32(_mm256_slli_epi32(both, 28), 28), high = _mm256_srai_epi32(both, 4);
    const auto value = [&](I code) { return mul(ZERO ? sub(to_float(code), zero) : to_float(code), step); };
    to[0] = value(low), to[1] = value(high);
  }
};

}  // namespace qg
#endif
