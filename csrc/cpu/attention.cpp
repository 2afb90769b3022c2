// Attention without the matrix: FlashAttention-2 (Dao 2023) for CPUs.
//
//   S = scale Q K^T   P = softmax(S)   O = P V        Q (L, E), K (S, E), V (S, Ev), per batch entry and head
//
// Forward: a strip of MR query rows meets the keys BC at a time. Its scores live in L1; the running row
// maximum m and sum l rescale the output strip, which stays in register tiles:
//   m' = max(m, max_j s_j)   P = exp(s - m')   l' = l exp(m - m') + sum_j P   O' = O exp(m - m') + P V
// Kept for backward: O and lse = m + log l. Tiles above the causal diagonal are skipped, and only those
// that the diagonal or the last key crosses are masked.
//
// Backward (KV-stationary): for BC keys at a time, over all the queries that see them,
//   P = exp(S - lse)          dV += P^T dO      dP = dO V^T
//   dS = P (dP - delta)       dK += dS^T Q      dQ += dS K      delta = rowsum(dO O) - dlse
// One task owns a head, so every sum has one fixed order and no atomics. Where there are few heads, the
// key tiles of one are dealt to a number of tasks that depends on the shape alone, and their dQ are
// added in order.
//
// All products run on the packed GEMM's microkernel (gemm.h). Packing Q, K, V, dO a head at a time
// converts 16-bit types and absorbs any strides; P and dS are operands as they lie. Where the machine
// multiplies pairs of bf16, all products take them: P and dS are rounded to bf16, sums over rows are not.
#include <cmath>
#include <limits>

