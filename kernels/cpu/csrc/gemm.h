// One matrix product for every layer: y (M, N) = A (M, K) times the rows of a quantized weight (N, K), transposed.
//
// Rows of A and rows of the weight are both contiguous along K, and stay so: a vector of one times a vector of the
// other adds to LANES partial sums, which are added up once, at the end of a chunk of K. Nothing is transposed, so a
// weight is read as it lies in the checkpoint. A block of its rows is unpacked into a scratch buffer that stays in the
// cache (that of the first level for a few tokens, that of the second for many), multiplied with all tokens of a
// panel, and forgotten.
//
// Each output is one thread's work, in one order: results are the same bits for any number of threads.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <type_traits>
#include "simd.h"

namespace qg {

// Kinds of product: what A and the unpacked weight hold, what sums are, and one vector of each multiplied.
struct Float32 {
  using A = float;
  using B = float;
  using Sum = float;
  using Acc = F;
  using Vec = F;
  static Vec load(const float* p) { return load_f(p); }
  static Acc zero() { return zero_f(); }
  static Acc dot(Acc acc, Vec a, Vec b) { return fma(a, b, acc); }
};

#if QG_BF16
struct Bfloat16 {
  using A = bf16;
  using B = bf16;
  using Sum = float;
  using Acc = F;
  using Vec = I;
  static Vec load(const bf16* p) { return load_i(p); }
  static Acc zero() { return zero_f(); }
  static Acc dot(Acc acc, Vec a, Vec b) { return dot_bf16(acc, a, b); }
};
#endif

#if QG_VNNI
// Codes of activations are offset by 128 to make them unsigned, as the instruction wants. What that adds to a sum is
// 128 times the sum of the weight's row, and `finish` takes it off.
struct Integer {
  using A = uint8_t;
  using B = int8_t;
  using Sum = int32_t;
  using Acc = Sums;
  using Vec = I;
  static constexpr int OFFSET = 128;
  static Vec load(const void* p) { return load_i(p); }
  static Acc zero() { return Sums{}; }
  static Acc dot(Acc acc, Vec a, Vec b) { return dot_bytes(acc, a, b); }
};
#else
struct Integer {
  using A = int16_t;
  using B = int16_t;
  using Sum = int32_t;
  using Acc = Sums;
  using Vec = I;
  static constexpr int OFFSET = 0;
  static Vec load(const void* p) { return load_i(p); }
  static Acc zero() { return Sums{}; }
  static Acc dot(Acc acc, Vec a, Vec b) { return acc + madd_16(a, b); }
};
#endif

// Tiles of the product: as many sums as the registers hold beside one row's vectors.
constexpr int TILE_M = QG_AVX512 ? 6 : 2, TILE_N = 4;
// What is unpacked at a time: rows, and bytes of each. For a few tokens all of it fits the first-level cache; for many,
// TILE_M rows of A and TILE_N of the weight do, and all of it the second-level cache.
constexpr int FEW_TOKENS = 16, ROWS_FEW = 16, ROWS_MANY = 64;
constexpr int64_t CHUNK_BYTES_FEW = 1024, CHUNK_BYTES_MANY = 4096;
// Tokens of a panel: their sums with ROWS_MANY rows stay in the second-level cache.
constexpr int64_t PANEL_TOKENS = 516;
// From here on a panel's activations have left the cache when the next rows of the weight come.
constexpr int64_t FETCH_TOKENS = 300;
// Fewer multiplications than this are not worth waking a thread for.
constexpr int64_t PARALLEL_WORK = 1 << 18;

// Memory of a thread that stays with it, so that it is not mapped and cleared at every call; null if there is none.
template <int WHICH>
inline void* scratch(size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { free(data); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < bytes) {
    free(buffer.data);
    buffer.size = (bytes + 4095) / 4096 * 4096;
    buffer.data = aligned_alloc(64, buffer.size);
    if (!buffer.data) buffer.size = 0;
  }
  return buffer.data;
}

// Where the unpacked weight keeps row r of a block: TILE_N rows stand together, vector by vector, so that a tile reads
// one stream. The row's next vector comes NEXT elements later.
template <class T>
struct Unpacked {
  static constexpr int64_t STEP = BYTES / sizeof(typename T::B), NEXT = TILE_N * STEP;
  typename T::B* data;
  int64_t length;               // of a row
  int64_t ahead_row, ahead_k;  // how far on in the weight the piece lies that comes next: to be fetched by then
  typename T::B* row(int r) const { return data + r / TILE_N * TILE_N * length + r % TILE_N * STEP; }
};

template <int N>
using Count = std::integral_constant<int, N>;

template <class T, int M>
inline void tile(const typename T::A* a, int64_t lda, const typename T::B* b, int64_t k, typename T::Sum* sums,
                 int64_t lds) {
  constexpr int64_t STEP = Unpacked<T>::STEP;
  typename T::Acc acc[M][TILE_N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < TILE_N; n++) acc[m][n] = T::zero();
  for (int64_t i = 0; i < k; i += STEP) {
    typename T::Vec w[TILE_N];
    for (int n = 0; n < TILE_N; n++) w[n] = T::load(b + i * TILE_N + n * STEP);
    for (int m = 0; m < M; m++) {
      const typename T::Vec x = T::load(a + m * lda + i);
      for (int n = 0; n < TILE_N; n++) acc[m][n] = T::dot(acc[m][n], x, w[n]);
    }
  }
  for (int m = 0; m < M; m++) add_to(sums + m * lds, sum_of_4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]));
}

