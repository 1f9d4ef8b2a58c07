// The product for a few tokens: weights go from memory to the multipliers.
//
// The product of `gemm.h` unpacks a piece of the weight into the cache and reads it from there. For so few tokens that
// takes longer than the products. Here 32 or 64 weights of a row go to registers and are used; for more tokens
// than a tile has they are unpacked again. On a machine that multiplies bfloat16 tiles are those of `Few`, with AVX2
// those of `few_floats.h` and `few_ints.h`.
#pragma once
#include "activations.h"

namespace qg {

// Features that have one scale at least.
constexpr int64_t FEW_UNIT = 32;
// A tile of the product has so many rows; a task, whole tiles.
constexpr int FEW_TILE_ROWS = 4, FEW_ROWS = 2 * LANES;

// Scales, and with ZERO zero points, of some rows as floats, and which of them are a step's, of UNITS units.
template <bool ZERO, int UNITS>
struct FewSteps {
  int64_t groups, units, group = 0, unit = 0;
  const float *scales, *zeros;  // (rows, groups)
  int64_t of[UNITS] = {};       // the groups of a step

  static int64_t floats(int64_t groups, int rows) { return (ZERO ? 2 : 1) * rows * groups; }

  FewSteps(const Rows& all, const int8_t* zero_point, int64_t group_size, int64_t row, int count, int rows,
           float* scratch)
      : groups(all.k), units(group_size / FEW_UNIT), scales(scratch), zeros(scratch + rows * groups) {
    for (int r = 0; r < rows; r++) {
      const int64_t from = (row + std::min(r, count - 1)) * groups, to = r * groups;
      // The rows that come next: too few bytes for the processor to fetch by itself.
      const int64_t next = from + rows * groups, line = 64 / size_of(all.type);
      for (int64_t i = 0; i < groups; i += line) prefetch_far((const char*)all.data + (next + i) * size_of(all.type));
      for (int64_t i = 0; ZERO && i < groups; i += 64) prefetch_far(zero_point + next + i);
      to_floats(all, from, groups, scratch + to);
      if (ZERO) std::copy_n(zero_point + from, groups, scratch + rows * groups + to);
    }
  }

  // Inline, or a caller's sums would leave the registers.
  __attribute__((always_inline)) void next() {
    for (int64_t& at : of) {
      at = std::min(group, groups - 1);  // a row may end in half a step
      if (++unit == units) unit = 0, group++;
    }
  }
  F scale(int r, int half) const { return set_f(scales[r * groups + of[half]]); }
  F zero(int r, int half) const { return set_f(zeros[r * groups + of[half]]); }
};

// A weight is what this asks of it:
//   layer                       whose `out`, `scratch_bytes` and `finish` are those of `gemm.h`
//   STEP_BYTES, data, bytes     of a step; where the rows are, and the bytes of each
//   length()                    features of a row in whole steps, as activations have them
//   floats(rows)                of scratch that Steps takes
//   Steps(weight, row, count, rows, scratch)
//                               what differs from group to group, for so many rows of which `count` are there;
//                               next() goes on to the next step
//   unpack(at, steps, r, to)    one step of row r -> vectors
// act (tokens, length()), in the order in which weights are unpacked. tiles(many, x, rows, steps, sums, block, r)
// multiplies so many of them with a tile's rows, which are r and following of the block. Returns 0, or 1 when there is
// no memory.
template <class Sum, int ROWS = FEW_TILE_ROWS, int TASK_ROWS = FEW_ROWS, class Weight, class A, class Tiles>
int few_tasks(const Weight& weight, const A* act, int64_t tokens, int64_t tile_tokens, const Tiles& tiles) {
  const auto& layer = weight.layer;
  const int64_t n = layer.out.n, length = weight.length(), blocks = (n + TASK_ROWS - 1) / TASK_ROWS;
  const int64_t parts = (tokens + tile_tokens - 1) / tile_tokens;
  int failed = 0;
#pragma omp parallel for schedule(dynamic) if (tokens * n * length > PARALLEL_WORK)
  for (int64_t task = 0; task < blocks; task++) {
    auto* sums = (Sum*)scratch<0>(sizeof(Sum) * tokens * TASK_ROWS);
    auto* floats = (float*)scratch<1>(sizeof(float) * (weight.floats(ROWS) + 1));
    auto* extra = (float*)scratch<2>(layer.scratch_bytes());
    if (!sums || !floats || (!extra && layer.scratch_bytes())) {
#pragma omp atomic write
      failed = 1;
      continue;
    }
    const int64_t row = task * TASK_ROWS;
    const int rows = int(std::min<int64_t>(TASK_ROWS, n - row));
    typename std::decay_t<decltype(layer)>::Block block{extra};
    for (int r = 0; r < rows; r += ROWS) {
      const int count = std::min(ROWS, rows - r);
      const uint8_t* at[ROWS];
      for (int i = 0; i < ROWS; i++) at[i] = weight.data + (row + r + std::min(i, count - 1)) * weight.bytes;
      const typename Weight::Steps steps(weight, row + r, count, ROWS, floats);
      for (int64_t part = 0; part < parts; part++) {
        const int64_t m = tokens * part / parts;
        tiles(tokens * (part + 1) / parts - m, act + m * length, at, steps, sums + m * TASK_ROWS + r, block, r);
      }
    }
    layer.finish(0, tokens, row, rows, sums, TASK_ROWS, block);
  }
  return failed;
}

// Ends rows with `left` bytes: what follows is another row, or not ours to read. They go on in `rest`, with zeros.
template <int64_t STEP_BYTES>
inline void rest_of_rows(const uint8_t** at, int64_t left, uint8_t (&rest)[FEW_TILE_ROWS][STEP_BYTES]) {
  memset(rest, 0, sizeof rest);
  for (int r = 0; r < FEW_TILE_ROWS; r++) memcpy(rest[r], at[r], size_t(left)), at[r] = rest[r];
}

#if QG_BF16

// Features of a step: two vectors of weights, each of one group.
constexpr int64_t FEW_STEP = 2 * FEW_UNIT;
// Tokens of a tile: its sums and its weights fill the registers. More would not fit the first-level cache.
constexpr int FEW_TILE_TOKENS = 5;

template <class Weight>
struct Few {
  const Weight& weight;
  const bf16* act;
  int64_t tokens;
  using Steps = typename Weight::Steps;