#include "gemm.h"
#include "vmath.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {
namespace {

constexpr int64_t BC = MR == 14 ? 224 : 192;  // keys a tile: a multiple of MR and of every NR
constexpr int64_t BR = MR == 14 ? 112 : 96;   // query rows a block
constexpr int64_t LD = BC + 16;               // row stride of P and dS; a rounder one would crowd a few cache sets
constexpr int64_t kStrips = BR / MR;
constexpr int64_t kTogether = MR == 14 ? 2 : 4;  // strips that share each panel of K and V while it is in L1
static_assert(BC % MR == 0 && BC % NR<float> == 0 && BC % NR<double> == 0 && BR % MR == 0);

template <class T>
constexpr T kInf = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kLog2e = T(1.4426950408889634074);

template <class S>
Matrix<S> head(const Heads& t, int64_t b, int64_t h) {
  return {static_cast<const S*>(t.data) + b * t.stride[0] + h * t.stride[1], t.stride[2], t.stride[3]};
}
template <class S>
S* output_row(const Heads& t, int64_t b, int64_t h, int64_t i) {  // channels are contiguous in every output
  return static_cast<S*>(t.data) + b * t.stride[0] + h * t.stride[1] + i * t.stride[2];
}

template <class T>
IVec<T> lane_index() {
  IVec<T> v{};
  for (int i = 0; i < W<T>; i++) v[i] = i;
  return v;
}

// A B of two packed panels, K steps long: in runs of 128, so that long rows round no worse than short ones.
template <class U, class T = typename Step<U>::Sum>
PYGPT_INLINE Tile<T> dot_products(int64_t K, const U* a, const U* b) {
  constexpr int64_t kRun = 128;
  Tile<T> tile = multiply<1, MR>(std::min(K, kRun), a, b, NR<T>);
  for (int64_t k = kRun; k < K; k += kRun)
    add(tile, multiply<1, MR>(std::min(K - k, kRun), a + k * MR, b + k * NR<T>, NR<T>));
  return tile;
}

// A step of Q is scaled when it is packed, unless it is a pair, which stays as it is: then its scores are.
template <class U>
Read<U> scaled(double scale) {
  if constexpr (Step<U>::kDepth == 1) return {U(scale)};
  return {};
}

// Scores of MR query rows from row0 against one panel of keys from `first`, from `steps` steps of each; those of
// keys from `keys` on, and above the diagonal if causal, become -inf.
template <class U, class T = typename Step<U>::Sum>
PYGPT_INLINE Tile<T> score_tile(const AttentionArgs& a, const U* q, const U* k, int64_t steps, int64_t row0, int64_t first) {
  const int64_t keys = a.k_len;
  const bool causal = a.is_causal;
  Tile<T> tile = dot_products(steps, q, k);
  if constexpr (Step<U>::kDepth > 1)
    for (int r = 0; r < MR; r++)
      for (int v = 0; v < NV; v++) tile.c[r][v] *= T(a.scale);
  if (first + NR<T> > keys || (causal && first + NR<T> > row0 + 1))
    for (int r = 0; r < MR; r++) {
      const int64_t seen = (causal ? std::min(keys, row0 + r + 1) : keys) - first;
      const IVec<T> limit = IVec<T>{} + typename IntOf<T>::type(std::clamp<int64_t>(seen, 0, NR<T>));
      for (int v = 0; v < NV; v++) tile.c[r][v] = lane_index<T>() + v * W<T> < limit ? tile.c[r][v] : set1(-kInf<T>);
    }
  return tile;
}

// How many of the BC keys from j0 the rows row0 .. row0 + rows - 1 can see.
inline int64_t visible(const AttentionArgs& a, int64_t row0, int64_t rows, int64_t j0) {
  const int64_t end = a.is_causal ? std::min(a.k_len, row0 + rows) : a.k_len;
  return std::clamp<int64_t>(end - j0, 0, BC);
}

struct PackedQ;
struct PackedK;
struct PackedV;
struct Strip;
struct Output;

template <class T>
struct Row {
  T m = -kInf<T>, l = 0;  // running maximum and sum
};

// One row of scores -> exp(score - m') in place, as steps U; updates the running maximum and sum, and returns
// the factor by which the output so far shrinks.
template <class U, class T>
PYGPT_INLINE T softmax_row(T* p, int64_t vectors, T& m, T& l) {
  Vec<T> top = load(p);
  for (int64_t v = 1; v < vectors; v++) top = max<T>(top, load(p + v * W<T>));
  const T here = largest<T>(top), before = m;
  m = here > before || here != here ? here : before;
  const T shift = m == -kInf<T> ? T(0) : m;
  Vec<T> total = {};
  for (int64_t v = 0; v < vectors; v++) {
    const Vec<T> e = exp2<T>((load(p + v * W<T>) - shift) * kLog2e<T>);
    Step<U>::store(reinterpret_cast<U*>(p) + v * W<T> / Step<U>::kDepth, e);
    total += e;
  }
  const T shrink = before == m ? T(1) : std::exp2((before - shift) * kLog2e<T>);
  l = l * shrink + sum<T>(total);
  return shrink;
}

// Divides a finished row by its sum; accumulated(j) is its vector from channel j.
template <class S, class F>
PYGPT_INLINE void finish_row(const AttentionArgs& a, int64_t b, int64_t h, int64_t i, Acc<S> m, Acc<S> l, F accumulated) {
  using T = Acc<S>;
  const T inverse = l == 0 ? T(0) : 1 / l;
  static_cast<T*>(a.lse)[(b * a.heads + h) * a.q_len + i] = l == 0 ? -kInf<T> : m + std::log(l);
  S* o = output_row<S>(a.out, b, h, i);
  for (int64_t j = 0; j < a.v_dim; j += W<T>) store(o + j, accumulated(j) * inverse, a.v_dim - j);
}

// One block of BR query rows of head (b, h) from row i0, against packed keys and values.
template <class S>
void forward_block(const AttentionArgs& a, int64_t b, int64_t h, int64_t i0, const StepOf<S>* k, const StepOf<S>* v) {
  using T = Acc<S>;
  using U = StepOf<S>;
  constexpr int64_t d = Step<U>::kDepth;
  const int64_t rows = std::min(BR, a.q_len - i0), v_panels = ceil_div(a.v_dim, NR<T>);
  const int64_t steps = ceil_div(a.head_dim, d), v_steps = ceil_div(a.k_len, d);
  U* q = scratch<U, PackedQ>(BR * steps);
  pack_rows<MR>(q, head<S>(a.q, b, h).at(i0, 0), rows, a.head_dim, scaled<U>(a.scale));
  T* s = scratch<T, Strip>(kTogether * MR * LD);
  Tile<T>* out = scratch<Tile<T>, Output>(kStrips * v_panels);
  std::fill(out, out + kStrips * v_panels, Tile<T>{});
  Row<T> state[BR];

  for (int64_t j0 = 0; j0 < a.k_len && visible(a, i0, rows, j0) > 0; j0 += BC)
    for (int64_t first = 0; first * MR < rows; first += kTogether) {
      const int64_t end = std::min(first + kTogether, ceil_div(rows, MR));
      auto seen = [&](int64_t strip) { return visible(a, i0 + strip * MR, MR, j0); };  // grows with strip
      for (int64_t p = 0; p * NR<T> < seen(end - 1); p++)
        for (int64_t strip = first; strip < end; strip++) {
          if (p * NR<T> >= seen(strip)) continue;
          const int64_t j = j0 + p * NR<T>;
          const Tile<T> tile = score_tile(a, q + strip * MR * steps, k + j * steps, steps, i0 + strip * MR, j);
          for (int r = 0; r < MR; r++)
            for (int w = 0; w < NV; w++) store(s + ((strip - first) * MR + r) * LD + p * NR<T> + w * W<T>, tile.c[r][w]);
        }
      T shrink[kTogether * MR];
      for (int64_t r = 0; r < (end - first) * MR; r++) {
        Row<T>& row = state[first * MR + r];
        const int64_t vectors = ceil_div(seen(first + r / MR), NR<T>) * NV;
        shrink[r] = vectors ? softmax_row<U>(s + r * LD, vectors, row.m, row.l) : T(1);
      }
      for (int64_t p = 0; p < v_panels; p++)
        for (int64_t strip = first; strip < end; strip++) {
          const U* x = reinterpret_cast<const U*>(s + (strip - first) * MR * LD);
          const U* y = v + (p * v_steps + j0 / d) * NR<T>;
          const Tile<T> more = multiply<LD, 1>(ceil_div(seen(strip), d), x, y, NR<T>);
          Tile<T>& sofar = out[strip * v_panels + p];
          for (int r = 0; r < MR; r++)
            for (int w = 0; w < NV; w++) sofar.c[r][w] = sofar.c[r][w] * shrink[(strip - first) * MR + r] + more.c[r][w];
        }
    }

  for (int64_t i = 0; i < rows; i++) {
    const Tile<T>* tiles = out + i / MR * v_panels;
    finish_row<S>(a, b, h, i0 + i, state[i].m, state[i].l,
                  [&](int64_t j) { return tiles[j / NR<T>].c[i % MR][j % NR<T> / W<T>]; });
  }
}

template <class S>
void forward(const AttentionArgs& a) {
  using T = Acc<S>;
  using U = StepOf<S>;
  const int64_t blocks = ceil_div(a.q_len, BR), group = a.heads / std::max<int64_t>(a.kv_heads, 1);
  parallel_for(a.batch * a.heads * blocks, [&](int64_t begin, int64_t end) {
    U* k = scratch<U, PackedK>(round_up(a.k_len, NR<T>) * ceil_div(a.head_dim, Step<U>::kDepth));
    U* v = scratch<U, PackedV>(round_up(a.v_dim, NR<T>) * ceil_div(a.k_len, Step<U>::kDepth));
    int64_t packed = -1;
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / blocks / a.heads, h = task / blocks % a.heads, kv = b * a.kv_heads + h / group;
      if (kv != packed) {
        pack_rows<NR<T>>(k, head<S>(a.k, b, h / group), a.k_len, a.head_dim);
        pack_rows<NR<T>>(v, head<S>(a.v, b, h / group).transposed(), a.v_dim, a.k_len);
        packed = kv;
      }
      // First and last blocks in turn: any run of tasks then holds short and long causal rows alike.
      const int64_t n = task % blocks, block = n % 2 ? blocks - 1 - n / 2 : n / 2;
      forward_block<S>(a, b, h, block * BR, k, v);
    }
  }, std::min(BR, a.q_len) * a.k_len * (a.head_dim + a.v_dim));
}

