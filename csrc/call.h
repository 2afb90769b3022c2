// What bind.h is written in: the checks of a call, outputs, and tensors as the pointers and strides of Args.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "ops.h"
#include "poison.h"

namespace pygpt::bind {

using torch::headeronly::ScalarType;
template <class Tensor>
using Maybe = std::optional<Tensor>;
using Needs = std::vector<bool>;

// Calls body with the stream that work on the tensor's device is queued on. Each library of CUDA kernels has its own.
void with_stream(const torch::stable::Tensor& lead, const std::function<void(const cuda::Stream&)>& body);

// ---------------------------------------------------------------- checks
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;  // borrowed

template <class Tensor>
Shape shape(const Tensor& t) {
  return t.sizes();
}

inline std::string to_string(Shape s) {
  std::string text = "(";
  for (size_t i = 0; i < s.size(); i++) text += (i ? ", " : "") + std::to_string(s[i]);
  return text + ")";
}

inline std::string to_string(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    default: return "another dtype";
  }
}

// The checks of one call; `lead` is the tensor whose dtype and device the others must share.
template <class Tensor>
struct Call {
  const char* op;
  const Tensor& lead;
  DType dtype;

  Call(const char* op, const Tensor& lead) : op(op), lead(lead) {
    switch (lead.scalar_type()) {
      case ScalarType::Double: dtype = DType::f64; break;
      case ScalarType::Float: dtype = DType::f32; break;
      case ScalarType::BFloat16: dtype = DType::bf16; break;
      case ScalarType::Half: dtype = DType::f16; break;
      default: fail("the first argument must be float64, float32, bfloat16 or float16");
    }
  }
  [[noreturn]] void fail(const std::string& message) const {
    STD_TORCH_CHECK(false, "pygpt.", op, ": ", message);
    throw;  // not reached
  }
  ScalarType statistics() const { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

  void check(const char* name, const Tensor& t, Shape want, ScalarType type) const {
    if (!t.defined()) fail(std::string(name) + " is undefined");
    if (t.scalar_type() != type)
      fail(std::string(name) + " must be " + to_string(type) + ", got " + to_string(t.scalar_type()));
    if (t.device() != lead.device())
      fail(std::string(name) + " is not on the device of the first argument");
    if (shape(t) != want)
      fail(std::string(name) + " must have shape " + to_string(want) + ", got " + to_string(shape(t)));
  }
  void check(const char* name, const Tensor& t, Shape want) const { check(name, t, want, lead.scalar_type()); }
  void check(const char* name, const Maybe<Tensor>& t, Shape want) const {
    if (t) check(name, *t, want);
  }
  void at_least(const char* name, const Tensor& t, int64_t dims) const {
    if (t.dim() < dims) fail(std::string(name) + " needs at least " + std::to_string(dims) + " dimensions");
  }
  // A CPU kernel takes its Args; a CUDA kernel a stream too, and it returns what went wrong.
  template <auto kernel, class Args>
  void run(const Args& a) const {
    if constexpr (std::is_invocable_v<decltype(kernel), const Args&>)
      compute(lead, [&] { kernel(a); });
    else
      with_stream(lead, [&](const cuda::Stream& stream) {
        if (cuda::Error error = kernel(a, stream)) fail(error);
      });
  }
  void count(const Needs& needs, size_t n) const {
    if (needs.size() != n)
      fail("needs must have " + std::to_string(n) + " entries, got " + std::to_string(needs.size()));
  }
};

// ---------------------------------------------------------------- torch's tensors
// What templates below ask of a tensor beyond its methods.
template <class F>
void compute(const torch::stable::Tensor&, const F& kernel) {
  kernel();
}

// Not torch::stable::new_empty: it looks the op up by name in every call, 0.9 us.
inline torch::stable::Tensor allocate(const torch::stable::Tensor& like, Shape size, Shape stride, ScalarType type) {
  using torch::stable::detail::from, torch::stable::detail::to;
  const int32_t dtype = to<int32_t>(from(type));
  int32_t device, index;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(size.size(), size.data(), stride.data(), dtype, device, index, &handle));
  return torch::stable::Tensor(handle);
}

using torch::stable::contiguous;

inline void fill_with_nan(const torch::stable::Tensor& t) {
  torch::stable::fill_(t, t.scalar_type() == ScalarType::Byte ? 0xFF : std::numeric_limits<double>::quiet_NaN());
}

// A string argument, owned. (The header's own std::string conversion leaks one string a call in 2.13.)
struct OwnedString {
  StringHandle handle;
};
inline std::string take(OwnedString s) {
  size_t length;
  const char* data;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(s.handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(s.handle, &data));
  std::string text(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(s.handle));
  return text;
}
inline std::string take(std::string s) { return s; }
template <class Tensor>
using Text = std::conditional_t<std::is_same_v<Tensor, torch::stable::Tensor>, OwnedString, std::string>;

