// What stands between torch and a kernel, once for all devices: check, allocate, fill Args, launch.
//
// Each op is a template over the kernel entry points of a device; bind_cpu.cpp and bind_cuda.cpp instantiate it. The
// schemas (SCHEMAS below) equal the signatures of <op>_fwd and <op>_bwd in pygpt/reference.py. Nothing
// here computes. Failures raise RuntimeError naming the op, the argument and what it should be.
#pragma once
#include <string>
#include <tuple>

#include "call.h"

namespace pygpt::bind {

constexpr const char* SCHEMAS[] = {
    "attention_fwd(Tensor q, Tensor k, Tensor v, bool is_causal, float scale) -> (Tensor out, Tensor lse)",
    "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool is_causal, "
    "float scale, bool[] needs) -> (Tensor dq, Tensor dk, Tensor dv)",
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "linear_bwd(Tensor dy, Tensor x, Tensor weight, bool[] needs) -> (Tensor dx, Tensor dw, Tensor db)",
    "mlp_fwd(Tensor x, Tensor fc_weight, Tensor? fc_bias, Tensor proj_weight, Tensor? proj_bias, str activation) "
    "-> (Tensor y, Tensor hidden, Tensor pre)",
    "mlp_bwd(Tensor dy, Tensor x, Tensor fc_weight, Tensor proj_weight, Tensor hidden, Tensor pre, str activation, "
    "bool[] needs) -> (Tensor dx, Tensor dfc_weight, Tensor dfc_bias, Tensor dproj_weight, Tensor dproj_bias)",
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool[] needs) "
    "-> (Tensor dx, Tensor dw, Tensor db)",
    "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor y, Tensor s, Tensor mean, Tensor rstd)",
    "add_layer_norm_bwd(Tensor dy, Tensor? ds, Tensor s, Tensor? weight, Tensor mean, Tensor rstd, bool[] needs) "
    "-> (Tensor dx, Tensor dw, Tensor db)",
    "rms_norm_fwd(Tensor x, Tensor? weight, float eps) -> (Tensor y, Tensor rstd)",
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, bool[] needs) -> (Tensor dx, Tensor dw)",
    "gelu_fwd(Tensor x, str approximate) -> Tensor",
    "gelu_bwd(Tensor dy, Tensor x, str approximate) -> Tensor",
    "relu_fwd(Tensor x) -> Tensor",
    "relu_bwd(Tensor dy, Tensor y) -> Tensor",
};
// ---------------------------------------------------------------- attention
template <class Tensor>
AttentionArgs attention_args(const Call<Tensor>& call, const Tensor& q, const Tensor& k, const Tensor& v,
                             bool is_causal, double scale) {
  for (auto& [name, t] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}})
    if (t->dim() != 4) call.fail(std::string(name) + " must have 4 dimensions, got " + to_string(shape(*t)));
  AttentionArgs a{};
  a.dtype = call.dtype;
  a.batch = q.size(0), a.heads = q.size(1), a.q_len = q.size(2), a.head_dim = q.size(3);
  a.k_len = k.size(2), a.v_dim = v.size(3);
  if (k.size(1) != a.heads) call.fail("q and k must have as many heads; grouped heads are not served yet");
  if (a.head_dim > 256 || a.v_dim > 256) call.fail("head dimensions above 256 are not served");
  call.check("k", k, {a.batch, a.heads, a.k_len, a.head_dim});
  call.check("v", v, {a.batch, a.heads, a.k_len, a.v_dim});
  a.is_causal = is_causal, a.scale = scale;
  a.q = heads(q), a.k = heads(k), a.v = heads(v);
  return a;
}

template <class Tensor, auto kernel>
std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, bool is_causal, double scale) {
  Call<Tensor> call("attention_fwd", q);
  AttentionArgs a = attention_args(call, q, k, v, is_causal, scale);
  Tensor out = empty_heads(q, a.batch, a.heads, a.q_len, a.v_dim);
  Tensor lse = for_backward(q, {a.batch, a.heads, a.q_len}, call.statistics());
  a.out = heads(out), a.lse = lse.mutable_data_ptr();
  call.template run<kernel>(a);
  return {out, lse};
}