// Few queries (decoding with a cache): reading K and V once is all the work, so nothing is packed. One
// task per query row; the channels of k and v are contiguous.
constexpr int64_t kFewQueries = 4;
struct Query;

using One = std::integral_constant<int, 1>;

// body(i, how many) for 0 .. n in fours, then one by one.
template <class F>
PYGPT_INLINE void in_fours(int64_t n, F body) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) body(i, std::integral_constant<int, 4>());
  for (; i < n; i++) body(i, One());
}

template <class S>
void few_queries(const AttentionArgs& a) {
  using T = Acc<S>;
  const int64_t E = a.head_dim, Ev = a.v_dim, group = a.heads / std::max<int64_t>(a.kv_heads, 1);
  parallel_for(a.batch * a.heads * a.q_len, [&](int64_t begin, int64_t end) {
    const int64_t ld = round_up(E, W<T>), ldv = round_up(Ev, W<T>);
    const auto whole = [](const S* at) { return load(at); };
    T *q = scratch<T, Query>(ld + BC + ldv), *p = q + ld, *out = p + BC;
    for (int64_t task = begin; task < end; task++) {
      const int64_t i = task % a.q_len, h = task / a.q_len % a.heads, b = task / a.q_len / a.heads;
      const Matrix<S> Q = head<S>(a.q, b, h), K = head<S>(a.k, b, h / group), V = head<S>(a.v, b, h / group);
      const int64_t keys = a.is_causal ? std::min(a.k_len, i + 1) : a.k_len;
      for (int64_t e = 0; e < ld; e++) q[e] = e < E ? to_acc(Q.data[i * Q.rs + e * Q.cs]) * T(a.scale) : T(0);
      std::fill(out, out + ldv, T(0));
      T m = -kInf<T>, l = 0;
      for (int64_t j0 = 0; j0 < keys; j0 += BC) {
        const int64_t n = std::min(BC, keys - j0);
        in_fours(n, [&](int64_t j, auto together) {
          Vec<T> dot[together.value] = {};
          auto step = [&](int64_t e, auto load_k) {
            for (int u = 0; u < together.value; u++) dot[u] += load(q + e) * load_k(K.data + (j0 + j + u) * K.rs + e);
          };
          for (int64_t v = 0; v < E / W<T>; v++) step(v * W<T>, whole);
          if (E % W<T>) step(E - E % W<T>, [&](const S* at) { return load(at, E % W<T>); });
          for (int u = 0; u < together.value; u++) p[j + u] = sum<T>(dot[u]);
        });
        std::fill(p + n, p + round_up(n, W<T>), -kInf<T>);
        const T shrink = softmax_row<T>(p, ceil_div(n, W<T>), m, l);
        auto add_values = [&](int64_t e, auto vectors, auto load_v) {
          Vec<T> even[vectors.value] = {}, odd[vectors.value] = {};
          auto add = [&](Vec<T>* sum, int64_t j) {
            for (int u = 0; u < vectors.value; u++) sum[u] += p[j] * load_v(V.data + (j0 + j) * V.rs + e + u * W<T>);
          };
          int64_t j = 0;
          for (; j + 2 <= n; j += 2) add(even, j), add(odd, j + 1);
          if (j < n) add(even, j);
          for (int u = 0; u < vectors.value; u++) {
            T* to = out + e + u * W<T>;
            store(to, load(to) * shrink + (even[u] + odd[u]));
          }
        };
        in_fours(Ev / W<T>, [&](int64_t v, auto vectors) { add_values(v * W<T>, vectors, whole); });
        if (Ev % W<T>) add_values(Ev - Ev % W<T>, One(), [&](const S* at) { return load(at, Ev % W<T>); });
      }
      finish_row<S>(a, b, h, i, m, l, [&](int64_t e) { return load(out + e); });
    }
  }, a.k_len * (E + Ev));
}

