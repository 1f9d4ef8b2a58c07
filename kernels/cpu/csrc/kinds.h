// What is multiplied: kinds of product, and how a piece of the weight lies once it is unpacked.
#pragma once
#include "memory.h"
#include "simd.h"

namespace qg {

// Kinds of product. A and B are the types of elements of A and of the unpacked weight, Sum that of sums. A step is STEP
// features: one load_a and one load_b, B_STEP elements long, and a dot. TILE_M tokens fill the registers. For up to FEW
// tokens a small piece of the weight is unpacked at a time. WIDE: `wide.h` serves it too; KEPT: and the tokens of a
// product there can stay in registers, beside the sums and a weight.
struct Float32 {
  using A = float;
  using B = float;
  using Sum = float;
  static constexpr bool WIDE = true, KEPT = !QG_AVX512;
  using Acc = F;
  static constexpr int STEP = LANES, B_STEP = STEP, TILE_M = QG_AVX512 ? 6 : 3, FEW = 16;
  static F load_a(const float* p) { return load_f(p); }
  static F load_b(const float* p) { return load_f(p); }
  static F everywhere(const float* p) { return set_f(*p); }
  static Acc dot(Acc acc, F a, F b) { return fma(a, b, acc); }
};

#if QG_BF16
struct Bfloat16 {
  using A = bf16;
  using B = bf16;
  using Sum = float;
  static constexpr bool WIDE = true, KEPT = false;
  using Acc = F;
  static constexpr int STEP = 2 * LANES, B_STEP = STEP, TILE_M = 6, FEW = 26;
  static I load_a(const bf16* p) { return load_i(p); }
  static I load_b(const bf16* p) { return load_i(p); }
  static I everywhere(const bf16* p) { return set_words_32(p); }
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
  static constexpr bool WIDE = true, KEPT = !QG_AVX512;
  using Acc = Sums;
  static constexpr int STEP = BYTES, B_STEP = STEP, TILE_M = QG_AVX512 ? 6 : 3, FEW = 16, OFFSET = 128;
  static I load_a(const void* p) { return load_i(p); }
  static I load_b(const void* p) { return load_i(p); }
  static I everywhere(const void* p) { return set_words_32(p); }
  static Acc dot(Acc acc, I a, I b) { return dot_bytes(acc, a, b); }
};
using Grouped = Integer;  // int4 with integers per group multiplies as int8
#else
// The same in 16 bits: the 8-bit instruction adds two products in 16 bits, and 2 * 255 * 127 does not fit there.
struct Integer {
  using A = int16_t;
  using B = int16_t;
  using Sum = int32_t;
  static constexpr bool WIDE = true, KEPT = false;
  using Acc = Sums;
  static constexpr int STEP = BYTES / 2, B_STEP = STEP, TILE_M = QG_AVX512 ? 6 : 3, FEW = 16, OFFSET = 0;
  static I load_a(const void* p) { return load_i(p); }
  static I load_b(const void* p) { return load_i(p); }
  static I everywhere(const void* p) { return set_words_32(p); }
  static Acc dot(Acc acc, I a, I b) { return acc + madd_16(a, b); }
};

// int4 codes with an integer 1..16 per group. 4 * 255 * 15 (a code less its zero point) fits into 16 bits, so here the 8-bit instruction is exact,
// and the integers multiply its sums. A step of the weight is the codes of even features, of odd ones, and the integer
// of every four features.
struct Grouped {
  using A = uint8_t;
  using B = int8_t;
  using Sum = int32_t;
  static constexpr bool WIDE = false;
  using Acc = Sums;
  static constexpr int STEP = 2 * BYTES, B_STEP = 3 * BYTES, TILE_M = QG_AVX512 ? 4 : 2, FEW = 16, OFFSET = 128;
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

}  // namespace qg
