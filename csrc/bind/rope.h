// The op bodies of rope_fwd and rope_bwd.
#pragma once
#include "check.h"

namespace pygpt::bind {

// cos, sin and the positions whose rows they are. pygpt/ops/rope.py has the meaning.
struct RopeTables {
  View cos, sin;
  Maybe position_ids;
};

// Fails if a position has no row. On a GPU such a position gives NaN, because reading the positions would wait for it.
inline void check_positions(const Call& call, const RopeArgs& a, int64_t count) {
  const auto check = [&](const auto* positions) {
    for (int64_t i = 0; i < count; i++)
      if (positions[i] < 0 || positions[i] >= a.table_rows)
        call.fail("position_ids must be from 0 to " + std::to_string(a.table_rows - 1) + ", got " +
                  std::to_string(positions[i]));
  };
  if (a.short_positions) check(static_cast<const int32_t*>(a.positions));
  else check(static_cast<const int64_t*>(a.positions));
}

// The arguments of a call, without its sides. `x` is q or k. A copy that the kernels need replaces its tensor in `t`.
template <bool on_cpu>
RopeArgs rope_args(Call& call, const char* name, const View& x, RopeTables& t, bool interleaved) {
  call.lead(x);
  if (x.dim() != 4) call.fail(std::string(name) + " must have 4 dimensions, got " + to_string(x.sizes));
  RopeArgs a{};
  a.dtype = call.dtype(), a.interleaved = interleaved;
  a.batch = x.size(0), a.length = x.size(2), a.head_dim = x.size(3);
  call.check("cos", t.cos, t.cos.sizes, call.statistics());
  const int64_t dims = t.cos.dim();
  const bool fits = dims == 2 || (dims == 3 && (t.cos.size(0) == 1 || t.cos.size(0) == a.batch));
  if (!fits || 2 * t.cos.size(dims - 1) > a.head_dim || (!t.position_ids && t.cos.size(dims - 2) != a.length))
    call.fail("cos must have a row of R/2 <= " + std::to_string(a.head_dim / 2) + " values for each position, got " +
              to_string(t.cos.sizes));
  call.check("sin", t.sin, t.cos.sizes, call.statistics());
  t.cos = call.contiguous(t.cos), t.sin = call.contiguous(t.sin);
  a.cos = t.cos.data, a.sin = t.sin.data, a.table_rows = t.cos.size(dims - 2), a.half = t.cos.size(dims - 1);
  a.table_stride = dims == 3 && t.cos.size(0) > 1 ? a.table_rows * a.half : 0;
  if (!t.position_ids) return a;

  View& ids = *t.position_ids;
  a.short_positions = ids.type == ScalarType::Int;
  call.check("position_ids", ids, ids.sizes, a.short_positions ? ScalarType::Int : ScalarType::Long);
  const bool per_batch = ids.dim() == 2 && (ids.size(0) == 1 || ids.size(0) == a.batch);
  if ((ids.dim() != 1 && !per_batch) || ids.size(ids.dim() - 1) != a.length)
    call.fail("position_ids must have an entry for each of " + std::to_string(a.length) + " positions, got " +
              to_string(ids.sizes));
  ids = call.contiguous(ids);
  a.positions = ids.data, a.positions_stride = per_batch && ids.size(0) > 1 ? a.length : 0;
  if (on_cpu) check_positions(call, a, ids.numel());
  return a;
}

// t, or a copy of it, with contiguous channels.
inline View with_channels(Call& call, const View& t) {
  return t.size(3) <= 1 || t.strides[3] == 1 ? t : call.contiguous(t);
}

template <auto kernel>
Results<4> rope_fwd(Call& call, View q, Maybe k, View cos, View sin, Maybe q_weight, Maybe k_weight, Maybe position_ids,
                    double eps, bool interleaved) {
  RopeTables tables{cos, sin, position_ids};
  RopeArgs a = rope_args<kOnCpu<kernel, RopeArgs>>(call, "q", q, tables, interleaved);
  a.eps = eps;
  if (k && k->dim() != 4) call.fail("k must have 4 dimensions, got " + to_string(k->sizes));
  if (k) call.check("k", *k, {a.batch, k->size(1), a.length, a.head_dim});
  if (!k && k_weight) call.fail("k_weight is given, but k is None");
  if (q_weight) call.check("q_weight", *q_weight, {a.head_dim}, call.statistics());
  if (k_weight) call.check("k_weight", *k_weight, {a.head_dim}, call.statistics());
  const std::array<Maybe, 2> inputs = {q, k};
  std::array<Maybe, 2> weights = {call.contiguous(q_weight), call.contiguous(k_weight)};
  Results<4> results;
  for (int i = 0; i < 2; i++) {
    const Maybe& x = inputs[i];
    results[i] = x ? call.empty(x->sizes, strides_like_query(*x, a.head_dim)) : call.empty(Shape{0});
    results[2 + i] = call.for_backward(weights[i] ? x->sizes.slice(0, 3) : Shape{0}, call.statistics());
    if (!x) continue;
    RopeSide& side = a.sides[i];
    side.heads = x->size(1), side.x = heads(with_channels(call, *x)), side.y = heads(results[i]);
    if (weights[i]) side.weight = weights[i]->data, side.rstd = results[2 + i].data;
  }
  call.run<kernel>(a);
  return results;
}

// What backward knows of q, or of k.
struct RopeBwdSide {
  const char *dy_name, *x_name, *weight_name, *rstd_name;
  Maybe dy, x, weight, rstd;
};

template <auto kernel>
Results<4> rope_bwd(Call& call, Maybe dq_out, Maybe dk_out, Maybe q, Maybe k, View cos, View sin, Maybe q_weight,
                    Maybe k_weight, Maybe q_rstd, Maybe k_rstd, Maybe position_ids, bool interleaved, Needs needs) {
  if (!dq_out && !dk_out) call.fail("dq_out and dk_out are both None");
  RopeTables tables{cos, sin, position_ids};
  RopeArgs a = rope_args<kOnCpu<kernel, RopeArgs>>(call, dq_out ? "dq_out" : "dk_out", dq_out ? *dq_out : *dk_out,
                                                   tables, interleaved);
  call.check_count(needs, 4);
  std::array<RopeBwdSide, 2> sides = {RopeBwdSide{"dq_out", "q", "q_weight", "q_rstd", dq_out, q, q_weight, q_rstd},
                                      RopeBwdSide{"dk_out", "k", "k_weight", "k_rstd", dk_out, k, k_weight, k_rstd}};
  for (int i = 0; i < 2; i++) {
    const auto& [dy_name, x_name, weight_name, rstd_name, dy, x, weight, rstd] = sides[i];
    if ((needs[i] || needs[2 + i]) && !dy) call.fail(std::string(dy_name) + " is None, but a gradient needs it");
    if (needs[2 + i] && !weight) call.fail(std::string("a gradient of ") + weight_name + ", which is None");
    if (!dy) continue;
    if (dy->dim() != 4) call.fail(std::string(dy_name) + " must have 4 dimensions, got " + to_string(dy->sizes));
    call.check(dy_name, *dy, {a.batch, dy->size(1), a.length, a.head_dim});
    if (!weight) continue;
    if (!x || !rstd) call.fail(std::string(weight_name) + " needs " + x_name + " and " + rstd_name);
    call.check(weight_name, *weight, {a.head_dim}, call.statistics());
    call.check(x_name, *x, dy->sizes);
    call.check(rstd_name, *rstd, dy->sizes.slice(0, 3), call.statistics());
  }
  Results<4> results;
  for (int i = 0; i < 2; i++) {
    auto& [dy_name, x_name, weight_name, rstd_name, dy, x, weight, rstd] = sides[i];
    results[i] = needs[i] ? call.empty(dy->sizes, strides_like_query(*dy, a.head_dim)) : call.empty_if(false, Shape{0});
    if (!needs[i] && !needs[2 + i]) continue;
    RopeSide& side = a.sides[i];
    side.heads = dy->size(1), side.dy = heads(with_channels(call, *dy));
    if (needs[i]) side.dx = heads(results[i]);
    if (!weight) continue;
    weight = call.contiguous(weight), rstd = call.contiguous(rstd);
    side.x = heads(with_channels(call, *x)), side.weight = weight->data, side.rstd = rstd->data;
  }
  for (int i = 0; i < 2; i++) {
    results[2 + i] = call.empty_if(needs[2 + i], {a.head_dim}, Shape{1}, call.statistics());
    a.sides[i].dweight = results[2 + i].data;
  }
  call.run<kernel>(a);
  return results;
}

// X(op, its kernel, the number of results without those that only backward reads)
#define PYGPT_ROPE_OPS(X, device)  \
  X(rope_fwd, device::rope_fwd, 2) \
  X(rope_bwd, device::rope_bwd, 4)

}  // namespace pygpt::bind
