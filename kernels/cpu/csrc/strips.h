// The product for some tokens, on a machine that multiplies bfloat16: too many for the tiles of `few.h`, and no more
// than fit the registers together with a strip of rows.
//
// Tokens are turned, as for `wide.h`: a vector holds two features of LANES tokens. A strip of rows goes through all of
// K with its sums in registers. While one step of it is multiplied the next is unpacked, so that the units which
// convert weights work beside the multipliers, and not before them.
#pragma once
#include "few.h"

#if QG_BF16
namespace qg {

// Rows of a task: whole strips of any height.
constexpr int STRIP_TASK = 48;
// So many tokens are two tiles of `few.h`; a third one would unpack a third time.
constexpr int64_t TILED_TOKENS = 2 * FEW_TILE_TOKENS, STRIP_TOKENS = 4 * LANES;

// Rows of a strip, for so many vectors of tokens. Their sums take half of the registers; unpacking needs the others.
constexpr int strip_rows(int vectors) { return vectors == 1 ? 16 : vectors == 2 ? 8 : vectors == 3 ? 6 : 4; }

// weight: see `Few`, and
//   place(pair)                 where `unpack_pairs` puts a pair of features, in order
//   unpack_pairs(at, steps, r, to)
//                               one step of row r -> two vectors
// turned (length() / 2, V, LANES), of 32 bits.
template <class Weight>
struct Strips {
  const Weight& weight;
  const float* turned;
  int64_t tokens;

  // Sums (tokens, STRIP_TASK) of the rows of a strip.
  template <int V>
  void strip(const uint8_t* const* at, typename Weight::Steps steps, float* sums) const {
    constexpr int R = strip_rows(V), PARTS = 4;
    const int64_t length = weight.length();
    alignas(64) bf16 unpacked[2][R][FEW_STEP];
    const float* x = turned;
    F acc[R][V] = {};
    const auto unpack = [&](int64_t step, int part) {
      const int64_t from = step * Weight::STEP_BYTES, left = weight.bytes - from;
      for (int r = R * part / PARTS; r < R * (part + 1) / PARTS; r++) {
        const uint8_t* codes = at[r] + from;
        uint8_t rest[Weight::STEP_BYTES];
        if (left < Weight::STEP_BYTES) {
          memset(rest, 0, sizeof rest);
          codes = (const uint8_t*)memcpy(rest, codes, size_t(left));
        }
        prefetch_far(at[r] + from + R * weight.bytes);
        I w[2];
        Weight::unpack_pairs(codes, steps, r, w);
        store_i(unpacked[step % 2][r], w[0]), store_i(unpacked[step % 2][r] + FEW_UNIT, w[1]);
      }
    };
    steps.next();
    for (int part = 0; part < PARTS; part++) unpack(0, part);
    for (int64_t step = 0, count = length / FEW_STEP; step < count; step++) {
      steps.next();
      for (int part = 0; part < PARTS; part++) {
        if (step + 1 < count) unpack(step + 1, part);
#pragma GCC unroll 16
        for (int i = 0; i < FEW_STEP / 2 / PARTS; i++, x += V * LANES) {
          const bf16* const rows = unpacked[step % 2][0] + Weight::place(part * (FEW_STEP / 2 / PARTS) + i);
          I a[V];
          for (int v = 0; v < V; v++) a[v] = load_i(x + v * LANES);
#pragma GCC unroll 16
          for (int r = 0; r < R; r++) {
            const I w = set_words_32(rows + r * FEW_STEP);
            for (int v = 0; v < V; v++) acc[r][v] = dot_bf16(acc[r][v], a[v], w);
          }
        }
      }
    }
    alignas(64) float out[R][V * LANES];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) store_f(out[r] + v * LANES, acc[r][v]);
    for (int64_t t = 0; t < tokens; t++)
      for (int r = 0; r < R; r++) sums[t * STRIP_TASK + r] = out[r][t];
  }

  template <int V>
  int run() const {
    return few_tasks<float, strip_rows(V), STRIP_TASK>(
        weight, turned, tokens, tokens,
        [&](int64_t, const float*, const uint8_t* const* rows, const typename Weight::Steps& steps, float* sums, auto&,
            int) { strip<V>(rows, steps, sums); });
  }
};

// Features that are turned by one thread at a time.
constexpr int64_t TURN_FEATURES = 512;

template <class Weight, int V>
int strips(const Weight& weight, const bf16* act, int64_t tokens) {
  const int64_t length = weight.length();
  const Memory<float> turned(length / 2 * V * LANES);
  if (!turned.data) return 1;
#pragma omp parallel for if (tokens * length > TURN_WORK)
  for (int64_t i = 0; i < length; i += TURN_FEATURES) {
    const int64_t words = std::min(TURN_FEATURES, length - i) / 2;
    turn_tokens((const char*)(act + i), length * sizeof(bf16), tokens, words, V, turned.data + i / 2 * V * LANES);
  }
  return Strips<Weight>{weight, turned.data, tokens}.template run<V>();
}

// For up to STRIP_TOKENS. act (tokens, length()), in the order in which weights are unpacked.
template <class Weight>
int few_or_strips(const Weight& weight, const bf16* act, int64_t tokens) {
  if (tokens <= TILED_TOKENS) return Few<Weight>{weight, act, tokens}.run();
  if (tokens <= LANES) return strips<Weight, 1>(weight, act, tokens);
  if (tokens <= 2 * LANES) return strips<Weight, 2>(weight, act, tokens);
  if (tokens <= 3 * LANES) return strips<Weight, 3>(weight, act, tokens);
  return strips<Weight, 4>(weight, act, tokens);
}

}  // namespace qg
#endif
