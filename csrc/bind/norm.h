// The op bodies of the forward and backward of the norms: layer_norm and rms_norm, of a tensor, of a sum (add_) and of
// a sum with dropout (dropout_add_).
#pragma once
#include "dropout.h"

namespace pygpt::bind {

inline NormArgs norm_args(Call& call, const View& x, double eps) {
  call.lead(x);
  call.at_least("x", x, 1);
  NormArgs a{};
  a.dtype = a.sum_dtype = a.parameter_dtype = call.dtype();
  a.rows = product(leading(x)), a.cols = x.sizes.back(), a.eps = eps;
  return a;
}

struct NormInputs {
  View x;
  Maybe residual, weight, bias;
  bool has_mean;
};

struct Normed {
  View y, rstd, sum, mean;  // sum is set only with a residual, mean only if it is requested
};

// The forward of every norm. `a` comes from norm_args. `sum` and `parameters` are the types of the residual and of the
// parameters.
template <auto kernel>
Normed norm_fwd(Call& call, NormArgs a, NormInputs in, ScalarType sum, ScalarType parameters) {
  const View x = in.x;
  call.check("weight", in.weight, {a.cols}, parameters);
  call.check("bias", in.bias, {a.cols}, parameters);
  call.check("residual", in.residual, x.sizes, sum);
  a.sum_dtype = kernel_dtype(sum), a.parameter_dtype = kernel_dtype(parameters);
  Normed out{call.empty(x.sizes), call.for_backward(leading(x), call.statistics())};
  if (in.residual) out.sum = call.empty(x.sizes, contiguous_strides(x.sizes), sum);
  if (in.has_mean) out.mean = call.for_backward(leading(x), call.statistics());
  const View x_rows = call.as_rows(x);
  const Maybe residual = call.as_rows(in.residual), weight = call.contiguous(in.weight),
              bias = call.contiguous(in.bias);
  a.x = rows(x_rows), a.residual = rows(residual), a.weight = pointer(weight), a.bias = pointer(bias);
  a.y = out.y.data, a.rstd = out.rstd.data, a.sum = out.sum.data, a.mean = out.mean.data;
  call.run<kernel>(a);
  return out;
}

template <auto kernel>
Normed norm_fwd(Call& call, NormArgs a, const NormInputs& in) {
  return norm_fwd<kernel>(call, a, in, in.x.type, in.x.type);
}

// The inputs of the backward of every norm. Those without a mean are the rms_norms.
struct NormBwdInputs {
  View dy;
  Maybe dsum;
  View x;
  Maybe weight, mean;
  View rstd;
};

// dx, dweight, dbias, and dresidual where it is another tensor than dx.
template <auto kernel>
Results<4> norm_bwd(Call& call, NormArgs a, NormBwdInputs in, std::array<bool, 4> needs, ScalarType parameters) {
  const ScalarType sum = in.x.type;
  call.check("x", in.x, in.x.sizes, sum);
  call.check("dy", in.dy, in.x.sizes);
  call.check("ds", in.dsum, in.x.sizes, sum);
  call.check("weight", in.weight, {a.cols}, parameters);
  if (in.mean) call.check("mean", *in.mean, leading(in.x), call.statistics());
  call.check("rstd", in.rstd, leading(in.x), call.statistics());
  a.sum_dtype = kernel_dtype(sum), a.parameter_dtype = kernel_dtype(parameters);
  const Sizes strides = contiguous_strides(in.x.sizes);
  View dx = call.empty_if(needs[0], in.x.sizes);
  View dw = call.empty_if(needs[1], {a.cols}, {1}, parameters), db, dresidual;
  if (in.mean) db = call.empty_if(needs[2], {a.cols}, {1}, parameters);
  if (needs[3]) dresidual = call.empty(in.x.sizes, strides, sum);
  const View dy = call.as_rows(in.dy), x = call.as_rows(in.x), rstd = call.contiguous(in.rstd);
  const Maybe dsum = call.as_rows(in.dsum), weight = call.contiguous(in.weight), mean = call.contiguous(in.mean);
  a.dy = rows(dy), a.dsum = rows(dsum), a.x = rows(x), a.weight = pointer(weight);
  a.mean = const_cast<void*>(pointer(mean)), a.rstd = rstd.data;
  a.dx = dx.data, a.dresidual = dresidual.data, a.dw = dw.data, a.db = db.data;
  call.run<kernel>(a);
  return {dx, dw, db, dresidual};
}

// ---------------------------------------------------------------- layer_norm, rms_norm
template <auto kernel>
Results<3> layer_norm_fwd(Call& call, View x, Maybe weight, Maybe bias, double eps) {
  const Normed out = norm_fwd<kernel>(call, norm_args(call, x, eps), {x, {}, weight, bias, true});
  return {out.y, out.mean, out.rstd};
}

template <auto kernel>
Results<3> layer_norm_bwd(Call& call, View dy, View x, Maybe weight, View mean, View rstd, Needs needs) {
  call.check_count(needs, 3);
  const auto [dx, dw, db, _] = norm_bwd<kernel>(call, norm_args(call, x, 0), {dy, {}, x, weight, mean, rstd},
                                                {needs[0], needs[1], needs[2]}, x.type);
  return {dx, dw, db};
}

template <auto kernel>
Results<2> rms_norm_fwd(Call& call, View x, Maybe weight, double eps, double weight_offset) {
  NormArgs a = norm_args(call, x, eps);
  a.weight_offset = weight_offset;
  const Normed out = norm_fwd<kernel>(call, a, {x, {}, weight, {}, false});
  return {out.y, out.rstd};
}

template <auto kernel>
Results<2> rms_norm_bwd(Call& call, View dy, View x, Maybe weight, View rstd, Needs needs, double weight_offset) {
  call.check_count(needs, 2);
  NormArgs a = norm_args(call, x, 0);
  a.weight_offset = weight_offset;
  const auto out = norm_bwd<kernel>(call, a, {dy, {}, x, weight, {}, rstd}, {needs[0], needs[1]}, x.type);
  return {out[0], out[1]};
}

// ---------------------------------------------------------------- of a sum
template <auto kernel>
Results<4> add_layer_norm_fwd(Call& call, View x, View residual, Maybe weight, Maybe bias, double eps) {
  const Normed out = norm_fwd<kernel>(call, norm_args(call, x, eps), {x, residual, weight, bias, true});
  return {out.y, out.sum, out.mean, out.rstd};
}

template <auto kernel>
Results<3> add_layer_norm_bwd(Call& call, View dy, Maybe ds, View s, Maybe weight, View mean, View rstd, Needs needs) {
  call.check_count(needs, 3);
  const auto [dx, dw, db, _] = norm_bwd<kernel>(call, norm_args(call, s, 0), {dy, ds, s, weight, mean, rstd},
                                                {needs[0], needs[1], needs[2]}, s.type);
  return {dx, dw, db};
}

template <auto kernel>
Results<3> add_rms_norm_fwd(Call& call, View x, View residual, Maybe weight, double eps, double weight_offset) {
  NormArgs a = norm_args(call, x, eps);
  a.weight_offset = weight_offset;
  const Normed out = norm_fwd<kernel>(call, a, {x, residual, weight, {}, false});
  return {out.y, out.sum, out.rstd};
}

template <auto kernel>
Results<2> add_rms_norm_bwd(Call& call, View dy, Maybe ds, View s, Maybe weight, View rstd, Needs needs,
                            double weight_offset) {
  call.check_count(needs, 2);
  NormArgs a = norm_args(call, s, 0);
  a.weight_offset = weight_offset;
  const auto out = norm_bwd<kernel>(call, a, {dy, ds, s, weight, {}, rstd}, {needs[0], needs[1]}, s.type);
  return {out[0], out[1]};
}

// ---------------------------------------------------------------- of a sum with dropout
// The arguments at the end. pygpt/ops/dropout_norm.py has the meaning.
struct LayerNormDropout {
  Maybe seed;
  double dropout_p = 0;
  auto fields() { return std::tie(seed, dropout_p); }
};
struct RMSNormDropout {
  Maybe seed;
  double dropout_p = 0, weight_offset = 0;
  auto fields() { return std::tie(seed, dropout_p, weight_offset); }
};

template <auto kernel>
Normed dropout_norm_fwd(Call& call, const NormInputs& in, double eps, const RMSNormDropout& o) {
  NormArgs a = norm_args(call, in.x, eps);
  a.weight_offset = o.weight_offset;
  set_dropout(call, a, o.seed, o.dropout_p);
  const Maybe& parameter = in.weight ? in.weight : in.bias;
  const char* name = in.weight ? "weight" : "bias";
  const ScalarType parameters = parameter ? call.type_or_statistics(name, *parameter) : in.x.type;
  return norm_fwd<kernel>(call, a, in, call.type_or_statistics("residual", *in.residual), parameters);
}

// dx, dresidual, dweight, dbias; needs has the same order. The parameters' gradients have the type of the weight, or of
// the statistics without one.
template <auto kernel>
Results<4> dropout_norm_bwd(Call& call, const NormBwdInputs& in, std::array<bool, 4> needs, const RMSNormDropout& o) {
  NormArgs a = norm_args(call, in.dy, 0);
  a.weight_offset = o.weight_offset;
  set_dropout(call, a, o.seed, o.dropout_p);
  const ScalarType sum = call.type_or_statistics("s", in.x);
  ScalarType parameters = in.weight ? call.type_or_statistics("weight", *in.weight) : call.statistics();
  if (!in.weight && !needs[2] && !needs[3]) parameters = in.dy.type;
  const bool same = !o.seed && sum == in.dy.type;  // dx is dresidual
  const bool as_dx = same && needs[1] && !needs[0];
  auto [dx, dw, db, dresidual] =
      norm_bwd<kernel>(call, a, in, {needs[0] || as_dx, needs[2], needs[3], needs[1] && !as_dx}, parameters);
  if (as_dx) std::swap(dx, dresidual);
  if (!needs[0]) dx = call.empty_if(false, {}, {}, in.dy.type);
  if (!needs[1]) dresidual = call.empty_if(false, {}, {}, sum);
  return {dx, dresidual, dw, db};
}

template <auto kernel>
Results<4> dropout_add_layer_norm_fwd(Call& call, View x, View residual, Maybe weight, Maybe bias, double eps,
                                      LayerNormDropout o) {
  const Normed out = dropout_norm_fwd<kernel>(call, {x, residual, weight, bias, true}, eps, {o.seed, o.dropout_p});
  return {out.y, out.sum, out.mean, out.rstd};
}

template <auto kernel>
Results<4> dropout_add_layer_norm_bwd(Call& call, View dy, Maybe ds, View s, Maybe weight, View mean, View rstd,
                                      Needs needs, LayerNormDropout o) {
  call.check_count(needs, 4);
  return dropout_norm_bwd<kernel>(call, {dy, ds, s, weight, mean, rstd}, {needs[0], needs[1], needs[2], needs[3]},
                                  {o.seed, o.dropout_p});
}

template <auto kernel>
Results<3> dropout_add_rms_norm_fwd(Call& call, View x, View residual, Maybe weight, double eps, RMSNormDropout o) {
  const Normed out = dropout_norm_fwd<kernel>(call, {x, residual, weight, {}, false}, eps, o);
  return {out.y, out.sum, out.rstd};
}

template <auto kernel>
Results<3> dropout_add_rms_norm_bwd(Call& call, View dy, Maybe ds, View s, Maybe weight, View rstd, Needs needs,
                                    RMSNormDropout o) {
  call.check_count(needs, 3);
  const auto [dx, dresidual, dw, db] =
      dropout_norm_bwd<kernel>(call, {dy, ds, s, weight, {}, rstd}, {needs[0], needs[1], needs[2]}, o);
  return {dx, dresidual, dw};
}

// X(op, its kernel, the number of results without those that only backward reads)
#define PYGPT_NORM_OPS(X, device)                    \
  X(layer_norm_fwd, device::norm_fwd, 1)             \
  X(layer_norm_bwd, device::norm_bwd, 3)             \
  X(add_layer_norm_fwd, device::norm_fwd, 2)         \
  X(add_layer_norm_bwd, device::norm_bwd, 3)         \
  X(rms_norm_fwd, device::norm_fwd, 1)               \
  X(rms_norm_bwd, device::norm_bwd, 2)               \
  X(add_rms_norm_fwd, device::norm_fwd, 2)           \
  X(add_rms_norm_bwd, device::norm_bwd, 2)           \
  X(dropout_add_layer_norm_fwd, device::norm_fwd, 2) \
  X(dropout_add_layer_norm_bwd, device::norm_bwd, 4) \
  X(dropout_add_rms_norm_fwd, device::norm_fwd, 2)   \
  X(dropout_add_rms_norm_bwd, device::norm_bwd, 3)

}  // namespace pygpt::bind
