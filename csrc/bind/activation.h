// The op bodies of gelu_fwd, gelu_bwd, relu_fwd, relu_bwd.
#pragma once
#include "check.h"

namespace pygpt::bind {

inline Sizes common_strides(const View& first, const View& second) {
  if (first.is_contiguous() && second.is_contiguous()) return contiguous_strides(first.sizes);
  return dense_strides(first.sizes, {first.strides, second.strides});
}

// The kernels run over n contiguous elements, so x is copied unless its memory order is that of the result.
template <auto kernel>
Results<1> activation_fwd(Call& call, View x, Activation activation) {
  const Sizes stride = common_strides(x, x);
  View y = call.empty(x.sizes, stride);
  x = call.with_strides(x, stride);
  call.run<kernel>(ActivationArgs{call.dtype(), activation, x.numel(), x.data, y.data, nullptr, nullptr});
  return {y};
}

// x is the activation's input, or relu's output. `stride` is the strides of the result.
template <auto kernel>
Results<1> activation_bwd(Call& call, View dy, View x, Activation activation, Shape stride) {
  View dx = call.empty(x.sizes, stride);
  x = call.with_strides(x, stride), dy = call.with_strides(dy, stride);
  call.run<kernel>(ActivationArgs{call.dtype(), activation, x.numel(), x.data, x.data, dy.data, dx.data});
  return {dx};
}

inline Activation gelu_named(const Call& call, std::string_view approximate) {
  if (approximate == "none") return Activation::gelu;
  if (approximate == "tanh") return Activation::gelu_tanh;
  call.fail("approximate must be 'none' or 'tanh', got '" + std::string(approximate) + "'");
}

template <auto kernel>
Results<1> gelu_fwd(Call& call, View x, std::string_view approximate) {
  call.lead(x);
  return activation_fwd<kernel>(call, x, gelu_named(call, approximate));
}

template <auto kernel>
Results<1> gelu_bwd(Call& call, View dy, View x, std::string_view approximate) {
  call.lead(x);
  call.check("dy", dy, x.sizes);
  return activation_bwd<kernel>(call, dy, x, gelu_named(call, approximate), common_strides(dy, x));
}

template <auto kernel>
Results<1> relu_fwd(Call& call, View x) {
  call.lead(x);
  return activation_fwd<kernel>(call, x, Activation::relu);
}

template <auto kernel>
Results<1> relu_bwd(Call& call, View dy, View y) {
  call.lead(y);
  call.check("dy", dy, y.sizes);
  return activation_bwd<kernel>(call, dy, y, Activation::relu, common_strides(y, dy));  // torch considers y first
}

// X(op, its kernel, the number of results without those that only backward reads)
#define PYGPT_ACTIVATION_OPS(X, device)  \
  X(gelu_fwd, device::activation_fwd, 1) \
  X(gelu_bwd, device::activation_bwd, 1) \
  X(relu_fwd, device::activation_fwd, 1) \
  X(relu_bwd, device::activation_bwd, 1)

}  // namespace pygpt::bind
