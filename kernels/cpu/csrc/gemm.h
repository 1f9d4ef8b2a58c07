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

inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// Kinds of product. A and B are the types of elements of A and of the unpacked weight, Sum that of sums. A step is STEP
// features: one load_a and one load_b, B_STEP elements long, and a dot. TILE_M tokens fill the registers.
struct Float32 {
  using A = float;
  using B = float;
  using Sum = float;
  using Acc = F;
  static constexpr int STEP = LANES, B_STEP = STEP, TILE_M = QG_AVX512 ? 6 : 3;
  static F load_a(const float* p) { return load_f(p); }
  static F load_b(const float* p) { return load_f(p); }
  static Acc dot(Acc acc, F a, F b) { return fma(a, b, acc); }
};

#if QG_BF16
struct Bfloat16 {
  using A = bf16;
  using B = bf16;
  using Sum = float;
  using Acc = F;
  static constexpr int STEP = 2 * LANES, B_STEP = STEP, TILE_M = 6;
  static I load_a(const bf16* p) { return load_i(p); }
  static I load_b(const bf16* p) { return load_i(p); }
  static Acc dot(Acc acc, I a, I b) { return dot_bf16(acc, a, b); }
};
#endif

#if QG_VNNI
// int8 times int8. Codes of activations are offset by 128 to make them unsigned, as the instruction wants. What that
// adds to a sum is 128 times the sum of the weight's row, and a layer's `finish` takes it off.
struct Integer {
  using A = uint8_t;
  using B = int8_t;
  using Sum = int32_t;
  using Acc = Sums;
  static constexpr int STEP = BYTES, B_STEP = STEP, TILE_M = QG_AVX512 ? 6 : 3, OFFSET = 128;
  static I load_a(const void* p) { return load_i(p); }
  static I load_b(const void* p) { return load_i(p); }
  static Acc dot(Acc acc, I a, I b) { return dot_bytes(acc, a, b); }
};
using Grouped = Integer;  // int4 with integers per group multiplies as int8
#else
// The same in 16 bits: the 8-bit instruction adds two products in 16 bits, and 2 * 255 * 127 does not fit there.
struct Integer {
  using A = int16_t;
  using B = int16_t;
  using Sum = int32_t;
  using Acc = Sums;
  static constexpr int STEP = BYTES / 2, B_STEP = STEP, TILE_M = QG_AVX512 ? 6 : 3, OFFSET = 0;
  static I load_a(const void* p) { return load_i(p); }
  static I load_b(const void* p) { return load_i(p); }
  static Acc dot(Acc acc, I a, I b) { return acc + madd_16(a, b); }
};

// int4 codes with an integer 1..16 per group. 4 * 255 * 8 fits into 16 bits, so here the 8-bit instruction is exact,
// and the integers multiply its sums. A step of the weight is the codes of even features, of odd ones, and the integer
// of every four features.
struct Grouped {
  using A = uint8_t;
  using B = int8_t;
  using Sum = int32_t;
  using Acc = Sums;
  static constexpr int STEP = 2 * BYTES, B_STEP = 3 * BYTES, TILE_M = QG_AVX512 ? 4 : 2, OFFSET = 128;
  struct Codes {
    I even, odd;
  };
  struct Weights {
    I even, odd, integers;
  };
  static Codes load_a(const uint8_t* p) { return {load_i(p), load_i(p + BYTES)}; }
  static Weights load_b(const int8_t* p) { return {load_i(p), load_i(p + BYTES), load_i(p + 2 * BYTES)}; }
  static Acc dot(Acc acc, Codes a, Weights b) {
    return acc + madd_16(add_16(madd_8(a.even, b.even), madd_8(a.odd, b.odd)), b.integers);
  }
};
#endif

// Rows of the weight in a tile of the product.
constexpr int TILE_N = 4;
// What is unpacked at a time: rows, and bytes of each. For a few tokens all of it fits the first-level cache; for many,
// a tile's rows do, and all of it the second-level cache.
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
    buffer.size = size_t(round_up(int64_t(bytes), 4096));
    buffer.data = aligned_alloc(64, buffer.size);
    if (!buffer.data) buffer.size = 0;
  }
  return buffer.data;
}

// Where the unpacked weight keeps row r of a block: TILE_N rows stand together, step by step, so that a tile reads one
// stream. The row's next step comes NEXT elements later.
template <class T>
struct Unpacked {
  static constexpr int64_t NEXT = TILE_N * T::B_STEP;
  typename T::B* data;
  int64_t length;              // of a row, in features
  int64_t ahead_row, ahead_k;  // how far on in the weight the piece lies that comes next: to be fetched by then
  static int64_t elements(int64_t features) { return features / T::STEP * T::B_STEP; }
  typename T::B* row(int r) const { return data + r / TILE_N * TILE_N * elements(length) + r % TILE_N * T::B_STEP; }
};

template <int N>
using Count = std::integral_constant<int, N>;

template <class T, int M>
inline void tile(const typename T::A* a, int64_t lda, const typename T::B* b, int64_t k, typename T::Sum* sums,
                 int64_t lds) {
  typename T::Acc acc[M][TILE_N] = {};
  for (int64_t i = 0; i < k; i += T::STEP, b += Unpacked<T>::NEXT)
    for (int n = 0; n < TILE_N; n++) {
      const auto weights = T::load_b(b + n * T::B_STEP);
      for (int m = 0; m < M; m++) acc[m][n] = T::dot(acc[m][n], T::load_a(a + m * lda + i), weights);
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
  constexpr int FULL = T::TILE_M;
  int64_t m = 0;
  const auto rest = [&](auto count) {
    tiles<T, decltype(count)::value>(a + m * lda, lda, weight, sums + m * lds, lds, rows);
  };
  for (; m + FULL <= tokens; m += FULL) {
    if (tokens >= FETCH_TOKENS) tiles_fetching<T, FULL>(a + m * lda, lda, weight, sums + m * lds, lds, rows);
    else rest(Count<FULL>());
  }
  switch (tokens - m) {
    case 1: return rest(Count<1>());
    case 2: return rest(Count<FULL == 2 ? 1 : 2>());
#if QG_AVX512
    case 3: return rest(Count<3>());
    case 4: return rest(Count<FULL == 4 ? 1 : 4>());
    case 5: return rest(Count<FULL == 4 ? 1 : 5>());
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
  const int64_t chunk = (few ? CHUNK_BYTES_FEW : CHUNK_BYTES_MANY) / sizeof(typename T::A);
  const int64_t blocks = (n + rows_max - 1) / rows_max, panels = (m + PANEL_TOKENS - 1) / PANEL_TOKENS;
  const int64_t panel = (m + panels - 1) / panels;
  int failed = 0;
#pragma omp parallel for schedule(dynamic) if (m * n * k > PARALLEL_WORK)
  for (int64_t task = 0; task < blocks * panels; task++) {
    const int64_t m0 = task / blocks * panel, tokens = std::min(panel, m - m0);
    const int64_t row = task % blocks * rows_max;
    const int rows = int(std::min<int64_t>(rows_max, n - row)), tiled = int(round_up(rows, TILE_N));
    auto* data = (typename T::B*)scratch<0>(sizeof(typename T::B) * Unpacked<T>::elements(chunk) * rows_max);
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
      if (tiled > rows)
        memset(weight.row(tiled - TILE_N), 0, sizeof(typename T::B) * TILE_N * Unpacked<T>::elements(weight.length));
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
