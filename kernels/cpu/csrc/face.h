// The C face of the native kernels, called by `native.py`. Every function but `qg_features` returns 0, or 1 when there is
// no memory. Tensors are contiguous; types are those of `Type`.
#pragma once
#include "types.h"

using namespace qg;

#define QG_EXPORT extern "C" __attribute__((visibility("default")))
