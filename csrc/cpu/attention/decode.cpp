// Attention of at most kDecodeQueries queries (decoding with a cache), forward and backward. The mathematics is in
// fwd.cpp and bwd.cpp. Reading K and V once is all the work, and packing them would triple it, so both are read where
// they lie: scores are dot products with rows of K, and O sums weighted rows of V.
//
//   forward    s_j = q k_j           O += p_j v_j
//   backward   dp_j = dO v_j         dQ += ds_j k_j
//              dk_j = sum_i ds_ij q_i                    dv_j = sum_i p_ij dO_i
//
// The rows of a task are the queries of all query heads that share a head of keys, so that a block of K and V, once
// read, serves them from the cache. Forward splits long sequences of keys among tasks, so that all threads work
// although there are few heads. The number of splits is a function of the number of keys alone: what else is in the
// batch changes no result.
//
// Forward and backward sum the scores in the same order, so that a query with one key has P = 1 exactly.
#include "tile.h"

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

// Dropout's factors of the n keys from j on, which start at the returned place in `factors`. Null without dropout.
template <bool general, class S, class T = Acc<S>>
const T* dropout_row(const QueryHead<S>& x, int64_t i, int64_t j, int64_t n, T* factors) {
  if (!general || !x.a.scores.seed || n == 0) return nullptr;
  x.dropout(i, 1, j / 4 * 4, j % 4 + n, factors, 0);
  return factors + j % 4;
}
constexpr int64_t kFactors = BC + 8 + W<float>;  // with what rounding to groups of 4 keys takes, and a vector to spare

// The number of tasks that the keys of a sequence are split among, and the keys of each, a multiple of BC.
constexpr int64_t kSplitKeys = 5 * BC, kMaxSplits = 16;
inline int64_t splits_of(int64_t k_len) { return std::clamp<int64_t>(k_len / kSplitKeys, 1, kMaxSplits); }
inline int64_t split_keys(int64_t k_len) { return round_up(ceil_div(k_len, splits_of(k_len)), BC); }

// Merges two rows of sums over parts of the keys: `width` channels of out, m and l.
template <class T>
void merge(T* to, const T* from, int64_t width) {
  const T m = std::max(to[width], from[width]), m_or_0 = m == -kInf<T> ? T(0) : m;
  const T mine = std::exp(to[width] - m_or_0), theirs = std::exp(from[width] - m_or_0);
  for (int64_t e = 0; e < width; e += W<T>) store(to + e, load(to + e) * mine + load(from + e) * theirs);
  to[width] = m, to[width + 1] = to[width + 1] * mine + from[width + 1] * theirs;
}

