// View, the op bodies' type for tensors from either front, and its conversion to the pointers and strides of Args
// structs.
#pragma once
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../ops.h"

namespace pygpt::bind {

using torch::headeronly::ScalarType;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;  // borrowed

constexpr size_t kMaxDims = 64;

// Sizes or strides that are computed, stored without heap memory.
struct Sizes {
  Sizes(size_t count) : count(count) {}
  Sizes(Shape s) : count(s.size()) { std::copy(s.begin(), s.end(), value.begin()); }
  operator Shape() const { return {value.data(), count}; }
  int64_t& operator[](size_t d) { return value[d]; }
  int64_t operator[](size_t d) const { return value[d]; }

  size_t count;
  std::array<int64_t, kMaxDims> value;  // only the first `count` are initialised
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
    case ScalarType::Bool:
    case ScalarType::Byte: return 1;
    default: return 2;
  }
}

// The bytes of a dense tensor. PTRDIFF_MAX, which no allocation grants, stands for any larger number.
inline size_t bytes_of(Shape shape, ScalarType type) {
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  ptrdiff_t bytes = bytes_of(type);
  for (int64_t size : shape)
    if (__builtin_mul_overflow(bytes, size, &bytes)) return PTRDIFF_MAX;
  return bytes;
}

struct Device {
  int32_t type, index;  // in the front's numbering
  bool operator!=(const Device& other) const { return type != other.type || index != other.index; }
};

struct View {
  void* data = nullptr;
  Shape sizes{}, strides{};  // borrowed from the tensor
  ScalarType type = ScalarType::Undefined;
  Device device{};
  void* owner = nullptr;  // the front's handle of the tensor

  int64_t dim() const { return sizes.size(); }
  int64_t size(int64_t d) const { return sizes[d]; }
  int64_t numel() const { return product(sizes); }
  bool has_strides(Shape want) const {  // strides that address no second element do not count
    for (int64_t d = 0; d < dim(); d++)
      if (sizes[d] != 1 && strides[d] != want[d]) return numel() == 0;
    return true;
  }
  bool is_contiguous() const {
    int64_t stride = 1;
    for (int64_t d = dim() - 1; d >= 0; stride *= sizes[d--])
      if (sizes[d] != 1 && strides[d] != stride) return numel() == 0;
    return true;
  }
};
using Maybe = std::optional<View>;

// The results of an op, in the order of its schema.
template <size_t n>
using Results = std::array<View, n>;

// Which gradients are needed, in the order in which they are returned.
struct Needs {
  size_t count = 0;
  uint32_t bits = 0;
  bool operator[](size_t i) const { return bits >> i & 1; }
};

// How many arguments of the schema become one argument of an op's body: one, or the fields of a struct of options,
// which stand at the end and have defaults.
template <class T, class = void>
struct Fields {
  static constexpr size_t count = 1;
};
template <class T>
struct Fields<T, std::void_t<decltype(std::declval<T&>().fields())>> {
  static constexpr size_t count = std::tuple_size_v<decltype(std::declval<T&>().fields())>;
};
template <class T>
constexpr size_t kFields = Fields<T>::count;

// ---------------------------------------------------------------- shapes and strides
inline Shape leading(const View& t) { return t.sizes.slice(0, t.dim() - 1); }

inline Sizes with_last(const View& t, int64_t last) {
  Sizes s(t.sizes);
  s[s.count - 1] = last;
  return s;
}

inline Sizes contiguous_strides(Shape size) {
  Sizes strides(size.size());
  int64_t stride = 1;
  for (int64_t d = int64_t(size.size()) - 1; d >= 0; stride *= std::max<int64_t>(size[d--], 1)) strides[d] = stride;
  return strides;
}

// The strides of a dense tensor whose dimensions are ordered as in the given tensors' strides. Two dimensions are
// ordered by the first tensor whose strides differ in them. torch lays out the results of element-wise ops in the same
// way (TensorIterator, empty_like).
inline Sizes dense_strides(Shape size, std::initializer_list<Shape> strides) {
  const size_t n = size.size();
  std::array<size_t, kMaxDims> order;  // the dimensions from the innermost to the outermost
  for (size_t i = 0; i < n; i++) order[i] = n - 1 - i;
  auto compare = [&](size_t a, size_t b) {  // > 0: a is outside b; < 0: inside; 0: the strides do not decide
    for (Shape s : strides) {
      if (s[a] == 0 || s[b] == 0) continue;
      if (s[a] != s[b]) return s[a] < s[b] ? -1 : 1;
      if (size[a] > size[b]) return 1;
    }
    return 0;
  };
  for (size_t i = 1; i < n; i++)
    for (size_t at = i, below = i; below-- > 0;) {
      const int before = compare(order[below], order[at]);
      if (before < 0) break;
      if (before > 0) std::swap(order[below], order[at]), at = below;
    }
  Sizes result(n);
  int64_t stride = 1;
  for (size_t i = 0; i < n; stride *= std::max<int64_t>(size[order[i++]], 1)) result[order[i]] = stride;
  return result;
}

// The strides of an attention output (B, H, L, width), as torch chooses them. Where torch uses its fused kernel, the
// batch, head and position dimensions are ordered as in the query and channels are innermost; else it is contiguous.
inline Sizes strides_like_query(const View& q, int64_t width) {
  Sizes size(q.sizes);
  size[3] = width;
  if (width != q.size(3) || q.strides[3] != 1) return contiguous_strides(size);
  size = dense_strides(q.sizes.slice(0, 3), {q.strides.slice(0, 3)});
  Sizes stride(4);
  for (int d = 0; d < 3; d++) stride[d] = size[d] * std::max<int64_t>(width, 1);
  stride[3] = 1;
  return stride;
}

// The strides of a (B, H, T, E) tensor stored as (B, T, H, E), so that merging the heads needs no copy.
inline Sizes heads_last_strides(int64_t H, int64_t T, int64_t E) {
  const int64_t e = std::max<int64_t>(E, 1), row = std::max<int64_t>(H, 1) * e;
  Sizes stride(4);
  stride[0] = std::max<int64_t>(T, 1) * row, stride[1] = e, stride[2] = row, stride[3] = 1;
  return stride;
}

// ---------------------------------------------------------------- conversion to Args
inline const void* pointer(const Maybe& t) { return t ? t->data : nullptr; }

// True if a (..., C) tensor consists of contiguous rows that are one fixed stride apart.
inline bool is_rows(const View& t) {
  if (t.is_contiguous()) return true;
  int64_t stride = -1;  // the stride that the next outer dimension must have; -1: not known yet
  bool regular = t.sizes.back() == 1 || t.strides.back() == 1;
  for (int64_t d = t.dim() - 2; d >= 0; d--) {
    if (t.size(d) == 1) continue;
    regular = regular && (stride == -1 || t.strides[d] == stride);
    stride = t.strides[d] * t.size(d);
  }
  return regular;
}
inline Rows rows(const View& t) {  // requires is_rows(t)
  for (int64_t d = t.dim() - 2; d >= 0; d--)
    if (t.size(d) != 1) return {t.data, t.strides[d]};
  return {t.data, t.dim() ? t.sizes.back() : 1};
}
inline Rows rows(const Maybe& t) { return t ? rows(*t) : Rows{nullptr, 0}; }

inline Heads heads(const View& t) { return {t.data, {t.strides[0], t.strides[1], t.strides[2], t.strides[3]}}; }

}  // namespace pygpt::bind
