// A tensor as the op bodies see it, whichever front it came from, and as the pointers and strides of an Args struct.
#pragma once
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "../ops.h"

namespace pygpt::bind {

using torch::headeronly::ScalarType;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;  // borrowed

constexpr size_t kMaxDims = 64;

// Sizes or strides that are computed here. No memory comes from the heap.
struct Sizes {
  Sizes(size_t count) : count(count) {}
  Sizes(Shape s) : count(s.size()) { std::copy(s.begin(), s.end(), value.begin()); }
  operator Shape() const { return {value.data(), count}; }
  int64_t& operator[](size_t d) { return value[d]; }
  int64_t operator[](size_t d) const { return value[d]; }

  size_t count;
  std::array<int64_t, kMaxDims> value;  // not initialised beyond count
};

inline int64_t product(Shape s) {
  int64_t n = 1;
  for (int64_t size : s) n *= size;
  return n;
}

inline size_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::Byte: return 1;
    default: return 2;
  }
}

struct Device {
  int32_t type, index;  // as the front numbers them
  bool operator!=(const Device& other) const { return type != other.type || index != other.index; }
};

struct View {
  void* data = nullptr;
  Shape sizes{}, strides{};  // borrowed from the tensor
  ScalarType type = ScalarType::Undefined;
  Device device{};
  void* owner = nullptr;  // the front's own name of the tensor

  int64_t dim() const { return sizes.size(); }
  int64_t size(int64_t d) const { return sizes[d]; }
  int64_t numel() const { return product(sizes); }
  bool has_strides(Shape want) const {  // those of dimensions with one element don't matter
    for (int64_t d = 0; d < dim(); d++)
      if (sizes[d] != 1 && strides[d] != want[d]) return false;
    return true;
  }
  bool is_contiguous() const {
    int64_t step = 1;
    for (int64_t d = dim() - 1; d >= 0; step *= sizes[d--])
      if (sizes[d] != 1 && strides[d] != step) return numel() == 0;
    return true;
  }
};
using Maybe = std::optional<View>;

// What an op returns: its results in the order of the schema.
template <size_t n>
using Results = std::array<View, n>;

// Which gradients are wanted, in the order in which they are returned.
struct Needs {
  size_t count = 0;
  uint32_t bits = 0;
  bool operator[](size_t i) const { return bits >> i & 1; }
};

// ---------------------------------------------------------------- shapes and strides
inline Shape leading(const View& t) { return t.sizes.slice(0, t.dim() - 1); }

inline Sizes with_last(const View& t, int64_t last) {
  Sizes s(t.sizes);
  s[s.count - 1] = last;
  return s;
}

inline Sizes contiguous_strides(Shape size) {
  Sizes stride(size.size());
  int64_t step = 1;
  for (int64_t d = int64_t(size.size()) - 1; d >= 0; step *= std::max<int64_t>(size[d--], 1)) stride[d] = step;
  return stride;
}

// (B, H, T, E) laid out as (B, T, H, E), so that merging the heads afterwards costs nothing.
inline Sizes heads_last_strides(int64_t H, int64_t T, int64_t E) {
  const int64_t e = std::max<int64_t>(E, 1), row = std::max<int64_t>(H, 1) * e;
  Sizes stride(4);
  stride[0] = std::max<int64_t>(T, 1) * row, stride[1] = e, stride[2] = row, stride[3] = 1;
  return stride;
}

// ---------------------------------------------------------------- to Args
inline const void* pointer(const Maybe& t) { return t ? t->data : nullptr; }

// Whether a (..., C) tensor is rows of adjacent elements, one stride apart.
inline bool is_rows(const View& t) {
  if (t.is_contiguous()) return true;
  int64_t step = -1;  // of the next dimension out, once known
  bool regular = t.sizes.back() == 1 || t.strides.back() == 1;
  for (int64_t d = t.dim() - 2; d >= 0; d--) {
    if (t.size(d) == 1) continue;
    regular = regular && (step == -1 || t.strides[d] == step);
    step = t.strides[d] * t.size(d);
  }
  return regular;
}
inline Rows rows(const View& t) {  // is_rows(t)
  for (int64_t d = t.dim() - 2; d >= 0; d--)
    if (t.size(d) != 1) return {t.data, t.strides[d]};
  return {t.data, t.dim() ? t.sizes.back() : 1};
}
inline Rows rows(const Maybe& t) { return t ? rows(*t) : Rows{nullptr, 0}; }

inline Heads heads(const View& t) { return {t.data, {t.strides[0], t.strides[1], t.strides[2], t.strides[3]}}; }

}  // namespace pygpt::bind
