// gelu_fwd, gelu_bwd, relu_fwd, relu_bwd.
#pragma once
#include "check.h"

namespace pygpt::bind {

template <auto kernel>
Results<1> activation_fwd(Call& call, View x, Activation activation) {
  View y = call.empty(x.sizes);
  x = call.dense(x);
  call.run<kernel>(ActivationArgs{call.dtype(), activation, x.numel(), x.data, y.data, nullptr, nullptr});
  return {y};
}

// x: the activation's input, for relu its output.
template <auto kernel>
Results<1> activation_bwd(Call& call, View dy, View x, Activation activation) {
  call.check("dy", dy, x.sizes);
  View dx = call.empty(x.sizes);
  x = call.dense(x), dy = call.dense(dy);
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
  return activation_bwd<kernel>(call, dy, x, gelu_named(call, approximate));
}

template <auto kernel>
Results<1> relu_fwd(Call& call, View x) {
  call.lead(x);
  return activation_fwd<kernel>(call, x, Activation::relu);
}

template <auto kernel>
Results<1> relu_bwd(Call& call, View dy, View y) {
  call.lead(y);
  return activation_bwd<kernel>(call, dy, y, Activation::relu);
}

}  // namespace pygpt::bind