template <class Tensor, auto kernel>
std::tuple<Tensor, Tensor, Tensor> attention_bwd(Tensor dout, Maybe<Tensor> dlse, Tensor q, Tensor k, Tensor v,
                                                 Tensor out, Tensor lse, bool is_causal, double scale, Needs needs) {
  Call<Tensor> call("attention_bwd", q);
  AttentionArgs a = attention_args(call, q, k, v, is_causal, scale);
  call.count(needs, 3);
  call.check("dout", dout, {a.batch, a.heads, a.q_len, a.v_dim});
  call.check("out", out, {a.batch, a.heads, a.q_len, a.v_dim});
  call.check("lse", lse, {a.batch, a.heads, a.q_len}, call.statistics());
  if (dlse) call.check("dlse", *dlse, {a.batch, a.heads, a.q_len}, call.statistics());
  lse = dense(lse), dlse = dense(dlse);
  auto gradient = [&](bool need, int64_t length, int64_t channels) {
    return need ? empty_heads(q, a.batch, a.heads, length, channels) : empty(q, {0});
  };
  Tensor dq = gradient(needs[0], a.q_len, a.head_dim);
  Tensor dk = gradient(needs[1], a.k_len, a.head_dim);
  Tensor dv = gradient(needs[2], a.k_len, a.v_dim);
  a.dout = heads(dout), a.out = heads(out), a.lse = input(lse), a.dlse = input(dlse);
  if (needs[0]) a.dq = heads(dq);
  if (needs[1]) a.dk = heads(dk);
  if (needs[2]) a.dv = heads(dv);
  call.template run<kernel>(a);
  return {dq, dk, dv};
}

// ---------------------------------------------------------------- linear, mlp
template <class Tensor>
Activation activation_named(const Call<Tensor>& call, const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  if (name == "relu2") return Activation::relu2;
  call.fail("unknown activation '" + name + "'; known: gelu, gelu_tanh, relu, relu2");
}

template <class Tensor>
void check_matrix(const Call<Tensor>& call, const char* name, const Tensor& weight, int64_t in) {
  if (weight.dim() != 2) call.fail(std::string(name) + " must be a matrix, got " + to_string(shape(weight)));
  call.check(name, weight, {weight.size(0), in});
}

template <class Tensor>
LinearArgs linear_args(const Call<Tensor>& call, const Tensor& x, const Tensor& weight) {
  call.at_least("x", x, 1);
  check_matrix(call, "weight", weight, x.sizes().back());
  LinearArgs a{};
  a.dtype = call.dtype;
  a.rows = product(leading(x)), a.in = weight.size(1), a.out = weight.size(0);
  return a;
}

template <class Tensor, auto kernel>
Tensor linear_fwd(Tensor x, Tensor weight, Maybe<Tensor> bias) {
  Call<Tensor> call("linear_fwd", x);
  LinearArgs a = linear_args(call, x, weight);
  call.check("bias", bias, {a.out});
  Tensor y = empty(x, with_last(x, a.out));
  x = as_rows(x), weight = as_rows(weight), bias = dense(bias);
  a.x = rows(x), a.weight = rows(weight), a.bias = input(bias), a.y = rows(y);
  call.template run<kernel>(a);
  return y;
}

template <class Tensor, auto kernel>
std::tuple<Tensor, Tensor, Tensor> linear_bwd(Tensor dy, Tensor x, Tensor weight, Needs needs) {
  Call<Tensor> call("linear_bwd", x);
  LinearArgs a = linear_args(call, x, weight);
  call.count(needs, 3);
  call.check("dy", dy, with_last(x, a.out));
  Tensor dx = wanted(needs[0], x, shape(x)), dw = wanted(needs[1], x, {a.out, a.in}), db = wanted(needs[2], x, {a.out});
  dy = as_rows(dy), x = as_rows(x), weight = as_rows(weight);
  a.dy = rows(dy), a.x = rows(x), a.weight = rows(weight);
  a.dx = output(needs[0], dx), a.dw = output(needs[1], dw), a.db = output(needs[2], db);
  call.template run<kernel>(a);
  return {dx, dw, db};
}

template <class Tensor>
MlpArgs mlp_args(const Call<Tensor>& call, const Tensor& x, const Tensor& fc_weight, const Tensor& proj_weight,
                        const std::string& activation) {
  call.at_least("x", x, 1);
  check_matrix(call, "fc_weight", fc_weight, x.sizes().back());
  check_matrix(call, "proj_weight", proj_weight, fc_weight.size(0));
  MlpArgs a{};
  a.dtype = call.dtype;
  a.activation = activation_named(call, activation);
  a.rows = product(leading(x)), a.in = x.sizes().back(), a.hidden_dim = fc_weight.size(0), a.out = proj_weight.size(0);
  return a;
}

