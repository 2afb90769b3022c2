// What backward's kernels share: P and dS of a tile, as attention/bwd.cpp defines them.
#pragma once
#include "tile.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

// The rows i0 .. i0 + rows - 1 of queries and the keys j0 .. j0 + keys - 1 of one head.
struct Block {
  int64_t i0, rows, j0, keys;
  Visible<int64_t> visible;

  // The rows, from i0 on, that see one of the n keys from j0 + j on.
  Range<int64_t> rows_that_see(int64_t j, int64_t n) const {
    const Range<int64_t> seeing = visible.transposed().walk(j0 + j, j0 + j + n);
    return {std::clamp<int64_t>(seeing.begin - i0, 0, rows), std::clamp<int64_t>(seeing.end - i0, 0, rows)};
  }
  // The keys, from j0 on, that one of the n rows from i0 + i on sees.
  Range<int64_t> keys_seen_by(int64_t i, int64_t n) const {
    const Range<int64_t> seen = visible.walk(i0 + i, i0 + i + n);
    return {std::clamp<int64_t>(seen.begin - j0, 0, BC), std::clamp<int64_t>(seen.end - j0, 0, BC)};
  }
};

// lse and delta of n rows from i0 on, also of rows behind the last query, which get P = 0.
template <class S, class T = Acc<S>>
void fill_statistics(const QueryHead<S>& x, int64_t i0, int64_t n, T* lse, T* delta) {
  for (int64_t i = 0; i < n; i++) {
    const bool exists = i0 + i < x.sequence.q_len;
    lse[i] = exists ? lse_of(x, i0 + i) : kInf<T>;
    delta[i] = exists ? delta_of(x, i0 + i) : T(0);
  }
}

// dmask = 0, for the main pass to add to. It is contiguous.
template <class S>
void clear_dmask(const AttentionArgs& a) {
  const int64_t bytes =
      a.sequences.q_len * a.sequences.k_len * (a.scores.mask_type == MaskType::storage ? sizeof(S) : sizeof(Acc<S>));
  parallel_for((a.dmask.stride[0] ? a.batch : 1) * a.heads, [&](int64_t begin, int64_t end) {
    std::memset(static_cast<char*>(a.dmask.data) + begin * bytes, 0, (end - begin) * bytes);
  }, bytes);
}

// Where the main pass adds dS of one tile to dmask.
template <class S>
class DmaskTile {
 public:
  using T = Acc<S>;
  // The tile of the queries from i on and the keys from j on.
  DmaskTile(const QueryHead<S>& x, int64_t i, int64_t j) : rows_(x.sequence.q_len - i), keys_(x.sequence.k_len - j) {
    const Heads& dmask = x.a.dmask;
    const int64_t at = x.b * dmask.stride[0] + x.h * dmask.stride[1] + i * dmask.stride[2] + j;
    stride_ = dmask.stride[2];
    if (dmask.data && x.a.scores.mask_type == MaskType::storage) in_storage_ = static_cast<S*>(dmask.data) + at;
    else if (dmask.data) in_statistics_ = static_cast<T*>(dmask.data) + at;
  }
  // Adds those of row r and the keys from column c on, if they exist and dmask is wanted here.
  PYGPT_INLINE void add(int64_t r, int64_t c, Vec<T> ds) const {
    if (r >= rows_ || c >= keys_) return;
    if (in_statistics_) add(in_statistics_ + r * stride_ + c, keys_ - c, ds);
    else if (in_storage_) add(in_storage_ + r * stride_ + c, keys_ - c, ds);
  }

 private:
  template <class M>
  static PYGPT_INLINE void add(M* at, int64_t n, Vec<T> ds) {
    store(at, load(at, n) + no_fma(ds), n);  // as in bwd_options.cpp, to the same bits
  }
  S* in_storage_ = nullptr;
  T* in_statistics_ = nullptr;
  int64_t stride_, rows_, keys_;
};

// Panels of one tile: MR rows of queries and dO, NR keys and their values, and the rows' statistics.
template <class U, class T>
struct TileOperands {
  const U *q, *k, *dout, *v;
  int64_t e_packs, v_packs;
  const T *lse, *delta;
  MaskEffect effect;
};

// Calls put(r, w, p, ds_scores, ds) for d rows r .. r + d - 1 of vector w, d the values of a pack: P after dropout, dS
// with and without softcap's derivative. Rows from row0 on, keys from j on.
template <bool general, class S, class U, class T, class F>
PYGPT_INLINE void gradient_tile(const QueryHead<S>& x, const TileOperands<U, T>& of, int64_t row0, int64_t j,
                                const F& put) {
  constexpr int d = PackElement<U>::kPackK, MR = Tiling<U>::MR, NR = Tiling<U>::NR;
  const Scores& o = x.a.scores;
  Tile<U> s, dp, tanhs;
  T factors[general ? MR * NR : 1];
  score_tile<general>(x, of.q, of.k, of.e_packs, row0, j, s.data(), NR);
  if constexpr (general) x.adjust(of.effect, {s.data(), NR, row0, MR, j, NR}, tanhs.data(), NR);
  dot_products(of.v_packs, of.dout, of.v, dp.data(), NR);
  if (general && o.seed) x.dropout(row0, MR, j, NR, factors, NR);
  if (x.at_edge(row0, MR, j, NR))
    for (int r = 0; r < MR; r++)
      for (int w = 0; w < NV; w++)
        if (has_one_key(x, row0 + r)) dp.c[r][w] = Vec<T>{};
  for (int r = 0; r < MR; r += d)
    for (int w = 0; w < NV; w++) {
      Vec<T> e[d], g[d], scores_g[d];
      for (int n = 0; n < d; n++) {
        // Row L may share a pack with the last query, whose gradients an infinite key must not spoil.
        if (d > 1 && row0 + r + n >= x.sequence.q_len) {
          e[n] = g[n] = scores_g[n] = Vec<T>{};
          continue;
        }
        e[n] = weight<general, T>(scaled_scores<general, U>(o.scale, s.c[r + n][w]) - of.lse[r + n]);
        if constexpr (general) {
          const Vec<T> f = o.seed ? load(factors + (r + n) * NR + w * W<T>) : set1(T(1));
          g[n] = e[n] * (f * dp.c[r + n][w] - of.delta[r + n]);
          e[n] *= f;
          const Vec<T> t = tanhs.c[r + n][w];
          scores_g[n] = o.softcap > 0 ? g[n] * (1 - t * t) : g[n];
        } else {
          g[n] = scores_g[n] = e[n] * (dp.c[r + n][w] - of.delta[r + n]);
        }
      }
      put(r, w, e, scores_g, g);
    }
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
