// The op bodies of varlen_attn_fwd and varlen_attn_bwd: attention's kernels on packed sequences.
#pragma once
#include <cstring>
#include <limits>

#include "attention.h"

namespace pygpt::bind {

// Where the sequences lie and how far their queries see. pygpt/ops/varlen_attn.py has the meaning.
struct Packing {
  View cu_seq_q, cu_seq_k;
  Maybe seqused_k;
  int64_t max_q = 0, max_k = 0;
  double scale = 1;
  int64_t left = -1, right = -1;

  auto fields() { return std::tie(cu_seq_q, cu_seq_k, seqused_k, max_q, max_k, scale, left, right); }
};

inline Heads packed_heads(const View& t) { return {t.data, {0, t.strides[1], t.strides[0], t.strides[2]}}; }

// Checks that sequences follow each other within `total` rows and are at most `most` rows long. Returns the longest.
inline int64_t check_rows(const Call& call, const std::string& name, const int32_t* first_row, int64_t sequences,
                          int64_t total, int64_t most) {
  bool valid = first_row[0] == 0 && first_row[sequences] <= total;
  int64_t longest = 0;
  for (int64_t b = 0; b < sequences; b++) {
    valid = valid && first_row[b] <= first_row[b + 1];
    longest = std::max<int64_t>(longest, int64_t(first_row[b + 1]) - first_row[b]);
  }
  if (!valid)
    call.fail("cu_seq_" + name + " must start at 0, never fall, and end within the " + std::to_string(total) + " rows");
  if (longest > most)
    call.fail("max_" + name + " is " + std::to_string(most) + ", but a sequence has " + std::to_string(longest) +
              " rows");
  return longest;
}

inline void check_used(const Call& call, const Sequences& s, int64_t sequences) {
  for (int64_t b = 0; s.seqused_k && b < sequences; b++)
    if (s.seqused_k[b] < 0 || s.seqused_k[b] > s.cu_seq_k[b + 1] - s.cu_seq_k[b])
      call.fail("seqused_k must be from 0 to the number of keys of a sequence");
}

// The arguments of a call. On a GPU the rows of the sequences are trusted, because reading them would wait for it.
template <bool on_cpu>
AttentionArgs packed_args(Call& call, const View& q, const View& k, const View& v, Packing& packing) {
  call.lead(q);
  for (auto& [name, t] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}})
    if (t->dim() != 3) call.fail(std::string(name) + " must have 3 dimensions, got " + to_string(t->sizes));
  if (packing.cu_seq_q.dim() != 1 || packing.cu_seq_q.size(0) == 0) call.fail("cu_seq_q must have shape (N + 1,)");
  AttentionArgs a{};
  a.dtype = call.dtype(), a.batch = packing.cu_seq_q.size(0) - 1;
  a.heads = q.size(1), a.kv_heads = k.size(1), a.head_dim = q.size(2), a.v_dim = v.size(2);
  check_heads(call, a);
  call.check("k", k, {k.size(0), a.kv_heads, a.head_dim});
  call.check("v", v, {k.size(0), a.kv_heads, a.v_dim});
  call.check("cu_seq_q", packing.cu_seq_q, {a.batch + 1}, ScalarType::Int);
  call.check("cu_seq_k", packing.cu_seq_k, {a.batch + 1}, ScalarType::Int);
  if (packing.seqused_k) call.check("seqused_k", *packing.seqused_k, {a.batch}, ScalarType::Int);
  packing.cu_seq_q = call.contiguous(packing.cu_seq_q), packing.cu_seq_k = call.contiguous(packing.cu_seq_k);
  packing.seqused_k = call.contiguous(packing.seqused_k);
  a.q = packed_heads(q), a.k = packed_heads(k), a.v = packed_heads(v);

  Sequences& s = a.sequences;
  s.cu_seq_q = static_cast<const int32_t*>(packing.cu_seq_q.data);
  s.cu_seq_k = static_cast<const int32_t*>(packing.cu_seq_k.data);
  s.seqused_k = static_cast<const int32_t*>(pointer(packing.seqused_k));
  s.q_len = packing.max_q, s.k_len = packing.max_k, s.total_q = q.size(0), s.total_k = k.size(0);
  if (on_cpu) {
    s.q_len = check_rows(call, "q", s.cu_seq_q, a.batch, s.total_q, packing.max_q);
    s.k_len = check_rows(call, "k", s.cu_seq_k, a.batch, s.total_k, packing.max_k);
    check_used(call, s, a.batch);
  }
  a.lse_stride[1] = s.total_q;
  a.scores.scale = packing.scale;
  a.reach = {packing.left, packing.right, true};
  return a;
}

