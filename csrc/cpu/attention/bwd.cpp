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
//   dslope = -sum dS distance    dmask = dS, summed over the batch entries that share the mask
//
// dmask is filled here if main_pass_fills_dmask, else by bwd_options.cpp, as the gradient of sinks always is.
//
// All five products use the GEMM's micro-kernel. Where the processor multiplies pairs of bf16, P and dS are rounded to
// bf16, but sums over rows are not.
#include "score_gradients.h"

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

// n elements of a packed operand, and the vector that packing may write behind them (gemm/pack.h). Another thread may
// pack the next head meanwhile.
template <class U>
int64_t with_spare(int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(U);
  return round_up(n, kLine) + kLine;
}

// The packed operands of heads of queries, and of heads of keys, in memory of this thread. A product with an operand in
// "t" sums over that operand's rows.
template <class S, class U = Packed<S>>
struct PackedQueries {
  using T = Acc<S>;
  int64_t rows, l_packs, e_packs, v_packs;  // rows up to whole tiles; packs along the queries and the channels
  int64_t e_panels, v_panels;
  U *q, *qt, *dout, *dout_t;
  T *lse, *delta;

  // Memory for n heads.
  PackedQueries(const AttentionArgs& a, int64_t n)
      : rows(round_up(a.sequences.q_len, Tiling<U>::MR)), l_packs(packs_of<U>(a.sequences.q_len)),
        e_packs(packs_of<U>(a.head_dim)), v_packs(packs_of<U>(a.v_dim)), e_panels(ceil_div(a.head_dim, Tiling<U>::NR)),
        v_panels(ceil_div(a.v_dim, Tiling<U>::NR)) {
    const Sizes size(*this);
    q = scratch<U>(Region::packed_q, n * size.q), qt = scratch<U>(Region::packed_q_t, n * size.qt);
    dout = scratch<U>(Region::packed_dout, n * size.dout), dout_t = scratch<U>(Region::packed_dout_t, n * size.dout_t);
    lse = scratch<T>(Region::row_statistics, n * 2 * rows), delta = lse + rows;
  }
  // Head n of the memory, for the queries of x, which may be a shorter sequence than others.
  PackedQueries at(int64_t n, const QueryHead<S>& x) const {
    const Sizes size(*this);
    PackedQueries head = *this;
    head.q += n * size.q, head.qt += n * size.qt, head.dout += n * size.dout, head.dout_t += n * size.dout_t;
    head.lse += n * 2 * rows, head.delta += n * 2 * rows;
    head.rows = round_up(x.sequence.q_len, Tiling<U>::MR), head.l_packs = packs_of<U>(x.sequence.q_len);
    return head;
  }
  PackedQueries pack(int64_t n, const QueryHead<S>& x) const {
    const PackedQueries head = at(n, x);
    const int64_t L = x.sequence.q_len, E = x.a.head_dim, Ev = x.a.v_dim;
    const auto Q = x.queries(x.a.q), dO = x.queries(x.a.dout);
    pack_a(head.q, Q, L, E, scaling_reader<U>(x.a.scores.scale));
    pack_transposed(head.qt, Q, E, L);
    pack_a(head.dout, dO, L, Ev);
    pack_transposed(head.dout_t, dO, Ev, L);
    fill_statistics(x, 0, head.rows, head.lse, head.delta);
    return head;
  }

 private:
  // How many elements one head's operands take.
  struct Sizes {
    int64_t q, qt, dout, dout_t;
    explicit Sizes(const PackedQueries& of)
        : q(with_spare<U>(of.rows * of.e_packs)), qt(with_spare<U>(of.e_panels * Tiling<U>::NR * of.l_packs)),
          dout(with_spare<U>(of.rows * of.v_packs)), dout_t(with_spare<U>(of.v_panels * Tiling<U>::NR * of.l_packs)) {}
  };
};
template <class S, class U = Packed<S>>
struct PackedKeys {
  int64_t rows, k_packs, e_packs, v_packs;
  int64_t e_panels;
  U *k, *kt, *v;

