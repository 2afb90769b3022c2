// What the attention kernels share: the sizes of blocks, the scores of a tile, and the running softmax.
//
// Kernels have a template parameter `general`. Without it, a score is scaled and nothing else happens to it; with it,
// it goes through all options of csrc/attention/scores.h, which are run-time fields.
#pragma once
#include <cmath>
#include <limits>

#include "../arena.h"
#include "../dropout.h"
#include "../gemm/pack.h"
#include "../vmath.h"
#include "mask_effect.h"

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
Matrix<S> head(const Heads& t, int64_t b, int64_t h, int64_t first_row) {
  return {static_cast<const S*>(t.data) + b * t.stride[0] + h * t.stride[1] + first_row * t.stride[2], t.stride[2],
          t.stride[3]};
}

// The scores of `rows` queries from row0 on against the keys first .. first + n - 1, in rows that are ld apart.
template <class T>
struct ScoreBlock {
  T* data;
  int64_t ld, row0, rows, first, n;
};

// ---------------------------------------------------------------- one head
// A query head of a sequence: where its tensors lie, which keys a query sees, and what happens to its scores.
template <class S>
struct QueryHead {
  using T = Acc<S>;
  const AttentionArgs& a;
  int64_t b, h;
  Sequence sequence;
  Visible<int64_t> visible;

  QueryHead(const AttentionArgs& a, int64_t b, int64_t h)
      : a(a), b(b), h(h), sequence(a.sequences(b)), visible(a.visible(sequence)) {}
  // Another head of the same sequence.
  QueryHead(const QueryHead& other, int64_t h) : QueryHead(other) { this->h = h; }

  Matrix<S> queries(const Heads& t) const { return head<S>(t, b, h, sequence.q_row); }
  Matrix<S> keys(const Heads& t) const { return head<S>(t, b, h / a.group(), sequence.k_row); }
  // Row i of an output with a row per query. Its channels are contiguous.
  S* output_row(const Heads& t, int64_t i) const { return const_cast<S*>(queries(t).at(i, 0).data); }
  // Where a statistic of query i is, such as lse.
  int64_t statistic(int64_t i) const { return b * a.lse_stride[0] + h * a.lse_stride[1] + sequence.q_row + i; }
  T sink() const { return static_cast<const T*>(a.scores.sink)[h]; }

  // Whether some of the keys first .. first + n - 1 are hidden from some of the queries row0 .. row0 + rows - 1.
  bool at_edge(int64_t row0, int64_t rows, int64_t first, int64_t n) const {
    const Range<int64_t> all_see = visible.unmasked(row0, row0 + rows);
    return first < all_see.begin || first + n > all_see.end;
  }

  // What the mask does to the scores of `rows` queries from row0 on against the keys first .. first + keys - 1.
  MaskEffect mask_effect(int64_t row0, int64_t rows, int64_t first, int64_t keys) const {
    switch (a.scores.mask_type) {
      case MaskType::none: return MaskEffect::changes_none;
      case MaskType::boolean: return effect_of<uint8_t>(row0, rows, first, keys);
      case MaskType::storage: return effect_of<S>(row0, rows, first, keys);
      case MaskType::statistics: break;
    }
    return effect_of<T>(row0, rows, first, keys);
  }

