// The product for a few tokens in integers, with the 16 registers of AVX2: see `few.h`.
#pragma once
#include "few.h"
#include "svdq.h"
#include "w8a8.h"

#if !QG_AVX512
namespace qg {

// Tokens of a tile. For more it is faster to unpack into the cache than again.
constexpr int64_t INT_TOKENS = 2;

// weight: see `few_tasks`, but
//   A, STEP                     the type of activations, and how many of them a step multiplies
//   summed()                    whether `finish` needs the sums of rows
//   steps.unpack(r, at, left, i)
//                               the step of row r at feature i, of which `left` bytes are there -> its weights
//   dot(acc, x, weights)        acc + the products of a step; and sum(acc, weights) those with ones
template <class Weight>
struct FewInts {
  const Weight& weight;
  const typename Weight::A* act;
  int64_t tokens;

  // Sums (M, FEW_ROWS) of the rows of a tile with M tokens. SUM: and those of the rows.
  template <int M, bool SUM>
  void tile(const uint8_t* const* rows, const typename Weight::Steps& steps, int32_t* sums, int32_t* row_sums) const {
    constexpr int R = FEW_TILE_ROWS;
    const int64_t length = weight.length();
    Sums acc[R][M] = {}, ones[R] = {};
    int64_t from = 0;
    for (int64_t i = 0; i < length; i += Weight::STEP, from += Weight::STEP_BYTES)
      for (int r = 0; r < R; r++) {
        prefetch(rows[r] + from + FEW_TILE_ROWS * weight.bytes);
        const auto w = steps.unpack(r, rows[r] + from, weight.bytes - from, i);
        if (SUM) ones[r] = Weight::sum(ones[r], w);
        for (int m = 0; m < M; m++) acc[r][m] = Weight::dot(acc[r][m], act + m * length + i, w);
      }
    for (int m = 0; m < M; m++)
      _mm_storeu_si128((__m128i*)(sums + m * FEW_ROWS), sum_of_4(acc[0][m], acc[1][m], acc[2][m], acc[3][m]));
    if (SUM) _mm_storeu_si128((__m128i*)row_sums, sum_of_4(ones[0], ones[1], ones[2], ones[3]));
  }

  int run() const {
    const auto tiles = [&](int64_t many, const typename Weight::A*, const uint8_t* const* rows,
                           const typename Weight::Steps& steps, int32_t* sums, IntegerBlock& block, int r) {
      int32_t* to = block.row_sums + r;
      if (many == 1) weight.summed() ? tile<1, true>(rows, steps, sums, to) : tile<1, false>(rows, steps, sums, to);
      else weight.summed() ? tile<2, true>(rows, steps, sums, to) : tile<2, false>(rows, steps, sums, to);
    };
    return few_tasks<int32_t>(weight, act, tokens, INT_TOKENS, tiles);
  }
};

struct SvdqInts {
  using A = uint8_t;
  static constexpr int64_t STEP_BYTES = BYTES, STEP = 2 * BYTES;
  const Svdq& layer;
  const uint8_t* data = layer.qweight;
  int64_t bytes = layer.padded / 2;

  int64_t length() const { return Activations::wide(layer.padded); }
  int64_t floats(int) const { return 0; }
  bool summed() const { return true; }

  struct Steps {
    const Svdq& layer;
    const uint8_t* groups[FEW_TILE_ROWS];
    int shift;
    Steps(const SvdqInts& w, int64_t row, int count, int rows, float*)
        : layer(w.layer), shift(__builtin_ctzll(layer.group_size)) {
      for (int r = 0; r < rows; r++)
        groups[r] = layer.group_scale + (row + std::min(r, count - 1)) * (layer.padded >> shift);
    }
    Svdq::Weights unpack(int r, const uint8_t* at, int64_t left, int64_t i) const {
      return layer.weights_of(groups[r], shift, i, load_bytes(at, left));
    }
  };

  static Sums sum(Sums acc, const Svdq::Weights& w) { return Svdq::dot(acc, set_bytes(1), set_bytes(1), w); }
  static Sums dot(Sums acc, const uint8_t* x, const Svdq::Weights& w) {
    return Svdq::dot(acc, load_i(x), load_i(x + BYTES), w);
  }
};

struct W8A8Ints {
  using A = Integer::A;
  static constexpr int64_t STEP_BYTES = BYTES, STEP = BYTES;
  static constexpr int VECTORS = STEP / Integer::STEP;
  const W8A8& layer;
  const uint8_t* data = (const uint8_t*)layer.qweight;
  int64_t bytes = layer.k;

  int64_t length() const { return round_up(layer.k, BYTES); }
  int64_t floats(int) const { return 0; }
  bool summed() const { return layer.integer_sums.offset != 0; }

  struct Weights {
    I of[VECTORS];
  };
  struct Steps {
    Steps(const W8A8Ints&, int64_t, int, int, float*) {}
    Weights unpack(int, const uint8_t* at, int64_t left, int64_t) const {
      const I codes = load_bytes(at, left);
#if QG_VNNI
      return {{codes}};
#else
      return {{_mm256_cvtepi8_epi16(_mm256_castsi256_si128(codes)),
               _mm256_cvtepi8_epi16(_mm256_extracti128_si256(codes, 1))}};
#endif
    }
  };

  static Sums sum(Sums acc, const Weights& w) {
    for (const I& part : w.of) acc = Integer::dot(acc, QG_VNNI ? set_bytes(1) : set_words(1), part);
    return acc;
  }
  static Sums dot(Sums acc, const A* x, const Weights& w) {
    for (int i = 0; i < VECTORS; i++) acc = Integer::dot(acc, Integer::load_a(x + i * Integer::STEP), w.of[i]);
    return acc;
  }
};

template <class Weight>
int few_ints(const Weight& weight, const typename Weight::A* act, int64_t tokens) {
  return FewInts<Weight>{weight, act, tokens}.run();
}

}  // namespace qg
#endif
