// The op bodies of qkv_attention_fwd and qkv_attention_bwd: attention's kernels on the heads of one tensor.
#pragma once
#include "attention.h"

namespace pygpt::bind {

// A tensor (B, T, n E) as its heads first .. first + count - 1, of E channels each: (B, count, T, E).
struct HeadsOf {
  Sizes sizes{4}, strides{4};
  View view;

  HeadsOf(const View& t, int64_t first, int64_t count, int64_t E) : view(t) {
    const int64_t of[4][2] = {
        {t.size(0), t.strides[0]}, {count, E * t.strides[2]}, {t.size(1), t.strides[1]}, {E, t.strides[2]}};
    for (int d = 0; d < 4; d++) sizes[d] = of[d][0], strides[d] = of[d][1];
    view.sizes = sizes, view.strides = strides;
    if (t.data) view.data = static_cast<char*>(t.data) + first * E * t.strides[2] * int64_t(bytes_of(t.type));
  }
  HeadsOf(const HeadsOf&) = delete;
};

// The heads of qkv (B, T, (heads + 2 kv_heads) E), or of its gradient.
struct QueriesKeysValues {
  HeadsOf q, k, v;

  QueriesKeysValues(const View& t, int64_t heads, int64_t kv_heads, int64_t E)
      : q(t, 0, heads, E), k(t, heads, kv_heads, E), v(t, heads + kv_heads, kv_heads, E) {}
};

// The arguments after the tensors. pygpt/ops/qkv_attention.py has the meaning.
struct QkvOptions {
  int64_t heads = 1, kv_heads = 1;
  bool is_causal = false;
  double scale = 1;
  Maybe seed;
  double dropout_p = 0;
  int64_t left = -1, right = -1;

  auto fields() { return std::tie(heads, kv_heads, is_causal, scale, seed, dropout_p, left, right); }

  // The channels of a head.
  int64_t width(const Call& call, const View& qkv) const {
    if (qkv.dim() != 3) call.fail("qkv must have 3 dimensions, got " + to_string(qkv.sizes));
    if (heads < 1 || kv_heads < 1 || qkv.size(2) % (heads + 2 * kv_heads))
      call.fail("qkv must have shape (B, T, (heads + 2 kv_heads) E), got " + to_string(qkv.sizes) + " with heads " +
                std::to_string(heads) + " and kv_heads " + std::to_string(kv_heads));
    return qkv.size(2) / (heads + 2 * kv_heads);
  }
  AttentionArgs args(Call& call, const QueriesKeysValues& of, AttentionOptions& options) const {
    options.seed = seed, options.dropout_p = dropout_p, options.left = left, options.right = right;
    return attention_args(call, of.q.view, of.k.view, of.v.view, is_causal, scale, options);
  }
};

template <auto kernel>
Results<2> qkv_attention_fwd(Call& call, View qkv, QkvOptions o) {
  const int64_t E = o.width(call, qkv);
  AttentionOptions options;
  AttentionArgs a = o.args(call, QueriesKeysValues(qkv, o.heads, o.kv_heads, E), options);
  View out = call.empty({qkv.size(0), qkv.size(1), o.heads * E});
  View lse = call.for_backward({a.batch, a.heads, a.sequences.q_len}, call.statistics());
  a.out = heads(HeadsOf(out, 0, o.heads, E).view), a.lse = lse.data;
  call.run<kernel>(a);
  return {out, lse};
}

template <auto kernel>
Results<1> qkv_attention_bwd(Call& call, View dout, View qkv, View out, View lse, QkvOptions o) {
  const int64_t E = o.width(call, qkv);
  AttentionOptions options;
  AttentionArgs a = o.args(call, QueriesKeysValues(qkv, o.heads, o.kv_heads, E), options);
  call.check("dout", dout, {qkv.size(0), qkv.size(1), o.heads * E});
  call.check("out", out, {qkv.size(0), qkv.size(1), o.heads * E});
  call.check("lse", lse, {a.batch, a.heads, a.sequences.q_len}, call.statistics());
  View dqkv = call.empty(qkv.sizes);
  lse = call.contiguous(lse);
  const QueriesKeysValues gradients(dqkv, o.heads, o.kv_heads, E);
  a.dout = heads(HeadsOf(dout, 0, o.heads, E).view), a.out = heads(HeadsOf(out, 0, o.heads, E).view), a.lse = lse.data;
  a.dq = heads(gradients.q.view), a.dk = heads(gradients.k.view), a.dv = heads(gradients.v.view);
  call.run<kernel>(a);
  return {dqkv};
}

#define PYGPT_QKV_ATTENTION_OPS(X, device)       \
  X(qkv_attention_fwd, device::attention_fwd, 1) \
  X(qkv_attention_bwd, device::attention_bwd, 1)

}  // namespace pygpt::bind
