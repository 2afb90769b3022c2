// What the attention kernels share: the sizes of blocks, the scores of a tile, and the running softmax.
#pragma once
#include <cmath>
#include <limits>

#include "arena.h"
#include "gemm/pack.h"
#include "vmath.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

constexpr int64_t BC = kRegisters == 32 ? 224 : 192;  // keys of a block, a multiple of every MR and NR
template <class E>
constexpr int64_t BR = (kRegisters == 32 ? 112 : 96) / Tiling<E>::MR * Tiling<E>::MR;  // query rows of a block
constexpr int64_t kScoreStride = BC + 16;  // row stride of P and dS; a power of two would crowd a few cache sets
static_assert(BC % Tiling<float>::MR == 0 && BC % Tiling<Packed<bf16>>::MR == 0);
static_assert(BC % Tiling<float>::NR == 0 && BC % Tiling<double>::NR == 0);

template <class T>
constexpr T kInf = std::numeric_limits<T>::infinity();

template <class S>
Matrix<S> head(const Heads& t, int64_t b, int64_t h) {
  return {static_cast<const S*>(t.data) + b * t.stride[0] + h * t.stride[1], t.stride[2], t.stride[3]};
}
template <class S>
S* output_row(const Heads& t, int64_t b, int64_t h, int64_t i) {  // the channels of every output are contiguous
  return static_cast<S*>(t.data) + b * t.stride[0] + h * t.stride[1] + i * t.stride[2];
}

// out = A B of two packed panels over K packs, summed 128 packs at a time, so that long rows round no worse than short
// ones.
template <class U, class T = Acc<U>>
PYGPT_INLINE void dot_products(int64_t K, const U* a, const U* b, T* out, int64_t ldo) {
  constexpr int64_t kChainK = 128, MR = Tiling<U>::MR, NR = Tiling<U>::NR;
  micro_kernel(std::min(K, kChainK), a, b, NR, out, ldo);
  for (int64_t k = kChainK; k < K; k += kChainK) {
    Tile<U> more;
    micro_kernel(std::min(K - k, kChainK), a + k * MR, b + k * NR, NR, more.data(), NR);
    add(out, ldo, more);
  }
}

// float: scale is folded into Q while packing. bf16 pairs: scale is applied to S after the product (in softmax_row); if
// scale <= 0 in score_tile, before masking, so that -inf stays -inf.
template <class U>
PackReader<U> scaling_reader(double scale) {
  if constexpr (PackElement<U>::kPackK == 1) return {U(scale)};
  return {};
}
template <class T>
bool scales_after_masking(double scale) {
  return T(scale) > 0;
}
template <class U, class T = Acc<U>>
PYGPT_INLINE Vec<T> scaled_scores(double scale, Vec<T> s) {
  if constexpr (PackElement<U>::kPackK == 1) return s;
  // Not fused, so that forward and backward have the same scores and a row's only key has P = 1.
  return no_fma(s * (scales_after_masking<T>(scale) ? T(scale) : T(1)));
}

// out = the scores of MR query rows from row0 on against the panel of keys from `first` on, `packs` packs each. Scores
// past the last key, and above the diagonal if causal, become -inf. scaled_scores finishes them.
template <class U, class T = Acc<U>>
PYGPT_INLINE void score_tile(const AttentionArgs& a, const U* q, const U* k, int64_t packs, int64_t row0, int64_t first,
                             T* out, int64_t ldo) {
  constexpr int64_t NR = Tiling<U>::NR;
  dot_products(packs, q, k, out, ldo);
  auto update_row = [&](int r, auto f) {
    for (int v = 0; v < NV; v++) store(out + r * ldo + v * W<T>, f(v, load(out + r * ldo + v * W<T>)));
  };
  if (PackElement<U>::kPackK > 1 && !scales_after_masking<T>(a.scale))
    for (int r = 0; r < Tiling<U>::MR; r++) update_row(r, [&](int, Vec<T> s) { return s * T(a.scale); });
  if (first + NR > unmasked_keys(a, row0))
    for (int r = 0; r < Tiling<U>::MR; r++) {
      const int64_t unmasked = std::clamp<int64_t>(unmasked_keys(a, row0 + r) - first, 0, NR);
      const IVec<T> limit = IVec<T>{} + typename IntOf<T>::type(unmasked);
      update_row(r, [&](int v, Vec<T> s) { return lane_index<T>() + v * W<T> < limit ? s : set1(-kInf<T>); });
    }
}

// The number of the BC keys from j0 on that some of the rows row0 .. row0 + rows - 1 may attend to.
inline int64_t unmasked_in_block(const AttentionArgs& a, int64_t row0, int64_t rows, int64_t j0) {
  return std::clamp<int64_t>(unmasked_keys(a, row0 + rows - 1) - j0, 0, BC);
}

// Replaces one row of scores by exp(score - m'), as packs of U. Updates the running maximum m and sum l, and returns
// the factor that rescales the output so far. A NaN score may not become the maximum, but its exponential and the sum
// are NaN.
template <class U, class T>
PYGPT_INLINE T softmax_row(double scale, T* p, int64_t vectors, T& m, T& l) {
  Vec<T> row_max[4], total[4] = {};
  std::fill(row_max, row_max + 4, load(p));
  unroll_by<4>(vectors, [&](int64_t v, auto together) {
    for (int u = 0; u < together.value; u++) row_max[u] = max<T>(row_max[u], load(p + (v + u) * W<T>));
  });
  const T previous_m = m;
  m = std::max(
      m, hmax<T>(scaled_scores<U>(scale, max<T>(max<T>(row_max[0], row_max[1]), max<T>(row_max[2], row_max[3])))));
  const T row_max_or_0 = m == -kInf<T> ? T(0) : m;
  unroll_by<4>(vectors, [&](int64_t v, auto together) {
    for (int u = 0; u < together.value; u++) {
      const Vec<T> e = exp<T>(scaled_scores<U>(scale, load(p + (v + u) * W<T>)) - row_max_or_0);
      PackElement<U>::store_row(reinterpret_cast<U*>(p) + (v + u) * W<T> / PackElement<U>::kPackK, e);
      total[u] += e;
    }
  });
  const T rescale = previous_m == m ? T(1) : std::exp(previous_m - row_max_or_0);
  l = l * rescale + hsum<T>((total[0] + total[1]) + (total[2] + total[3]));
  return rescale;
}

// Stores a finished row divided by its sum, and its lse. accumulated(j) is the row's vector from channel j on.
template <class S, class F>
PYGPT_INLINE void finish_row(const AttentionArgs& a, int64_t b, int64_t h, int64_t i, Acc<S> m, Acc<S> l,
                             F accumulated) {
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

// For backward: query i's lse, or +inf if the row is fully masked, so that P = 0; and delta = rowsum(dO O) - dlse.
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

// Decoding with a cache, that is at most kDecodeQueries queries, has kernels of its own in attention_few.cpp. They read
// K and V where they lie, and need contiguous channels.
constexpr int64_t kDecodeQueries = 4;
inline bool is_decode(const AttentionArgs& a) {
  return a.q_len <= kDecodeQueries && a.k.stride[3] == 1 && a.v.stride[3] == 1;
}
void decode_fwd(const AttentionArgs& a);
void decode_bwd(const AttentionArgs& a);

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
