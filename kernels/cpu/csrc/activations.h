// What happens to activations before the product: smooth, rotate, quantize; and the projection down to the branch.
#pragma once
#include <cmath>
#include "output.h"

namespace qg {

// The constants of reference.py.
constexpr float MAX_INT4 = 7, ACT_STEPS = 7.5f, ACT_SPAN = 15.5f, MAX_INT8 = 127, MAX_GROUP_SCALE = 16, TINY = 1e-30f;

inline F signs_of(int distance) {  // +1 where a butterfly adds, -1 where it subtracts
  float signs[LANES];
  for (int i = 0; i < LANES; i++) signs[i] = i & distance ? -1.0f : 1.0f;
  return load_f(signs);
}

// Every group of `size` numbers (a power of two, at least LANES) times the orthonormal Hadamard matrix, in place.
inline void rotate_groups(float* x, int64_t count, int64_t size) {
  const F s1 = signs_of(1), s2 = signs_of(2), s4 = signs_of(4), norm = set_f(1.0f / std::sqrt(float(size)));
#if QG_AVX512
  const F s8 = signs_of(8);
#endif
  for (float* group = x; group < x + count; group += size) {
    for (int64_t i = 0; i < size; i += LANES) {
      F v = mul(load_f(group + i), norm);
      v = fma(v, s1, swap_1(v));
      v = fma(v, s2, swap_2(v));
      v = fma(v, s4, swap_4(v));
#if QG_AVX512
      v = fma(v, s8, swap_8(v));
#endif
      store_f(group + i, v);
    }
    for (int64_t half = LANES; half < size; half *= 2)
      for (int64_t i = 0; i < size; i += 2 * half)
        for (int64_t j = i; j < i + half; j += LANES) {
          const F a = load_f(group + j), b = load_f(group + j + half);
          store_f(group + j, add(a, b));
          store_f(group + j + half, sub(a, b));
        }
  }
}

// Token t on its way to codes: x / smooth_factor, padded with zeros and rotated, into out (padded,).
inline void prepare_token(const Rows& x, int64_t t, const float* smooth_factor, int64_t padded, bool rotate,
                          int64_t group_size, float* out) {
  const int64_t k = x.k, whole = k / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
    const F value = load(x.data, x.type, t * k + i);
    store_f(out + i, smooth_factor ? div(value, load_f(smooth_factor + i)) : value);
  }
  for (int64_t i = whole; i < k; i++) {
    const float value = float_at(x.data, x.type, t * k + i);
    out[i] = smooth_factor ? value / smooth_factor[i] : value;
  }
  std::fill(out + k, out + padded, 0.0f);
  if (rotate) rotate_groups(out, padded, group_size);
}

// The largest magnitude; NaN if anything is NaN or infinite, so that it cannot be lost on the way.
inline float absmax(const float* x, int64_t count) {
  F most = zero_f(), spoiled = zero_f();
  for (int64_t i = 0; i < count; i += LANES) {
    const F v = load_f(x + i);
    most = max(most, abs(v));
    spoiled = fma(v, zero_f(), spoiled);
  }
  float sums[LANES], total = max_of(most);
  store_f(sums, spoiled);
  for (float s : sums) total += s;
  return total;
}

// round(x / scale), kept in [first, last], times an integer.
inline void round_to(const float* x, int64_t count, float scale, float first, float last, float integer,
                     int8_t* codes) {
  const F step = set_f(scale), most = set_f(last), least = set_f(first), times = set_f(integer);
  for (int64_t i = 0; i < count; i += LANES) {
    const F code = min(max(round(div(load_f(x + i), step)), least), most);
    store_int8(codes + i, mul(code, times));
  }
}

// The scale with which the magnitude `most` takes so many steps; never 0, and NaN for NaN.
inline float step_of(float most, float steps) {
  const float scale = most / steps;
  return scale < TINY ? TINY : scale;
}

struct Range {
  float least, largest;
};

inline Range range_of(const float* x, int64_t count) {
  F low = load_f(x), high = low;
  for (int64_t i = LANES; i < count; i += LANES) {
    low = min(low, load_f(x + i));
    high = max(high, load_f(x + i));
  }
  return {-max_of(sub(zero_f(), low)), max_of(high)};
}