// ---------------------------------------------------------------- results
// A result this large comes from the system each time, and touching it first costs more than computing it
// (measured: relu on 50 MB, 14 ms of which 10 are page faults). 2 MB pages make that 512 times rarer.
inline void ask_for_large_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  if (bytes < 16 * kPage) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), first = (begin + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / kPage * kPage, MADV_HUGEPAGE);  // or not
#endif
}

inline const bool poison = poison_requested();

template <class Tensor>
Tensor empty_strided(const Tensor& like, Shape size, Shape stride, ScalarType type) {
  Tensor t = allocate(like, size, stride, type);
  if (t.is_cpu()) ask_for_large_pages(t.mutable_data_ptr(), size_t(t.numel()) * t.element_size());
  if (poison) fill_with_nan(t);
  return t;
}
template <class Tensor>
Tensor empty(const Tensor& like, Shape size, ScalarType type) {
  std::vector<int64_t> stride(size.size(), 1);
  for (int64_t d = int64_t(size.size()) - 2; d >= 0; d--) stride[d] = stride[d + 1] * std::max<int64_t>(size[d + 1], 1);
  return empty_strided(like, size, stride, type);
}
template <class Tensor>
Tensor empty(const Tensor& like, Shape size) {
  return empty(like, size, like.scalar_type());
}
// What forward leaves for backward, and whether there will be one.
inline torch::stable::Tensor for_backward(const torch::stable::Tensor& like, Shape size, ScalarType type) {
  return empty(like, size, type);
}
inline bool has_backward(const torch::stable::Tensor&) { return true; }

// (B, H, T, E) laid out as (B, T, H, E), so that merging the heads afterwards costs nothing.
template <class Tensor>
Tensor empty_heads(const Tensor& like, int64_t B, int64_t H, int64_t T, int64_t E) {
  const int64_t e = std::max<int64_t>(E, 1), row = std::max<int64_t>(H, 1) * e, batch = std::max<int64_t>(T, 1) * row;
  return empty_strided(like, {B, H, T, E}, {batch, e, row, 1}, like.scalar_type());
}

// An output gradient: with no elements where it isn't wanted.
template <class Tensor>
Tensor wanted(bool need, const Tensor& like, Shape size) {
  return need ? empty(like, size) : empty(like, {0});
}
template <class Tensor>
void* output(bool need, const Tensor& t) {
  return need ? t.mutable_data_ptr() : nullptr;
}

// ---------------------------------------------------------------- tensors to Args
template <class Tensor>
void* input(const Tensor& t) {
  return const_cast<void*>(t.const_data_ptr());
}
template <class Tensor>
const void* input(const Maybe<Tensor>& t) {
  return t ? input(*t) : nullptr;
}

template <class Tensor>
Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : contiguous(t);
}
template <class Tensor>
Maybe<Tensor> dense(const Maybe<Tensor>& t) {
  return t ? Maybe<Tensor>(dense(*t)) : t;
}

// A (..., C) tensor as rows of one stride, copied only where its strides don't allow that.
template <class Tensor>
Tensor as_rows(const Tensor& t) {
  if (t.is_contiguous()) return t;
  auto size = t.sizes(), stride = t.strides();
  int64_t step = -1;  // of the next dimension out, once known
  bool regular = size.back() == 1 || stride.back() == 1;
  for (int64_t d = t.dim() - 2; d >= 0; d--) {
    if (size[d] == 1) continue;
    regular = regular && (step == -1 || stride[d] == step);
    step = stride[d] * size[d];
  }
  return regular ? t : contiguous(t);
}
template <class Tensor>
Rows rows(const Tensor& t) {  // of a tensor from as_rows
  for (int64_t d = t.dim() - 2; d >= 0; d--)
    if (t.size(d) != 1) return {input(t), t.stride(d)};
  return {input(t), t.dim() ? t.sizes().back() : 1};
}
template <class Tensor>
Rows rows(const Maybe<Tensor>& t) {
  return t ? rows(*t) : Rows{nullptr, 0};
}

template <class Tensor>
Heads heads(const Tensor& t) {
  return {input(t), {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

template <class Tensor>
Shape leading(const Tensor& t) {
  return t.sizes().slice(0, t.dim() - 1);
}
template <class Tensor>
std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> s = t.sizes().vec();
  s.back() = last;
  return s;
}
inline int64_t product(Shape s) {
  int64_t n = 1;
  for (int64_t d : s) n *= d;
  return n;
}

}  // namespace pygpt::bind