template <class T, int M>
inline void tiles(const typename T::A* a, int64_t lda, const Unpacked<T>& weight, typename T::Sum* sums, int64_t lds,
                  int rows) {
  for (int n = 0; n < rows; n += TILE_N) tile<T, M>(a, lda, weight.row(n), weight.length, sums + n, lds);
}

// The same, while the next tokens are fetched, a share with every tile: for panels too large for the caches.
template <class T, int M>
inline void tiles_fetching(const typename T::A* a, int64_t lda, const Unpacked<T>& weight, typename T::Sum* sums,
                           int64_t lds, int rows) {
  constexpr int64_t LINE = 64 / sizeof(typename T::A);
  const int64_t share = (weight.length / LINE * TILE_N + rows - 1) / rows * LINE;
  for (int n = 0; n < rows; n += TILE_N) {
    const int64_t from = n / TILE_N * share, to = std::min(from + share, weight.length);
    for (int m = M; m < 2 * M; m++)
      for (int64_t i = from; i < to; i += LINE) prefetch(a + m * lda + i);
    tile<T, M>(a, lda, weight.row(n), weight.length, sums + n, lds);
  }
}

template <class T>
inline void tiles_of_panel(const typename T::A* a, int64_t lda, const Unpacked<T>& weight, typename T::Sum* sums,
                           int64_t lds, int rows, int64_t tokens) {
  int64_t m = 0;
  const auto rest = [&](auto count) {
    tiles<T, decltype(count)::value>(a + m * lda, lda, weight, sums + m * lds, lds, rows);
  };
  for (; m + TILE_M <= tokens; m += TILE_M) {
    if (tokens >= FETCH_TOKENS) tiles_fetching<T, TILE_M>(a + m * lda, lda, weight, sums + m * lds, lds, rows);
    else rest(Count<TILE_M>());
  }
  switch (tokens - m) {
    case 1: return rest(Count<1>());
#if QG_AVX512
    case 2: return rest(Count<2>());
    case 3: return rest(Count<3>());
    case 4: return rest(Count<4>());
    case 5: return rest(Count<5>());
#endif
  }
}

