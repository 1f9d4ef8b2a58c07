#include "bitnet.h"
#include "face.h"
#include "few_floats.h"
#include "few_ints.h"
#include "strips.h"
#include "svdq.h"
#include "w4a16.h"
#include "w8a8.h"

// What the machine can do, as bits: 1 AVX-512, 2 eight-bit dot products, 4 bfloat16 ones.
QG_EXPORT int32_t qg_features() { return QG_AVX512 | QG_VNNI << 1 | QG_BF16 << 2; }

// rotation: features of a group that is rotated, or 0; k features are padded to whole groups, `padded` in all.
QG_EXPORT int32_t qg_w8a8(const void* x, int32_t x_type, const float* smooth_factor, const int8_t* qweight,
                          const float* scale, const int8_t* zero_point, const float* act_scale, int32_t act_zero_point,
                          const void* bias, int32_t bias_type, void* y, int32_t type, int64_t m, int64_t n, int64_t k,
                          int64_t padded, int64_t rotation) {
  const int64_t wide = round_up(padded, BYTES);
  const Memory<Integer::A> codes(m * wide);
  const Memory<float> steps(m);
  const Memory<int32_t> sums(m);
  if (!codes.data || !steps.data || !sums.data) return 1;
  const RawTokens tokens{{x, Type(x_type), m, k}, smooth_factor, padded, rotation};
  if (quantize_w8a8(tokens, wide, act_scale, act_zero_point, codes.data, steps.data, sums.data)) return 1;
  const Output out{y, Type(type), n, bias, Type(bias_type)};
  const IntegerSums ends{scale, steps.data, Integer::OFFSET + act_zero_point, zero_point, sums.data};
  const W8A8 layer{qweight, padded, ends, out};
#if !QG_AVX512
  if (m <= INT_TOKENS) return few_ints(W8A8Ints{layer}, codes.data, m);
#endif
  return gemm<Integer>(codes.data, wide, m, n, wide, layer);
}

QG_EXPORT int32_t qg_bitnet(const void* x, int32_t x_type, const uint8_t* qweight, const float* scale, const void* bias,
                            int32_t bias_type, void* y, int32_t type, int64_t m, int64_t n, int64_t k) {
  const int64_t wide = round_up(k, QUAD);
  const Memory<Integer::A> codes(m * wide);
  const Memory<float> steps(m);
  if (!codes.data || !steps.data || quantize_bitnet({x, Type(x_type), m, k}, wide, codes.data, steps.data)) return 1;
  const Output out{y, Type(type), n, bias, Type(bias_type)};
  const IntegerSums ends{scale, steps.data, Integer::OFFSET};
  return gemm<Integer>(codes.data, wide, m, n, wide, BitNet{qweight, (k + 3) / 4, ends, out});
}

// W4A16, and with act_bits 4 or 8 the layers with an SVD branch whose scales are floats per group. Groups are whole
// units.
QG_EXPORT int32_t qg_w4_float(const void* x, int32_t x_type, const float* smooth_factor, const void* down,
                              int32_t down_type, const uint8_t* qweight, const void* scale, int32_t scale_type,
                              const int8_t* zero_point, const void* up, int32_t up_type, const void* bias,
                              int32_t bias_type, void* y, int32_t type, int64_t m, int64_t n, int64_t k, int64_t padded,
                              int64_t group_size, int32_t rotate, int32_t act_bits, int64_t rank) {
  const Rows tokens{x, Type(x_type), m, k};
  const Memory<float> lora(m * rank);
  if (!lora.data || (rank && project_down(tokens, down, Type(down_type), rank, lora.data))) return 1;
  const Output out{y, Type(type), n, bias, Type(bias_type), lora.data, up, Type(up_type), rank};
  const auto run = [&](auto kind) {
    using T = decltype(kind);
    const Memory<typename T::A> act(m * padded);
    const Type rounded = act_bits ? FLOAT32 : out.type;
    if (!act.data) return 1;
    if (prepare_w4a16<T>(tokens, smooth_factor, padded, group_size, rotate, act_bits, rounded, act.data)) return 1;
    const W4A16<T> layer{qweight, scale, Type(scale_type), zero_point, padded, group_size, out};
#if !QG_AVX512
    if (m <= FLOAT_TOKENS)
      return zero_point ? few_floats(W4A16Floats<true>{layer}, act.data, m)
                        : few_floats(W4A16Floats<false>{layer}, act.data, m);
#endif
    return gemm<T>(act.data, padded, m, n, padded, layer);
  };
#if QG_BF16
  if (type == BFLOAT16 && !act_bits) {
    if (m > STRIP_TOKENS) return run(Bfloat16());
    const W4A16<Bfloat16> layer{qweight, scale, Type(scale_type), zero_point, padded, group_size, out};
    return w4a16_few(layer, tokens, smooth_factor, rotate);
  }
#endif
  return run(Float32());
}

QG_EXPORT int32_t qg_svdq_quantize(const void* x, int32_t x_type, const float* smooth_factor, const void* down,
                                   int32_t down_type, int64_t m, int64_t k, int64_t padded, int64_t group_size,
                                   int32_t rotate, int32_t bits, int32_t act_zero_point, int64_t rank, int8_t* codes,
                                   float* act_scale, float* lora) {
  const Activations act{{x, Type(x_type), m, k}, smooth_factor, padded, group_size, rotate != 0, bits, act_zero_point != 0};
  if (rank && project_down(act.x, down, Type(down_type), rank, lora)) return 1;
  return act.quantize(nullptr, codes, act_scale);
}

QG_EXPORT int32_t qg_svdq(const void* x, int32_t x_type, const float* smooth_factor, const void* down,
                          int32_t down_type, const uint8_t* qweight, const float* scale, const uint8_t* group_scale,
                          const void* up, int32_t up_type, const void* bias, int32_t bias_type, void* y, int32_t type,
                          int64_t m, int64_t n, int64_t k, int64_t padded, int64_t group_size, int32_t rotate,
                          int32_t bits, int32_t act_zero_point, int64_t rank) {
  const int64_t wide = Activations::wide(padded);
  const Memory<uint8_t> planes(m * wide);
  const Memory<float> act_scale(m), lora(m * rank);
  if (!planes.data || !act_scale.data || !lora.data) return 1;
  const Activations act{{x, Type(x_type), m, k}, smooth_factor, padded, group_size, rotate != 0, bits, act_zero_point != 0};
  if (rank && project_down(act.x, down, Type(down_type), rank, lora.data)) return 1;
  if (act.quantize(planes.data, nullptr, act_scale.data)) return 1;
  const Output out{y, Type(type), n, bias, Type(bias_type), lora.data, up, Type(up_type), rank};
  const IntegerSums ends{scale, act_scale.data, Grouped::OFFSET};
  const Svdq layer{qweight, group_scale, padded, group_size, ends, out};
#if !QG_AVX512
  if (m <= INT_TOKENS) return few_ints(SvdqInts{layer}, planes.data, m);
#endif
  return gemm<Grouped>(planes.data, wide, m, n, wide, layer);
}
