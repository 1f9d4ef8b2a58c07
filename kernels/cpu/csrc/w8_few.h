// int8 weights for a few tokens: see `few.h`. Activations stay in the order of features.
#pragma once
#include "few.h"
#include "w8_group.h"

#if QG_BF16
namespace qg {

// W8A16: codes are exact in bfloat16, and the scale comes last.
struct W8Few {
  static constexpr int64_t STEP_BYTES = FEW_STEP;
  const W8<Bfloat16>& layer;
  const uint8_t* data = (const uint8_t*)layer.qweight;
  int64_t bytes = layer.k;

  int64_t length() const { return round_up(layer.k, FEW_STEP); }
  int64_t floats() const { return 0; }

  struct Steps {
    Steps(const W8Few&, int64_t, int, float*) {}
    void next() {}
  };

  static void unpack(const uint8_t* at, const Steps&, int, I* to) {
    for (int half = 0; half < 2; half++) {
      const int8_t* codes = (const int8_t*)at + half * FEW_UNIT;
      to[half] = pack_bf16(float_of_int8(codes), float_of_int8(codes + LANES));
    }
  }
};

template <bool ZERO>
struct W8GroupFew {
  static constexpr int64_t STEP_BYTES = FEW_STEP;
  const W8Group<Bfloat16>& layer;
  const uint8_t* data = (const uint8_t*)layer.qweight;
  int64_t bytes = layer.k;

  int64_t length() const { return round_up(layer.k, FEW_STEP); }
  int64_t floats() const { return FewSteps<ZERO>::floats(layer.groups); }

  struct Steps : FewSteps<ZERO> {
    Steps(const W8GroupFew& w, int64_t row, int count, float* scratch)
        : FewSteps<ZERO>({w.layer.scale, FLOAT32, w.layer.out.n, w.layer.groups}, w.layer.zero_point,
                         w.layer.group_size, row, count, scratch) {}
  };

  static void unpack(const uint8_t* at, const Steps& steps, int r, I* to) {
    for (int half = 0; half < 2; half++) {
      const int8_t* codes = (const int8_t*)at + half * FEW_UNIT;
      const F step = steps.scale(r, half), zero = ZERO ? steps.zero(r, half) : zero_f();
      using Values = W8Group<Bfloat16>;
      to[half] = pack_bf16(Values::value<ZERO>(codes, zero, step), Values::value<ZERO>(codes + LANES, zero, step));
    }
  }
};

// x is bfloat16.
template <class Weight>
int w8_few(const Weight& weight, const Rows& x) {
  const Whole<Bfloat16> act(x, FEW_STEP);
  return act.data ? Few<Weight>{weight, act.data, x.m}.run() : 1;
}

}  // namespace qg
#endif
