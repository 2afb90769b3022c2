// Attention of at most kDecodeQueries queries (decoding with a cache), forward and backward. The mathematics is in
// attention.cpp and attention_bwd.cpp. Reading K and V once is all the work, and packing them would triple it, so both
// are read where they lie: scores are dot products with rows of K, and O sums weighted rows of V.
//
//   forward    s_j = q k_j           O += p_j v_j        one task per query
//   backward   dp_j = dO v_j         dQ += ds_j k_j      one task per head
//              dk_j = sum_i ds_ij q_i                    dv_j = sum_i p_ij dO_i
//
// Both sum the scores in the same order, so that a query with one key has P = 1 exactly.
#include "attention.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {
namespace {

// to = scale times row i of m (n long), padded with zeros to whole vectors.
template <class S, class T = Acc<S>>
void unpack(T* to, Matrix<S> m, int64_t i, int64_t n, T scale) {
  for (int64_t e = 0; e < round_up(n, W<T>); e++) to[e] = e < n ? to_acc(m.at(i, e).data[0]) * scale : T(0);
}

// out[j] = x . row j of m, for n rows of `channels` values. Four rows at a time keep memory busier.
template <class S, class T = Acc<S>>
PYGPT_INLINE void dots(const T* x, Matrix<S> m, int64_t n, int64_t channels, T* out) {
  unroll_by<4>(n, [&](int64_t j, auto together) {
    Vec<T> dot[together.value] = {};
    auto add_products = [&](int64_t e, auto load_m) {
      for (int u = 0; u < together.value; u++) dot[u] += load(x + e) * load_m(m.data + (j + u) * m.rs + e);
    };
    const int64_t whole = channels / W<T> * W<T>;
    for (int64_t e = 0; e < whole; e += W<T>) add_products(e, [](const S* at) { return load(at); });
    if (whole < channels) add_products(whole, [&](const S* at) { return load(at, channels - whole); });
    for (int u = 0; u < together.value; u++) out[j + u] = hsum<T>(dot[u]);
  });
}

// to = to * rescale + sum_j p[j] row j of m, for n rows of `channels` values.
template <class S, class T = Acc<S>>
PYGPT_INLINE void add_weighted(T* to, T rescale, const T* p, Matrix<S> m, int64_t n, int64_t channels) {
  auto columns = [&](int64_t e, auto vectors, auto load_m) {
    Vec<T> even[vectors.value] = {}, odd[vectors.value] = {};
    auto add = [&](Vec<T>* sum, int64_t j) {
      for (int u = 0; u < vectors.value; u++) sum[u] += p[j] * load_m(m.data + j * m.rs + e + u * W<T>);
    };
    int64_t j = 0;
    for (; j + 2 <= n; j += 2) add(even, j), add(odd, j + 1);
    if (j < n) add(even, j);
    for (int u = 0; u < vectors.value; u++) {
      T* at = to + e + u * W<T>;
      store(at, load(at) * rescale + (even[u] + odd[u]));
    }
  };
  const int64_t whole = channels / W<T> * W<T>;
  unroll_by<4>(whole / W<T>,
               [&](int64_t v, auto vectors) { columns(v * W<T>, vectors, [](const S* at) { return load(at); }); });
  if (whole < channels)
    columns(whole, std::integral_constant<int, 1>(), [&](const S* at) { return load(at, channels - whole); });
}

template <class S>
void forward(const AttentionArgs& a) {
  using T = Acc<S>;
  const int64_t E = a.head_dim, Ev = a.v_dim;
  parallel_for(a.batch * a.heads * a.q_len, [&](int64_t begin, int64_t end) {
    const int64_t ld = round_up(E, W<T>), ldv = round_up(Ev, W<T>);
    T *q = scratch<T>(Region::decode_rows, ld + BC + ldv), *p = q + ld, *out = p + BC;
    for (int64_t task = begin; task < end; task++) {
      const int64_t i = task % a.q_len, h = task / a.q_len % a.heads, b = task / a.q_len / a.heads;
      const Matrix<S> K = head<S>(a.k, b, h), V = head<S>(a.v, b, h);
      unpack(q, head<S>(a.q, b, h), i, E, T(a.scale));
      std::fill(out, out + ldv, T(0));
      T m = -kInf<T>, l = 0;
      for (int64_t j0 = 0; j0 < unmasked_keys(a, i); j0 += BC) {
        const int64_t n = std::min(BC, unmasked_keys(a, i) - j0);
        dots(q, K.at(j0, 0), n, E, p);
        std::fill(p + n, p + round_up(n, W<T>), -kInf<T>);
        const T rescale = softmax_row<T>(a.scale, p, ceil_div(n, W<T>), m, l);
        add_weighted(out, rescale, p, V.at(j0, 0), n, Ev);
      }
      finish_row<S>(a, b, h, i, m, l, [&](int64_t e) { return load(out + e); });
    }
  }, a.k_len * (E + Ev));
}

// Row j0 + j of `to` is sum_i weights[i * BC + j] (row i of x), for n rows; the rows of x are ld apart.
template <class S, class T = Acc<S>>
void store_outer(const Heads& to, int64_t b, int64_t h, int64_t j0, int64_t n, int64_t channels, int64_t queries,
                 const T* weights, const T* x, int64_t ld) {
  if (!to.data) return;
  for (int64_t j = 0; j < n; j++)
    for (int64_t e = 0; e < channels; e += W<T>) {
      Vec<T> total = {};
      for (int64_t i = 0; i < queries; i++) total += weights[i * BC + j] * load(x + i * ld + e);
      store(output_row<S>(to, b, h, j0 + j) + e, total, channels - e);
    }
}

template <class S>
void backward(const AttentionArgs& a) {
  using T = Acc<S>;
  const int64_t L = a.q_len, E = a.head_dim, Ev = a.v_dim, ld = round_up(E, W<T>), ldv = round_up(Ev, W<T>);
  parallel_for(a.batch * a.heads, [&](int64_t begin, int64_t end) {
    T *q = scratch<T>(Region::decode_rows, L * (2 * ld + ldv)), *dq = q + L * ld, *dout = dq + L * ld;
    T *p = scratch<T>(Region::decode_scores, 2 * L * BC), *ds = p + L * BC;
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / a.heads, h = task % a.heads;
      const Matrix<S> K = head<S>(a.k, b, h), V = head<S>(a.v, b, h), dO = head<S>(a.dout, b, h);
      T lse[kDecodeQueries], delta[kDecodeQueries];
      std::fill(dq, dq + L * ld, T(0));
      for (int64_t i = 0; i < L; i++) {
        unpack(q + i * ld, head<S>(a.q, b, h), i, E, T(a.scale));
        unpack(dout + i * ldv, dO, i, Ev, T(1));
        lse[i] = lse_of<T>(a, b, h, i);
        delta[i] = delta_of<S>(a, b, h, i);
      }
      for (int64_t j0 = 0; j0 < a.k_len; j0 += BC) {
        const int64_t keys = std::min(BC, a.k_len - j0);
        for (int64_t i = 0; i < L; i++) {
          const int64_t n = std::clamp<int64_t>(unmasked_keys(a, i) - j0, 0, keys);
          T *pi = p + i * BC, *dsi = ds + i * BC;
          dots(q + i * ld, K.at(j0, 0), n, E, pi);
          dots(dout + i * ldv, V.at(j0, 0), n, Ev, dsi);
          for (int64_t j = 0; j < n; j += W<T>) {
            const Vec<T> e = exp<T>(load(pi + j) - lse[i]);
            store(dsi + j, e * (load(dsi + j) - delta[i]));
            store(pi + j, e);
          }
          std::fill(pi + n, pi + keys, T(0)), std::fill(dsi + n, dsi + keys, T(0));
          if (a.dq.data) add_weighted(dq + i * ld, T(1), dsi, K.at(j0, 0), n, E);
        }
        store_outer<S>(a.dk, b, h, j0, keys, E, L, ds, q, ld);
        store_outer<S>(a.dv, b, h, j0, keys, Ev, L, p, dout, ldv);
      }
      for (int64_t i = 0; a.dq.data && i < L; i++)
        for (int64_t e = 0; e < E; e += W<T>)
          store(output_row<S>(a.dq, b, h, i) + e, load(dq + i * ld + e) * T(a.scale), E - e);
    }
  }, 3 * L * a.k_len * (E + Ev));
}

}  // namespace

void decode_fwd(const AttentionArgs& a) {
  visit(a.dtype, [&](auto s) { forward<decltype(s)>(a); });
}
void decode_bwd(const AttentionArgs& a) {
  visit(a.dtype, [&](auto s) { backward<decltype(s)>(a); });
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
