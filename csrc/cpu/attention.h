// What the attention kernels share: their tiles, the scores of one, and a step of the running softmax.
#pragma once
#include <cmath>
#include <limits>

#include "gemm.h"
#include "vmath.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

constexpr int64_t BC = kRegisters == 32 ? 224 : 192;  // keys a tile: a multiple of every MR and NR
template <class E>
constexpr int64_t BR = (kRegisters == 32 ? 112 : 96) / MR<E> * MR<E>;  // query rows a block
constexpr int64_t kScoreStride = BC + 16;  // row stride of P and dS; a rounder one would crowd a few cache sets
static_assert(BC % MR<float> == 0 && BC % NR<float> == 0 && BC % NR<double> == 0 && BC % MR<Packed<bf16>> == 0);

template <class T>
constexpr T kInf = std::numeric_limits<T>::infinity();

template <class S>
Matrix<S> head(const Heads& t, int64_t b, int64_t h) {
  return {static_cast<const S*>(t.data) + b * t.stride[0] + h * t.stride[1], t.stride[2], t.stride[3]};
}
template <class S>
S* output_row(const Heads& t, int64_t b, int64_t h, int64_t i) {  // channels are contiguous in every output
  return static_cast<S*>(t.data) + b * t.stride[0] + h * t.stride[1] + i * t.stride[2];
}

// out = A B of two packed panels, K steps long: in runs of 128, so that long rows round no worse than short ones.
template <class U, class T = Acc<U>>
PYGPT_INLINE void dot_products(int64_t K, const U* a, const U* b, T* out, int64_t ldo) {
  constexpr int64_t kRun = 128;
  multiply_panels(std::min(K, kRun), a, b, NR<T>, out, ldo);
  for (int64_t k = kRun; k < K; k += kRun) {
    Tile<U> more;
    multiply_panels(std::min(K - k, kRun), a + k * MR<U>, b + k * NR<T>, NR<T>, more.data(), NR<T>);
    add(out, ldo, more);
  }
}

// A step of Q is scaled when it is packed, unless it is a pair, which stays as it is. Then its scores are, where they are used;
// but where scale is not positive, a -inf would not remain one, and score_tile does it.
template <class U>
PackReader<U> scaled(double scale) {
  if constexpr (PackElement<U>::kPackK == 1) return {U(scale)};
  return {};
}
template <class T>
bool scaled_late(double scale) {
  return T(scale) > 0;
}
template <class U, class T = Acc<U>>
PYGPT_INLINE Vec<T> scaled_scores(double scale, Vec<T> s) {
  if constexpr (PackElement<U>::kPackK == 1) return s;
  return no_fma(s * (scaled_late<T>(scale) ? T(scale) : T(1)));  // the same forward and backward: a row's only key has P = 1
}

// How many keys query i sees.
inline int64_t unmasked_keys(const AttentionArgs& a, int64_t i) { return a.is_causal ? std::min(a.k_len, i + 1) : a.k_len; }

// out = scores (see scaled_scores) of MR query rows from row0 against one panel of keys from `first`, from `steps` steps of
// each; those of keys that are none, and above the diagonal if causal, become -inf.
template <class U, class T = Acc<U>>
PYGPT_INLINE void score_tile(const AttentionArgs& a, const U* q, const U* k, int64_t steps, int64_t row0, int64_t first,
                             T* out, int64_t ldo) {
  dot_products(steps, q, k, out, ldo);
  auto each = [&](int r, auto f) {
    for (int v = 0; v < NV; v++) store(out + r * ldo + v * W<T>, f(v, load(out + r * ldo + v * W<T>)));
  };
  if (PackElement<U>::kPackK > 1 && !scaled_late<T>(a.scale))
    for (int r = 0; r < MR<U>; r++) each(r, [&](int, Vec<T> s) { return s * T(a.scale); });
  if (first + NR<T> > unmasked_keys(a, row0))
    for (int r = 0; r < MR<U>; r++) {
      const int64_t unmasked = std::clamp<int64_t>(unmasked_keys(a, row0 + r) - first, 0, NR<T>);
      const IVec<T> limit = IVec<T>{} + typename IntOf<T>::type(unmasked);
      each(r, [&](int v, Vec<T> s) { return lane_index<T>() + v * W<T> < limit ? s : set1(-kInf<T>); });
    }
}