// A layer is what `gemm` asks of it:
//   Block                       what it remembers from one chunk of the same rows to the next; begins with a pointer to
//                               scratch_bytes() of memory
//   unpack(row, rows, k, to, block)
//                               rows [row, row + rows) of the weight, features [k, k + to.length), as T::B; `length` is
//                               whole vectors, and what lies past the end becomes zeros, or meets zeros in A
//   finish(m, tokens, row, rows, sums, ld, block)
//                               sums -> outputs
// Returns 0, or 1 when there is no memory.
template <class T, class Layer>
int gemm(const typename T::A* a, int64_t lda, int64_t m, int64_t n, int64_t k, const Layer& layer) {
  const bool few = m <= FEW_TOKENS;
  const int rows_max = few ? ROWS_FEW : ROWS_MANY;
  const int64_t chunk = (few ? CHUNK_BYTES_FEW : CHUNK_BYTES_MANY) / sizeof(typename T::B);
  const int64_t blocks = (n + rows_max - 1) / rows_max, panels = (m + PANEL_TOKENS - 1) / PANEL_TOKENS;
  const int64_t panel = (m + panels - 1) / panels;
  int failed = 0;
#pragma omp parallel for schedule(dynamic) if (m * n * k > PARALLEL_WORK)
  for (int64_t task = 0; task < blocks * panels; task++) {
    const int64_t m0 = task / blocks * panel, tokens = std::min(panel, m - m0);
    const int64_t row = task % blocks * rows_max;
    const int rows = int(std::min<int64_t>(rows_max, n - row)), tiled = (rows + TILE_N - 1) / TILE_N * TILE_N;
    auto* data = (typename T::B*)scratch<0>(sizeof(typename T::B) * chunk * rows_max);
    auto* sums = (typename T::Sum*)scratch<1>(sizeof(typename T::Sum) * panel * rows_max);
    auto* extra = (float*)scratch<2>(layer.scratch_bytes());
    if (!data || !sums || (!extra && layer.scratch_bytes())) {
#pragma omp atomic write
      failed = 1;
      continue;
    }
    std::fill(sums, sums + tokens * rows_max, typename T::Sum(0));
    typename Layer::Block block{extra};
    for (int64_t start = 0; start < k; start += chunk) {
      const bool last = start + chunk >= k;
      const Unpacked<T> weight{data, std::min(chunk, k - start), last ? rows_max : 0, last ? -start : chunk};
      if (tiled > rows) memset(weight.row(tiled - TILE_N), 0, sizeof(typename T::B) * TILE_N * weight.length);
      layer.unpack(row, rows, start, weight, block);
      const typename T::A* x = a + m0 * lda + start;
      tiles_of_panel<T>(x, lda, weight, sums, rows_max, tiled, tokens);
    }
    layer.finish(m0, tokens, row, rows, sums, rows_max, block);
  }
  return failed;
}

// What outputs are stored as.
enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline void store(void* p, Type type, int64_t index, F value) {
  if (type == FLOAT32) store_f((float*)p + index, value);
  else if (type == BFLOAT16) store_bf16((bf16*)p + index, value);
  else store_fp16((uint16_t*)p + index, value);
}

// The first `count` lanes only.
inline void store_some(void* p, Type type, int64_t index, F value, int count) {
  alignas(64) char all[BYTES];
  store(all, type, 0, value);
  const int size = type == FLOAT32 ? 4 : 2;
  memcpy((char*)p + index * size, all, size_t(count) * size);
}

inline F load(const void* p, Type type, int64_t index) {
  if (type == FLOAT32) return load_f((const float*)p + index);
  if (type == BFLOAT16) return float_of_bf16((const bf16*)p + index);
  return float_of_fp16((const uint16_t*)p + index);
}

inline F load_some(const void* p, Type type, int64_t index, int count) {
  alignas(64) char all[BYTES] = {};
  const int size = type == FLOAT32 ? 4 : 2;
  memcpy(all, (const char*)p + index * size, size_t(count) * size);
  return load(all, type, 0);
}

}  // namespace qg