  PackedKeys(const AttentionArgs& a, int64_t n)
      : rows(round_up(a.sequences.k_len, Tiling<U>::NR)), k_packs(packs_of<U>(a.sequences.k_len)),
        e_packs(packs_of<U>(a.head_dim)), v_packs(packs_of<U>(a.v_dim)), e_panels(ceil_div(a.head_dim, Tiling<U>::NR)) {
    const Sizes size(*this);
    k = scratch<U>(Region::packed_k, n * size.k), kt = scratch<U>(Region::packed_k_t, n * size.kt);
    v = scratch<U>(Region::packed_v, n * size.v);
  }
  PackedKeys at(int64_t n, const QueryHead<S>& x) const {
    const Sizes size(*this);
    PackedKeys head = *this;
    head.k += n * size.k, head.kt += n * size.kt, head.v += n * size.v;
    head.rows = round_up(x.sequence.k_len, Tiling<U>::NR), head.k_packs = packs_of<U>(x.sequence.k_len);
    return head;
  }
  PackedKeys pack(int64_t n, const QueryHead<S>& x) const {
    const PackedKeys head = at(n, x);
    const auto K = x.keys(x.a.k), V = x.keys(x.a.v);
    pack_b(head.k, K.transposed(), x.sequence.k_len, x.a.head_dim);
    pack_b(head.kt, K, x.a.head_dim, x.sequence.k_len);
    pack_b(head.v, V.transposed(), x.sequence.k_len, x.a.v_dim);
    return head;
  }

 private:
  struct Sizes {
    int64_t k, kt, v;
    explicit Sizes(const PackedKeys& of)
        : k(with_spare<U>(of.rows * of.e_packs)), kt(with_spare<U>(of.e_panels * Tiling<U>::NR * of.k_packs)),
          v(with_spare<U>(of.rows * of.v_packs)) {}
  };
};

