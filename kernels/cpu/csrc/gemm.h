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
#include <type_traits>
#include "memory.h"
#include "types.h"
#include "wide.h"

namespace qg {

// What is unpacked at a time: rows, and bytes of each. For a few tokens all of it fits the first-level cache; for many,
// a tile's rows do, and all of it the second-level cache.
constexpr int ROWS_FEW = 16;
constexpr int64_t CHUNK_BYTES_FEW = 1024, CHUNK_BYTES_MANY = 4096;
// Tokens of a panel: their sums with ROWS_MANY rows stay in the second-level cache, or beside it.
constexpr int64_t PANEL_TOKENS = 516, PANEL_TOKENS_WIDE = 1056;
// From here on a panel's activations have left the cache when the next rows of the weight come.
constexpr int64_t FETCH_TOKENS = 300;
// Fewer multiplications than this are not worth waking a thread for.
constexpr int64_t PARALLEL_WORK = 1 << 18;

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
//   stored(row, k)              where the weight is, from which `unpack` of that row and feature reads
//   finish(m, tokens, row, rows, sums, ld, block)
//                               sums -> outputs
// Returns 0, or 1 when there is no memory.
template <class T, class Layer>
int gemm(const typename T::A* a, int64_t lda, int64_t m, int64_t n, int64_t k, const Layer& layer) {
  const bool few = m <= T::FEW;
  const int rows_max = few ? ROWS_FEW : ROWS_MANY;
  const bool wide = T::WIDE && m >= WIDE_TOKENS;
  const int64_t bytes = few ? CHUNK_BYTES_FEW : wide ? CHUNK_BYTES_WIDE : CHUNK_BYTES_MANY;
  const int64_t chunk = bytes / sizeof(typename T::A), most = wide ? PANEL_TOKENS_WIDE : PANEL_TOKENS;
  const int64_t least = (m + most - 1) / most;
  const int64_t panel = round_up((m + least - 1) / least, LANES), panels = (m + panel - 1) / panel;
  const int64_t blocks = (n + rows_max - 1) / rows_max;
  const Memory<typename T::A> turned(wide ? panels * panel * k : 0);
  if (!turned.data) return 1;
  if (wide) turn_panels<T>(a, lda, m, k, panel, turned.data);
  int failed = 0;
#pragma omp parallel for schedule(dynamic) if (m * n * k > PARALLEL_WORK)
  for (int64_t task = 0; task < blocks * panels; task++) {
    const int64_t m0 = task / blocks * panel, tokens = std::min(panel, m - m0);
    const int64_t row = task % blocks * rows_max;
    const int rows = int(std::min<int64_t>(rows_max, n - row)), tiled = int(round_up(rows, wide ? WIDE_ROWS : TILE_N));
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
      const int64_t next_row = last ? row + rows_max : row, next = last ? 0 : start + chunk;
      const Unpacked<T> weight{data, std::min(chunk, k - start), wide ? 0 : next_row - row, wide ? 0 : next - start};
      for (int r = rows / TILE_N * TILE_N; r < tiled; r += TILE_N)
        memset(weight.row(r), 0, sizeof(typename T::B) * TILE_N * Unpacked<T>::elements(weight.length));
      layer.unpack(row, rows, start, weight, block);
      const int64_t done = wide ? turned_of(tokens) : 0;
      if constexpr (T::WIDE)
        if (done) {
          const char* const at = layer.stored(next_row, next);
          Fetch fetch(at, layer.stored(next_row, next + weight.length) - at, layer.stored(next_row + 1, next) - at);
          wide_panel<T>(turned.data + m0 * k, k, start, weight, fetch, sums, rows_max, tiled, done);
        }
      tiles_of_panel<T>(a + (m0 + done) * lda + start, lda, weight, sums + done * rows_max, rows_max, tiled,
                        tokens - done);
    }
    layer.finish(m0, tokens, row, rows, sums, rows_max, block);
  }
  return failed;
}

}  // namespace qg
