// The product for many tokens: vectors of tokens times one weight in all lanes.
//
// A tile of `gemm.h` loads ten vectors for 24 products, half of them from the second-level cache. Here the
// tokens of a panel are turned once, so that a vector holds LANES tokens of the same features, as many as 32 bits hold.
// A weight is then read as it was unpacked, 32 bits at a time into all lanes, and sums are whole as they stand: nothing
// is added up across a vector.
#pragma once
#include <algorithm>
#include "kinds.h"

namespace qg {

// Rows of the weight, and at most so many vectors of tokens, in a tile: their sums fill the registers.
constexpr int WIDE_ROWS = QG_AVX512 ? 8 : 4, WIDE_VECTORS = 3;
// Rows that are unpacked at a time, and bytes of each: with two groups of tokens they fit the second-level cache.
constexpr int ROWS_MANY = 64;
constexpr int64_t CHUNK_BYTES_WIDE = 2048;
// Fewer tokens leave too many lanes empty.
constexpr int64_t WIDE_TOKENS = QG_AVX512 ? 27 : 16;

// How many of a panel's tokens are turned: a vector that would be half empty is left to the tile of `gemm.h`.
inline int64_t turned_of(int64_t tokens) {
  const int64_t rest = tokens % LANES;
  return rest > LANES / 2 ? tokens : tokens - rest;
}

// The vectors of a panel stand in groups, each a tile wide, and as equal as they can be.
struct Groups {
  int64_t vectors, count;
  explicit Groups(int64_t tokens)
      : vectors((tokens + LANES - 1) / LANES), count((vectors + WIDE_VECTORS - 1) / WIDE_VECTORS) {}
  int64_t begin(int64_t group) const { return vectors * group / count; }
  int width(int64_t group) const { return int(begin(group + 1) - begin(group)); }
};

// Fewer numbers are not worth waking a thread for.
constexpr int64_t TURN_WORK = 1 << 17;

// The next piece of the weight, fetched line by line while this one is multiplied: at once, the memory would be busy
// and the multipliers idle.
struct Fetch {
  const char* at;
  int64_t bytes, stride, done = 0, rows = ROWS_MANY;
  int at_once = 0;
  Fetch(const char* data, int64_t bytes, int64_t stride) : at(data), bytes(bytes), stride(stride) {}
  void in(int64_t steps) { at_once = int((rows * ((bytes + 63) / 64) + steps - 1) / steps); }
  void step() {
    for (int i = 0; i < at_once && rows; i++) {
      prefetch_far(at + done);
      if ((done += 64) < bytes) continue;
      done = 0, rows--, at += stride;
    }
  }
};

// Four rows of four 32-bit numbers -> their columns.
inline void turn(__m128& a, __m128& b, __m128& c, __m128& d) { _MM_TRANSPOSE4_PS(a, b, c, d); }

// One group: tokens [0, tokens) of `width` vectors, k features, rows lda bytes apart, into
// (k / features in 32 bits, width, LANES). Tokens that are not there become zeros.
inline void turn_tokens(const char* a, int64_t lda, int64_t tokens, int64_t words, int width, float* out) {
  for (int64_t t = 0; t < width * LANES; t += 4)
    for (int64_t i = 0; i < words; i += 4) {
      __m128 row[4];
      for (int j = 0; j < 4; j++)
        row[j] = t + j < tokens ? _mm_loadu_ps((const float*)(a + (t + j) * lda) + i) : _mm_setzero_ps();
      turn(row[0], row[1], row[2], row[3]);
      for (int j = 0; j < 4; j++) _mm_store_ps(out + (i + j) * width * LANES + t, row[j]);
    }
}

inline void put_acc(float* p, F x) { store_f(p, x); }
inline void put_acc(int32_t* p, Sums x) { memcpy(p, &x, sizeof x); }
inline __m128 add_bits(const float* p, __m128 x) { return _mm_add_ps(_mm_loadu_ps(p), x); }
inline __m128 add_bits(const int32_t* p, __m128 x) {
  return _mm_castsi128_ps(_mm_add_epi32(_mm_loadu_si128((const __m128i*)p), _mm_castps_si128(x)));
}

// sums (tokens, lds) of WIDE_ROWS rows += the products of a group's tokens with rows r and following of the weight.
// Meanwhile a share of the tokens `ahead` is fetched, all of them by the tiles of a block of ROWS_MANY.
template <class T, int V>
inline void wide_tile(const float* tokens, const float* ahead, const Unpacked<T>& weight, Fetch& fetch, int r,
                      typename T::Sum* sums, int64_t lds) {
  typename T::Acc acc[WIDE_ROWS][V] = {};
  const typename T::B* rows[WIDE_ROWS / TILE_N];
  for (int n = 0; n < WIDE_ROWS; n += TILE_N) rows[n / TILE_N] = weight.row(r + n);
  constexpr int WORD = 4 / sizeof(typename T::B), SHARE = V * LANES * WIDE_ROWS / ROWS_MANY;
  ahead += weight.length / T::STEP * SHARE * LANES * (r / WIDE_ROWS);
  for (int64_t i = 0; i < weight.length; i += T::STEP) {
    for (int j = 0; j < SHARE; j++, ahead += LANES) prefetch_far(ahead);
    fetch.step();
    const auto product = [&](int lane) __attribute__((always_inline)) {
      decltype(T::load_a(nullptr)) x[V];
      for (int v = 0; v < V; v++) {
        x[v] = T::load_a((const typename T::A*)(tokens + v * LANES));
        if constexpr (T::KEPT) keep(x[v]);
      }
      for (int n = 0; n < WIDE_ROWS; n++) {
        const auto w = T::everywhere(rows[n / TILE_N] + n % TILE_N * T::B_STEP + lane * WORD);
        for (int v = 0; v < V; v++) acc[n][v] = T::dot(acc[n][v], x[v], w);
      }
      tokens += V * LANES;
    };
    if constexpr (T::KEPT) {  // written out, because gcc does not unroll by the pragma here
      product(0), product(1), product(2), product(3), product(4), product(5), product(6), product(7);
    } else {
#pragma GCC unroll 4
      for (int lane = 0; lane < LANES; lane++) product(lane);
    }
    for (auto& at : rows) at += Unpacked<T>::NEXT;
  }
  alignas(64) typename T::Sum out[WIDE_ROWS][V * LANES];
  for (int n = 0; n < WIDE_ROWS; n++)
    for (int v = 0; v < V; v++) put_acc(out[n] + v * LANES, acc[n][v]);
  for (int t = 0; t < V * LANES; t += 4)
    for (int n = 0; n < WIDE_ROWS; n += 4) {
      __m128 part[4];
      for (int j = 0; j < 4; j++) part[j] = _mm_load_ps((const float*)out[n + j] + t);
      turn(part[0], part[1], part[2], part[3]);
      for (int j = 0; j < 4; j++) {
        typename T::Sum* to = sums + (t + j) * lds + n;
        _mm_storeu_ps((float*)to, add_bits(to, part[j]));
      }
    }
}

// Tokens (m, k) in panels of so many, each turned.
template <class T>
void turn_panels(const typename T::A* a, int64_t lda, int64_t m, int64_t k, int64_t panel, typename T::A* out) {
  constexpr int64_t WORD = 4 / sizeof(typename T::A), MOST = WIDE_VECTORS * LANES;
  const int64_t panels = (m + panel - 1) / panel, most = (panel + MOST - 1) / MOST;
#pragma omp parallel for if (m * k > TURN_WORK)
  for (int64_t task = 0; task < panels * most; task++) {
    const int64_t m0 = task / most * panel, g = task % most;
    const Groups groups(turned_of(std::min(panel, m - m0)));
    if (g >= groups.count) continue;
    const int64_t from = m0 + groups.begin(g) * LANES;
    turn_tokens((const char*)(a + from * lda), lda * sizeof(typename T::A), m - from, k / WORD, groups.width(g),
                (float*)(out + from * k));
  }
}

// The turned tokens of a panel times one piece of the weight: features [start, start + length).
template <class T>
inline void wide_panel(const typename T::A* panel, int64_t k, int64_t start, const Unpacked<T>& weight, Fetch& fetch,
                       typename T::Sum* sums, int64_t lds, int rows, int64_t tokens) {
  constexpr int WORD = 4 / sizeof(typename T::A);
  const Groups groups(tokens);
  const auto tokens_of = [&](int64_t g) {
    return (const float*)panel + (groups.begin(g) * k + start * groups.width(g)) / WORD * LANES;
  };
  fetch.in(groups.count * (rows / WIDE_ROWS) * (weight.length / T::STEP));
  for (int64_t g = 0; g < groups.count; g++) {
    const int width = groups.width(g);
    const float *at = tokens_of(g), *ahead = tokens_of(std::min(g + 1, groups.count - 1));
    for (int r = 0; r < rows; r += WIDE_ROWS) {
      typename T::Sum* to = sums + groups.begin(g) * LANES * lds + r;
      if (width == 3) wide_tile<T, 3>(at, ahead, weight, fetch, r, to, lds);
      else if (width == 2) wide_tile<T, 2>(at, ahead, weight, fetch, r, to, lds);
      else wide_tile<T, 1>(at, ahead, weight, fetch, r, to, lds);
    }
  }
}

}  // namespace qg
