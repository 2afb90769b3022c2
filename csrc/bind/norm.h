// The op bodies of the forward and backward of layer_norm, add_layer_norm, rms_norm and add_rms_norm.
#pragma once
#include "check.h"

namespace pygpt::bind {

inline NormArgs norm_args(Call& call, const View& x, const Maybe& weight, const Maybe& bias, double eps) {
  call.lead(x);
  call.at_least("x", x, 1);
  NormArgs a{};
  a.dtype = call.dtype();
  a.rows = product(leading(x)), a.cols = x.sizes.back(), a.eps = eps;
  call.check("weight", weight, {a.cols});
  call.check("bias", bias, {a.cols});
  return a;
}

struct Normed {
  View y, rstd, sum, mean;  // sum is set only with a residual, mean only if it is requested
};

// The forward of all four norms. `a` comes from norm_args.
template <auto kernel>
Normed norm_fwd(Call& call, NormArgs a, View x, Maybe residual, Maybe weight, Maybe bias, bool with_mean = true) {
  call.check("residual", residual, x.sizes);
  Normed out{call.empty(x.sizes), call.for_backward(leading(x), call.statistics())};
  if (residual) out.sum = call.empty(x.sizes);
  if (with_mean) out.mean = call.for_backward(leading(x), call.statistics());
  x = call.as_rows(x), residual = call.as_rows(residual), weight = call.contiguous(weight),
  bias = call.contiguous(bias);
  a.x = rows(x), a.residual = rows(residual), a.weight = pointer(weight), a.bias = pointer(bias);
  a.y = out.y.data, a.rstd = out.rstd.data, a.sum = out.sum.data, a.mean = out.mean.data;
  call.run<kernel>(a);
  return out;
}

// The inputs of the backward of all four norms. Those without a mean are rms_norm and add_rms_norm.
struct NormBwdInputs {
  View dy;
  Maybe dsum;
  View x;
  Maybe weight, mean;
  View rstd;
};

template <auto kernel>
Results<3> norm_bwd(Call& call, NormBwdInputs in, Needs needs) {
  NormArgs a = norm_args(call, in.x, in.weight, {}, 0.0);
  call.check("dy", in.dy, in.x.sizes);
  call.check("ds", in.dsum, in.x.sizes);
  if (in.mean) call.check("mean", *in.mean, leading(in.x), call.statistics());
  call.check("rstd", in.rstd, leading(in.x), call.statistics());
  View dx = call.empty_if(needs[0], in.x.sizes), dw = call.empty_if(needs[1], {a.cols});
  View db = in.mean ? call.empty_if(needs[2], {a.cols}) : View{};
  const View dy = call.as_rows(in.dy), x = call.as_rows(in.x), rstd = call.contiguous(in.rstd);
  const Maybe dsum = call.as_rows(in.dsum), weight = call.contiguous(in.weight), mean = call.contiguous(in.mean);
  a.dy = rows(dy), a.dsum = rows(dsum), a.x = rows(x), a.weight = pointer(weight);
  a.mean = const_cast<void*>(pointer(mean)), a.rstd = rstd.data;
  a.dx = dx.data, a.dw = dw.data, a.db = db.data;
  call.run<kernel>(a);
  return {dx, dw, db};
}

template <auto kernel>
Results<3> layer_norm_fwd(Call& call, View x, Maybe weight, Maybe bias, double eps) {
  const Normed out = norm_fwd<kernel>(call, norm_args(call, x, weight, bias, eps), x, {}, weight, bias);
  return {out.y, out.mean, out.rstd};
}

template <auto kernel>
Results<3> layer_norm_bwd(Call& call, View dy, View x, Maybe weight, View mean, View rstd, Needs needs) {
  call.check_count(needs, 3);
  return norm_bwd<kernel>(call, {dy, {}, x, weight, mean, rstd}, needs);
}

template <auto kernel>
Results<4> add_layer_norm_fwd(Call& call, View x, View residual, Maybe weight, Maybe bias, double eps) {
  const Normed out = norm_fwd<kernel>(call, norm_args(call, x, weight, bias, eps), x, residual, weight, bias);
  return {out.y, out.sum, out.mean, out.rstd};
}

template <auto kernel>
Results<3> add_layer_norm_bwd(Call& call, View dy, Maybe ds, View s, Maybe weight, View mean, View rstd, Needs needs) {
  call.check_count(needs, 3);
  return norm_bwd<kernel>(call, {dy, ds, s, weight, mean, rstd}, needs);
}

template <auto kernel>
Results<2> rms_norm_fwd(Call& call, View x, Maybe weight, double eps) {
  const Normed out = norm_fwd<kernel>(call, norm_args(call, x, weight, {}, eps), x, {}, weight, {}, false);
  return {out.y, out.rstd};
}

template <auto kernel>
Results<2> rms_norm_bwd(Call& call, View dy, View x, Maybe weight, View rstd, Needs needs) {
  call.check_count(needs, 2);
  const auto [dx, dw, db] = norm_bwd<kernel>(call, {dy, {}, x, weight, {}, rstd}, needs);
  return {dx, dw};
}

template <auto kernel>
Results<3> add_rms_norm_fwd(Call& call, View x, View residual, Maybe weight, double eps) {
  const Normed out = norm_fwd<kernel>(call, norm_args(call, x, weight, {}, eps), x, residual, weight, {}, false);
  return {out.y, out.sum, out.rstd};
}

template <auto kernel>
Results<2> add_rms_norm_bwd(Call& call, View dy, Maybe ds, View s, Maybe weight, View rstd, Needs needs) {
  call.check_count(needs, 2);
  const auto [dx, dw, db] = norm_bwd<kernel>(call, {dy, ds, s, weight, {}, rstd}, needs);
  return {dx, dw};
}

// X(op, its kernel, the number of results without those that only backward reads)
#define PYGPT_NORM_OPS(X, device)            \
  X(layer_norm_fwd, device::norm_fwd, 1)     \
  X(layer_norm_bwd, device::norm_bwd, 3)     \
  X(add_layer_norm_fwd, device::norm_fwd, 2) \
  X(add_layer_norm_bwd, device::norm_bwd, 3) \
  X(rms_norm_fwd, device::norm_fwd, 1)       \
  X(rms_norm_bwd, device::norm_bwd, 2)       \
  X(add_rms_norm_fwd, device::norm_fwd, 2)   \
  X(add_rms_norm_bwd, device::norm_bwd, 2)

}  // namespace pygpt::bind