// ---------------------------------------------------------------- backward
struct PackedQt;
struct PackedDo;
struct PackedDot;
struct PackedKt;
struct PackedVt;
struct Statistics;
struct ProbabilityBlock;
struct ScoreGradientBlock;
struct ScoreGradientRows;
struct KeyGradient;
struct ValueGradient;
struct QueryGradient;
struct QueryGradientPartials;

template <class S, class T = Acc<S>>
T row_dot(Matrix<S> a, Matrix<S> b, int64_t n) {
  Vec<T> total[2] = {};
  if (a.cs == 1 && b.cs == 1) {
    for (int64_t j = 0; j < n; j += W<T>) total[j / W<T> % 2] += load(a.data + j, n - j) * load(b.data + j, n - j);
    return sum<T>(total[0] + total[1]);
  }
  double slow = 0;
  for (int64_t j = 0; j < n; j++) slow += double(to_acc(a.data[j * a.cs])) * double(to_acc(b.data[j * b.cs]));
  return T(slow);
}

// Everything of one head that the key tiles share, packed. A "t" operand is the right-hand side of a
// product that sums over its rows: panels [step][NR].
template <class S>
struct Packed {
  using T = Acc<S>;
  using U = StepOf<S>;
  static constexpr int64_t kDepth = Step<U>::kDepth;
  const AttentionArgs& a;
  int64_t b, h, L, E, Ev, e_panels, v_panels;
  int64_t l_steps, k_steps, e_steps, v_steps;  // along the queries, the keys and the channels
  U *q, *qt, *go, *got, *k, *kt, *v;
  T *lse, *delta;

