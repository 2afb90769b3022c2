// The ops as kernels of torch's dispatcher: boxed functions of LibTorch's stable ABI.
//
// Before it calls one of these functions, the dispatcher has handled autocast, autograd and modes, and has resolved the
// negative bit of tensors.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "table.h"

namespace pygpt::bind {

// ---------------------------------------------------------------- tensors
struct ReleaseTensor {
  void operator()(AtenTensorHandle t) const { aoti_torch_delete_tensor_object(t); }
};
using Handle = std::unique_ptr<AtenTensorOpaque, ReleaseTensor>;

// The numbers by which libtorch identifies the dtypes that ops use.
struct DtypeCode {
  ScalarType type;
  int32_t code;
};
inline const std::array<DtypeCode, 8> dtype_codes = {{{ScalarType::Float, aoti_torch_dtype_float32()},
                                                      {ScalarType::BFloat16, aoti_torch_dtype_bfloat16()},
                                                      {ScalarType::Half, aoti_torch_dtype_float16()},
                                                      {ScalarType::Double, aoti_torch_dtype_float64()},
                                                      {ScalarType::Long, aoti_torch_dtype_int64()},
                                                      {ScalarType::Int, aoti_torch_dtype_int32()},
                                                      {ScalarType::Bool, aoti_torch_dtype_bool()},
                                                      {ScalarType::Byte, aoti_torch_dtype_uint8()}}};
inline const int32_t cpu_device = aoti_torch_device_type_cpu();

// A View of a tensor without its data pointer.
inline View view_of(AtenTensorHandle t) {
  View v;
  bool defined;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(t, &defined));
  if (!defined) return v;
  int64_t dim, *sizes, *strides;
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t, &dim));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t, &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t, &strides));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &code));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t, &v.device.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t, &v.device.index));
  for (const DtypeCode& known : dtype_codes)
    if (known.code == code) v.type = known.type;
  v.sizes = Shape(sizes, dim), v.strides = Shape(strides, dim), v.owner = t;
  return v;
}

// A View of an argument.
inline View argument(AtenTensorHandle t) {
  View v = view_of(t);
  const void* data = nullptr;
  if (v.owner) STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(t, &data));
  v.data = const_cast<void*>(data);
  return v;
}

// torch::stable::new_empty is avoided, because it looks the op up by name in every call (docs/measured.md G3).
inline Handle new_tensor(Shape size, Shape stride, ScalarType type, Device device) {
  const auto known = std::find_if(dtype_codes.begin(), dtype_codes.end(), [=](auto& d) { return d.type == type; });
  AtenTensorHandle t;
  const AOTITorchError error =
      aoti_torch_empty_strided(size.size(), size.data(), stride.data(), known->code, device.type, device.index, &t);
  if (error && device.type == cpu_device)  // on a CPU nothing else goes wrong
    throw std::runtime_error("pygpt: not enough memory: tried to allocate " + std::to_string(bytes_of(size, type)) +
                             " bytes");
  STABLE_TORCH_ERROR_CODE_CHECK(error);
  return Handle(t);
}

// A second handle of the same tensor.
inline torch::stable::Tensor shared(AtenTensorHandle t) {
  AtenTensorHandle another;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t, &another));
  return torch::stable::Tensor(another);
}

// Fills a tensor with NaN. In a tensor of bytes all bits are set, which is NaN in every floating-point type.
inline void fill_tensor_with_nan(AtenTensorHandle t, bool is_bytes) {
  torch::stable::fill_(shared(t), is_bytes ? 0xFF : std::numeric_limits<double>::quiet_NaN());
}

// With PYGPT_POISON=1, a tensor that a kernel is to write is a part of a larger one, between two guard bands.
class GuardedTensor {
 public:
  GuardedTensor(Shape size, ScalarType type, Device device)
      : numel_(bytes_of(size, type) / bytes_of(type)), band_(kGuard / bytes_of(type)),
        is_bytes_(type == ScalarType::Byte), whole_(new_tensor(Shape{numel_ + 2 * band_}, Shape{1}, type, device)) {
    fill_tensor_with_nan(whole_.get(), is_bytes_);
  }
  Handle tensor(Shape size, Shape stride) const { return part(size, stride, band_); }
  bool is_intact() const { return is_nan(0) && is_nan(band_ + numel_); }

 private:
  Handle part(Shape size, Shape stride, int64_t first) const {
    AtenTensorHandle t;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(whole_.get(), size.size(), size.data(), stride.data(), first, &t));
    return Handle(t);
  }
  // Whether the band from element `first` on still holds what it was filled with. Waits for a GPU's kernels.
  bool is_nan(int64_t first) const {
    const Handle band = part(Shape{band_}, Shape{1}, first);
    const Handle values =
        new_tensor(Shape{band_}, Shape{1}, is_bytes_ ? ScalarType::Byte : ScalarType::Double, {cpu_device, 0});
    torch::stable::Tensor to = shared(values.get());
    torch::stable::copy_(to, shared(band.get()));
    const void* data;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(values.get(), &data));
    if (is_bytes_) return pygpt::is_nan(data, band_);
    const double* value = static_cast<const double*>(data);
    return std::all_of(value, value + band_, [](double v) { return std::isnan(v); });
  }

  int64_t numel_, band_;
  bool is_bytes_;
  Handle whole_;
};
inline bool are_intact(const std::vector<GuardedTensor>& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const GuardedTensor& t) { return t.is_intact(); });
}

// ---------------------------------------------------------------- one call
class DispatcherCall final : public Call {
 public:
  using Call::Call;

  // Transfers the ownership of a result's tensor to the caller.
  AtenTensorHandle take(const View& result) {
    for (Handle& t : results_)
      if (t && t.get() == result.owner) return t.release();
    fail("a result that was not allocated");
  }

