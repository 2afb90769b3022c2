// The op bodies of attention_fwd and attention_bwd.
#pragma once
#include "dropout.h"

namespace pygpt::bind {

// The optional arguments of attention. pygpt/ops/attention.py gives their shapes and meaning.
struct AttentionOptions {
  Maybe attn_mask, alibi_slopes, sink, seed;
  double dropout_p = 0, softcap = 0;
  int64_t left = -1, right = -1;
  bool lower_right = false;

  auto fields() { return std::tie(attn_mask, alibi_slopes, sink, seed, dropout_p, softcap, left, right, lower_right); }
};

// Checks a tensor with 1 in the place of broadcast dimensions, and returns its strides, 0 in these dimensions.
inline Sizes broadcast_strides(const Call& call, const char* name, const View& t, Shape want) {
  Sizes strides(want.size());
  bool fits = t.dim() == int64_t(want.size());
  for (size_t d = 0; fits && d < want.size(); d++) {
    fits = t.size(d) == 1 || t.size(d) == want[d];
    strides[d] = t.size(d) == 1 ? 0 : t.strides[d];
  }
  if (!fits) call.fail(std::string(name) + " must broadcast to " + to_string(want) + ", got " + to_string(t.sizes));
  return strides;
}

inline MaskType mask_type(const Call& call, const View& mask, ScalarType storage) {
  if (mask.type == ScalarType::Bool) return MaskType::boolean;
  if (mask.type == storage) return MaskType::storage;
  if (mask.type == call.statistics()) return MaskType::statistics;
  call.fail("attn_mask must be bool, " + std::string(to_string(storage)) + " or " + to_string(call.statistics()));
}

// Fills a.scores and a.reach. A copy that a kernel needs replaces its tensor in `o`.
inline void set_options(Call& call, AttentionArgs& a, const View& q, AttentionOptions& o) {
  const std::array<int64_t, 4> shape = {a.batch, a.heads, a.sequences.q_len, a.sequences.k_len};
  const Shape scores(shape.data(), 4);
  Scores& s = a.scores;
  if (!(o.softcap >= 0)) call.fail("softcap must not be negative");
  set_dropout(call, s, o.seed, o.dropout_p);
  s.softcap = o.softcap;
  a.reach.left = o.left, a.reach.lower_right = o.lower_right;
  if (o.attn_mask) {
    call.check("attn_mask", *o.attn_mask, o.attn_mask->sizes, o.attn_mask->type);
    const Sizes strides = broadcast_strides(call, "attn_mask", *o.attn_mask, scores);
    s.mask_type = mask_type(call, *o.attn_mask, q.type), s.mask = o.attn_mask->data;
    for (int d = 0; d < 4; d++) s.mask_stride[d] = strides[d];
  }
  if (o.alibi_slopes) {
    o.alibi_slopes = call.contiguous(o.alibi_slopes);
    call.check("alibi_slopes", *o.alibi_slopes, o.alibi_slopes->sizes, call.statistics());
    s.slope_stride = broadcast_strides(call, "alibi_slopes", *o.alibi_slopes, scores.slice(0, 2))[0];
    if (o.alibi_slopes->size(1) != a.heads) call.fail("alibi_slopes must have " + std::to_string(a.heads) + " heads");
    s.slopes = o.alibi_slopes->data;
  }
  if (o.sink) {
    o.sink = call.contiguous(o.sink);
    call.check("sink", *o.sink, Shape{a.heads}, call.statistics());
    s.sink = o.sink->data;
  }
}

inline void check_heads(const Call& call, const AttentionArgs& a) {
  if (a.kv_heads != a.heads && (a.kv_heads == 0 || a.heads == 0 || a.heads % a.kv_heads))
    call.fail(std::to_string(a.heads) + " query heads are no multiple of " + std::to_string(a.kv_heads) + " key heads");
  if (std::max(a.head_dim, a.v_dim) > kMaxHeadDim)
    call.fail("head dimensions above " + std::to_string(kMaxHeadDim) + " are not served");
}

inline AttentionArgs attention_args(Call& call, const View& q, const View& k, const View& v, bool is_causal,
                                    double scale, AttentionOptions& options) {
  call.lead(q);
  for (auto& [name, t] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}})
    if (t->dim() != 4) call.fail(std::string(name) + " must have 4 dimensions, got " + to_string(t->sizes));
  AttentionArgs a{};
  a.dtype = call.dtype();
  a.batch = q.size(0), a.heads = q.size(1), a.kv_heads = k.size(1), a.head_dim = q.size(3), a.v_dim = v.size(3);
  a.sequences.q_len = q.size(2), a.sequences.k_len = k.size(2);
  check_heads(call, a);
  call.check("k", k, {a.batch, a.kv_heads, a.sequences.k_len, a.head_dim});
  call.check("v", v, {a.batch, a.kv_heads, a.sequences.k_len, a.v_dim});
  a.q = heads(q), a.k = heads(k), a.v = heads(v);
  a.lse_stride[0] = a.heads * a.sequences.q_len, a.lse_stride[1] = a.sequences.q_len;
  a.scores.scale = scale;
  a.reach.right = is_causal ? 0 : options.right;
  set_options(call, a, q, options);
  return a;
}

