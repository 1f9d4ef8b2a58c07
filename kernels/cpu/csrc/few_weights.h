// What `few_tasks` asks of int8 and int4 weights that are multiplied as T, in steps of STEP features; but for `unpack`.
#pragma once
#include "few.h"
#include "w4a16.h"
#include "w8_group.h"

namespace qg {

// int8 weights whose scale comes last.
template <class T, int64_t STEP>
struct FewW8 {
  static constexpr int64_t STEP_BYTES = STEP;
  const W8<T>& layer;
  const uint8_t* data = (const uint8_t*)layer.qweight;
  int64_t bytes = layer.k;

  int64_t length() const { return round_up(layer.k, STEP); }
  int64_t floats(int) const { return 0; }

  struct Steps {
    Steps(const FewW8&, int64_t, int, int, float*) {}
    void next() {}
  };
};

template <class T, bool ZERO, int64_t STEP>
struct FewW8Group {
  static constexpr int64_t STEP_BYTES = STEP;
  const W8Group<T>& layer;
  const uint8_t* data = (const uint8_t*)layer.qweight;
  int64_t bytes = layer.k;

  using OfGroups = FewSteps<ZERO, STEP / FEW_UNIT>;
  int64_t length() const { return round_up(layer.k, STEP); }
  int64_t floats(int rows) const { return OfGroups::floats(layer.groups, rows); }

  struct Steps : OfGroups {
    Steps(const FewW8Group& w, int64_t row, int count, int rows, float* scratch)
        : OfGroups({w.layer.scale, FLOAT32, w.layer.out.n, w.layer.groups}, w.layer.zero_point, w.layer.group_size, row,
                   count, rows, scratch) {}
  };
};

template <class T, bool ZERO, int64_t STEP>
struct FewW4A16 {
  static constexpr int64_t STEP_BYTES = STEP / 2;
  const W4A16<T>& layer;
  const uint8_t* data = layer.qweight;
  int64_t bytes = layer.padded / 2, groups = layer.padded / layer.group_size;

  using OfGroups = FewSteps<ZERO, STEP / FEW_UNIT>;
  int64_t length() const { return round_up(layer.padded, STEP); }
  int64_t floats(int rows) const { return OfGroups::floats(groups, rows); }

  struct Steps : OfGroups {
    Steps(const FewW4A16& w, int64_t row, int count, int rows, float* scratch)
        : OfGroups({w.layer.scale, w.layer.scale_type, w.layer.out.n, w.groups}, w.layer.zero_point, w.layer.group_size,
                   row, count, rows, scratch) {}
  };
};

}  // namespace qg
