// W4A16 for a few tokens, on a machine that multiplies bfloat16: weights go from memory to the multipliers.
//
// The product of `gemm.h` unpacks a piece of the weight into the cache and reads it from there. For so few tokens that
// takes longer than the products. Here 64 weights of a row are unpacked into two registers and used; for more tokens
// than a tile has they are unpacked again.
#pragma once
#include "w4a16.h"

#if QG_BF16
namespace qg {

// Features of a step: of 32 bytes the low nibbles, then the high ones. Activations stand in that order.
constexpr int64_t FEW_STEP = 64;
// A tile of the product: its sums and its weights fill the registers.
constexpr int FEW_TILE_TOKENS = 5, FEW_TILE_ROWS = 4;
// Rows of a task.
constexpr int FEW_ROWS = 2 * LANES;

struct W4A16Few {
  const W4A16<Bfloat16>& layer;
  const bf16* act;  // (tokens, wide), as `prepare` leaves them
  int64_t tokens;

  static int64_t wide(int64_t padded) { return round_up(padded, FEW_STEP); }

  // Smoothed, rotated, rounded and in the order of steps.
  static int prepare(const Rows& x, const float* smooth_factor, int64_t padded, int64_t group_size, bool rotate,
                     bf16* act) {
    const int64_t length = wide(padded);
    return each_token(x.m, length, [=](int64_t t, float* row, int8_t*) {
      prepare_token(x, t, smooth_factor, padded, rotate, group_size, row);
      std::fill(row + padded, row + length, 0.0f);
      for (int64_t i = 0; i < length; i += FEW_STEP) {
        const F a = load_f(row + i), b = load_f(row + i + LANES);
        const F c = load_f(row + i + 2 * LANES), d = load_f(row + i + 3 * LANES);
        store_i(act + t * length + i, pack_bf16(even_floats(a, b), even_floats(c, d)));
        store_i(act + t * length + i + 2 * LANES, pack_bf16(odd_floats(a, b), odd_floats(c, d)));
      }
    });
  }

  int64_t groups() const { return layer.padded / layer.group_size; }

  // Scales, and zero points, of FEW_TILE_ROWS rows, each (FEW_TILE_ROWS, groups).
  struct Steps {
    float *scales, *zeros;
  };