template <bool general, class S>
void forward(const AttentionArgs& a) {
  using T = Acc<S>;
  const int64_t L = std::min(a.sequences.q_len, kDecodeQueries), E = a.head_dim, Ev = a.v_dim;
  const int64_t ld = round_up(E, W<T>), ldv = round_up(Ev, W<T>), ldr = ldv + 2, heads = a.batch * a.kv_heads;
  const int64_t group = a.group(), rows = group * L, splits = splits_of(a.sequences.k_len);
  // Row by row: out, not yet divided by l, then m and l. A task that has all keys keeps its rows to itself.
  T* shared = splits > 1 ? scratch<T>(Region::decode_partials, heads * splits * rows * ldr) : nullptr;
  const auto finish = [&](const QueryHead<S>& x, int64_t i, const T* row) {
    finish_row(x, i, row[ldv], row[ldv + 1], [&](int64_t e) { return load(row + e); });
  };
  parallel_for(heads * splits, [&](int64_t begin, int64_t end) {
    T *q = scratch<T>(Region::decode_rows, rows * ld), *p = scratch<T>(Region::decode_scores, BC);
    T* own = shared ? nullptr : scratch<T>(Region::decode_partials, rows * ldr);
    T factors[general ? kFactors : 1];
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / splits / a.kv_heads, h0 = task / splits % a.kv_heads * group;
      const QueryHead<S> first_head(a, b, h0);
      const Matrix<S> K = first_head.keys(a.k), V = first_head.keys(a.v);
      const int64_t q_len = first_head.sequence.q_len, k_len = first_head.sequence.k_len;
      if (!is_decode(first_head) || task % splits >= splits_of(k_len)) continue;
      const int64_t chunk = split_keys(k_len), first = task % splits * chunk;
      T* states = shared ? shared + task * rows * ldr : own;
      for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < q_len; i++) {
          T* row = states + (g * L + i) * ldr;
          std::fill(row, row + ldv, T(0));
          row[ldv] = -kInf<T>, row[ldv + 1] = 0;
          unpack(q + (g * L + i) * ld, head<S>(a.q, b, h0 + g, first_head.sequence.q_row), i, E, T(a.scores.scale));
        }
      for (int64_t j0 = first; j0 < std::min(first + chunk, k_len); j0 += BC)
        for (int64_t g = 0; g < group; g++) {
          const QueryHead<S> x(first_head, h0 + g);
          for (int64_t i = 0; i < q_len; i++) {
            const int64_t j = std::max(j0, x.visible.begin(i)), n = std::min(j0 + BC, x.visible.end(i)) - j;
            if (n <= 0) continue;
            const MaskEffect effect = general ? x.mask_effect(i, 1, j, n) : MaskEffect::changes_none;
            if (effect == MaskEffect::hides_all) continue;
            T* row = states + (g * L + i) * ldr;
            dots(q + (g * L + i) * ld, K.at(j, 0), n, E, p);
            if constexpr (general) x.adjust(effect, {p, 0, i, 1, j, n}, nullptr, 0);
            std::fill(p + n, p + round_up(n, W<T>), -kInf<T>);
            const T* kept = dropout_row<general>(x, i, j, n, factors);
            T &m = row[ldv], &l = row[ldv + 1];
            const T rescale = softmax_row<general, T>(a.scores.scale, p, ceil_div(n, W<T>), m, l, kept);
            add_weighted(row, rescale, p, V.at(j, 0), n, Ev);
          }
        }
      for (int64_t g = 0; !shared && g < group; g++)
        for (int64_t i = 0; i < q_len; i++) finish({first_head, h0 + g}, i, states + (g * L + i) * ldr);
    }
  }, rows * std::min(split_keys(a.sequences.k_len), a.sequences.k_len) * (E + Ev));
  if (shared)
    parallel_for(heads * rows, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const QueryHead<S> x(a, n / rows / a.kv_heads, n / L % a.heads);
        if (n % L >= x.sequence.q_len || !is_decode(x)) continue;
        T* row = shared + (n / rows * splits * rows + n % rows) * ldr;
        for (int64_t s = 1; s < splits_of(x.sequence.k_len); s++) merge(row, row + s * rows * ldr, ldv);
        finish(x, n % L, row);
      }
    }, splits * Ev);
}

// to[j] = sum_r weights[r * BC + j] (row r of x) for n keys and `rows` rows; the rows of x are ld apart.
template <class S, class T = Acc<S>>
void store_outer(Matrix<S> to, int64_t n, int64_t channels, int64_t rows, const T* weights, const T* x, int64_t ld) {
  for (int64_t j = 0; j < n; j++)
    for (int64_t e = 0; e < channels; e += W<T>) {
      Vec<T> total = {};
      for (int64_t r = 0; r < rows; r++) total += weights[r * BC + j] * load(x + r * ld + e);
      store(const_cast<S*>(to.at(j, 0).data) + e, total, channels - e);
    }
}

