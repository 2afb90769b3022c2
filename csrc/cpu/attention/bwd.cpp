// Backward of attention (KV-stationary): for each block of BC keys, over all queries that attend to one of them,
//
//   P = exp(S - lse)          dV += P^T dO      dP = dO V^T
//   dS = P (dP - delta)       dK += dS^T Q      dQ += dS K      delta = rowsum(dO O) - dlse
//
// One task owns a head of keys and all query heads that share it, so every sum has a fixed order without atomics. If
// there are few heads, several tasks share a head's key blocks.
//
// With the options of csrc/attention/scores.h, and f the factors of dropout and c = 1 - tanh^2 of softcap:
//
//   dV += (P f)^T dO    dS = P (f dP - delta)    dK += (dS c)^T Q    dQ += (dS c) K
//   dslope = -sum dS distance    dsink = -sum exp(sink - lse) delta    dmask = dS, summed over what was broadcast
//
// dmask has a pass of its own, as what it sums over are other heads and batch entries: mask_gradient computes dS again.
//
// All five products use the GEMM's micro-kernel. Where the processor multiplies pairs of bf16, P and dS are rounded to
// bf16, but sums over rows are not.
#include <numeric>

#include "tile.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {
namespace {

// Packs m^T as the B operand. With AMX it becomes the A operand and the product comes out transposed, because P and dS
// are stored row-major and AMX's A must be contiguous along K.
template <class U, class S>
void pack_transposed(U* dst, Matrix<S> m, int64_t columns, int64_t rows) {
  if constexpr (kUsesAmx<U>) pack_a(dst, m.transposed(), columns, rows);
  else pack_b(dst, m, columns, rows);
}

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

// The packed operands of a head of queries, and of a head of keys. A product with an operand in "t" sums over that
// operand's rows.
template <class S, class U = Packed<S>>
struct PackedQueries {
  using T = Acc<S>;
  int64_t e_panels, v_panels, l_packs, e_packs, v_packs;  // packs along the queries and the channels
  U *q, *qt, *dout, *dout_t;
  T *lse, *delta;

  explicit PackedQueries(const QueryHead<S>& x)
      : e_panels(ceil_div(x.a.head_dim, Tiling<U>::NR)), v_panels(ceil_div(x.a.v_dim, Tiling<U>::NR)),
        l_packs(packs_of<U>(x.sequence.q_len)), e_packs(packs_of<U>(x.a.head_dim)), v_packs(packs_of<U>(x.a.v_dim)) {
    constexpr int64_t MR = Tiling<U>::MR, NR = Tiling<U>::NR;
    const int64_t L = x.sequence.q_len, E = x.a.head_dim, Ev = x.a.v_dim, padded = round_up(L, MR);
    q = scratch<U>(Region::packed_q, padded * e_packs), qt = scratch<U>(Region::packed_q_t, e_panels * NR * l_packs);
    dout = scratch<U>(Region::packed_dout, padded * v_packs),
    dout_t = scratch<U>(Region::packed_dout_t, v_panels * NR * l_packs);
    const auto Q = x.queries(x.a.q), dO = x.queries(x.a.dout);
    pack_a(q, Q, L, E, scaling_reader<U>(x.a.scores.scale));
    pack_transposed(qt, Q, E, L);
    pack_a(dout, dO, L, Ev);
    pack_transposed(dout_t, dO, Ev, L);
    lse = scratch<T>(Region::row_statistics, 2 * padded), delta = lse + padded;
    fill_statistics(x, 0, padded, lse, delta);
  }
};
template <class S, class U = Packed<S>>
struct PackedKeys {
  int64_t k_packs, e_packs, v_packs;  // along the keys and the channels
  U *k, *kt, *v;