  // Finishes scaled scores: softcap, ALiBi, the mask, and -inf for hidden keys and those behind the last one, up to
  // whole vectors. `effect` is mask_effect of a block that contains these scores; hides_all is applied like mixed.
  // `tanhs` (rows ldt apart) becomes tanh(s / softcap), if it is not null.
  PYGPT_INLINE void adjust(MaskEffect effect, const ScoreBlock<T>& scores, T* tanhs, int64_t ldt) const {
    const Scores& o = a.scores;
    T* const p = scores.data;
    const int64_t ldp = scores.ld, row0 = scores.row0, first = scores.first, n = scores.n;
    const int64_t rows = std::min(scores.rows, sequence.q_len - row0);
    const auto each_vector = [&](const auto& f) {
      for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < n; c += W<T>) store(p + r * ldp + c, f(r, c, load(p + r * ldp + c)));
    };
    if (o.softcap > 0)
      each_vector([&](int64_t r, int64_t c, Vec<T> s) {
        const Vec<T> t = tanh<T>(s / T(o.softcap));
        if (tanhs) store(tanhs + r * ldt + c, t);
        return t * T(o.softcap);
      });
    if (o.slopes)
      each_vector([&](int64_t r, int64_t c, Vec<T> s) { return s - slope() * distances(row0 + r, first + c); });
    // A vector of the mask is read where it lies if it is contiguous and whole.
    const auto each_of_mask = [&](auto type, const auto& f) {
      using M = decltype(type);
      const int64_t stride = o.mask_stride[3], exist = sequence.k_len - first;
      for (int64_t r = 0; r < rows; r++) {
        const M* row = mask_at<M>(row0 + r, first);
        for (int64_t c = 0; c < n; c += W<T>) {
          const auto m = stride == 1 && c + W<T> <= exist ? mask_vector(row + c)
                                                          : mask_vector(row + c * stride, stride, exist - c);
          store(p + r * ldp + c, f(load(p + r * ldp + c), m));
        }
      }
    };
    const auto hide = [](Vec<T> s, IVec<T> m) { return m != 0 ? s : set1(-kInf<T>); };
    const auto add = [](Vec<T> s, Vec<T> m) { return s + m; };
    switch (effect == MaskEffect::changes_none ? MaskType::none : o.mask_type) {
      case MaskType::none: break;
      case MaskType::boolean: each_of_mask(uint8_t{}, hide); break;
      case MaskType::storage: each_of_mask(S{}, add); break;
      case MaskType::statistics: each_of_mask(T{}, add); break;
    }
    if (n % W<T> == 0 && !at_edge(row0, rows, first, n)) return;
    for (int64_t r = 0; r < rows; r++) {
      T* row = p + r * ldp;
      const int64_t begin = std::clamp<int64_t>(visible.begin(row0 + r) - first, 0, n);
      const int64_t end = std::clamp<int64_t>(visible.end(row0 + r) - first, 0, n);
      std::fill(row, row + begin, -kInf<T>), std::fill(row + end, row + round_up(n, W<T>), -kInf<T>);
    }
  }
  T slope() const { return static_cast<const T*>(a.scores.slopes)[b * a.scores.slope_stride + h]; }
  PYGPT_INLINE Vec<T> distances(int64_t i, int64_t j) const {
    return abs<T>(T(j - i - visible.diagonal) + __builtin_convertvector(lane_index<T>(), Vec<T>));
  }

  // Dropout's factors of `rows` queries and `keys` keys from j on, a multiple of 4; `to` has rows ld apart.
  void dropout(int64_t row0, int64_t rows, int64_t j, int64_t keys, T* to, int64_t ld) const {
    dropout_factors(a.scores, b * a.heads + h, row0, rows, j, keys, to, ld);
  }

 private:
  template <class M>
  MaskEffect effect_of(int64_t row0, int64_t rows, int64_t first, int64_t keys) const {
    const int64_t(&stride)[4] = a.scores.mask_stride;
    rows = stride[2] ? std::min(rows, sequence.q_len - row0) : 1;
    keys = stride[3] ? std::min(keys, sequence.k_len - first) : 1;
    return cpu::PYGPT_ISA::mask_effect<T>(mask_at<M>(row0, first), rows, stride[2], keys, stride[3]);
  }

  template <class M>
  const M* mask_at(int64_t i, int64_t j) const {
    const int64_t(&stride)[4] = a.scores.mask_stride;
    return static_cast<const M*>(a.scores.mask) + b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3];
  }
  // W<T> values of a mask, uint8_t as integers, others as numbers.
  template <class M>
  static PYGPT_INLINE auto mask_vector(const M* p) {
    if constexpr (std::is_same_v<M, uint8_t>) return load_bytes<T>(p);
    else return load(p);
  }
  // The same with any stride, and 0 in the place of what does not exist.
  template <class M>
  static auto mask_vector(const M* p, int64_t stride, int64_t exist) {
    M values[W<T>] = {};
    for (int64_t lane = 0; lane < std::min<int64_t>(exist, W<T>); lane++) values[lane] = p[lane * stride];
    return mask_vector(values);
  }
};

// ---------------------------------------------------------------- scores
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

// float: scale is folded into Q while packing. bf16 pairs: scale is applied to S after the product, in scaled_scores.
// If scale <= 0 or scores are to be adjusted, score_tile applies it before, so that -inf stays -inf.
template <class U>
PackReader<U> scaling_reader(double scale) {
  if constexpr (PackElement<U>::kPackK == 1) return {U(scale)};
  return {};
}
template <bool general, class T>
bool scales_after_masking(double scale) {
  return !general && T(scale) > 0;
}
template <bool general, class U, class T = Acc<U>>
PYGPT_INLINE Vec<T> scaled_scores(double scale, Vec<T> s) {
  if constexpr (general || PackElement<U>::kPackK == 1) return s;
  // Not fused, so that forward and backward have the same scores and a row's only key has P = 1.
  return no_fma(s * (scales_after_masking<general, T>(scale) ? T(scale) : T(1)));
}