  // Sums (M, FEW_ROWS) of the rows of a tile with M tokens.
  template <int M>
  void tile(const bf16* x, const uint8_t* const* rows, Steps steps, float* sums) const {
    constexpr int R = FEW_TILE_ROWS;
    const int64_t length = weight.length();
    const uint8_t* at[R];
    for (int r = 0; r < R; r++) at[r] = rows[r];
    uint8_t rest[R][Weight::STEP_BYTES];
    F acc[R][M] = {};
    for (int64_t i = 0, left = weight.bytes; i < length; i += FEW_STEP, left -= Weight::STEP_BYTES) {
      if (left < Weight::STEP_BYTES) rest_of_rows(at, left, rest);
      steps.next();
      I w[R][2];
      for (int r = 0; r < R; r++) {
        prefetch(at[r] + FEW_TILE_ROWS * weight.bytes);
        Weight::unpack(at[r], steps, r, w[r]);
        at[r] += Weight::STEP_BYTES;
      }
#pragma GCC unroll 5  // whole, or the sums would lie in memory; likewise below
      for (int m = 0; m < M; m++) {
        const I a = load_i(x + m * length + i), b = load_i(x + m * length + i + FEW_UNIT);
        for (int r = 0; r < R; r++) acc[r][m] = dot_bf16(dot_bf16(acc[r][m], a, w[r][0]), b, w[r][1]);
      }
    }
#pragma GCC unroll 5
    for (int m = 0; m < M; m++)
      _mm_storeu_ps(sums + m * FEW_ROWS, sum_of_4(acc[0][m], acc[1][m], acc[2][m], acc[3][m]));
  }

  void tiles(int64_t many, const bf16* x, const uint8_t* const* rows, const Steps& steps, float* sums) const {
    switch (many) {
      case 1: return tile<1>(x, rows, steps, sums);
      case 2: return tile<2>(x, rows, steps, sums);
      case 3: return tile<3>(x, rows, steps, sums);
      case 4: return tile<4>(x, rows, steps, sums);
      case 5: return tile<5>(x, rows, steps, sums);
    }
  }

  int run() const {
    return few_tasks<float>(weight, act, tokens, FEW_TILE_TOKENS,
                            [&](int64_t many, const bf16* x, const uint8_t* const* rows, const Steps& steps,
                                float* sums, auto&, int) { tiles(many, x, rows, steps, sums); });
  }
};

#endif

}  // namespace qg