  // Sums (M, FEW_ROWS) of the rows of a tile, or of the `count` that there are, with M tokens. SPLIT: the halves of a
  // step may be of two groups. ZERO: there are zero points.
  template <int M, bool SPLIT, bool ZERO>
  void tile(const bf16* x, int64_t row, int count, const Steps& steps, float* sums) const {
    constexpr int R = FEW_TILE_ROWS;
    const int64_t length = wide(layer.padded), bytes = layer.padded / 2;
    const int64_t units = layer.group_size / UNIT, all = groups();
    const I second_half = SPLIT ? _mm512_inserti64x4(zero_i(), _mm256_set1_epi16(16), 1) : zero_i();
    const F codes = load_f(CODES);
    const uint8_t* packed[R];
    for (int r = 0; r < R; r++) packed[r] = layer.qweight + (row + std::min(r, count - 1)) * bytes;
    F acc[R][M] = {};
    int64_t group = 0, unit = 0;  // where the step begins: the group, and how many of its units are done
    const auto next_unit = [&] {
      if (++unit == units) unit = 0, group++;
    };
    for (int64_t i = 0; i < length; i += FEW_STEP) {
      const int64_t from = group;
      next_unit();
      const int64_t to = SPLIT ? std::min(group, all - 1) : from;
      next_unit();
      I even[R], odd[R];
      for (int r = 0; r < R; r++) {
        const auto values = [&](int64_t g) {
          const F code = ZERO ? sub(codes, set_f(steps.zeros[r * all + g])) : codes;
          return mul(code, set_f(steps.scales[r * all + g]));
        };
        const F low = values(from), high = SPLIT ? values(to) : low;
        const I table = pack_bf16(low, high);
        const uint8_t* at = packed[r] + i / 2;
        prefetch(at + R * bytes);
        // A row may end in half a step; what follows it is another row, or not ours to read.
        const __m256i here = i + FEW_STEP <= layer.padded
                                 ? _mm256_loadu_si256((const __m256i*)at)
                                 : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)at));
        I index = _mm512_cvtepu8_epi16(here), upper = shift_right_16(index, 4);
        if (SPLIT) {
          index = _mm512_or_si512(and_i(index, set_words(15)), second_half);
          upper = _mm512_or_si512(upper, second_half);
        }
        even[r] = _mm512_permutexvar_epi16(index, table);  // by the lowest five bits; without SPLIT four decide
        odd[r] = _mm512_permutexvar_epi16(upper, table);
      }
      for (int m = 0; m < M; m++) {
        const I a = load_i(x + m * length + i), b = load_i(x + m * length + i + 2 * LANES);
        for (int r = 0; r < R; r++) acc[r][m] = dot_bf16(dot_bf16(acc[r][m], a, even[r]), b, odd[r]);
      }
    }
    for (int m = 0; m < M; m++)
      _mm_storeu_ps(sums + m * FEW_ROWS, sum_of_4(acc[0][m], acc[1][m], acc[2][m], acc[3][m]));
  }

  template <bool SPLIT, bool ZERO>
  void tiles(int64_t row, int count, const Steps& steps, float* sums) const {
    const int64_t length = wide(layer.padded), parts = (tokens + FEW_TILE_TOKENS - 1) / FEW_TILE_TOKENS;
    for (int64_t part = 0; part < parts; part++) {
      const int64_t m = tokens * part / parts;
      const auto run = [&](auto many) {
        tile<decltype(many)::value, SPLIT, ZERO>(act + m * length, row, count, steps, sums + m * FEW_ROWS);
      };
      switch (tokens * (part + 1) / parts - m) {
        case 1: run(Count<1>()); break;
        case 2: run(Count<2>()); break;
        case 3: run(Count<3>()); break;
        case 4: run(Count<4>()); break;
        case 5: run(Count<5>()); break;
      }
    }
  }

  // Returns 0, or 1 when there is no memory.
  int run() const {
    const int64_t n = layer.out.n, blocks = (n + FEW_ROWS - 1) / FEW_ROWS;
    const bool split = layer.group_size % FEW_STEP && groups() > 1;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) if (tokens * n * layer.padded > PARALLEL_WORK)
    for (int64_t task = 0; task < blocks; task++) {
      auto* sums = (float*)scratch<0>(sizeof(float) * tokens * FEW_ROWS);
      auto* scales = (float*)scratch<1>(sizeof(float) * 2 * groups() * FEW_TILE_ROWS);
      auto* extra = (float*)scratch<2>(layer.scratch_bytes());
      if (!sums || !scales || (!extra && layer.scratch_bytes())) {
#pragma omp atomic write
        failed = 1;
        continue;
      }
      const int64_t row = task * FEW_ROWS;
      const int rows = int(std::min<int64_t>(FEW_ROWS, n - row));
      for (int r = 0; r < rows; r += FEW_TILE_ROWS) {
        const int count = std::min(FEW_TILE_ROWS, rows - r);
        const Steps steps{scales, scales + groups() * FEW_TILE_ROWS};
        for (int i = 0; i < FEW_TILE_ROWS; i++) {
          const int64_t from = (row + r + std::min(i, count - 1)) * groups(), to = i * groups();
          to_floats({layer.scale, layer.scale_type, n, groups()}, from, groups(), steps.scales + to);
          if (layer.zero_point) std::copy_n(layer.zero_point + from, groups(), steps.zeros + to);
        }
        const auto run = layer.zero_point ? (split ? &W4A16Few::tiles<true, true> : &W4A16Few::tiles<false, true>)
                                          : (split ? &W4A16Few::tiles<true, false> : &W4A16Few::tiles<false, false>);
        (this->*run)(row + r, count, steps, sums + r);
      }
      typename W4A16<Bfloat16>::Block block{extra};
      layer.finish(0, tokens, row, rows, sums, FEW_ROWS, block);
    }
    return failed;
  }
};

}  // namespace qg
#endif
