// Vectors of the widest kind that this machine has, under one set of names: AVX-512 (64 bytes) or AVX2 (32 bytes).
//
// F holds floats, I bytes or integers; LANES floats or int32 fit in one. Only what the kernels use is here.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define QG_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define QG_AVX512 0
#else
#error "qgraft: the native CPU kernels need AVX2, FMA and F16C"
#endif

// Eight-bit dot products that add up in 32 bits. Without them the kernels multiply 16-bit numbers: `vpmaddubsw`, the
// older instruction for bytes, saturates silently.
#if (QG_AVX512 && defined(__AVX512VNNI__)) || (!QG_AVX512 && defined(__AVXVNNI__))
#define QG_VNNI 1
#else
#define QG_VNNI 0
#endif

#if QG_AVX512 && defined(__AVX512BF16__)
#define QG_BF16 1
#else
#define QG_BF16 0
#endif

namespace qg {

using bf16 = uint16_t;  // the upper half of a float
constexpr int BYTES = QG_AVX512 ? 64 : 32;
constexpr int LANES = BYTES / 4;
// Integer sums have a type of their own: gcc keeps arrays of __m512i, which may alias anything, in memory.
typedef int32_t Sums __attribute__((vector_size(BYTES)));

inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
inline void prefetch_far(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }  // to the second-level cache

inline float float_of(bf16 value) {
  const uint32_t bits = uint32_t(value) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

#if QG_AVX512

using F = __m512;
using I = __m512i;

inline F zero_f() { return _mm512_setzero_ps(); }
inline I zero_i() { return _mm512_setzero_si512(); }
inline F set_f(float x) { return _mm512_set1_ps(x); }
inline I set_bytes(int8_t x) { return _mm512_set1_epi8(x); }
inline I set_words(int16_t x) { return _mm512_set1_epi16(x); }
inline F load_f(const float* p) { return _mm512_loadu_ps(p); }
inline I load_i(const void* p) { return _mm512_loadu_si512(p); }
inline void store_f(float* p, F x) { _mm512_storeu_ps(p, x); }
inline void store_i(void* p, I x) { _mm512_storeu_si512(p, x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float max_of(F a) { return _mm512_reduce_max_ps(a); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline F to_float(Sums a) { return to_float((I)a); }
inline F float_of_int8(const int8_t* p) { return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline F float_of_bf16(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline F float_of_fp16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store_fp16(uint16_t* p, F x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#if QG_BF16
// To nearest, ties to even; NaN stays NaN.
inline void store_bf16(bf16* p, F x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
#else
inline void store_bf16(bf16* p, F x) {
  const I bits = _mm512_castps_si512(x);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  I out = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  out = _mm512_mask_mov_epi32(out, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(out));
}
#endif
// Floats that are integers in int8's range -> LANES bytes.
inline void store_int8(int8_t* p, F x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x))); }
inline I and_i(I a, I b) { return _mm512_and_si512(a, b); }
inline I xor_i(I a, I b) { return _mm512_xor_si512(a, b); }
inline I shift_right_16(I a, int n) { return _mm512_srli_epi16(a, n); }
inline I shift_right_32(I a, int n) { return _mm512_srli_epi32(a, n); }
inline I widen_uint8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
// One of 16 floats by the lowest four bits of each index; with LANES of 8 they are in two vectors.
inline F look_up(F low, F, I index) { return _mm512_permutexvar_ps(index, low); }
inline I shuffle_bytes(I table, I index) { return _mm512_shuffle_epi8(table, index); }
inline I repeat_lane(__m128i a) { return _mm512_broadcast_i32x4(a); }
inline I madd_8(I unsigned_a, I signed_b) { return _mm512_maddubs_epi16(unsigned_a, signed_b); }
inline I add_16(I a, I b) { return _mm512_add_epi16(a, b); }
inline Sums madd_16(I a, I b) { return (Sums)_mm512_madd_epi16(a, b); }
inline I widen_int8(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
// Neighbours at distance 1, 2, 4 and 8 change places: a butterfly's other wing.
inline F swap_1(F x) { return _mm512_permute_ps(x, 0xB1); }
inline F swap_2(F x) { return _mm512_permute_ps(x, 0x4E); }
inline F swap_4(F x) { return _mm512_shuffle_f32x4(x, x, 0xB1); }
inline F swap_8(F x) { return _mm512_shuffle_f32x4(x, x, 0x4E); }
// Two vectors of bytes -> their even bytes, in order; and the odd ones.
inline I even_bytes(I a, I b) {
  const I mask = _mm512_set1_epi16(0xFF);
  const I mixed = _mm512_packus_epi16(_mm512_and_si512(a, mask), _mm512_and_si512(b, mask));
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), mixed);
}
// The same of floats.
inline F even_floats(F a, F b) {
  const I index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_permutex2var_ps(a, index, b);
}
inline F odd_floats(F a, F b) {
  const I index = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return _mm512_permutex2var_ps(a, index, b);
}
inline I odd_bytes(I a, I b) { return even_bytes(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)); }

inline __m128 sum_of_4(F a, F b, F c, F d) {
  const auto half = [](F x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); };
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}
inline __m128i sum_of_4(Sums a, Sums b, Sums c, Sums d) {
  const auto half = [](Sums y) {
    const I x = (I)y;
    return _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
  };
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(half(a), half(b)), _mm256_hadd_epi32(half(c), half(d)));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}
#if QG_VNNI
inline Sums dot_bytes(Sums acc, I unsigned_a, I signed_b) {
  return (Sums)_mm512_dpbusd_epi32((I)acc, unsigned_a, signed_b);
}
#endif
#if QG_BF16
inline F dot_bf16(F acc, I a, I b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
// Two vectors of floats -> one of bfloat16, in order, to nearest even. What has 8 significant bits is exact.
inline I pack_bf16(F low, F high) { return (I)_mm512_cvtne2ps_pbh(high, low); }
#endif

#else  // AVX2

using F = __m256;
using I = __m256i;

inline F zero_f() { return _mm256_setzero_ps(); }
inline I zero_i() { return _mm256_setzero_si256(); }
inline F set_f(float x) { return _mm256_set1_ps(x); }
inline I set_bytes(int8_t x) { return _mm256_set1_epi8(x); }
inline I set_words(int16_t x) { return _mm256_set1_epi16(x); }
inline F load_f(const float* p) { return _mm256_loadu_ps(p); }
inline I load_i(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline void store_f(float* p, F x) { _mm256_storeu_ps(p, x); }
inline void store_i(void* p, I x) { _mm256_storeu_si256((__m256i*)p, x); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float max_of(F a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline F to_float(I a) { return _mm256_cvtepi32_ps(a); }
inline F to_float(Sums a) { return to_float((I)a); }
inline F float_of_int8(const int8_t* p) { return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
inline F float_of_bf16(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline F float_of_fp16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void store_fp16(uint16_t* p, F x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline __m128i narrow_32(I x) {  // int32 in int16's range -> int16
  return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
inline void store_bf16(bf16* p, F x) {
  const I bits = _mm256_castps_si256(x);
  const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  I out = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  const I nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  out = _mm256_blendv_epi8(out, _mm256_set1_epi32(0x7FC0), nan);
  _mm_storeu_si128((__m128i*)p, narrow_32(out));
}
inline void store_int8(int8_t* p, F x) {
  const I all = _mm256_cvtps_epi32(x);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}
inline I and_i(I a, I b) { return _mm256_and_si256(a, b); }
inline I xor_i(I a, I b) { return _mm256_xor_si256(a, b); }
inline I shift_right_16(I a, int n) { return _mm256_srli_epi16(a, n); }
inline I shift_right_32(I a, int n) { return _mm256_srli_epi32(a, n); }
inline I widen_uint8(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline F look_up(F low, F high, I index) {
  const F upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 of the index becomes the sign
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper);
}
inline I shuffle_bytes(I table, I index) { return _mm256_shuffle_epi8(table, index); }
inline I repeat_lane(__m128i a) { return _mm256_broadcastsi128_si256(a); }
inline I madd_8(I unsigned_a, I signed_b) { return _mm256_maddubs_epi16(unsigned_a, signed_b); }
inline I add_16(I a, I b) { return _mm256_add_epi16(a, b); }
inline Sums madd_16(I a, I b) { return (Sums)_mm256_madd_epi16(a, b); }
inline I widen_int8(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
inline F swap_1(F x) { return _mm256_permute_ps(x, 0xB1); }
inline F swap_2(F x) { return _mm256_permute_ps(x, 0x4E); }
inline F swap_4(F x) { return _mm256_permute2f128_ps(x, x, 1); }
inline I even_bytes(I a, I b) {
  const I mask = _mm256_set1_epi16(0xFF);
  const I mixed = _mm256_packus_epi16(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
  return _mm256_permute4x64_epi64(mixed, 0xD8);
}
inline F in_order(F mixed) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xD8)); }
inline F even_floats(F a, F b) { return in_order(_mm256_shuffle_ps(a, b, 0x88)); }
inline F odd_floats(F a, F b) { return in_order(_mm256_shuffle_ps(a, b, 0xDD)); }
inline I odd_bytes(I a, I b) { return even_bytes(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8)); }

inline __m128 sum_of_4(F a, F b, F c, F d) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}
inline __m128i sum_of_4(Sums a, Sums b, Sums c, Sums d) {
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32((I)a, (I)b), _mm256_hadd_epi32((I)c, (I)d));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}
#if QG_VNNI
inline Sums dot_bytes(Sums acc, I unsigned_a, I signed_b) {
  return (Sums)_mm256_dpbusd_avx_epi32((I)acc, unsigned_a, signed_b);
}
#endif

#endif

// The vector at p, of which only `left` bytes are there: the others are `fill`.
inline I load_bytes(const void* p, int64_t left, int fill = 0) {
  if (left >= BYTES) return load_i(p);
  alignas(64) uint8_t rest[BYTES];
  memset(rest, fill, BYTES);
  if (left > 0) memcpy(rest, p, size_t(left));
  return load_i(rest);
}

// One lane of a vector per 16 bytes, each from its own address.
inline I load_lanes(const void* const lanes[]) {
#if QG_AVX512
  __m512i out = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)lanes[0]));
  out = _mm512_inserti32x4(out, _mm_loadu_si128((const __m128i*)lanes[1]), 1);
  out = _mm512_inserti32x4(out, _mm_loadu_si128((const __m128i*)lanes[2]), 2);
  return _mm512_inserti32x4(out, _mm_loadu_si128((const __m128i*)lanes[3]), 3);
#else
  const __m256i out = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)lanes[0]));
  return _mm256_inserti128_si256(out, _mm_loadu_si128((const __m128i*)lanes[1]), 1);
#endif
}