 private:
  View allocate(Shape size, Shape stride, ScalarType type) override {
    Handle& t = results_.at(count_);
    if (poison) guarded_.emplace_back(size, type, device());
    t = poison ? guarded_.back().tensor(size, stride) : new_tensor(size, stride, type, device());
    count_++;
    View v = view_of(t.get());
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(t.get(), &v.data));
    if (device().type == cpu_device) request_huge_pages(v.data, bytes_of(size, type));
    return v;
  }
  View temporary(Shape size, ScalarType type) override { return empty(size, contiguous_strides(size), type); }
  View copy(const View& t, Shape stride) override {
    copies_.push_back(new_tensor(t.sizes, stride, t.type, t.device));
    torch::stable::Tensor to = shared(copies_.back().get());
    torch::stable::copy_(to, shared(static_cast<AtenTensorHandle>(t.owner)));
    return argument(copies_.back().get());
  }
  bool is_intact() const override { return are_intact(guarded_); }
  void fill(const View& t, double value) override {
    torch::stable::fill_(shared(static_cast<AtenTensorHandle>(t.owner)), value);
  }

  std::array<Handle, 8> results_;  // those that take() has not released yet
  size_t count_ = 0;
  std::vector<Handle> copies_;
  std::vector<GuardedTensor> guarded_;
};

// ---------------------------------------------------------------- arguments
// Converts an argument at this place of the stack to the type that a body takes, and owns what the stack has handed
// over.
template <class T, class = void>
struct Argument {
  explicit Argument(const StableIValue* v) : value(torch::stable::detail::to<T>(*v)) {}
  T get() const { return value; }
  T value;
};
template <>
struct Argument<View> {
  explicit Argument(const StableIValue* v) : tensor(torch::stable::detail::to<AtenTensorHandle>(*v)) {}
  View get() const { return argument(tensor.get()); }
  Handle tensor;
};
template <>
struct Argument<Maybe> {
  explicit Argument(const StableIValue* v)
      : tensor(torch::stable::detail::to<std::optional<AtenTensorHandle>>(*v).value_or(nullptr)) {}
  Maybe get() const { return tensor ? Maybe(argument(tensor.get())) : Maybe(); }
  Handle tensor;
};
// The header's conversion to std::string is avoided, because it leaks one string per call in torch 2.13.
template <>
struct Argument<std::string_view> {
  explicit Argument(const StableIValue* v) : text(torch::stable::detail::to<StringHandle>(*v)) {}
  Argument(const Argument&) = delete;
  ~Argument() { torch_delete_string(text); }
  std::string_view get() const {
    size_t length;
    const char* data;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(text, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(text, &data));
    return {data, length};
  }
  StringHandle text;
};
template <>
struct Argument<Needs> {
  explicit Argument(const StableIValue* v) {
    const auto list = torch::stable::detail::to<std::vector<bool>>(*v);
    value.count = list.size();
    for (size_t i = 0; i < list.size() && i < 32; i++) value.bits |= uint32_t(list[i]) << i;
  }
  Needs get() const { return value; }
  Needs value;
};

// A struct of arguments, which stand one after the other.
template <class T, class Fields>
struct StructArgument;
template <class T, class... Field>
struct StructArgument<T, std::tuple<Field&...>> {
  explicit StructArgument(const StableIValue* v) : StructArgument(v, std::index_sequence_for<Field...>()) {}
  T get() const {
    T value;
    std::apply([&](const auto&... argument) { value.fields() = std::make_tuple(argument.get()...); }, arguments);
    return value;
  }

 private:
  template <size_t... I>
  StructArgument(const StableIValue* v, std::index_sequence<I...>) : arguments((v + I)...) {}
  std::tuple<Argument<Field>...> arguments;
};
template <class T>
struct Argument<T, std::enable_if_t<(kFields<T> > 1)>> : StructArgument<T, decltype(std::declval<T&>().fields())> {
  using StructArgument<T, decltype(std::declval<T&>().fields())>::StructArgument;
};

// ---------------------------------------------------------------- boxed functions
template <auto f>
struct Boxed;
template <size_t results, class... Args, Results<results> (*f)(Call&, Args...)>
struct Boxed<f> {
  static inline const char* op;

  static void call(StableIValue* stack, uint64_t num_args, uint64_t num_results) {
    if (num_args != (kFields<Args> + ...) || num_results != results)
      throw std::runtime_error(std::string("pygpt.") + op + ": the registered schema is not the kernel's");
    call(stack, std::index_sequence_for<Args...>());
  }

 private:
  template <size_t... I>
  static void call(StableIValue* stack, std::index_sequence<I...>) {
    // An argument of several fields is the last one, so argument I starts at place I.
    const std::tuple<Argument<Args>...> args((stack + I)...);
    DispatcherCall call(op);
    const Results<results> views = f(call, std::get<I>(args).get()...);
    for (size_t i = 0; i < results; i++) stack[i] = torch::stable::detail::from(call.take(views[i]));
  }
};

template <auto f>
void implement(torch::stable::detail::StableLibrary& library, const char* op) {
  Boxed<f>::op = op;
  library.impl(op, Boxed<f>::call);
}

// Registers every op in a STABLE_TORCH_LIBRARY_IMPL(_, _, m), with the kernels of namespace `device`.
#define PYGPT_IMPL(m, device) PYGPT_OPS(PYGPT_IMPL_OP, device)
#define PYGPT_IMPL_OP(op, kernel, results) pygpt::bind::implement<&pygpt::bind::op<kernel>>(m, #op);

}  // namespace pygpt::bind
