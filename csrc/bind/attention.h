// The op bodies of attention_fwd and attention_bwd.
#pragma once
#include "check.h"

namespace pygpt::bind {

inline AttentionArgs attention_args(Call& call, const View& q, const View& k, const View& v, bool is_causal,
                                    double scale) {
  call.lead(q);
  for (auto& [name, t] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}})
    if (t->dim() != 4) call.fail(std::string(name) + " must have 4 dimensions, got " + to_string(t->sizes));
  AttentionArgs a{};
  a.dtype = call.dtype();
  a.batch = q.size(0), a.heads = q.size(1), a.q_len = q.size(2), a.head_dim = q.size(3);
  a.k_len = k.size(2), a.v_dim = v.size(3);
  if (k.size(1) != a.heads) call.fail("q and k must have as many heads; grouped heads are not served yet");
  if (std::max(a.head_dim, a.v_dim) > kMaxHeadDim)
    call.fail("head dimensions above " + std::to_string(kMaxHeadDim) + " are not served");
  call.check("k", k, {a.batch, a.heads, a.k_len, a.head_dim});
  call.check("v", v, {a.batch, a.heads, a.k_len, a.v_dim});
  a.is_causal = is_causal, a.scale = scale;
  a.q = heads(q), a.k = heads(k), a.v = heads(v);
  return a;
}

template <auto kernel>
Results<2> attention_fwd(Call& call, View q, View k, View v, bool is_causal, double scale) {
  AttentionArgs a = attention_args(call, q, k, v, is_causal, scale);
  View out = call.empty({a.batch, a.heads, a.q_len, a.v_dim}, strides_like_query(q, a.v_dim));
  View lse = call.for_backward({a.batch, a.heads, a.q_len}, call.statistics());
  a.out = heads(out), a.lse = lse.data;
  call.run<kernel>(a);
  return {out, lse};
}

template <auto kernel>
Results<3> attention_bwd(Call& call, View dout, Maybe dlse, View q, View k, View v, View out, View lse, bool is_causal,
                         double scale, Needs needs) {
  AttentionArgs a = attention_args(call, q, k, v, is_causal, scale);
  const Shape rows = q.sizes.slice(0, 3);
  call.check_count(needs, 3);
  call.check("dout", dout, {a.batch, a.heads, a.q_len, a.v_dim});
  call.check("out", out, {a.batch, a.heads, a.q_len, a.v_dim});
  call.check("lse", lse, rows, call.statistics());
  if (dlse) call.check("dlse", *dlse, rows, call.statistics());
  auto gradient = [&](int i, int64_t length, int64_t channels) {
    return call.empty_if(needs[i], {a.batch, a.heads, length, channels}, heads_last_strides(a.heads, length, channels));
  };
  View dq = gradient(0, a.q_len, a.head_dim), dk = gradient(1, a.k_len, a.head_dim), dv = gradient(2, a.k_len, a.v_dim);
  lse = call.contiguous(lse), dlse = call.contiguous(dlse);
  a.dout = heads(dout), a.out = heads(out), a.lse = lse.data, a.dlse = pointer(dlse);
  if (needs[0]) a.dq = heads(dq);
  if (needs[1]) a.dk = heads(dk);
  if (needs[2]) a.dv = heads(dv);
  call.run<kernel>(a);
  return {dq, dk, dv};
}

// X(op, its kernel, the number of results without those that only backward reads)
#define PYGPT_ATTENTION_OPS(X, device)       \
  X(attention_fwd, device::attention_fwd, 1) \
  X(attention_bwd, device::attention_bwd, 3)

}  // namespace pygpt::bind