template <class Tensor, auto kernel>
std::tuple<Tensor, Tensor, Tensor> mlp_fwd(Tensor x, Tensor fc_weight, Maybe<Tensor> fc_bias, Tensor proj_weight,
                                           Maybe<Tensor> proj_bias, Text<Tensor> activation) {
  const std::string name = take(activation);
  Call<Tensor> call("mlp_fwd", x);
  MlpArgs a = mlp_args(call, x, fc_weight, proj_weight, name);
  call.check("fc_bias", fc_bias, {a.hidden_dim});
  call.check("proj_bias", proj_bias, {a.out});
  Tensor y = empty(x, with_last(x, a.out)), hidden = for_backward(x, with_last(x, a.hidden_dim), x.scalar_type());
  const bool keeps_pre = saves_input(a.activation) && has_backward(x);
  Tensor pre = wanted(keeps_pre, x, with_last(x, a.hidden_dim));
  x = as_rows(x), fc_weight = as_rows(fc_weight), proj_weight = as_rows(proj_weight);
  fc_bias = dense(fc_bias), proj_bias = dense(proj_bias);
  a.x = rows(x), a.fc_weight = rows(fc_weight), a.proj_weight = rows(proj_weight);
  a.fc_bias = input(fc_bias), a.proj_bias = input(proj_bias);
  a.y = y.mutable_data_ptr(), a.hidden = hidden.mutable_data_ptr(), a.pre = output(keeps_pre, pre);
  call.template run<kernel>(a);
  return {y, hidden, pre};
}

template <class Tensor, auto kernel>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_bwd(Tensor dy, Tensor x, Tensor fc_weight, Tensor proj_weight,
                                                           Tensor hidden, Tensor pre, Text<Tensor> activation,
                                                           Needs needs) {
  const std::string name = take(activation);
  Call<Tensor> call("mlp_bwd", x);
  MlpArgs a = mlp_args(call, x, fc_weight, proj_weight, name);
  call.count(needs, 5);
  call.check("dy", dy, with_last(x, a.out));
  call.check("hidden", hidden, with_last(x, a.hidden_dim));
  if (saves_input(a.activation)) call.check("pre", pre, shape(hidden));
  Tensor dx = wanted(needs[0], x, shape(x));
  Tensor dfc_weight = wanted(needs[1], x, shape(fc_weight)), dfc_bias = wanted(needs[2], x, {a.hidden_dim});
  Tensor dproj_weight = wanted(needs[3], x, shape(proj_weight)), dproj_bias = wanted(needs[4], x, {a.out});
  const bool inner = needs[0] || needs[1] || needs[2];
  Tensor dpre = wanted(inner, x, shape(hidden));
  dy = as_rows(dy), x = as_rows(x), fc_weight = as_rows(fc_weight), proj_weight = as_rows(proj_weight);
  hidden = dense(hidden), pre = dense(pre);
  a.dy = rows(dy), a.x = rows(x), a.fc_weight = rows(fc_weight), a.proj_weight = rows(proj_weight);
  a.hidden = input(hidden), a.pre = saves_input(a.activation) ? input(pre) : nullptr, a.dpre = output(inner, dpre);
  a.dx = output(needs[0], dx), a.dfc_weight = output(needs[1], dfc_weight), a.dfc_bias = output(needs[2], dfc_bias);
  a.dproj_weight = output(needs[3], dproj_weight), a.dproj_bias = output(needs[4], dproj_bias);
  call.template run<kernel>(a);
  return {dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias};
}

// ---------------------------------------------------------------- norms
template <class Tensor>
NormArgs norm_args(const Call<Tensor>& call, const Tensor& x, const Maybe<Tensor>& weight, const Maybe<Tensor>& bias,
                   double eps) {
  call.at_least("x", x, 1);
  NormArgs a{};
  a.dtype = call.dtype;
  a.rows = product(leading(x)), a.cols = x.sizes().back(), a.eps = eps;
  call.check("weight", weight, {a.cols});
  call.check("bias", bias, {a.cols});
  return a;
}

template <class Tensor>
struct Normed {
  Tensor y, rstd;
  Maybe<Tensor> sum, mean;  // where there is a residual; where asked for
};