// How many of the BC keys from j0 the rows row0 .. row0 + rows - 1 can see.
inline int64_t unmasked_in_block(const AttentionArgs& a, int64_t row0, int64_t rows, int64_t j0) {
  return std::clamp<int64_t>(unmasked_keys(a, row0 + rows - 1) - j0, 0, BC);
}

// One row of scores -> exp(score - m') in place, as steps U; updates the running maximum and sum, and returns
// the factor by which the output so far shrinks. A NaN may be no maximum, but makes its own exponential and the sum NaN.
template <class U, class T>
PYGPT_INLINE T softmax_row(double scale, T* p, int64_t vectors, T& m, T& l) {
  Vec<T> row_max[4], total[4] = {};
  std::fill(row_max, row_max + 4, load(p));
  unroll_by<4>(vectors, [&](int64_t v, auto together) {
    for (int u = 0; u < together.value; u++) row_max[u] = max<T>(row_max[u], load(p + (v + u) * W<T>));
  });
  const T before = m;
  m = std::max(m, hmax<T>(scaled_scores<U>(scale, max<T>(max<T>(row_max[0], row_max[1]), max<T>(row_max[2], row_max[3])))));
  const T row_max_or_0 = m == -kInf<T> ? T(0) : m;
  unroll_by<4>(vectors, [&](int64_t v, auto together) {
    for (int u = 0; u < together.value; u++) {
      const Vec<T> e = exp<T>(scaled_scores<U>(scale, load(p + (v + u) * W<T>)) - row_max_or_0);
      PackElement<U>::store_row(reinterpret_cast<U*>(p) + (v + u) * W<T> / PackElement<U>::kPackK, e);
      total[u] += e;
    }
  });
  const T rescale = before == m ? T(1) : std::exp(before - row_max_or_0);
  l = l * rescale + hsum<T>((total[0] + total[1]) + (total[2] + total[3]));
  return rescale;
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

template <class S, class T = Acc<S>>
T row_dot(Matrix<S> a, Matrix<S> b, int64_t n) {
  Vec<T> total[2] = {};
  if (a.cs == 1 && b.cs == 1) {
    for (int64_t j = 0; j < n; j += W<T>) total[j / W<T> % 2] += load(a.data + j, n - j) * load(b.data + j, n - j);
    return hsum<T>(total[0] + total[1]);
  }
  double slow = 0;
  for (int64_t j = 0; j < n; j++) slow += double(to_acc(a.data[j * a.cs])) * double(to_acc(b.data[j * b.cs]));
  return T(slow);
}

// Of query i, for backward: its lse, +inf where it sees nothing, so that P = 0; and rowsum(dO O) - dlse.
template <class T>
T lse_of(const AttentionArgs& a, int64_t b, int64_t h, int64_t i) {
  const T lse = canonical_nan(static_cast<const T*>(a.lse)[(b * a.heads + h) * a.q_len + i]);
  return lse == -kInf<T> ? kInf<T> : lse;
}
template <class S, class T = Acc<S>>
T delta_of(const AttentionArgs& a, int64_t b, int64_t h, int64_t i) {
  const T dlse = a.dlse ? static_cast<const T*>(a.dlse)[(b * a.heads + h) * a.q_len + i] : T(0);
  return row_dot(head<S>(a.dout, b, h).at(i, 0), head<S>(a.out, b, h).at(i, 0), a.v_dim) - canonical_nan(dlse);
}

// Few queries (decoding with a cache) have kernels of their own, in attention_few.cpp; they read K and V as they
// lie, and want their channels contiguous.
constexpr int64_t kDecodeQueries = 4;
inline bool is_decode(const AttentionArgs& a) {
  return a.q_len <= kDecodeQueries && a.k.stride[3] == 1 && a.v.stride[3] == 1;
}
void decode_fwd(const AttentionArgs& a);
void decode_bwd(const AttentionArgs& a);

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