// The same 16 bytes in every lane, or in a vector of four lanes one table for each half.
inline I load_halves(const void* first, const void* second) {
#if QG_AVX512
  const __m512i out = _mm512_castsi256_si512(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)first)));
  return _mm512_inserti64x4(out, _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)second)), 1);
#else
  (void)second;
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)first));
#endif
}

// The first half of one and, in a vector of four lanes, the first half of another.
inline I join_halves(I first, I second) {
#if QG_AVX512
  return _mm512_inserti64x4(first, _mm512_castsi512_si256(second), 1);
#else
  (void)second;
  return first;
#endif
}

// x is loaded once and stays in its register: of 16 registers gcc would rather load it again for each product with it,
// and the loads would be what is waited for.
template <class V>
inline void keep(V& x) {
  asm("" : "+x"(x));
}

// The 32 bits at p in every lane.
inline I set_words_32(const void* p) {
  int32_t bits;
  memcpy(&bits, p, 4);
#if QG_AVX512
  return _mm512_set1_epi32(bits);
#else
  return _mm256_set1_epi32(bits);
#endif
}

inline void add_to(float* p, __m128 x) { _mm_storeu_ps(p, _mm_add_ps(_mm_loadu_ps(p), x)); }
inline void add_to(int32_t* p, __m128i x) {
  _mm_storeu_si128((__m128i*)p, _mm_add_epi32(_mm_loadu_si128((const __m128i*)p), x));
}

}  // namespace qg