// The forward of all three.
template <class Tensor, auto kernel>
Normed<Tensor> norm_fwd(const Call<Tensor>& call, Tensor x, Maybe<Tensor> residual, Maybe<Tensor> weight,
                        Maybe<Tensor> bias, double eps, bool with_mean = true) {
  NormArgs a = norm_args(call, x, weight, bias, eps);
  call.check("residual", residual, shape(x));
  Normed<Tensor> out{empty(x, shape(x)), for_backward(x, leading(x), call.statistics())};
  if (residual) out.sum = empty(x, shape(x)), a.sum = out.sum->mutable_data_ptr();
  if (with_mean) out.mean = for_backward(x, leading(x), call.statistics()), a.mean = out.mean->mutable_data_ptr();
  x = as_rows(x), weight = dense(weight), bias = dense(bias);
  if (residual) residual = as_rows(*residual);
  a.x = rows(x), a.residual = rows(residual), a.weight = input(weight), a.bias = input(bias);
  a.y = out.y.mutable_data_ptr(), a.rstd = out.rstd.mutable_data_ptr();
  call.template run<kernel>(a);
  return out;
}

// The backward of all three; without a mean it is rms_norm's.
template <class Tensor, auto kernel>
std::tuple<Tensor, Tensor, Tensor> norm_bwd(const Call<Tensor>& call, Tensor dy, Maybe<Tensor> dsum, Tensor x,
                                            Maybe<Tensor> weight, Maybe<Tensor> mean, Tensor rstd, bool need_dx,
                                            bool need_dw, bool need_db) {
  NormArgs a = norm_args<Tensor>(call, x, weight, std::nullopt, 0.0);
  call.check("dy", dy, shape(x));
  call.check("ds", dsum, shape(x));
  if (mean) call.check("mean", *mean, leading(x), call.statistics());
  call.check("rstd", rstd, leading(x), call.statistics());
  Tensor dx = wanted(need_dx, x, shape(x)), dw = wanted(need_dw, x, {a.cols}), db = wanted(need_db, x, {a.cols});
  dy = as_rows(dy), x = as_rows(x), weight = dense(weight), mean = dense(mean), rstd = dense(rstd);
  if (dsum) dsum = as_rows(*dsum);
  a.dy = rows(dy), a.dsum = rows(dsum), a.x = rows(x), a.weight = input(weight);
  a.mean = mean ? input(*mean) : nullptr, a.rstd = input(rstd);
  a.dx = output(need_dx, dx), a.dw = output(need_dw, dw), a.db = output(need_db, db);
  call.template run<kernel>(a);
  return {dx, dw, db};
}

template <class Tensor, auto kernel>
std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(Tensor x, Maybe<Tensor> weight, Maybe<Tensor> bias, double eps) {
  auto [y, rstd, sum, mean] = norm_fwd<Tensor, kernel>(Call<Tensor>("layer_norm_fwd", x), x, {}, weight, bias, eps);
  return {y, *mean, rstd};
}

template <class Tensor, auto kernel>
std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(Tensor dy, Tensor x, Maybe<Tensor> weight, Tensor mean, Tensor rstd,
                                                  Needs needs) {
  Call<Tensor> call("layer_norm_bwd", x);
  call.count(needs, 3);
  return norm_bwd<Tensor, kernel>(call, dy, {}, x, weight, mean, rstd, needs[0], needs[1], needs[2]);
}

template <class Tensor, auto kernel>
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(Tensor x, Tensor residual, Maybe<Tensor> weight,
                                                              Maybe<Tensor> bias, double eps) {
  auto [y, rstd, sum, mean] =
      norm_fwd<Tensor, kernel>(Call<Tensor>("add_layer_norm_fwd", x), x, residual, weight, bias, eps);
  return {y, *sum, *mean, rstd};
}

template <class Tensor, auto kernel>
std::tuple<Tensor, Tensor, Tensor> add_layer_norm_bwd(Tensor dy, Maybe<Tensor> ds, Tensor s, Maybe<Tensor> weight,
                                                      Tensor mean, Tensor rstd, Needs needs) {
  Call<Tensor> call("add_layer_norm_bwd", s);
  call.count(needs, 3);
  return norm_bwd<Tensor, kernel>(call, dy, ds, s, weight, mean, rstd, needs[0], needs[1], needs[2]);
}

template <class Tensor, auto kernel>
std::tuple<Tensor, Tensor> rms_norm_fwd(Tensor x, Maybe<Tensor> weight, double eps) {
  auto [y, rstd, sum, mean] = norm_fwd<Tensor, kernel>(Call<Tensor>("rms_norm_fwd", x), x, {}, weight, {}, eps, false);
  return {y, rstd};
}