// ---------------------------------------------------------------- P and dS
// The row stride of ds_rows. With pairs, every row has cache lines of its own, as AMX needs.
template <class U>
constexpr int64_t kScoreGradStride = PackElement<U>::kPackK > 1 ? BC / PackElement<U>::kPackK : kScoreStride;

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
        // The products read MR keys and whole steps of queries around what is seen, and nothing further away.
        constexpr int64_t kMargin = MR + d * PackElement<U>::kTileK;
        if (column >= seen.end + kMargin || column + NR + kMargin <= seen.begin) continue;
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
      const DmaskTile<S> dmask(x, row0, j);
      Vec<T> with_distance = {};
      gradient_tile<general>(x, of, row0, j, [&](int r, int w, const auto& e, const auto& scores_g, const auto& g) {
        put(r, w, e, scores_g);
        if (general && x.a.dslopes)
          for (int n = 0; n < d && row0 + r + n < x.sequence.q_len; n++)
            with_distance += g[n] * x.distances(row0 + r + n, j + w * W<T>);
        for (int n = 0; general && n < d; n++) dmask.add(r + n, w * W<T>, g[n]);
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
        if (seeing.size() == 0) continue;
        const int64_t start = seeing.begin / (d * G) * G, n = packs_of<U>(seeing.end) - start;
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
inline int64_t tasks_of_head(const AttentionArgs& a) {
  const int64_t blocks = ceil_div(a.sequences.k_len, BC);
  int64_t tasks = 1;
  while (tasks < kParts && tasks * a.batch * a.kv_heads < 8 && tasks < blocks) tasks *= 2;
  return tasks;
}

// Whether the main pass adds dS to dmask on its way to dq, dk and dv. If not, dmask has a pass of its own, with the
// same bits. An element must belong to one head. If batch entries share it, one task adds theirs in turn: there must
// be such tasks for all threads, and dmask must hold the sum without rounding it in between.
inline bool main_pass_fills_dmask(const AttentionArgs& a) {
  const int64_t(&stride)[4] = a.dmask.stride;
  const bool main_pass = (a.dq.data || a.dk.data || a.dv.data || a.dslopes) && !is_decode(a, a.sequences.q_len);
  const bool of_one_head = (stride[1] || a.heads == 1) && stride[2] && stride[3];
  const bool of_one_entry = stride[0] || a.batch == 1;
  const bool rounded = a.scores.mask_type == MaskType::storage && (a.dtype == DType::bf16 || a.dtype == DType::f16);
  const bool enough_tasks = a.kv_heads * tasks_of_head(a) >= threads.count();
  return a.dmask.data && main_pass && of_one_head && (of_one_entry || (!rounded && enough_tasks));
}

template <bool general, class S>
void backward(const AttentionArgs& a) {
  using T = Acc<S>;
  using U = Packed<S>;
  constexpr int64_t MR = Tiling<U>::MR, NR = Tiling<U>::NR, kLevels = 3;  // 2^kLevels = kParts
  const int64_t kv_heads = a.batch * a.kv_heads, group = a.group(), blocks = ceil_div(a.sequences.k_len, BC);
  const int64_t e_panels = ceil_div(a.head_dim, NR), v_panels = ceil_div(a.v_dim, NR);
  if (general && a.dmask.data) clear_dmask<S>(a);
  const int64_t tasks = tasks_of_head(a);
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
  // If several tasks share a head, its operands are packed for all of them first, else where the head's task begins.
  const bool shared = tasks > 1;
  const PackedKeys<S> all_keys(a, shared ? kv_heads : 0);
  const PackedQueries<S> all_queries(a, shared ? a.batch * a.heads : 0);
  if (shared)
    parallel_for(a.batch * a.heads, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const QueryHead<S> x(a, n / a.heads, n % a.heads);
        if (is_decode(x)) continue;
        all_queries.pack(n, x);
        if (x.h % group == 0) all_keys.pack(n / group, x);
      }
    }, (a.sequences.q_len + a.sequences.k_len) * (a.head_dim + a.v_dim));
  // Tasks that add to the same elements of dmask, those of the batch entries, run one after the other.
  const int64_t all_tasks = kv_heads * tasks;
  const int64_t apart = a.dmask.data && !a.dmask.stride[0] ? a.kv_heads * tasks : all_tasks;
  const auto run = [&](int64_t own) {
    for (int64_t n = own; n < all_tasks; n += apart) {
      const int64_t b = n / tasks / a.kv_heads, first = n / tasks % a.kv_heads * group, task = n % tasks;
      const QueryHead<S> first_head(a, b, first);
      if (is_decode(first_head) || (task > 0 && task * BC >= first_head.sequence.k_len)) continue;
      const PackedKeys<S> of_k = shared ? all_keys.at(n / tasks, first_head) : PackedKeys<S>(a, 1).pack(0, first_head);
      const KeyGradients<S> sums = {a.dk.data ? scratch<Tile<U>>(Region::dk_tiles, kept * dk_tiles) : nullptr,
                                    a.dv.data ? scratch<Tile<U>>(Region::dv_tiles, kept * dv_tiles) : nullptr};
      QueryGradients<U> sums_of_dq = {partials.most_rows, e_panels};
      if (a.dq.data) sums_of_dq.allocate(Region::dq_tiles, Region::dq_begun, 1 + kLevels);
      for (int64_t h = first; h < first + group; h++) {
        const QueryHead<S> x(first_head, h);
        const int64_t head = b * a.heads + h;
        const PackedQueries<S> of_q = shared ? all_queries.at(head, x) : PackedQueries<S>(a, 1).pack(0, x);
        HeadTask<general, S> head_task = {
            x, of_q, of_k, sums, dk_tiles, dv_tiles, slope_gradients ? slope_gradients + head * kParts : nullptr};
        QueryGradient<U> levels[1 + kLevels];
        for (int64_t level = 0; level <= kLevels; level++) levels[level] = sums_of_dq.at(level, x);
        if (partial) levels[0] = partials.at(head * tasks + task, x);
        head_task.sum(task, tasks, levels);
        if (a.dq.data && !partial) store_dq(x, levels[0]);
      }
    }
  };
  parallel_for(apart, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const typename PackElement<U>::TileScope held;
    for (int64_t own = begin; own < end; own++) run(own);
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

}  // namespace

void attention_bwd(const AttentionArgs& a) {
  AttentionArgs main_pass = a, rest = a;
  (main_pass_fills_dmask(a) ? rest : main_pass).dmask.data = nullptr;
  if (a.dq.data || a.dk.data || a.dv.data || a.dslopes) {
    by_length(main_pass, decode_bwd, [](const AttentionArgs& a) {
      visit_scores(a, [&](auto s, auto general) { backward<general.value, decltype(s)>(a); });
    });
  }
  mask_and_sink_gradients(rest);
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