// out = the scores of MR query rows from row0 on against the panel of keys from `first` on, `packs` packs each. Hidden
// ones become -inf, and scaled_scores finishes them. With `general`, QueryHead::adjust is to do both.
template <bool general, class S, class U = Packed<S>, class T = Acc<S>>
PYGPT_INLINE void score_tile(const QueryHead<S>& x, const U* q, const U* k, int64_t packs, int64_t row0, int64_t first,
                             T* out, int64_t ldo) {
  constexpr int64_t MR = Tiling<U>::MR, NR = Tiling<U>::NR;
  dot_products(packs, q, k, out, ldo);
  auto update_row = [&](int r, auto f) {
    for (int v = 0; v < NV; v++) store(out + r * ldo + v * W<T>, f(v, load(out + r * ldo + v * W<T>)));
  };
  const double scale = x.a.scores.scale;
  if (PackElement<U>::kPackK > 1 && !scales_after_masking<general, T>(scale))
    for (int r = 0; r < MR; r++) update_row(r, [&](int, Vec<T> s) { return no_fma(s * T(scale)); });
  if (general || !x.at_edge(row0, MR, first, NR)) return;
  using Int = typename IntOf<T>::type;
  const bool hides_first = x.visible.begin(row0 + MR - 1) > first;
  for (int r = 0; r < MR; r++) {
    const IVec<T> end = IVec<T>{} + Int(std::clamp<int64_t>(x.visible.end(row0 + r) - first, 0, NR));
    update_row(r, [&](int v, Vec<T> s) { return lane_index<T>() + v * W<T> < end ? s : set1(-kInf<T>); });
    if (!hides_first) continue;
    const IVec<T> begin = IVec<T>{} + Int(std::clamp<int64_t>(x.visible.begin(row0 + r) - first, 0, NR));
    update_row(r, [&](int v, Vec<T> s) { return lane_index<T>() + v * W<T> >= begin ? s : set1(-kInf<T>); });
  }
}

// The weight exp(x). Masks and ALiBi make many weights tiny. Below 2^-100 they are 0, because products with them would
// be subnormal, which is slow (docs/measured.md C14); the largest weight of a row is 1, so none is missed.
template <bool general, class T>
PYGPT_INLINE Vec<T> weight(Vec<T> x) {
  const Vec<T> e = exp<T>(x);
  if constexpr (general) return e < T(0x1p-100) ? Vec<T>{} : e;
  else return e;
}

// Replaces one row of scores by exp(score - m'), as packs of U. Updates the running maximum m and sum l, and returns
// the factor that rescales the output so far. A NaN score may not become the maximum, but its exponential and the sum
// are NaN. The exponentials are stored after multiplication with dropout's factors, where those are given.
template <bool general, class U, class T>
PYGPT_INLINE T softmax_row(double scale, T* p, int64_t vectors, T& m, T& l,
                           [[maybe_unused]] const T* factors = nullptr) {
  Vec<T> row_max[4], total[4] = {};
  std::fill(row_max, row_max + 4, load(p));
  unroll_by<4>(vectors, [&](int64_t v, auto together) {
    for (int u = 0; u < together.value; u++) row_max[u] = max<T>(row_max[u], load(p + (v + u) * W<T>));
  });
  const T previous_m = m;
  m = std::max(m, hmax<T>(scaled_scores<general, U>(
                      scale, max<T>(max<T>(row_max[0], row_max[1]), max<T>(row_max[2], row_max[3])))));
  const T row_max_or_0 = m == -kInf<T> ? T(0) : m;
  unroll_by<4>(vectors, [&](int64_t v, auto together) {
    for (int u = 0; u < together.value; u++) {
      const Vec<T> e = weight<general, T>(scaled_scores<general, U>(scale, load(p + (v + u) * W<T>)) - row_max_or_0);
      Vec<T> kept = e;
      if constexpr (general)
        if (factors) kept = e * load(factors + (v + u) * W<T>);
      PackElement<U>::store_row(reinterpret_cast<U*>(p) + (v + u) * W<T> / PackElement<U>::kPackK, kept);
      total[u] += e;
    }
  });
  const T rescale = previous_m == m ? T(1) : std::exp(previous_m - row_max_or_0);
  l = l * rescale + hsum<T>((total[0] + total[1]) + (total[2] + total[3]));
  return rescale;
}

// Stores a finished row divided by its sum, and its lse. accumulated(j) is the row's vector from channel j on. A sink
// is one more exponential in the sum.
template <class S, class F>
PYGPT_INLINE void finish_row(const QueryHead<S>& x, int64_t i, Acc<S> m, Acc<S> l, F accumulated) {
  using T = Acc<S>;
  T rescale = 1;
  if (x.a.scores.sink && x.sink() != -kInf<T>) {
    const T previous_m = m;
    m = std::max(m, x.sink());
    rescale = std::exp(previous_m - m), l = l * rescale + std::exp(x.sink() - m);
  }
  const T inverse = l == 0 ? T(0) : rescale / l;
  static_cast<T*>(x.a.lse)[x.statistic(i)] = l == 0 ? -kInf<T> : m + std::log(l);
  S* o = x.output_row(x.a.out, i);
  for (int64_t j = 0; j < x.a.v_dim; j += W<T>) store(o + j, accumulated(j) * inverse, x.a.v_dim - j);
}