template <class Tensor, auto kernel>
std::tuple<Tensor, Tensor> rms_norm_bwd(Tensor dy, Tensor x, Maybe<Tensor> weight, Tensor rstd, Needs needs) {
  Call<Tensor> call("rms_norm_bwd", x);
  call.count(needs, 2);
  auto [dx, dw, db] = norm_bwd<Tensor, kernel>(call, dy, {}, x, weight, {}, rstd, needs[0], needs[1], false);
  return {dx, dw};
}

// ---------------------------------------------------------------- activations
template <class Tensor, auto kernel>
Tensor activation_fwd(const Call<Tensor>& call, Tensor x, Activation activation) {
  Tensor y = empty(x, shape(x));
  x = dense(x);
  call.template run<kernel>(
      ActivationArgs{call.dtype, activation, x.numel(), input(x), y.mutable_data_ptr(), nullptr, nullptr});
  return y;
}

// x: the input, for relu its output.
template <class Tensor, auto kernel>
Tensor activation_bwd(const Call<Tensor>& call, Tensor dy, Tensor x, Activation activation) {
  call.check("dy", dy, shape(x));
  Tensor dx = empty(x, shape(x));
  x = dense(x), dy = dense(dy);
  call.template run<kernel>(
      ActivationArgs{call.dtype, activation, x.numel(), input(x), input(x), input(dy), dx.mutable_data_ptr()});
  return dx;
}

template <class Tensor>
Activation gelu_named(const Call<Tensor>& call, const std::string& approximate) {
  if (approximate == "none") return Activation::gelu;
  if (approximate == "tanh") return Activation::gelu_tanh;
  call.fail("approximate must be 'none' or 'tanh', got '" + approximate + "'");
}

template <class Tensor, auto kernel>
Tensor gelu_fwd(Tensor x, Text<Tensor> approximate) {
  const std::string name = take(approximate);
  Call<Tensor> call("gelu_fwd", x);
  return activation_fwd<Tensor, kernel>(call, x, gelu_named(call, name));
}

template <class Tensor, auto kernel>
Tensor gelu_bwd(Tensor dy, Tensor x, Text<Tensor> approximate) {
  const std::string name = take(approximate);
  Call<Tensor> call("gelu_bwd", x);
  return activation_bwd<Tensor, kernel>(call, dy, x, gelu_named(call, name));
}

template <class Tensor, auto kernel>
Tensor relu_fwd(Tensor x) {
  return activation_fwd<Tensor, kernel>(Call<Tensor>("relu_fwd", x), x, Activation::relu);
}

template <class Tensor, auto kernel>
Tensor relu_bwd(Tensor dy, Tensor y) {
  return activation_bwd<Tensor, kernel>(Call<Tensor>("relu_bwd", y), dy, y, Activation::relu);
}

// Every op, the kernel that it runs, and how many of its results are not for the backward pass alone.
#define PYGPT_OPS(X, device)                            \
  X(attention_fwd, device::attention_fwd, 1)            \
  X(attention_bwd, device::attention_bwd, 3)            \
  X(linear_fwd, device::linear_fwd, 1)                  \
  X(linear_bwd, device::linear_bwd, 3)                  \
  X(mlp_fwd, device::mlp_fwd, 1)                        \
  X(mlp_bwd, device::mlp_bwd, 5)                        \
  X(layer_norm_fwd, device::norm_fwd, 1)                \
  X(layer_norm_bwd, device::norm_bwd, 3)                \
  X(add_layer_norm_fwd, device::norm_fwd, 2)            \
  X(add_layer_norm_bwd, device::norm_bwd, 3)            \
  X(rms_norm_fwd, device::norm_fwd, 1)                  \
  X(rms_norm_bwd, device::norm_bwd, 2)                  \
  X(gelu_fwd, device::activation_fwd, 1)                \
  X(gelu_bwd, device::activation_bwd, 1)                \
  X(relu_fwd, device::activation_fwd, 1)                \
  X(relu_bwd, device::activation_bwd, 1)

// Registers them with torch's dispatcher, with the kernels of namespace `device`.
#define PYGPT_IMPL(m, device) PYGPT_OPS(PYGPT_IMPL_OP, device)
#define PYGPT_IMPL_OP(op, kernel, results) m.impl(#op, TORCH_BOX((&pygpt::bind::op<torch::stable::Tensor, kernel>)));

}  // namespace pygpt::bind