  explicit PackedKeys(const QueryHead<S>& x)
      : k_packs(packs_of<U>(x.sequence.k_len)), e_packs(packs_of<U>(x.a.head_dim)), v_packs(packs_of<U>(x.a.v_dim)) {
    constexpr int64_t NR = Tiling<U>::NR;
    const int64_t n = x.sequence.k_len, E = x.a.head_dim, padded = round_up(n, NR);
    k = scratch<U>(Region::packed_k, padded * e_packs);
    kt = scratch<U>(Region::packed_k_t, round_up(E, NR) * k_packs);
    v = scratch<U>(Region::packed_v, padded * v_packs);
    const auto K = x.keys(x.a.k), V = x.keys(x.a.v);
    pack_b(k, K.transposed(), n, E);
    pack_b(kt, K, E, n);
    pack_b(v, V.transposed(), n, x.a.v_dim);
  }
};

// ---------------------------------------------------------------- P and dS
// The row stride of ds_rows. With pairs, every row has cache lines of its own, as AMX needs.
template <class U>
constexpr int64_t kScoreGradStride = PackElement<U>::kPackK > 1 ? BC / PackElement<U>::kPackK : kScoreStride;

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
  if constexpr (general) x.adjust(of.effect, row0, MR, j, NR, s.data(), NR, tanhs.data(), NR);
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

// P and dS of the block, zero where masked. p and ds (BR, BC) have packs along the queries. ds_rows has packs along the
// keys, in rows kScoreGradStride apart; where a pack is one value, it is ds itself. Returns sum dS distance if the
// gradient of the slopes is wanted.
template <bool general, class S, class U = Packed<S>>
double gradient_block(const QueryHead<S>& x, const PackedQueries<S>& of_q, const PackedKeys<S>& of_k,
                      const Block& block, MaskEffect effect, U* p, U* ds, U* ds_rows) {
  using T = Acc<S>;
  constexpr int d = PackElement<U>::kPackK, MR = Tiling<U>::MR, NR = Tiling<U>::NR;
  double slope_gradient = 0;
  for (int64_t column = 0; column < BC; column += NR)
    for (int64_t i = 0; i < block.rows; i += MR) {
      const int64_t row0 = block.i0 + i, j = block.j0 + column;
      auto put = [&](int r, int w, const Vec<T>(&e)[d], const Vec<T>(&g)[d]) {
        const int64_t at = (i + r) / d * kScoreStride + column + w * W<T>;
        store(reinterpret_cast<T*>(p) + at, PackElement<U>::zip_rows(e));
        store(reinterpret_cast<T*>(ds) + at, PackElement<U>::zip_rows(g));
        if constexpr (d > 1)
          for (int n = 0; n < d; n++)
            PackElement<U>::store_row(ds_rows + (i + r + n) * kScoreGradStride<U> + (column + w * W<T>) / d, g[n]);
      };
      const Range<int64_t> seen = block.keys_seen_by(i, MR);
      if (column >= seen.end || column + NR <= seen.begin) {
        const Vec<T> zero[d] = {};
        for (int r = 0; r < MR; r += d)
          for (int w = 0; w < NV; w++) put(r, w, zero, zero);
        continue;
      }
      const TileOperands<U, T> of = {of_q.q + row0 * of_q.e_packs,
                                     of_k.k + j * of_k.e_packs,
                                     of_q.dout + row0 * of_q.v_packs,
                                     of_k.v + j * of_k.v_packs,
                                     of_q.e_packs,
                                     of_q.v_packs,
                                     of_q.lse + row0,
                                     of_q.delta + row0,
                                     effect};
      Vec<T> with_distance = {};
      gradient_tile<general>(x, of, row0, j, [&](int r, int w, const auto& e, const auto& scores_g, const auto& g) {
        put(r, w, e, scores_g);
        if (general && x.a.dslopes)
          for (int n = 0; n < d && row0 + r + n < x.sequence.q_len; n++)
            with_distance += g[n] * x.distances(row0 + r + n, j + w * W<T>);
      });
      if (general && x.a.dslopes) slope_gradient += hsum<T>(with_distance);
    }
  return slope_gradient;
}

// acc (BC keys, channels) += x^T y for the block's rows and keys of x and y, which is packed as panels of `packs` packs
// along the queries. With AMX, acc holds transposed tiles.
template <class U, class T = Acc<U>>
void add_transposed_product(Tile<U>* acc, const U* x, const U* y, int64_t packs, int64_t panels, const Block& block) {
  constexpr int64_t MR = Tiling<U>::MR, NR = Tiling<U>::NR, d = PackElement<U>::kPackK, G = PackElement<U>::kTileK;
  constexpr int64_t kKeys = kRegisters == 32 ? 4 * MR : 8 * MR;  // keys whose columns of x stay in L1 for all panels
  for (int64_t j0 = 0; j0 < block.keys; j0 += kKeys)
    for (int64_t p = 0; p < panels; p++)
      for (int64_t j = j0; j < std::min(block.keys, j0 + kKeys); j += MR) {
        Tile<U>& sum = acc[j / MR * panels + p];
        const Range<int64_t> seeing = block.rows_that_see(j, MR);
        const int64_t start = seeing.begin / (d * G) * G, n = packs_of<U>(seeing.end) - start;
        if (n <= 0) continue;
        const U *from = x + start * kScoreStride + j, *with = y + (p * packs + block.i0 / d + start) * NR;
        if constexpr (kUsesAmx<U>) add_product<G, MR * G>(sum, n, with, from, kScoreStride);
        else add_product<1, kScoreStride>(sum, n, from, with, NR);
      }
}

// Transposes n square tiles.
template <class U, class T = Acc<U>>
void transpose_tiles(Tile<U>* tiles, int64_t n) {
  constexpr int MR = Tiling<U>::MR;
  static_assert(MR == Tiling<U>::NR && MR % W<T> == 0);
  for (Tile<U>* tile = tiles; tile < tiles + n; tile++) {
    const Tile<U> from = *tile;
    for (int i = 0; i < MR; i += W<T>)
      for (int v = 0; v < NV; v++) {
        Vec<T> square[W<T>];
        for (int r = 0; r < W<T>; r++) square[r] = from.c[i + r][v];
        transpose<T>(square);
        for (int r = 0; r < W<T>; r++) tile->c[v * W<T> + r][i / W<T>] = square[r];
      }
  }
}

// `rows` rows from i0 on of a tensor whose channels are contiguous = scale times the tiles.
template <class S>
void store_tiles(Matrix<S> to, int64_t i0, int64_t rows, int64_t channels, const Tile<Packed<S>>* tiles, Acc<S> scale) {
  using T = Acc<S>;
  constexpr int64_t MR = Tiling<Packed<S>>::MR, NR = Tiling<Packed<S>>::NR;
  const int64_t panels = ceil_div(channels, NR);
  for (int64_t i = 0; i < rows; i++) {
    S* row = const_cast<S*>(to.at(i0 + i, 0).data);
    for (int64_t j = 0; j < channels; j += W<T>) {
      const Vec<T> x = tiles[i / MR * panels + j / NR].c[i % MR][j % NR / W<T>];
      store(row + j, x * scale, channels - j);
    }
  }
}

// ---------------------------------------------------------------- dq, dk, dv
// The gradients of the keys of a block, as tiles, dk not yet scaled.
template <class S>
struct KeyGradients {
  Tile<Packed<S>>*dk, *dv;
};

// A sum of dq over some key blocks, as rows of tiles of a whole head, not yet scaled. A row that no block has added to
// is 0 without being in memory: with a window, a block adds to few of them. Without `tiles`, dq is not wanted.
template <class U>
struct QueryGradient {
  Tile<U>* tiles = nullptr;
  uint8_t* begun = nullptr;  // whether a row of tiles is in memory
  int64_t rows = 0, panels = 0;