template <auto kernel>
Results<2> attention_fwd(Call& call, View q, View k, View v, bool is_causal, double scale, AttentionOptions options) {
  AttentionArgs a = attention_args(call, q, k, v, is_causal, scale, options);
  View out = call.empty({a.batch, a.heads, a.sequences.q_len, a.v_dim}, strides_like_query(q, a.v_dim));
  View lse = call.for_backward({a.batch, a.heads, a.sequences.q_len}, call.statistics());
  a.out = heads(out), a.lse = lse.data;
  call.run<kernel>(a);
  return {out, lse};
}

template <auto kernel>
Results<6> attention_bwd(Call& call, View dout, Maybe dlse, View q, View k, View v, View out, View lse, bool is_causal,
                         double scale, Needs needs, AttentionOptions options) {
  AttentionArgs a = attention_args(call, q, k, v, is_causal, scale, options);
  const int64_t L = a.sequences.q_len, S = a.sequences.k_len;
  const Shape rows = q.sizes.slice(0, 3);
  if (needs.count != 3) call.check_count(needs, 6);
  call.check("dout", dout, {a.batch, a.heads, L, a.v_dim});
  call.check("out", out, {a.batch, a.heads, L, a.v_dim});
  call.check("lse", lse, rows, call.statistics());
  if (dlse) call.check("dlse", *dlse, rows, call.statistics());
  auto gradient = [&](int i, int64_t heads, int64_t length, int64_t channels) {
    return call.empty_if(needs[i], {a.batch, heads, length, channels}, heads_last_strides(heads, length, channels));
  };
  View dq = gradient(0, a.heads, L, a.head_dim), dk = gradient(1, a.kv_heads, S, a.head_dim),
       dv = gradient(2, a.kv_heads, S, a.v_dim);
  lse = call.contiguous(lse), dlse = call.contiguous(dlse);
  a.dout = heads(dout), a.out = heads(out), a.lse = lse.data, a.dlse = pointer(dlse);
  if (needs[0]) a.dq = heads(dq);
  if (needs[1]) a.dk = heads(dk);
  if (needs[2]) a.dv = heads(dv);
  // With three entries in `needs`, the gradients of the options are not asked for.
  auto of_option = [&](int i, const Maybe& t) {
    if (needs[i] && !t) call.fail("a gradient of an argument that is None");
    if (needs[i] && t->type == ScalarType::Bool) call.fail("a boolean attn_mask has no gradient");
    if (needs[i]) return call.empty(t->sizes, contiguous_strides(t->sizes), t->type);
    return needs.count == 3 ? call.omitted() : call.empty_if(false, Shape{0});
  };
  View dmask = of_option(3, options.attn_mask), dslopes = of_option(4, options.alibi_slopes),
       dsink = of_option(5, options.sink);
  if (needs[3]) {
    const Sizes strides = broadcast_strides(call, "attn_mask", dmask, {a.batch, a.heads, L, S});
    a.dmask = {dmask.data, {strides[0], strides[1], strides[2], strides[3]}};
  }
  if (needs[4]) a.dslopes = dslopes.data;
  if (needs[5]) a.dsink = dsink.data;
  call.run<kernel>(a);
  return {dq, dk, dv, dmask, dslopes, dsink};
}

// X(op, its kernel, the number of results without those that only backward reads)
#define PYGPT_ATTENTION_OPS(X, device)       \
  X(attention_fwd, device::attention_fwd, 1) \
  X(attention_bwd, device::attention_bwd, 6)

}  // namespace pygpt::bind