inline float group_integer(float ratio) { return std::min(std::max(std::nearbyint(ratio), 1.0f), MAX_GROUP_SCALE); }

// The token's scale; its codes go to codes (padded,), a multiple of LANES. Two-level for 4 bits, see reference.py.
inline float quantize_token(const float* x, int64_t padded, int64_t group_size, int bits, bool zero_point,
                            int8_t* codes) {
  const float most = absmax(x, padded);
  if (bits == 8) {
    const float scale = step_of(most, MAX_INT8);
    round_to(x, padded, scale, -MAX_INT8, MAX_INT8, 1, codes);
    return scale;
  }
  const float scale = step_of(most, ACT_STEPS * MAX_GROUP_SCALE);
  for (int64_t g = 0; g < padded; g += group_size) {
    if (zero_point) {
      const Range range = range_of(x + g, group_size);
      const float integer = group_integer((range.largest - range.least) / (ACT_SPAN * scale)), step = integer * scale;
      const float first = std::nearbyint((range.largest + range.least) / (2 * step) - 7.5f);
      round_to(x + g, group_size, step, first, first + 15, integer, codes + g);
    } else {
      const float integer = group_integer(absmax(x + g, group_size) / (ACT_STEPS * scale));
      round_to(x + g, group_size, integer * scale, -MAX_INT4, MAX_INT4, integer, codes + g);
    }
  }
  return scale;
}

// Rounded to codes with a float scale per group (4 bits) or per token (8 bits), and back, in place.
inline void round_groups(float* x, int64_t padded, int64_t group_size, int bits, int8_t* codes) {
  const int64_t size = bits == 8 ? padded : group_size;
  const float limit = bits == 8 ? MAX_INT8 : MAX_INT4;
  for (int64_t g = 0; g < padded; g += size) {
    const float scale = step_of(absmax(x + g, size), limit);
    round_to(x + g, size, scale, -limit, limit, 1, codes);
    for (int64_t i = 0; i < size; i += LANES) store_f(x + g + i, mul(float_of_int8(codes + i), set_f(scale)));
  }
}

// Calls one(t, row, codes) for every token, in parallel, with room for `wide` floats and as many codes. Returns 0, or 1
// when there is no memory.
template <class One>
int each_token(int64_t m, int64_t wide, const One& one) {
  int failed = 0;
#pragma omp parallel for if (m > 1 && m * wide > PARALLEL_WORK / 16)
  for (int64_t t = 0; t < m; t++) {
    float* row = (float*)scratch<0>(sizeof(float) * wide);
    int8_t* codes = (int8_t*)scratch<1>(wide);
    if (row && codes) {
      one(t, row, codes);
    } else {
#pragma omp atomic write
      failed = 1;
    }
  }
  return failed;
}

// Codes in the order of features -> as `Grouped` multiplies them with int4 weights: of every 2 * BYTES features first
// the even ones, then the odd ones, because that is how the nibbles of packed bytes come apart; and offset by 128.
inline void to_planes(const int8_t* codes, int64_t count, uint8_t* out) {
  static_assert(Grouped::OFFSET == 128, "a flipped sign bit");
  for (int64_t i = 0; i < count; i += 2 * BYTES) {
    const I first = load_i(codes + i), second = load_i(codes + i + BYTES);
    store_i(out + i, xor_i(even_bytes(first, second), set_bytes(-128)));
    store_i(out + i + BYTES, xor_i(odd_bytes(first, second), set_bytes(-128)));
  }
}

// Numbers [at, at + count) of x, as floats.
inline void to_floats(const Rows& x, int64_t at, int64_t count, float* out) {
  const int64_t whole = count / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) store_f(out + i, load(x.data, x.type, at + i));
  for (int64_t i = whole; i < count; i++) out[i] = float_at(x.data, x.type, at + i);
}

// x (M, K) @ down (K, R) -> out (M, R), float32. Few tokens split K, in a way that does not depend on the threads.
constexpr int64_t FEW_TOKENS = 16, DOWN_TOKENS = 48, DOWN_FEATURES = 256, DOWN_COLUMNS = 2 * LANES;