// Sums in the same order whatever the strides are, so that they do not change the bits.
template <class S, class T = Acc<S>>
T row_dot(Matrix<S> a, Matrix<S> b, int64_t n) {
  Vec<T> total[2] = {};
  const auto sum = [&](auto load_from) {
    const auto product = [&](int64_t j) { return load_from(a, j) * load_from(b, j); };
    for (int64_t j = 0; j < n; j += 2 * W<T>) {
      total[0] += product(j);
      if (j + W<T> < n) total[1] += product(j + W<T>);
    }
  };
  if (a.cs == 1 && b.cs == 1) {
    sum([&](Matrix<S> m, int64_t j) { return load(m.data + j, n - j); });
  } else {
    sum([&](Matrix<S> m, int64_t j) {
      Vec<T> v = {};
      for (int64_t lane = 0; lane < std::min<int64_t>(W<T>, n - j); lane++) v[lane] = to_acc(m.data[(j + lane) * m.cs]);
      return v;
    });
  }
  return hsum<T>(total[0] + total[1]);
}

// For backward: query i's lse, or +inf if the row is fully masked, so that P = 0; and delta = rowsum(dO O) - dlse.
template <class S, class T = Acc<S>>
T lse_of(const QueryHead<S>& x, int64_t i) {
  const T lse = canonical_nan(static_cast<const T*>(x.a.lse)[x.statistic(i)]);
  return lse == -kInf<T> ? kInf<T> : lse;
}
// Whether query i sees one key and no sink. Its P is 1 whatever the score, so dS is dlse: rowsum(dO O) and dO V^T,
// which are equal, are left out where their rounding would show.
template <class S>
bool has_one_key(const QueryHead<S>& x, int64_t i) {
  return x.visible.sees_one_key(i) && !x.a.scores.sink;
}
template <class S, class T = Acc<S>>
T delta_of(const QueryHead<S>& x, int64_t i) {
  const T dlse = x.a.dlse ? canonical_nan(static_cast<const T*>(x.a.dlse)[x.statistic(i)]) : T(0);
  if (has_one_key(x, i)) return -dlse;
  return row_dot(x.queries(x.a.dout).at(i, 0), x.queries(x.a.out).at(i, 0), x.a.v_dim) - dlse;
}

// dslopes from sum dS distance of every head and split, in this order.
template <class T>
void store_slope_gradients(const AttentionArgs& a, const double* sums, int64_t splits) {
  for (int64_t b = 0; b < (a.scores.slope_stride ? a.batch : 1); b++)
    for (int64_t h = 0; h < a.heads; h++) {
      double total = 0;
      for (int64_t from = b; from < (a.scores.slope_stride ? b + 1 : a.batch); from++)
        for (int64_t s = 0; s < splits; s++) total -= sums[(from * a.heads + h) * splits + s];
      static_cast<T*>(a.dslopes)[b * a.heads + h] = T(total);
    }
}

// Decoding with a cache, that is at most kDecodeQueries queries, has kernels of its own in decode.cpp. They read K and
// V where they lie, and need contiguous channels. Of packed sequences each takes its own way, whatever the others are.
constexpr int64_t kDecodeQueries = 4;
inline bool is_decode(const AttentionArgs& a, int64_t q_len) {
  return q_len <= kDecodeQueries && a.k.stride[3] == 1 && a.v.stride[3] == 1;
}
template <class S>
bool is_decode(const QueryHead<S>& x) {
  return is_decode(x.a, x.sequence.q_len);
}
void decode_fwd(const AttentionArgs& a);
void decode_bwd(const AttentionArgs& a);
void mask_and_sink_gradients(const AttentionArgs& a);  // if they are wanted

// Calls the kernels that the call's sequences need: decode, tiled, or, for packed sequences of unequal lengths, both.
template <class Decode, class Tiled>
void by_length(const AttentionArgs& a, const Decode& decode, const Tiled& tiled) {
  const bool all_decode = is_decode(a, a.sequences.q_len);
  if (all_decode || (a.sequences.cu_seq_q && is_decode(a, 0))) decode(a);
  if (!all_decode) tiled(a);
}

// Calls f with the storage type and with whether more happens to scores than scaling.
template <class F>
void visit_scores(const AttentionArgs& a, const F& f) {
  visit(a.dtype, [&](auto s) { visit(!a.scores.scale_only(), [&](auto general) { f(s, general); }); });
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