  Packed(const AttentionArgs& a, int64_t b, int64_t h)
      : a(a), b(b), h(h), L(a.q_len), E(a.head_dim), Ev(a.v_dim), e_panels(ceil_div(E, NR<T>)), v_panels(ceil_div(Ev, NR<T>)),
        l_steps(ceil_div(L, kDepth)), k_steps(ceil_div(a.k_len, kDepth)), e_steps(ceil_div(E, kDepth)), v_steps(ceil_div(Ev, kDepth)) {
    const int64_t padded = round_up(L, MR), kpad = round_up(a.k_len, NR<T>);
    q = scratch<U, PackedQ>(padded * e_steps), qt = scratch<U, PackedQt>(e_panels * NR<T> * l_steps);
    go = scratch<U, PackedDo>(padded * v_steps), got = scratch<U, PackedDot>(v_panels * NR<T> * l_steps);
    k = scratch<U, PackedK>(kpad * e_steps), kt = scratch<U, PackedKt>(e_panels * NR<T> * k_steps);
    v = scratch<U, PackedVt>(kpad * v_steps);
    const auto Q = head<S>(a.q, b, h), K = head<S>(a.k, b, h), V = head<S>(a.v, b, h), dO = head<S>(a.dout, b, h);
    pack_rows<MR>(q, Q, L, E, scaled<U>(a.scale));
    pack_rows<NR<T>>(qt, Q.transposed(), E, L);
    pack_rows<MR>(go, dO, L, Ev);
    pack_rows<NR<T>>(got, dO.transposed(), Ev, L);
    pack_rows<NR<T>>(k, K, a.k_len, E);
    pack_rows<NR<T>>(kt, K.transposed(), E, a.k_len);
    pack_rows<NR<T>>(v, V, a.k_len, Ev);

    lse = scratch<T, Statistics>(2 * padded), delta = lse + padded;
    const auto O = head<S>(a.out, b, h);
    const int64_t offset = (b * a.heads + h) * L;
    for (int64_t i = 0; i < padded; i++) {
      const T given = i < L ? static_cast<const T*>(a.lse)[offset + i] : kInf<T>;
      lse[i] = given == -kInf<T> ? kInf<T> : given;  // a row that sees nothing, or is none: P = 0
      if (i >= L) delta[i] = 0;
      else delta[i] = row_dot(dO.at(i, 0), O.at(i, 0), Ev) - (a.dlse ? static_cast<const T*>(a.dlse)[offset + i] : T(0));
    }
    if (L <= kFewQueries) own_statistics();
  }

  // few_queries sums its scores in another order than score_tile; a row that sees one key would not give
  // P = 1 exactly. So the lse of so few rows is found again, from the scores that backward forms.
  void own_statistics() {
    T* s = scratch<T, Strip>(kTogether * MR * LD);
    Row<T> row[kFewQueries];
    for (int64_t j0 = 0; visible(a, 0, L, j0) > 0; j0 += BC) {
      const int64_t panels = ceil_div(visible(a, 0, L, j0), NR<T>);
      for (int64_t p = 0; p < panels; p++) {
        const int64_t j = j0 + p * NR<T>;
        const Tile<T> tile = score_tile(a, q, k + j * e_steps, e_steps, 0, j);
        for (int64_t r = 0; r < L; r++)
          for (int w = 0; w < NV; w++) store(s + r * LD + p * NR<T> + w * W<T>, tile.c[r][w]);
      }
      for (int64_t r = 0; r < L; r++) softmax_row<T>(s + r * LD, panels * NV, row[r].m, row[r].l);
    }
    for (int64_t r = 0; r < L; r++) lse[r] = row[r].l == 0 ? kInf<T> : row[r].m + std::log(row[r].l);
  }
};