  void clear() { std::fill_n(begun, rows, 0); }
  // Row i, in memory.
  Tile<U>* row(int64_t i) {
    Tile<U>* const at = tiles + i * panels;
    if (!begun[i]) std::fill_n(at, panels, Tile<U>{});
    begun[i] = 1;
    return at;
  }
  void add(const QueryGradient& other) {
    for (int64_t i = 0; i < rows; i++) {
      if (!other.begun[i]) continue;
      const Tile<U>* from = other.tiles + i * panels;
      if (!begun[i]) std::copy_n(from, panels, tiles + i * panels);
      else
        for (int64_t p = 0; p < panels; p++) PYGPT_ISA::add(tiles[i * panels + p], from[p]);
      begun[i] = 1;
    }
  }
};

// Memory for n of them, side by side; none if dq is not wanted.
template <class U>
struct QueryGradients {
  int64_t most_rows, panels;
  Tile<U>* tiles = nullptr;
  uint8_t* begun = nullptr;

  void allocate(Region of_tiles, Region of_begun, int64_t n) {
    tiles = scratch<Tile<U>>(of_tiles, n * most_rows * panels);
    begun = scratch<uint8_t>(of_begun, n * most_rows);
  }
  // Number n, with as many rows of tiles as the head's queries fill.
  template <class S>
  QueryGradient<U> at(int64_t n, const QueryHead<S>& x) const {
    if (!tiles) return {};
    const int64_t row = n * most_rows;
    return {tiles + row * panels, begun + row, ceil_div(x.sequence.q_len, Tiling<U>::MR), panels};
  }
};

template <class S>
void store_dq(const QueryHead<S>& x, QueryGradient<Packed<S>> dq) {
  for (int64_t i = 0; i < dq.rows; i++) dq.row(i);
  store_tiles<S>(x.queries(x.a.dq), 0, x.sequence.q_len, x.a.head_dim, dq.tiles, Acc<S>(x.a.scores.scale));
}

// Adds what one query head makes of the BC keys from j0 on: to dk and dv, and its share of dq. Returns what
// gradient_block does.
template <bool general, class S>
double backward_tile(const QueryHead<S>& x, const PackedQueries<S>& of_q, const PackedKeys<S>& of_k, int64_t j0,
                     KeyGradients<S> sums, QueryGradient<Packed<S>> dq) {
  using U = Packed<S>;
  constexpr int64_t d = PackElement<U>::kPackK, MR = Tiling<U>::MR, NR = Tiling<U>::NR, BR = cpu::PYGPT_ISA::BR<U>;
  constexpr int64_t kStep = PackElement<U>::kTileK * d;
  U *p = scratch<U>(Region::p_block, BR * kScoreStride / d), *ds = scratch<U>(Region::ds_block, BR * kScoreStride / d);
  U* ds_rows = d > 1 ? scratch<U>(Region::ds_rows, BR * kScoreGradStride<U>) : ds;
  double slope_gradient = 0;
  const int64_t keys = std::min(BC, x.sequence.k_len - j0);
  const Range<int64_t> seeing = x.visible.transposed().walk(j0, j0 + keys);
  for (int64_t i0 = seeing.begin / MR * MR; i0 < seeing.end; i0 += BR) {
    const Block block = {i0, std::min(BR, x.sequence.q_len - i0), j0, keys, x.visible};
    const MaskEffect effect = general ? x.mask_effect(i0, block.rows, j0, keys) : MaskEffect::changes_none;
    if (effect == MaskEffect::hides_all) continue;
    slope_gradient += gradient_block<general>(x, of_q, of_k, block, effect, p, ds, ds_rows);
    for (int64_t e = 0; dq.tiles && e < of_q.e_panels; e++)
      for (int64_t i = 0; i < block.rows; i += MR) {
        const Range<int64_t> seen = block.keys_seen_by(i, MR);
        const int64_t start = seen.begin / kStep * kStep;
        if (seen.size() == 0) continue;
        add_product<kScoreGradStride<U>, PackElement<U>::kTileK>(
            dq.row((i0 + i) / MR)[e], packs_of<U>(seen.end - start), ds_rows + i * kScoreGradStride<U> + start / d,
            of_k.kt + (e * of_k.k_packs + (j0 + start) / d) * NR, NR);
      }
    if (sums.dv) add_transposed_product(sums.dv, p, of_q.dout_t, of_q.l_packs, of_q.v_panels, block);
    if (sums.dk) add_transposed_product(sums.dk, ds, of_q.qt, of_q.l_packs, of_q.e_panels, block);
  }
  return slope_gradient;
}

// Key block n belongs to part n % kParts. dq is the sum of the parts, added as a binary tree, so that its bits are the
// same whichever tasks form it, and whatever else is in the batch:
//
//   sum(part, step) = sum(part, 2 step) + sum(part + step, 2 step)      sum(part, kParts) = the part itself
constexpr int64_t kParts = 8;

// What a task does for one query head of the group that shares its keys.
template <bool general, class S>
struct HeadTask {
  using T = Acc<S>;
  using U = Packed<S>;
  const QueryHead<S>& x;
  const PackedQueries<S>& of_q;
  const PackedKeys<S>& of_k;
  KeyGradients<S> kept;  // the sums of all blocks of the task, in its order; of one block if the group is one head
  int64_t dk_tiles, dv_tiles;  // of a block
  double* slope_gradients;  // of each part, or null
  int64_t at = 0;  // the place of the next block in `kept`

