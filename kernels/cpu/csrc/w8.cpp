// Apart from kernels.cpp to be compiled beside it: these take as long as the rest.
#include "face.h"
#include "few_floats.h"
#include "w8_few.h"

// The product with float activations of any type, as T multiplies them.
template <class T, class Layer>
static int with_floats(const Rows& x, int64_t n, const Layer& layer) {
  const Whole<T> act(x);
  return act.data ? gemm<T>(act.data, act.k, x.m, n, act.k, layer) : 1;
}

#if !QG_AVX512
template <class Weight>
static int with_few_floats(const Rows& x, const Weight& weight) {
  const Whole<Float32> act(x, FEW_UNIT);
  return act.data ? few_floats(weight, act.data, x.m) : 1;
}
#endif

// W8A32 and W8A16. bfloat16 is multiplied as it is where the machine can.
QG_EXPORT int32_t qg_w8(const void* x, int32_t x_type, const int8_t* qweight, const float* scale, const void* bias,
                        int32_t bias_type, void* y, int32_t type, int64_t m, int64_t n, int64_t k) {
  const Rows tokens{x, Type(x_type), m, k};
  const Output out{y, Type(type), n, bias, Type(bias_type)};
#if QG_BF16
  if (x_type == BFLOAT16) {
    const W8<Bfloat16> layer{qweight, scale, k, out};
    return m <= STRIP_TOKENS ? w8_few(W8Few{layer}, tokens) : with_floats<Bfloat16>(tokens, n, layer);
  }
#endif
  const W8<Float32> layer{qweight, scale, k, out};
#if !QG_AVX512
  if (m <= FLOAT_TOKENS) return with_few_floats(tokens, W8Floats{layer});
#endif
  return with_floats<Float32>(tokens, n, layer);
}

// Groups are whole multiples of 32 features; the last one may be short.
QG_EXPORT int32_t qg_w8_group(const void* x, int32_t x_type, const int8_t* qweight, const float* scale,
                              const int8_t* zero_point, const void* bias, int32_t bias_type, void* y, int32_t type,
                              int64_t m, int64_t n, int64_t k, int64_t group_size) {
  const Rows tokens{x, Type(x_type), m, k};
  const Output out{y, Type(type), n, bias, Type(bias_type)};
  const int64_t groups = (k + group_size - 1) / group_size;
#if QG_BF16
  if (x_type == BFLOAT16) {
    const W8Group<Bfloat16> layer{qweight, scale, zero_point, k, group_size, groups, out};
    // A few more tokens than a vector would leave most of the second one empty: three tiles of `gemm.h` hold them.
    const bool tiled = m > LANES && m <= 3 * Bfloat16::TILE_M;
    if (tiled || m > STRIP_TOKENS) return with_floats<Bfloat16>(tokens, n, layer);
    return zero_point ? w8_few(W8GroupFew<true>{layer}, tokens) : w8_few(W8GroupFew<false>{layer}, tokens);
  }
#endif
  const W8Group<Float32> layer{qweight, scale, zero_point, k, group_size, groups, out};
#if !QG_AVX512
  if (m <= FLOAT_TOKENS)
    return zero_point ? with_few_floats(tokens, W8GroupFloats<true>{layer})
                      : with_few_floats(tokens, W8GroupFloats<false>{layer});
#endif
  return with_floats<Float32>(tokens, n, layer);
}