template <int M>
inline void project_tile(const float* x, int64_t k, const float* panel, int64_t features, float* out, int64_t ldo) {
  F acc[M][2];
  for (int m = 0; m < M; m++)
    for (int j = 0; j < 2; j++) acc[m][j] = load_f(out + m * ldo + j * LANES);
  for (int64_t i = 0; i < features; i++) {
    const F a = load_f(panel + i * DOWN_COLUMNS), b = load_f(panel + i * DOWN_COLUMNS + LANES);
    for (int m = 0; m < M; m++) {
      const F value = set_f(x[m * k + i]);
      acc[m][0] = fma(value, a, acc[m][0]);
      acc[m][1] = fma(value, b, acc[m][1]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int j = 0; j < 2; j++) store_f(out + m * ldo + j * LANES, acc[m][j]);
}

inline int project_down(const Rows& x, const void* down, Type type, int64_t rank, float* out) {
  const int64_t m = x.m, k = x.k;
  const int64_t columns = (rank + DOWN_COLUMNS - 1) / DOWN_COLUMNS, wide = columns * DOWN_COLUMNS;
  const int64_t pieces = (k + DOWN_FEATURES - 1) / DOWN_FEATURES, splits = m <= FEW_TOKENS ? pieces : 1;
  const int64_t blocks = (m + DOWN_TOKENS - 1) / DOWN_TOKENS;
  const Memory<float> sums_of_splits(splits * m * wide);
  float* const partial = sums_of_splits.data;
  if (!partial) return 1;
  std::fill(partial, partial + splits * m * wide, 0.0f);
  int failed = 0;
#pragma omp parallel for if (m * k * rank > PARALLEL_WORK)
  for (int64_t task = 0; task < blocks * splits; task++) {
    float* panel = (float*)scratch<0>(sizeof(float) * DOWN_FEATURES * DOWN_COLUMNS);
    float* floats = (float*)scratch<1>(sizeof(float) * DOWN_FEATURES * DOWN_TOKENS);
    if (!panel || !floats) {
#pragma omp atomic write
      failed = 1;
      continue;
    }
    const int64_t m0 = task / splits * DOWN_TOKENS, tokens = std::min(DOWN_TOKENS, m - m0), split = task % splits;
    float* sums = partial + (split * m + m0) * wide;
    const int64_t first = splits == 1 ? 0 : split, last = splits == 1 ? pieces : split + 1;
    for (int64_t piece = first; piece < last; piece++) {
      const int64_t start = piece * DOWN_FEATURES, features = std::min(DOWN_FEATURES, k - start);
      const bool as_they_are = x.type == FLOAT32;
      const float* rows = as_they_are ? (const float*)x.data + m0 * k + start : floats;
      const int64_t ldx = as_they_are ? k : DOWN_FEATURES;
      for (int64_t t = 0; t < tokens && !as_they_are; t++)
        to_floats(x, (m0 + t) * k + start, features, floats + t * ldx);
      for (int64_t c = 0; c < columns; c++) {
        const int64_t r = c * DOWN_COLUMNS;
        for (int64_t i = 0; i < features; i++)
          for (int j = 0; j < 2; j++) {
            const int count = int(std::max<int64_t>(0, std::min<int64_t>(LANES, rank - r - j * LANES)));
            const int64_t at = (start + i) * rank + r + j * LANES;
            const F value = count == LANES ? load(down, type, at) : load_some(down, type, count ? at : 0, count);
            store_f(panel + i * DOWN_COLUMNS + j * LANES, value);
          }
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4)
          project_tile<4>(rows + t * ldx, ldx, panel, features, sums + t * wide + r, wide);
        for (; t < tokens; t++) project_tile<1>(rows + t * ldx, ldx, panel, features, sums + t * wide + r, wide);
      }
    }
  }
  for (int64_t t = 0; t < m; t++)
    for (int64_t r = 0; r < rank; r++) {
      float sum = 0;
      for (int64_t split = 0; split < splits; split++) sum += partial[(split * m + t) * wide + r];
      out[t * rank + r] = sum;
    }
  return failed;
}

}  // namespace qg
