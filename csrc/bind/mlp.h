// The op bodies of linear_fwd, linear_bwd, mlp_fwd, mlp_bwd.
#pragma once
#include "check.h"

namespace pygpt::bind {

inline void check_matrix(const Call& call, const char* name, const View& weight, int64_t in) {
  if (weight.dim() != 2) call.fail(std::string(name) + " must be a matrix, got " + to_string(weight.sizes));
  call.check(name, weight, {weight.size(0), in});
}

inline LinearArgs linear_args(Call& call, const View& x, const View& weight) {
  call.lead(x);
  call.at_least("x", x, 1);
  check_matrix(call, "weight", weight, x.sizes.back());
  LinearArgs a{};
  a.dtype = call.dtype();
  a.rows = product(leading(x)), a.in = weight.size(1), a.out = weight.size(0);
  return a;
}

template <auto kernel>
Results<1> linear_fwd(Call& call, View x, View weight, Maybe bias) {
  LinearArgs a = linear_args(call, x, weight);
  call.check("bias", bias, {a.out});
  View y = call.empty(with_last(x, a.out));
  x = call.as_rows(x), weight = call.as_rows(weight), bias = call.contiguous(bias);
  a.x = rows(x), a.weight = rows(weight), a.bias = pointer(bias), a.y = rows(y);
  call.run<kernel>(a);
  return {y};
}

template <auto kernel>
Results<3> linear_bwd(Call& call, View dy, View x, View weight, Needs needs) {
  LinearArgs a = linear_args(call, x, weight);
  call.check_count(needs, 3);
  call.check("dy", dy, with_last(x, a.out));
  View dx = call.empty_if(needs[0], x.sizes), dw = call.empty_if(needs[1], {a.out, a.in});
  View db = call.empty_if(needs[2], {a.out});
  dy = call.as_rows(dy), x = call.as_rows(x), weight = call.as_rows(weight);
  a.dy = rows(dy), a.x = rows(x), a.weight = rows(weight);
  a.dx = dx.data, a.dw = dw.data, a.db = db.data;
  call.run<kernel>(a);
  return {dx, dw, db};
}

// ---------------------------------------------------------------- mlp
struct MlpActivation {
  const char* name;
  Activation activation;
  bool gated;
};
constexpr MlpActivation mlp_activations[] = {
    {"gelu", Activation::gelu, false},   {"gelu_tanh", Activation::gelu_tanh, false}, {"relu", Activation::relu, false},
    {"relu2", Activation::relu2, false}, {"swiglu", Activation::silu, true},          {"geglu", Activation::gelu, true},
};

inline const MlpActivation& activation_named(const Call& call, std::string_view name) {
  std::string known;
  for (const MlpActivation& a : mlp_activations) {
    if (name == a.name) return a;
    known += (known.empty() ? "" : ", ") + std::string(a.name);
  }
  call.fail("unknown activation '" + std::string(name) + "'; known: " + known);
}

// Whether mlp_fwd returns hidden and pre, or leaves it to backward to compute them again.
inline bool saves_all(const Call& call, std::string_view save) {
  if (save != "all" && save != "input") call.fail("save must be 'all' or 'input', got '" + std::string(save) + "'");
  return save == "all";
}

inline MlpArgs mlp_args(Call& call, const View& x, const View& fc_weight, const View& proj_weight,
                        std::string_view activation) {
  call.lead(x);
  call.at_least("x", x, 1);
  check_matrix(call, "fc_weight", fc_weight, x.sizes.back());
  const MlpActivation& named = activation_named(call, activation);
  const int64_t fc_dim = fc_weight.size(0);
  if (named.gated && fc_dim % 2)
    call.fail("fc_weight must have an even number of rows for " + std::string(named.name) + ", got " +
              std::to_string(fc_dim));
  MlpArgs a{};
  a.dtype = call.dtype(), a.activation = named.activation, a.gated = named.gated;
  a.rows = product(leading(x)), a.in = x.sizes.back(), a.hidden_dim = named.gated ? fc_dim / 2 : fc_dim;
  check_matrix(call, "proj_weight", proj_weight, a.hidden_dim);
  a.out = proj_weight.size(0);
  return a;
}

template <auto kernel>
Results<3> mlp_fwd(Call& call, View x, View fc_weight, Maybe fc_bias, View proj_weight, Maybe proj_bias,
                   std::string_view activation, std::string_view save) {
  MlpArgs a = mlp_args(call, x, fc_weight, proj_weight, activation);
  call.check("fc_bias", fc_bias, {a.fc_dim()});
  call.check("proj_bias", proj_bias, {a.out});
  const bool saves = saves_all(call, save) && call.has_backward();
  View y = call.empty(with_last(x, a.out)), hidden, pre;
  if (call.has_backward()) {
    hidden = call.empty_if(saves, with_last(x, a.hidden_dim));
    pre = call.empty_if(saves && saves_input(a.activation), with_last(x, a.fc_dim()));
  }
  a.hidden = saves ? hidden.data : call.scratch(with_last(x, a.hidden_dim)).data;
  x = call.as_rows(x), fc_weight = call.as_rows(fc_weight), proj_weight = call.as_rows(proj_weight);
  fc_bias = call.contiguous(fc_bias), proj_bias = call.contiguous(proj_bias);
  a.x = rows(x), a.fc_weight = rows(fc_weight), a.proj_weight = rows(proj_weight);
  a.fc_bias = pointer(fc_bias), a.proj_bias = pointer(proj_bias);
  a.y = y.data, a.pre = pre.data;
  call.run<kernel>(a);
  return {y, hidden, pre};
}

template <auto kernel>
Results<5> mlp_bwd(Call& call, View dy, View x, View fc_weight, View proj_weight, View hidden, View pre,
                   std::string_view activation, Needs needs) {
  MlpArgs a = mlp_args(call, x, fc_weight, proj_weight, activation);
  const bool reads_pre = saves_input(a.activation), inner = needs[0] || needs[1] || needs[2];
  call.check_count(needs, 5);
  call.check("dy", dy, with_last(x, a.out));
  call.check("hidden", hidden, with_last(x, a.hidden_dim));
  if (reads_pre) call.check("pre", pre, with_last(x, a.fc_dim()));
  View dx = call.empty_if(needs[0], x.sizes);
  View dfc_weight = call.empty_if(needs[1], fc_weight.sizes), dfc_bias = call.empty_if(needs[2], {a.fc_dim()});
  View dproj_weight = call.empty_if(needs[3], proj_weight.sizes), dproj_bias = call.empty_if(needs[4], {a.out});
  if (inner) a.dpre = call.scratch(with_last(x, a.fc_dim())).data;
  dy = call.as_rows(dy), x = call.as_rows(x), fc_weight = call.as_rows(fc_weight);
  proj_weight = call.as_rows(proj_weight), hidden = call.contiguous(hidden);
  if (reads_pre) a.pre = call.contiguous(pre).data;
  a.dy = rows(dy), a.x = rows(x), a.fc_weight = rows(fc_weight), a.proj_weight = rows(proj_weight);
  a.hidden = hidden.data;
  a.dx = dx.data, a.dfc_weight = dfc_weight.data, a.dfc_bias = dfc_bias.data;
  a.dproj_weight = dproj_weight.data, a.dproj_bias = dproj_bias.data;
  call.run<kernel>(a);
  return {dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias};
}

// X(op, its kernel, the number of results without those that only backward reads)
#define PYGPT_MLP_OPS(X, device)       \
  X(linear_fwd, device::linear_fwd, 1) \
  X(linear_bwd, device::linear_bwd, 3) \
  X(mlp_fwd, device::mlp_fwd, 1)       \
  X(mlp_bwd, device::mlp_bwd, 5)

}  // namespace pygpt::bind
