// W4A4-SVD and W4A8-SVD with two-level scales: int4 weights become int8 on their way to an integer product.
//
// A group's integer 1..16 times a code less the group's zero point is an int8, and there are only 16 codes: one shuffle
// looks all of a vector up, for every group in its own table. Sums are exact; the float scales, the branch and the bias come at the end.
#pragma once
#include "activations.h"

namespace qg {

// What a group makes of every code, as two's complement counts them, by the byte that holds the integer - 1 and above it
// the zero point + 8. A byte whose products are no int8 is in no layer.
struct Products {
  alignas(16) int8_t of[256][16];
  constexpr Products() : of() {
    for (int byte = 0; byte < 256; byte++)
      for (int code = 0; code < 16; code++)
        of[byte][code] = int8_t((byte % 16 + 1) * ((code < 8 ? code : code - 16) - (byte / 16 - 8)));
  }
};
constexpr Products PRODUCTS;
constexpr uint8_t ZERO_POINT = 0xF0, NO_GROUP = 0x80;  // the integer 1, the zero point 0

struct Svdq {
  const uint8_t* qweight;      // (N, padded / 2)
  const uint8_t* group_scale;  // (N, padded / group_size)
  int64_t padded, group_size;
  IntegerSums integer_sums;
  Output out;

  using Block = IntegerBlock;
  const char* stored(int64_t row, int64_t start) const { return (const char*)qweight + (row * padded + start) / 2; }
  size_t scratch_bytes() const { return out.scratch_bytes(); }

  void unpack(int64_t row, int rows, int64_t start, const Unpacked<Grouped>& to, Block& block) const {
    const int64_t inside = std::max<int64_t>(0, std::min(to.length, padded - start)) / 2;  // bytes
    const int shift = __builtin_ctzll(group_size);
    const int64_t groups = padded >> shift, ahead = (to.ahead_row * padded + to.ahead_k) / 2;
    for (int r = 0; r < rows; r++) {
      const uint8_t* packed = qweight + ((row + r) * padded + start) / 2;
      const uint8_t* bytes_of_groups = group_scale + (row + r) * groups;
      for (int64_t i = 0; i < inside; i += 64) prefetch(packed + ahead + i);
      Grouped::B* at = to.row(r);
      Sums sum = {};
      for (int64_t i = 0; i < to.length / 2; i += BYTES)
        at = put(weights_of(bytes_of_groups, shift, start + 2 * i, load_bytes(packed + i, inside - i)), at, sum);
      block.row_sums[r] += total(sum);
    }
  }

  // Looks codes up in the tables of their groups, by those bits of their byte; the vectors begin at `feature`.
  void look_up(const uint8_t* groups, uint8_t bits, int shift, int64_t feature, I packed, I& even, I& odd) const {
    const I nibble = set_bytes(15), low = and_i(packed, nibble), high = and_i(shift_right_16(packed, 4), nibble);
    const void* tables[BYTES / 16];
    const auto table_of = [&](int64_t at) { return PRODUCTS.of[(at < padded ? groups[at >> shift] : NO_GROUP) & bits]; };
    I table;
    if (shift >= 6) {  // the usual case: every 64 features are of one group
      table = load_halves(table_of(feature), table_of(feature + 64));
    } else {
      for (int lane = 0; lane < BYTES / 16; lane++) tables[lane] = table_of(feature + 32 * lane);
      table = load_lanes(tables);
    }
    even = shuffle_bytes(table, low), odd = shuffle_bytes(table, high);
    if (shift < 5) {  // two groups of 16 features in each lane of 16 bytes
      for (int lane = 0; lane < BYTES / 16; lane++) tables[lane] = table_of(feature + 32 * lane + 16);
      const I second = load_lanes(tables), first_half = repeat_lane(_mm_set_epi64x(0, -1));
      const I second_half = repeat_lane(_mm_set_epi64x(-1, 0));
      even = xor_i(and_i(even, first_half), and_i(shuffle_bytes(second, low), second_half));
      odd = xor_i(and_i(odd, first_half), and_i(shuffle_bytes(second, high), second_half));
    }
  }

  // Codes less their zero points times their integers; or, where that has to wait, beside the integers of their groups.
#if QG_VNNI
  struct Weights {
    I even, odd;
  };
  Weights weights_of(const uint8_t* groups, int shift, int64_t feature, I packed) const {
    Weights out;
    look_up(groups, 0xFF, shift, feature, packed, out.even, out.odd);
    return out;
  }
  static Grouped::B* put(const Weights& weights, Grouped::B* at, Sums& sum) {
    return put_int8(put_int8(at, weights.even, sum), weights.odd, sum);
  }
  static Sums dot(Sums acc, I even, I odd, const Weights& weights) {
    return dot_bytes(dot_bytes(acc, even, weights.even), odd, weights.odd);
  }
#else
  using Weights = Grouped::Weights;
  Weights weights_of(const uint8_t* groups, int shift, int64_t feature, I packed) const {
    Weights out;
    look_up(groups, ZERO_POINT, shift, feature, packed, out.even, out.odd);
    const auto integer_of = [&](int64_t at) {
      return int16_t((at < padded ? groups[at >> shift] : NO_GROUP) % 16 + 1);
    };
    if (shift >= 6) {
      out.integers = join_halves(set_words(integer_of(feature)), set_words(integer_of(feature + 64)));
    } else {
      alignas(64) int16_t each[BYTES / 2];  // of four features
      for (int i = 0; i < BYTES / 2; i += 4)  // the smallest group has 16
        std::fill_n(each + i, 4, integer_of(feature + 4 * i));
      out.integers = load_i(each);
    }
    return out;
  }
  static Grouped::B* put(const Weights& weights, Grouped::B* at, Sums& sum) {
    store_i(at, weights.even);
    store_i(at + BYTES, weights.odd);
    store_i(at + 2 * BYTES, weights.integers);
    sum = dot(sum, set_bytes(1), set_bytes(1), weights);
    return at + Unpacked<Grouped>::NEXT;
  }
  static Sums dot(Sums acc, I even, I odd, const Weights& weights) { return Grouped::dot(acc, {even, odd}, weights); }
#endif

  void finish(int64_t m0, int64_t tokens, int64_t row, int rows, const int32_t* sums, int64_t ld, Block& block) const {
    integer_sums.write(out, m0, tokens, row, rows, sums, ld, block);
  }
};

// x (M, K) -> codes (M, wide) as `Grouped` wants them, act_scale (M,), lora (M, rank).
struct Activations {
  Rows x;
  const float* smooth_factor;
  int64_t padded, group_size;
  bool rotate;
  int bits;
  bool act_zero_point;

  static int64_t wide(int64_t padded) { return round_up(padded, 2 * BYTES); }

  // One of planes (M, wide) and codes (M, padded) is null.
  int quantize(uint8_t* planes, int8_t* codes, float* act_scale) const {
    const int64_t width = wide(padded);
    return each_token(x.m, width, [=](int64_t t, float* row, int8_t* bytes) {
      prepare_token(x, t, smooth_factor, padded, rotate, group_size, row);
      act_scale[t] = quantize_token(row, padded, group_size, bits, act_zero_point, bytes);
      if (codes) memcpy(codes + t * padded, bytes, padded);
      if (!planes) return;
      std::fill(bytes + padded, bytes + width, int8_t(0));
      to_planes(bytes, width, planes + t * width);
    });
  }
};

}  // namespace qg