  // levels[0] = sum(part, step). The others are memory, one for each further level of the tree.
  void sum(int64_t part, int64_t step, QueryGradient<U>* levels) {
    if (step == kParts) return add_part(part, levels[0]);
    sum(part, 2 * step, levels);
    if ((part + step) * BC >= x.sequence.k_len) return;
    sum(part + step, 2 * step, levels + 1);
    levels[0].add(levels[1]);
  }

 private:
  void add_part(int64_t part, QueryGradient<U> dq) {
    const AttentionArgs& a = x.a;
    const bool first = x.h % a.group() == 0, last = (x.h + 1) % a.group() == 0;
    dq.clear();
    double slope_gradient = 0;
    for (int64_t j0 = part * BC; j0 < x.sequence.k_len; j0 += kParts * BC, at += a.group() > 1) {
      const int64_t keys = std::min(BC, x.sequence.k_len - j0);
      const KeyGradients<S> sums = {kept.dk ? kept.dk + at * dk_tiles : nullptr,
                                    kept.dv ? kept.dv + at * dv_tiles : nullptr};
      if (first && sums.dk) std::fill(sums.dk, sums.dk + dk_tiles, Tile<U>{});
      if (first && sums.dv) std::fill(sums.dv, sums.dv + dv_tiles, Tile<U>{});
      slope_gradient += backward_tile<general>(x, of_q, of_k, j0, sums, dq);
      if (!last) continue;
      if constexpr (kUsesAmx<U>) {
        if (sums.dk) transpose_tiles(sums.dk, dk_tiles);
        if (sums.dv) transpose_tiles(sums.dv, dv_tiles);
      }
      if (sums.dk) store_tiles<S>(x.keys(a.dk), j0, keys, a.head_dim, sums.dk, T(a.scores.scale));
      if (sums.dv) store_tiles<S>(x.keys(a.dv), j0, keys, a.v_dim, sums.dv, T(1));
    }
    if (slope_gradients) slope_gradients[part] = slope_gradient;
  }
};

// How many tasks share a head of keys: 1, 2, 4 or 8, the more the fewer heads there are.
inline int64_t tasks_of_head(int64_t kv_heads, int64_t blocks) {
  int64_t tasks = 1;
  while (tasks < kParts && tasks * kv_heads < 8 && tasks < blocks) tasks *= 2;
  return tasks;
}

template <bool general, class S>
void backward(const AttentionArgs& a) {
  using T = Acc<S>;
  using U = Packed<S>;
  constexpr int64_t MR = Tiling<U>::MR, NR = Tiling<U>::NR, kLevels = 3;  // 2^kLevels = kParts
  const int64_t kv_heads = a.batch * a.kv_heads, group = a.group(), blocks = ceil_div(a.sequences.k_len, BC);
  const int64_t e_panels = ceil_div(a.head_dim, NR), v_panels = ceil_div(a.v_dim, NR);
  const int64_t tasks = tasks_of_head(kv_heads, blocks);
  // Task t of a head forms sum(t, tasks) of dq. If there are several, they leave their sums in memory.
  const bool partial = tasks > 1 && a.dq.data;
  QueryGradients<U> partials = {ceil_div(a.sequences.q_len, MR), e_panels};
  if (partial) partials.allocate(Region::dq_partials, Region::dq_partials_begun, a.batch * a.heads * tasks);
  const int64_t slope_parts = a.dslopes ? a.batch * a.heads * kParts : 0;
  double* slope_gradients = a.dslopes ? scratch<double>(Region::slope_gradients, slope_parts) : nullptr;
  std::fill_n(slope_gradients, slope_parts, 0.0);
  // A single query head stores dk and dv block by block. Several add to the sums of all blocks in turn.
  const int64_t kept = group == 1 ? 1 : kParts / tasks * ceil_div(blocks, kParts);
  const int64_t dk_tiles = BC / MR * e_panels, dv_tiles = BC / MR * v_panels;
  parallel_for(kv_heads * tasks, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const typename PackElement<U>::TileScope held;
    for (int64_t n = begin; n < end; n++) {
      const int64_t b = n / tasks / a.kv_heads, first = n / tasks % a.kv_heads * group, task = n % tasks;
      const QueryHead<S> first_head(a, b, first);
      if (is_decode(first_head) || (task > 0 && task * BC >= first_head.sequence.k_len)) continue;
      const PackedKeys<S> of_k(first_head);
      const KeyGradients<S> sums = {a.dk.data ? scratch<Tile<U>>(Region::dk_tiles, kept * dk_tiles) : nullptr,
                                    a.dv.data ? scratch<Tile<U>>(Region::dv_tiles, kept * dv_tiles) : nullptr};
      QueryGradients<U> sums_of_dq = {partials.most_rows, e_panels};
      if (a.dq.data) sums_of_dq.allocate(Region::dq_tiles, Region::dq_begun, 1 + kLevels);
      for (int64_t h = first; h < first + group; h++) {
        const QueryHead<S> x(first_head, h);
        const int64_t head = b * a.heads + h;
        const PackedQueries<S> of_q(x);
        HeadTask<general, S> head_task = {
            x, of_q, of_k, sums, dk_tiles, dv_tiles, slope_gradients ? slope_gradients + head * kParts : nullptr};
        QueryGradient<U> levels[1 + kLevels];
        for (int64_t level = 0; level <= kLevels; level++) levels[level] = sums_of_dq.at(level, x);
        if (partial) levels[0] = partials.at(head * tasks + task, x);
        head_task.sum(task, tasks, levels);
        if (a.dq.data && !partial) store_dq(x, levels[0]);
      }
    }
  }, group * a.sequences.q_len * ceil_div(a.sequences.k_len, tasks) * (a.head_dim + a.v_dim));
  if (partial)
    parallel_for(a.batch * a.heads, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const QueryHead<S> x(a, n / a.heads, n % a.heads);
        if (is_decode(x)) continue;
        const auto part_of = [&](int64_t part) { return partials.at(n * tasks + part, x); };
        for (int64_t step = tasks / 2; step > 0; step /= 2)
          for (int64_t part = 0; part < step && (part + step) * BC < x.sequence.k_len; part++)
            part_of(part).add(part_of(part + step));
        store_dq(x, part_of(0));
      }
    });
  if (slope_gradients) store_slope_gradients<T>(a, slope_gradients, kParts);
}

