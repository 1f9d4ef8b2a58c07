// What activations come in, and outputs go out in: read and written as vectors of floats.
#pragma once
#include "simd.h"

namespace qg {

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline int64_t size_of(Type type) { return type == FLOAT32 ? 4 : 2; }

inline void store(void* p, Type type, int64_t index, F value) {
  if (type == FLOAT32) store_f((float*)p + index, value);
  else if (type == BFLOAT16) store_bf16((bf16*)p + index, value);
  else store_fp16((uint16_t*)p + index, value);
}

// The first `count` lanes only.
inline void store_some(void* p, Type type, int64_t index, F value, int count) {
  alignas(64) char all[BYTES];
  store(all, type, 0, value);
  memcpy((char*)p + index * size_of(type), all, size_t(count * size_of(type)));
}

inline F load(const void* p, Type type, int64_t index) {
  if (type == FLOAT32) return load_f((const float*)p + index);
  if (type == BFLOAT16) return float_of_bf16((const bf16*)p + index);
  return float_of_fp16((const uint16_t*)p + index);
}

inline F load_some(const void* p, Type type, int64_t index, int count) {
  alignas(64) char all[BYTES] = {};
  memcpy(all, (const char*)p + index * size_of(type), size_t(count * size_of(type)));
  return load(all, type, 0);
}

inline float float_at(const void* p, Type type, int64_t index) {
  if (type == FLOAT32) return ((const float*)p)[index];
  return type == BFLOAT16 ? float_of(((const bf16*)p)[index]) : _cvtsh_ss(((const uint16_t*)p)[index]);
}

// Rows (m, k) of floats of any type, one after the other.
struct Rows {
  const void* data;
  Type type;
  int64_t m, k;
};

}  // namespace qg