template <bool general, class S>
void backward(const AttentionArgs& a) {
  using T = Acc<S>;
  const int64_t L = std::min(a.sequences.q_len, kDecodeQueries), E = a.head_dim, Ev = a.v_dim;
  const int64_t ld = round_up(E, W<T>), ldv = round_up(Ev, W<T>), group = a.group(), rows = group * L;
  double* slope_gradients = a.dslopes ? scratch<double>(Region::slope_gradients, a.batch * a.heads) : nullptr;
  if (slope_gradients) std::fill(slope_gradients, slope_gradients + a.batch * a.heads, 0.0);
  parallel_for(a.batch * a.kv_heads, [&](int64_t begin, int64_t end) {
    T *q = scratch<T>(Region::decode_rows, rows * (2 * ld + ldv)), *dq = q + rows * ld, *dout = dq + rows * ld;
    T *p = scratch<T>(Region::decode_scores, 2 * rows * BC + W<T>), *ds = p + rows * BC + W<T>;
    T *lse = scratch<T>(Region::row_statistics, 2 * rows), *delta = lse + rows;
    T factors[general ? kFactors : 1], tanhs[general ? BC + W<T> : 1];
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / a.kv_heads, h0 = task % a.kv_heads * group;
      const QueryHead<S> first_head(a, b, h0);
      if (!is_decode(first_head)) continue;
      const Matrix<S> K = first_head.keys(a.k), V = first_head.keys(a.v);
      const int64_t q_len = first_head.sequence.q_len, k_len = first_head.sequence.k_len;
      std::fill(q, q + rows * (2 * ld + ldv), T(0));  // rows that do not exist have no weight
      for (int64_t g = 0; g < group; g++) {
        const QueryHead<S> x(first_head, h0 + g);
        for (int64_t i = 0; i < q_len; i++) {
          const int64_t r = g * L + i;
          unpack(q + r * ld, x.queries(a.q), i, E, T(a.scores.scale));
          unpack(dout + r * ldv, x.queries(a.dout), i, Ev, T(1));
          lse[r] = lse_of(x, i), delta[r] = delta_of(x, i);
        }
      }
      for (int64_t j0 = 0; j0 < k_len; j0 += BC) {
        const int64_t keys = std::min(BC, k_len - j0);
        for (int64_t g = 0; g < group; g++) {
          const QueryHead<S> x(first_head, h0 + g);
          for (int64_t i = 0; i < L; i++) {
            const int64_t r = g * L + i, start = std::clamp<int64_t>(x.visible.begin(i) - j0, 0, keys), j = j0 + start;
            int64_t n = std::clamp<int64_t>(x.visible.end(i) - j, 0, keys - start);
            T *pr = p + r * BC, *dsr = ds + r * BC, *pi = pr + start, *dsi = dsr + start;
            if (i >= q_len) n = 0;
            const MaskEffect effect = general && n > 0 ? x.mask_effect(i, 1, j, n) : MaskEffect::changes_none;
            if (effect == MaskEffect::hides_all) n = 0;
            dots(q + r * ld, K.at(j, 0), n, E, pi);
            dots(dout + r * ldv, V.at(j, 0), n, Ev, dsi);
            if constexpr (general) x.adjust(effect, {pi, 0, i, 1, j, n}, tanhs, 0);
            const T* kept = dropout_row<general>(x, i, j, n, factors);
            const bool one_key = has_one_key(x, i);
            Vec<T> with_distance = {};
            for (int64_t c = 0; c < n; c += W<T>) {
              Vec<T> e = weight<general, T>(load(pi + c) - lse[r]), dp = one_key ? Vec<T>{} : load(dsi + c),
                     f = set1(T(1));
              if (general && kept) f = load(kept + c), dp *= f;
              Vec<T> g = e * (dp - delta[r]);
              if (general && slope_gradients)  // lanes behind the last key have no weight
                with_distance +=
                    lane_index<T>() < IVec<T>{} + typename IntOf<T>::type(n - c) ? g * x.distances(i, j + c) : Vec<T>{};
              if (general && a.scores.softcap > 0) g *= 1 - load(tanhs + c) * load(tanhs + c);
              store(dsi + c, g);
              store(pi + c, general ? e * f : e);
            }
            if (general && slope_gradients) slope_gradients[b * a.heads + x.h] += hsum<T>(with_distance);
            std::fill(pr, pi, T(0)), std::fill(dsr, dsi, T(0));
            std::fill(pi + n, pr + keys, T(0)), std::fill(dsi + n, dsr + keys, T(0));
            if (a.dq.data) add_weighted(dq + r * ld, T(1), dsi, K.at(j, 0), n, E);
          }
        }
        if (a.dk.data) store_outer(first_head.keys(a.dk).at(j0, 0), keys, E, rows, ds, q, ld);
        if (a.dv.data) store_outer(first_head.keys(a.dv).at(j0, 0), keys, Ev, rows, p, dout, ldv);
      }
      for (int64_t g = 0; a.dq.data && g < group; g++)
        for (int64_t i = 0; i < q_len; i++) {
          S* to = QueryHead<S>(first_head, h0 + g).output_row(a.dq, i);
          for (int64_t e = 0; e < E; e += W<T>)
            store(to + e, load(dq + (g * L + i) * ld + e) * T(a.scores.scale), E - e);
        }
    }
  }, 3 * rows * a.sequences.k_len * (E + Ev));
  if (slope_gradients) store_slope_gradients<T>(a, slope_gradients, 1);
}

}  // namespace

void decode_fwd(const AttentionArgs& a) {
  visit_scores(a, [&](auto s, auto general) { forward<general.value, decltype(s)>(a); });
}
void decode_bwd(const AttentionArgs& a) {
  visit_scores(a, [&](auto s, auto general) { backward<general.value, decltype(s)>(a); });
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