// ---------------------------------------------------------------- the gradients of options
// sum (BR, BC) += dS of one head's block. Packs the block's operands, whose products cost a hundred times as much.
template <class S, class T = Acc<S>>
void add_block(const QueryHead<S>& x, int64_t i0, int64_t j0, T* sum) {
  using U = Packed<S>;
  constexpr int d = PackElement<U>::kPackK, MR = Tiling<U>::MR, NR = Tiling<U>::NR, BR = cpu::PYGPT_ISA::BR<U>;
  const int64_t rows = std::min<int64_t>(BR, x.sequence.q_len - i0), keys = std::min(BC, x.sequence.k_len - j0);
  if (rows <= 0 || keys <= 0) return;
  const MaskEffect effect = x.mask_effect(i0, rows, j0, keys);
  if (effect == MaskEffect::hides_all) return;
  const Block block = {i0, rows, j0, keys, x.visible};
  const int64_t E = x.a.head_dim, Ev = x.a.v_dim, e_packs = packs_of<U>(E), v_packs = packs_of<U>(Ev);
  U *q = scratch<U>(Region::packed_q, BR * e_packs), *dout = scratch<U>(Region::packed_dout, BR * v_packs);
  U *k = scratch<U>(Region::packed_k, BC * e_packs), *v = scratch<U>(Region::packed_v, BC * v_packs);
  pack_a(q, x.queries(x.a.q).at(i0, 0), rows, E, scaling_reader<U>(x.a.scores.scale));
  pack_a(dout, x.queries(x.a.dout).at(i0, 0), rows, Ev);
  pack_b(k, x.keys(x.a.k).at(j0, 0).transposed(), keys, E);
  pack_b(v, x.keys(x.a.v).at(j0, 0).transposed(), keys, Ev);
  T lse[BR], delta[BR];
  fill_statistics(x, i0, BR, lse, delta);
  for (int64_t column = 0; column < keys; column += NR)
    for (int64_t i = 0; i < rows; i += MR) {
      const Range<int64_t> seen = block.keys_seen_by(i, MR);
      if (column >= seen.end || column + NR <= seen.begin) continue;
      const TileOperands<U, T> of = {q + i * e_packs,
                                     k + column * e_packs,
                                     dout + i * v_packs,
                                     v + column * v_packs,
                                     e_packs,
                                     v_packs,
                                     lse + i,
                                     delta + i,
                                     effect};
      gradient_tile<true>(x, of, i0 + i, j0 + column, [&](int r, int w, const auto&, const auto&, const auto& g) {
        for (int n = 0; n < d && i + r + n < rows; n++) {
          T* at = sum + (i + r + n) * BC + column + w * W<T>;
          store(at, load(at) + g[n]);
        }
      });
    }
}