// Makes the rows of t (total, heads, width) that belong to no sequence 0; kernels leave them out. On a GPU it fills all
// rows, because the host does not know which they are.
template <bool on_cpu>
void zero_outside(Call& call, const View& t, const AttentionArgs& a, bool of_keys) {
  if constexpr (!on_cpu) return call.fill(t, 0);
  const Sequences& s = a.sequences;
  const int32_t* first_row = of_keys ? s.cu_seq_k : s.cu_seq_q;
  const int64_t row_bytes = t.size(1) * t.size(2) * bytes_of(t.type);
  const auto zero = [&](int64_t begin, int64_t end) {
    if (end > begin) std::memset(static_cast<char*>(t.data) + begin * row_bytes, 0, (end - begin) * row_bytes);
  };
  for (int64_t b = 0; of_keys && s.seqused_k && b < a.batch; b++) zero(first_row[b] + s.seqused_k[b], first_row[b + 1]);
  zero(first_row[a.batch], t.size(0));
}

// The same for lse (heads, total), which becomes -inf.
template <bool on_cpu>
void empty_outside(Call& call, const View& lse, const AttentionArgs& a) {
  if constexpr (!on_cpu) return call.fill(lse, -std::numeric_limits<double>::infinity());
  const int64_t total = a.sequences.total_q, first = a.sequences.cu_seq_q[a.batch];
  const auto fill = [&](auto* rows) {
    using T = std::remove_pointer_t<decltype(rows)>;
    for (int64_t h = 0; h < a.heads; h++)
      std::fill(rows + h * total + first, rows + (h + 1) * total, -std::numeric_limits<T>::infinity());
  };
  if (a.dtype == DType::f64) fill(static_cast<double*>(lse.data));
  else fill(static_cast<float*>(lse.data));
}

template <auto kernel>
Results<2> varlen_attn_fwd(Call& call, View q, View k, View v, Packing packing) {
  constexpr bool on_cpu = kOnCpu<kernel, AttentionArgs>;
  AttentionArgs a = packed_args<on_cpu>(call, q, k, v, packing);
  View out = call.empty({q.size(0), a.heads, a.v_dim});
  View lse = call.empty({a.heads, q.size(0)}, contiguous_strides({a.heads, q.size(0)}), call.statistics());
  zero_outside<on_cpu>(call, out, a, false);
  empty_outside<on_cpu>(call, lse, a);
  a.out = packed_heads(out), a.lse = lse.data;
  call.run<kernel>(a);
  return {out, lse};
}

template <auto kernel>
Results<3> varlen_attn_bwd(Call& call, View dout, Maybe dlse, View q, View k, View v, View out, View lse, Needs needs,
                           Packing packing) {
  constexpr bool on_cpu = kOnCpu<kernel, AttentionArgs>;
  AttentionArgs a = packed_args<on_cpu>(call, q, k, v, packing);
  const std::array<int64_t, 2> rows = {a.heads, q.size(0)};
  call.check_count(needs, 3);
  call.check("dout", dout, {q.size(0), a.heads, a.v_dim});
  call.check("out", out, {q.size(0), a.heads, a.v_dim});
  call.check("lse", lse, Shape(rows.data(), 2), call.statistics());
  if (dlse) call.check("dlse", *dlse, Shape(rows.data(), 2), call.statistics());
  View dq = call.empty_if(needs[0], q.sizes), dk = call.empty_if(needs[1], k.sizes),
       dv = call.empty_if(needs[2], v.sizes);
  lse = call.contiguous(lse), dlse = call.contiguous(dlse);
  a.dout = packed_heads(dout), a.out = packed_heads(out), a.lse = lse.data, a.dlse = pointer(dlse);
  for (auto& [need, gradient, heads, of_keys] :
       {std::tuple{needs[0], &dq, &a.dq, false}, {needs[1], &dk, &a.dk, true}, {needs[2], &dv, &a.dv, true}}) {
    if (!need) continue;
    *heads = packed_heads(*gradient);
    zero_outside<on_cpu>(call, *gradient, a, of_keys);
  }
  call.run<kernel>(a);
  return {dq, dk, dv};
}

#define PYGPT_VARLEN_ATTN_OPS(X, device)       \
  X(varlen_attn_fwd, device::attention_fwd, 2) \
  X(varlen_attn_bwd, device::attention_bwd, 3)

}  // namespace pygpt::bind