// P and dS of `rows` query rows from i0 against the BC keys from j0, zero where nothing is seen. p and ds
// (BR, BC) have their steps along the queries; ds_rows, the same as ds where a step is one value, along the keys.
template <class S, class U = StepOf<S>>
void gradient_block(const Packed<S>& x, U* p, U* ds, U* ds_rows, int64_t i0, int64_t rows, int64_t j0) {
  using T = Acc<S>;
  constexpr int d = Step<U>::kDepth;
  for (int64_t panel = 0; panel * NR<T> < BC; panel++)
    for (int64_t i = 0; i < rows; i += MR) {
      const int64_t row0 = i0 + i, column = panel * NR<T>, j = j0 + column;
      auto put = [&](int r, int w, const Vec<T>(&e)[d], const Vec<T>(&g)[d]) {  // of rows r .. r + d - 1
        const int64_t at = (i + r) / d * LD + column + w * W<T>;
        store(reinterpret_cast<T*>(p) + at, Step<U>::join(e));
        store(reinterpret_cast<T*>(ds) + at, Step<U>::join(g));
        if constexpr (d > 1)
          for (int n = 0; n < d; n++) Step<U>::store(ds_rows + (i + r + n) * LD / d + (column + w * W<T>) / d, g[n]);
      };
      if (column >= visible(x.a, row0, MR, j0)) {
        const Vec<T> zero[d] = {};
        for (int r = 0; r < MR; r += d)
          for (int w = 0; w < NV; w++) put(r, w, zero, zero);
        continue;
      }
      const Tile<T> s = score_tile(x.a, x.q + row0 * x.e_steps, x.k + j * x.e_steps, x.e_steps, row0, j);
      const Tile<T> dp = dot_products(x.v_steps, x.go + row0 * x.v_steps, x.v + j * x.v_steps);
      for (int r = 0; r < MR; r += d)
        for (int w = 0; w < NV; w++) {
          Vec<T> e[d], g[d];
          for (int n = 0; n < d; n++) {
            e[n] = exp2<T>((s.c[r + n][w] - x.lse[row0 + r + n]) * kLog2e<T>);
            g[n] = e[n] * (dp.c[r + n][w] - x.delta[row0 + r + n]);
          }
          put(r, w, e, g);
        }
    }
}

// acc (BC keys, channels) += x^T (rows, BC) y, y packed as panels of `steps` steps along the queries.
template <class U, class T = typename Step<U>::Sum>
void add_transposed_product(Tile<T>* acc, const U* x, const U* y, int64_t steps, int64_t i0, int64_t rows, int64_t keys,
                            int64_t panels, int64_t first_row) {
  constexpr int64_t kKeys = MR == 14 ? 4 * MR : 8 * MR;  // whose columns of x stay in L1 for all panels
  constexpr int64_t d = Step<U>::kDepth;
  for (int64_t j0 = 0; j0 < keys; j0 += kKeys)
    for (int64_t p = 0; p < panels; p++)
      for (int64_t j = j0; j < std::min(keys, j0 + kKeys); j += MR) {
        const int64_t start = std::clamp<int64_t>(first_row + j, 0, rows) / d;  // rows before see none of these keys
        add(acc[j / MR * panels + p],
            multiply<1, int(LD)>(ceil_div(rows, d) - start, x + start * LD + j, y + (p * steps + i0 / d + start) * NR<T>, NR<T>));
      }
}

template <class S>
void store_tiles(const Heads& to, int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t channels, const Tile<Acc<S>>* tiles,
                 Acc<S> scale) {
  using T = Acc<S>;
  const int64_t panels = ceil_div(channels, NR<T>);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < channels; j += W<T>) {
      const Vec<T> x = tiles[i / MR * panels + j / NR<T>].c[i % MR][j % NR<T> / W<T>];
      store(output_row<S>(to, b, h, i0 + i) + j, x * scale, channels - j);
    }
}