// dmask. A task owns a block of the mask and adds up, batch entry by batch entry and head by head, what the heads that
// share it make of dS; a dimension of the mask that is broadcast is one block, whose rows or columns are added up last.
template <class S>
void mask_gradient(const AttentionArgs& a) {
  using T = Acc<S>;
  constexpr int64_t BR = cpu::PYGPT_ISA::BR<Packed<S>>;
  const int64_t L = a.sequences.q_len, K = a.sequences.k_len;
  const int64_t(&stride)[4] = a.dmask.stride;
  const int64_t batch = stride[0] ? a.batch : 1, heads = stride[1] ? a.heads : 1;
  const int64_t row_blocks = stride[2] ? ceil_div(L, BR) : 1, key_blocks = stride[3] ? ceil_div(K, BC) : 1;
  // Calls f with the indices of a dimension of `size` that a task sums over: all, or one that it owns.
  const auto each = [](bool owned, int64_t own, int64_t size, int64_t step, const auto& f) {
    for (int64_t i = owned ? own : 0; i < (owned ? own + 1 : size); i += step) f(i);
  };
  parallel_for(batch * heads * row_blocks * key_blocks, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const typename PackElement<Packed<S>>::TileScope held;
    for (int64_t task = begin; task < end; task++) {
      const int64_t key_block = task % key_blocks, row_block = task / key_blocks % row_blocks,
                    h0 = task / key_blocks / row_blocks % heads, b0 = task / key_blocks / row_blocks / heads;
      T* sum = scratch<T>(Region::mask_gradient, BR * BC);
      std::fill(sum, sum + BR * BC, T(0));
      each(stride[0], b0, a.batch, 1, [&](int64_t b) {
        each(stride[1], h0, a.heads, 1, [&](int64_t h) {
          const QueryHead<S> x(a, b, h);
          each(stride[2], row_block * BR, L, BR, [&](int64_t i0) {
            each(stride[3], key_block * BC, K, BC, [&](int64_t j0) { add_block(x, i0, j0, sum); });
          });
        });
      });
      int64_t rows = std::min(BR, L - row_block * BR), columns = std::min(BC, K - key_block * BC);
      if (!stride[2]) {
        for (int64_t r = 1; r < BR; r++)
          for (int64_t c = 0; c < BC; c++) sum[c] += sum[r * BC + c];
        rows = 1;
      }
      if (!stride[3]) {
        for (int64_t r = 0; r < rows; r++) sum[r * BC] = std::accumulate(sum + r * BC, sum + r * BC + BC, T(0));
        columns = 1;
      }
      const auto store_as = [&](auto* to) {
        using M = std::remove_pointer_t<decltype(to)>;
        to += b0 * stride[0] + h0 * stride[1] + row_block * BR * stride[2] + key_block * BC * stride[3];
        for (int64_t r = 0; r < rows; r++)
          for (int64_t c = 0; c < columns; c += W<T>)
            store<M>(to + r * stride[2] + c, load(sum + r * BC + c), columns - c);
      };
      if (a.scores.mask_type == MaskType::storage) store_as(static_cast<S*>(a.dmask.data));
      else store_as(static_cast<T*>(a.dmask.data));
    }
  });
}

template <class S>
void sink_gradient(const AttentionArgs& a) {
  using T = Acc<S>;
  parallel_for(a.heads, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; h++) {
      double total = 0;
      for (int64_t b = 0; b < a.batch; b++) {
        const QueryHead<S> x(a, b, h);
        for (int64_t i = 0; i < x.sequence.q_len; i++) {
          const T lse = lse_of(x, i);
          if (lse < kInf<T> || lse != lse) total -= double(std::exp(x.sink() - lse) * delta_of(x, i));
        }
      }
      static_cast<T*>(a.dsink)[h] = T(total);
    }
  }, a.batch * a.sequences.q_len * a.v_dim);
}

}  // namespace

void attention_bwd(const AttentionArgs& a) {
  if (a.dq.data || a.dk.data || a.dv.data || a.dslopes) {
    by_length(a, decode_bwd, [](const AttentionArgs& a) {
      visit_scores(a, [&](auto s, auto general) { backward<general.value, decltype(s)>(a); });
    });
  }
  visit(a.dtype, [&](auto s) {
    if (a.dmask.data) mask_gradient<decltype(s)>(a);
    if (a.dsink) sink_gradient<decltype(s)>(a);
  });
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
