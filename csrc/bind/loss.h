// The op bodies of the forward and backward of cross_entropy and linear_cross_entropy.
#pragma once
#include "mlp.h"

namespace pygpt::bind {

// The arguments after the leading ones. pygpt/ops/loss.py has the meaning.
struct LossOptions {
  int64_t ignore_index = -100;
  Maybe weight;
  std::string_view reduction = "mean";
  double label_smoothing = 0, z_loss = 0;

  auto fields() { return std::tie(ignore_index, weight, reduction, label_smoothing, z_loss); }
};

inline Reduction reduction_named(const Call& call, std::string_view name) {
  if (name == "none") return Reduction::none;
  if (name == "mean") return Reduction::mean;
  if (name == "sum") return Reduction::sum;
  call.fail("reduction must be 'none', 'mean' or 'sum', got '" + std::string(name) + "'");
}

// On a GPU the classes are not checked, because reading them would wait for it.
inline void check_classes(const Call& call, const CrossEntropyArgs& a) {
  for (int64_t i = 0; i < a.rows; i++)
    if ((a.target[i] < 0 || a.target[i] >= a.classes) && a.target[i] != a.ignore_index)
      call.fail_index("target has the class " + std::to_string(a.target[i]) + " in row " + std::to_string(i) +
                      "; classes are from 0 to " + std::to_string(a.classes - 1) + ", and ignore_index is " +
                      std::to_string(a.ignore_index));
}

// The loss of `rows` rows of `classes` logits. Makes target and the weight contiguous.
template <bool on_cpu>
CrossEntropyArgs loss_args(Call& call, int64_t rows, int64_t classes, View& target, LossOptions& options) {
  if (classes < 1) call.fail("the logits need at least 1 class");
  CrossEntropyArgs a{};
  a.dtype = call.dtype(), a.rows = rows, a.classes = classes;
  call.check("target", target, {rows}, ScalarType::Long);
  if (options.weight) call.check("weight", *options.weight, {classes}, call.statistics());
  a.reduction = reduction_named(call, options.reduction);
  target = call.contiguous(target), options.weight = call.contiguous(options.weight);
  a.target = static_cast<const int64_t*>(target.data), a.ignore_index = options.ignore_index;
  a.weight = pointer(options.weight), a.label_smoothing = options.label_smoothing, a.z_loss = options.z_loss;
  if (on_cpu) check_classes(call, a);
  return a;
}

// x are the logits, or what they are computed from.
inline void check_logits(Call& call, const View& x) {
  call.lead(x);
  if (x.dim() != 2) call.fail("x must be a matrix, got " + to_string(x.sizes));
}

struct LossResults {
  View loss, stats, totals;
};

inline LossResults loss_results(Call& call, CrossEntropyArgs& a) {
  const Sizes per_row = Shape{a.rows}, one = Shape{};
  const Sizes& shape = a.reduction == Reduction::none ? per_row : one;
  View loss = call.empty(shape, contiguous_strides(shape), call.statistics());
  View stats = call.for_backward({2, a.rows}, call.statistics()), totals = call.for_backward({2}, call.statistics());
  a.loss = loss.data, a.stats = stats.data, a.totals = totals.data;
  return {loss, stats, totals};
}

// What forward has left for backward. Makes it contiguous.
struct LossSaved {
  View dloss, stats, totals;
};

inline void check_saved(Call& call, CrossEntropyArgs& a, LossSaved& saved) {
  const Sizes per_row = Shape{a.rows}, one = Shape{};
  call.check("dloss", saved.dloss, a.reduction == Reduction::none ? per_row : one, call.statistics());
  call.check("stats", saved.stats, {2, a.rows}, call.statistics());
  call.check("totals", saved.totals, {2}, call.statistics());
  saved = {call.contiguous(saved.dloss), call.contiguous(saved.stats), call.contiguous(saved.totals)};
  a.dloss = saved.dloss.data, a.stats = saved.stats.data, a.totals = saved.totals.data;
}

// ---------------------------------------------------------------- cross_entropy
template <auto kernel>
Results<3> cross_entropy_fwd(Call& call, View x, View target, LossOptions options) {
  check_logits(call, x);
  CrossEntropyArgs a = loss_args<kOnCpu<kernel, CrossEntropyArgs>>(call, x.size(0), x.size(1), target, options);
  const LossResults out = loss_results(call, a);
  x = call.as_rows(x);
  a.x = rows(x);
  call.run<kernel>(a);
  return {out.loss, out.stats, out.totals};
}

template <auto kernel>
Results<1> cross_entropy_bwd(Call& call, View dloss, View x, View target, View stats, View totals,
                             LossOptions options) {
  check_logits(call, x);
  CrossEntropyArgs a = loss_args<kOnCpu<kernel, CrossEntropyArgs>>(call, x.size(0), x.size(1), target, options);
  LossSaved saved = {dloss, stats, totals};
  check_saved(call, a, saved);
  View dx = call.empty(x.sizes);
  x = call.as_rows(x);
  a.x = rows(x), a.dx = rows(dx);
  call.run<kernel>(a);
  return {dx};
}

// ---------------------------------------------------------------- linear_cross_entropy
// The rows of a CPU's chunk. Every chunk packs the linear weight twice and updates its gradient once, whatever its rows
// are, so it has at least kLeastRows rows, and more while their logits stay in cache.
inline int64_t chunk_rows(int64_t rows, int64_t classes, size_t logit_bytes) {
  constexpr int64_t kLeastRows = 512, kCacheBytes = 2 << 20;
  const int64_t most = std::max<int64_t>(kLeastRows, kCacheBytes / (classes * int64_t(logit_bytes)));
  const int64_t chunks = std::max<int64_t>(1, (rows + most - 1) / most);
  return (rows + chunks - 1) / chunks;
}

struct LinearInputs {
  View x, linear_weight, target;
  Maybe linear_bias;
};

template <bool on_cpu>
LinearCrossEntropyArgs linear_loss_args(Call& call, LinearInputs& in, LossOptions& options) {
  check_logits(call, in.x);
  check_matrix(call, "linear_weight", in.linear_weight, in.x.size(1));
  LinearCrossEntropyArgs a{};
  const int64_t classes = in.linear_weight.size(0);
  call.check("linear_bias", in.linear_bias, {classes});
  a.loss = loss_args<on_cpu>(call, in.x.size(0), classes, in.target, options);
  a.in = in.x.size(1);
  in.x = call.as_rows(in.x), in.linear_weight = call.as_rows(in.linear_weight);
  in.linear_bias = call.contiguous(in.linear_bias);
  a.x = rows(in.x), a.linear_weight = rows(in.linear_weight), a.linear_bias = pointer(in.linear_bias);
  if (!on_cpu) return a;
  a.chunk = chunk_rows(a.loss.rows, classes, bytes_of(call.statistics()));
  a.logits = call.scratch({a.chunk, classes}, call.statistics()).data;
  return a;
}

template <auto kernel>
Results<6> linear_cross_entropy_fwd(Call& call, View x, View linear_weight, View target, Maybe linear_bias, Needs needs,
                                    LossOptions options) {
  call.check_count(needs, 3);
  LinearInputs in = {x, linear_weight, target, linear_bias};
  LinearCrossEntropyArgs a = linear_loss_args<kOnCpu<kernel, LinearCrossEntropyArgs>>(call, in, options);
  const LossResults out = loss_results(call, a.loss);
  const bool formed = a.loss.reduction != Reduction::none;
  const ScalarType type = call.statistics();
  View dx = call.empty_if(formed && needs[0], x.sizes, type);
  View dw = call.empty_if(formed && needs[1], linear_weight.sizes, type);
  View db = call.empty_if(formed && needs[2], {a.loss.classes}, type);
  a.dx = dx.data, a.dw = dw.data, a.db = db.data;
  call.run<kernel>(a);
  return {out.loss, dx, dw, db, out.stats, out.totals};
}

template <auto kernel>
Results<3> linear_cross_entropy_bwd(Call& call, View dloss, View x, View linear_weight, View target, Maybe linear_bias,
                                    View stats, View totals, Needs needs, LossOptions options) {
  call.check_count(needs, 3);
  constexpr bool on_cpu = kOnCpu<kernel, LinearCrossEntropyArgs>;
  LinearInputs in = {x, linear_weight, target, linear_bias};
  LinearCrossEntropyArgs a = linear_loss_args<on_cpu>(call, in, options);
  LossSaved saved = {dloss, stats, totals};
  check_saved(call, a.loss, saved);
  View dx = call.empty_if(needs[0], x.sizes), dw = call.empty_if(needs[1], linear_weight.sizes);
  View db = call.empty_if(needs[2], {a.loss.classes});
  const bool rounded = dw.type != call.statistics();  // else dw's sums are the result
  if (on_cpu && needs[1]) a.dw_sums = rounded ? call.scratch(linear_weight.sizes, call.statistics()).data : dw.data;
  if (on_cpu && needs[2]) a.db_sums = call.scratch({a.loss.classes}, call.statistics()).data;
  a.dx = dx.data, a.dw = dw.data, a.db = db.data;
  call.run<kernel>(a);
  return {dx, dw, db};
}

// X(op, its kernel, the number of results without those that only backward reads)
#define PYGPT_LOSS_OPS(X, device)                                  \
  X(cross_entropy_fwd, device::cross_entropy_fwd, 1)               \
  X(cross_entropy_bwd, device::cross_entropy_bwd, 1)               \
  X(linear_cross_entropy_fwd, device::linear_cross_entropy_fwd, 1) \
  X(linear_cross_entropy_bwd, device::linear_cross_entropy_bwd, 3)

}  // namespace pygpt::bind