// dk, dv of the BC keys from j0, and their share of dq (tiles of the whole head, not yet scaled).
template <class S>
void backward_tile(const Packed<S>& x, int64_t j0, Tile<Acc<S>>* dq) {
  using T = Acc<S>;
  using U = StepOf<S>;
  constexpr int64_t d = Step<U>::kDepth;
  const AttentionArgs& a = x.a;
  const int64_t keys = std::min(BC, a.k_len - j0);
  U *p = scratch<U, ProbabilityBlock>(BR * LD / d), *ds = scratch<U, ScoreGradientBlock>(BR * LD / d);
  U* ds_rows = d > 1 ? scratch<U, ScoreGradientRows>(BR * LD / d) : ds;
  Tile<T>* dk = scratch<Tile<T>, KeyGradient>(BC / MR * x.e_panels);
  Tile<T>* dv = scratch<Tile<T>, ValueGradient>(BC / MR * x.v_panels);
  std::fill(dk, dk + BC / MR * x.e_panels, Tile<T>{});
  std::fill(dv, dv + BC / MR * x.v_panels, Tile<T>{});

  for (int64_t i0 = a.is_causal ? j0 / BR * BR : 0; i0 < x.L; i0 += BR) {
    const int64_t rows = std::min(BR, x.L - i0);
    gradient_block(x, p, ds, ds_rows, i0, rows, j0);
    for (int64_t e = 0; dq && e < x.e_panels; e++)
      for (int64_t i = 0; i < rows; i += MR)
        add(dq[(i0 + i) / MR * x.e_panels + e],
            multiply<LD / d, 1>(ceil_div(visible(a, i0 + i, MR, j0), d), ds_rows + i * LD / d,
                                x.kt + (e * x.k_steps + j0 / d) * NR<T>, NR<T>));
    const int64_t first_row = a.is_causal ? j0 - i0 : -BC;
    if (a.dv.data) add_transposed_product(dv, p, x.got, x.l_steps, i0, rows, keys, x.v_panels, first_row);
    if (a.dk.data) add_transposed_product(dk, ds, x.qt, x.l_steps, i0, rows, keys, x.e_panels, first_row);
  }
  if (a.dk.data) store_tiles<S>(a.dk, x.b, x.h, j0, keys, x.E, dk, T(a.scale));
  if (a.dv.data) store_tiles<S>(a.dv, x.b, x.h, j0, keys, x.Ev, dv, T(1));
}

template <class S>
void backward(const AttentionArgs& a) {
  using T = Acc<S>;
  const int64_t heads = a.batch * a.heads, tiles = ceil_div(a.k_len, BC), e_panels = ceil_div(a.head_dim, NR<T>);
  const int64_t dq_tiles = ceil_div(a.q_len, MR) * e_panels;
  // Few heads: deal each one's key tiles round robin to several tasks, by the shape alone.
  const int64_t splits = std::clamp<int64_t>(ceil_div(8, std::max<int64_t>(heads, 1)), 1, std::max<int64_t>(tiles, 1));
  Tile<T>* partials = splits > 1 && a.dq.data ? scratch<Tile<T>, QueryGradientPartials>(heads * splits * dq_tiles) : nullptr;
  parallel_for(heads * splits, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / splits / a.heads, h = task / splits % a.heads;
      const Packed<S> x(a, b, h);
      Tile<T>* dq = partials ? partials + task * dq_tiles : a.dq.data ? scratch<Tile<T>, QueryGradient>(dq_tiles) : nullptr;
      if (dq) std::fill(dq, dq + dq_tiles, Tile<T>{});
      for (int64_t tile = task % splits; tile < tiles; tile += splits) backward_tile(x, tile * BC, dq);
      if (dq && !partials) store_tiles<S>(a.dq, b, h, 0, a.q_len, a.head_dim, dq, T(a.scale));
    }
  }, a.q_len * ceil_div(a.k_len, splits) * (a.head_dim + a.v_dim));
  if (partials)
    parallel_for(heads, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        Tile<T>* dq = partials + n * splits * dq_tiles;
        for (int64_t s = 1; s < splits; s++)
          for (int64_t t = 0; t < dq_tiles; t++) add(dq[t], dq[s * dq_tiles + t]);
        store_tiles<S>(a.dq, n / a.heads, n % a.heads, 0, a.q_len, a.head_dim, dq, T(a.scale));
      }
    });
}

}  // namespace

void attention_fwd(const AttentionArgs& a) {
  const bool few = a.q_len <= kFewQueries && a.k.stride[3] == 1 && a.v.stride[3] == 1;
  visit(a.dtype, [&](auto s) { few ? few_queries<decltype(s)>(a) : forward<decltype(s)>(a); });
}

void attention_bwd(const AttentionArgs& a) {
  visit(a.dtype, [&](auto s) { backward<decltype(s)>(a); });
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
