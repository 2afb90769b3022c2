// Backward of attention (KV-stationary): for each block of BC keys, over all queries that attend to one of them,
//
//   P = exp(S - lse)          dV += P^T dO      dP = dO V^T
//   dS = P (dP - delta)       dK += dS^T Q      dQ += dS K      delta = rowsum(dO O) - dlse
//
// One task owns a head, so every sum has a fixed order without atomics. If there are few heads, a head's key blocks are
// dealt to several tasks, whose number depends on the shape alone, and their dQ are added in order.
//
// All five products use the GEMM's micro-kernel. Where the processor multiplies pairs of bf16, P and dS are rounded to
// bf16, but sums over rows are not.
#include "attention.h"

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

// The packed operands of one head, which its key blocks share. A product with an operand in "t" sums over that
// operand's rows.
template <class S>
struct PackedHead {
  using T = Acc<S>;
  using U = Packed<S>;
  static constexpr int64_t NR = Tiling<U>::NR;
  const AttentionArgs& a;
  int64_t b, h, L, E, Ev, e_panels, v_panels;
  int64_t l_packs, k_packs, e_packs, v_packs;  // along the queries, the keys and the channels
  U *q, *qt, *dout, *dout_t, *k, *kt, *v;
  T *lse, *delta;

  PackedHead(const AttentionArgs& a, int64_t b, int64_t h)
      : a(a), b(b), h(h), L(a.q_len), E(a.head_dim), Ev(a.v_dim), e_panels(ceil_div(E, NR)), v_panels(ceil_div(Ev, NR)),
        l_packs(packs_of<U>(L)), k_packs(packs_of<U>(a.k_len)), e_packs(packs_of<U>(E)), v_packs(packs_of<U>(Ev)) {
    const int64_t padded = round_up(L, Tiling<U>::MR), kpad = round_up(a.k_len, NR);
    q = scratch<U>(Region::packed_q, padded * e_packs), qt = scratch<U>(Region::packed_q_t, e_panels * NR * l_packs);
    dout = scratch<U>(Region::packed_dout, padded * v_packs),
    dout_t = scratch<U>(Region::packed_dout_t, v_panels * NR * l_packs);
    k = scratch<U>(Region::packed_k, kpad * e_packs), kt = scratch<U>(Region::packed_k_t, e_panels * NR * k_packs);
    v = scratch<U>(Region::packed_v, kpad * v_packs);
    const auto Q = head<S>(a.q, b, h), K = head<S>(a.k, b, h), V = head<S>(a.v, b, h), dO = head<S>(a.dout, b, h);
    pack_a(q, Q, L, E, scaling_reader<U>(a.scale));
    pack_transposed(qt, Q, E, L);
    pack_a(dout, dO, L, Ev);
    pack_transposed(dout_t, dO, Ev, L);
    pack_b(k, K.transposed(), a.k_len, E);
    pack_b(kt, K, E, a.k_len);
    pack_b(v, V.transposed(), a.k_len, Ev);

    lse = scratch<T>(Region::row_statistics, 2 * padded), delta = lse + padded;
    for (int64_t i = 0; i < padded; i++) {
      lse[i] = i < L ? lse_of<T>(a, b, h, i) : kInf<T>;
      delta[i] = i < L ? delta_of<S>(a, b, h, i) : T(0);
    }
  }
};

// The row stride of ds_rows. With pairs, every row has cache lines of its own, as AMX needs.
template <class U>
constexpr int64_t kScoreGradStride = PackElement<U>::kPackK > 1 ? BC / PackElement<U>::kPackK : kScoreStride;

// P and dS of `rows` query rows from i0 on against the BC keys from j0 on, zero where masked. p and ds (BR, BC) have
// packs along the queries. ds_rows has packs along the keys, in rows kScoreGradStride apart; where a pack is one value,
// it is ds itself.
template <class S, class U = Packed<S>>
void gradient_block(const PackedHead<S>& x, U* p, U* ds, U* ds_rows, int64_t i0, int64_t rows, int64_t j0) {
  using T = Acc<S>;
  constexpr int d = PackElement<U>::kPackK, MR = Tiling<U>::MR, NR = Tiling<U>::NR;
  for (int64_t panel = 0; panel * NR < BC; panel++)
    for (int64_t i = 0; i < rows; i += MR) {
      const int64_t row0 = i0 + i, column = panel * NR, j = j0 + column;
      auto put = [&](int r, int w, const Vec<T>(&e)[d], const Vec<T>(&g)[d]) {  // rows r .. r + d - 1
        const int64_t at = (i + r) / d * kScoreStride + column + w * W<T>;
        store(reinterpret_cast<T*>(p) + at, PackElement<U>::zip_rows(e));
        store(reinterpret_cast<T*>(ds) + at, PackElement<U>::zip_rows(g));
        if constexpr (d > 1)
          for (int n = 0; n < d; n++)
            PackElement<U>::store_row(ds_rows + (i + r + n) * kScoreGradStride<U> + (column + w * W<T>) / d, g[n]);
      };
      if (column >= unmasked_in_block(x.a, row0, MR, j0)) {
        const Vec<T> zero[d] = {};
        for (int r = 0; r < MR; r += d)
          for (int w = 0; w < NV; w++) put(r, w, zero, zero);
        continue;
      }
      Tile<U> s, dp;
      score_tile(x.a, x.q + row0 * x.e_packs, x.k + j * x.e_packs, x.e_packs, row0, j, s.data(), NR);
      dot_products(x.v_packs, x.dout + row0 * x.v_packs, x.v + j * x.v_packs, dp.data(), NR);
      for (int r = 0; r < MR; r += d)
        for (int w = 0; w < NV; w++) {
          Vec<T> e[d], g[d];
          for (int n = 0; n < d; n++) {
            // Row L may share a pack with the last query, whose gradients an infinite key must not spoil.
            if (d > 1 && row0 + r + n >= x.L) {
              e[n] = g[n] = Vec<T>{};
              continue;
            }
            e[n] = exp<T>(scaled_scores<U>(x.a.scale, s.c[r + n][w]) - x.lse[row0 + r + n]);
            g[n] = e[n] * (dp.c[r + n][w] - x.delta[row0 + r + n]);
          }
          put(r, w, e, g);
        }
    }
}

// acc (BC keys, channels) += x^T y for x (rows, BC) and y packed as panels of `packs` packs along the queries. With
// AMX, acc holds transposed tiles.
template <class U, class T = Acc<U>>
void add_transposed_product(Tile<U>* acc, const U* x, const U* y, int64_t packs, int64_t i0, int64_t rows, int64_t keys,
                            int64_t panels, int64_t first_row) {
  constexpr int64_t MR = Tiling<U>::MR, NR = Tiling<U>::NR, d = PackElement<U>::kPackK, G = PackElement<U>::kTileK;
  constexpr int64_t kKeys = kRegisters == 32 ? 4 * MR : 8 * MR;  // keys whose columns of x stay in L1 for all panels
  for (int64_t j0 = 0; j0 < keys; j0 += kKeys)
    for (int64_t p = 0; p < panels; p++)
      for (int64_t j = j0; j < std::min(keys, j0 + kKeys); j += MR) {
        Tile<U>& sum = acc[j / MR * panels + p];
        // Earlier rows attend to none of these keys.
        const int64_t start = std::clamp<int64_t>(first_row + j, 0, rows) / (d * G) * G;
        const U *from = x + start * kScoreStride + j, *with = y + (p * packs + i0 / d + start) * NR;
        if constexpr (kUsesAmx<U>) add_product<G, MR * G>(sum, packs_of<U>(rows) - start, with, from, kScoreStride);
        else add_product<1, kScoreStride>(sum, packs_of<U>(rows) - start, from, with, NR);
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

template <class S>
void store_tiles(const Heads& to, int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t channels,
                 const Tile<Packed<S>>* tiles, Acc<S> scale) {
  using T = Acc<S>;
  constexpr int64_t MR = Tiling<Packed<S>>::MR, NR = Tiling<Packed<S>>::NR;
  const int64_t panels = ceil_div(channels, NR);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < channels; j += W<T>) {
      const Vec<T> x = tiles[i / MR * panels + j / NR].c[i % MR][j % NR / W<T>];
      store(output_row<S>(to, b, h, i0 + i) + j, x * scale, channels - j);
    }
}

// dk and dv of the BC keys from j0 on, and their share of dq, which is tiles of the whole head and not yet scaled.
template <class S>
void backward_tile(const PackedHead<S>& x, int64_t j0, Tile<Packed<S>>* dq) {
  using T = Acc<S>;
  using U = Packed<S>;
  constexpr int64_t d = PackElement<U>::kPackK, MR = Tiling<U>::MR, NR = Tiling<U>::NR, BR = cpu::PYGPT_ISA::BR<U>;
  const AttentionArgs& a = x.a;
  const int64_t keys = std::min(BC, a.k_len - j0);
  U *p = scratch<U>(Region::p_block, BR * kScoreStride / d), *ds = scratch<U>(Region::ds_block, BR * kScoreStride / d);
  U* ds_rows = d > 1 ? scratch<U>(Region::ds_rows, BR * kScoreGradStride<U>) : ds;
  Tile<U>* dk = scratch<Tile<U>>(Region::dk_tiles, BC / MR * x.e_panels);
  Tile<U>* dv = scratch<Tile<U>>(Region::dv_tiles, BC / MR * x.v_panels);
  std::fill(dk, dk + BC / MR * x.e_panels, Tile<U>{});
  std::fill(dv, dv + BC / MR * x.v_panels, Tile<U>{});

  for (int64_t i0 = a.is_causal ? j0 / BR * BR : 0; i0 < x.L; i0 += BR) {
    const int64_t rows = std::min(BR, x.L - i0);
    gradient_block(x, p, ds, ds_rows, i0, rows, j0);
    for (int64_t e = 0; dq && e < x.e_panels; e++)
      for (int64_t i = 0; i < rows; i += MR)
        add_product<kScoreGradStride<U>, PackElement<U>::kTileK>(
            dq[(i0 + i) / MR * x.e_panels + e], packs_of<U>(unmasked_in_block(a, i0 + i, MR, j0)),
            ds_rows + i * kScoreGradStride<U>, x.kt + (e * x.k_packs + j0 / d) * NR, NR);
    const int64_t first_row = a.is_causal ? j0 - i0 : -BC;
    if (a.dv.data) add_transposed_product(dv, p, x.dout_t, x.l_packs, i0, rows, keys, x.v_panels, first_row);
    if (a.dk.data) add_transposed_product(dk, ds, x.qt, x.l_packs, i0, rows, keys, x.e_panels, first_row);
  }
  if constexpr (kUsesAmx<U>) transpose_tiles(dk, BC / MR * x.e_panels), transpose_tiles(dv, BC / MR * x.v_panels);
  if (a.dk.data) store_tiles<S>(a.dk, x.b, x.h, j0, keys, x.E, dk, T(a.scale));
  if (a.dv.data) store_tiles<S>(a.dv, x.b, x.h, j0, keys, x.Ev, dv, T(1));
}

template <class S>
void backward(const AttentionArgs& a) {
  using T = Acc<S>;
  using U = Packed<S>;
  const int64_t heads = a.batch * a.heads, tiles = ceil_div(a.k_len, BC),
                e_panels = ceil_div(a.head_dim, Tiling<U>::NR);
  const int64_t dq_tiles = ceil_div(a.q_len, Tiling<U>::MR) * e_panels;
  // With few heads, deals each head's key blocks to several tasks in turn; their number depends on the shape alone.
  const int64_t splits = std::clamp<int64_t>(ceil_div(8, std::max<int64_t>(heads, 1)), 1, std::max<int64_t>(tiles, 1));
  Tile<U>* partials =
      splits > 1 && a.dq.data ? scratch<Tile<U>>(Region::dq_partials, heads * splits * dq_tiles) : nullptr;
  parallel_for(heads * splits, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const typename PackElement<U>::TileScope held;
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / splits / a.heads, h = task / splits % a.heads;
      const PackedHead<S> x(a, b, h);
      Tile<U>* dq =
          partials ? partials + task * dq_tiles : (a.dq.data ? scratch<Tile<U>>(Region::dq_tiles, dq_tiles) : nullptr);
      if (dq) std::fill(dq, dq + dq_tiles, Tile<U>{});
      for (int64_t tile = task % splits; tile < tiles; tile += splits) backward_tile(x, tile * BC, dq);
      if (dq && !partials) store_tiles<S>(a.dq, b, h, 0, a.q_len, a.head_dim, dq, T(a.scale));
    }
  }, a.q_len * ceil_div(a.k_len, splits) * (a.head_dim + a.v_dim));
  if (partials)
    parallel_for(heads, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        Tile<U>* dq = partials + n * splits * dq_tiles;
        for (int64_t s = 1; s < splits; s++)
          for (int64_t t = 0; t < dq_tiles; t++) add(dq[t], dq[s * dq_tiles + t]);
        store_tiles<S>(a.dq, n / a.heads, n % a.heads, 0, a.q_len, a.head_dim, dq, T(a.scale));
      }
    });
}

}  // namespace

void attention_bwd(const AttentionArgs& a) {
  if (is_decode(a)) return decode_bwd(a);
  visit(a.dtype, [&](auto s) { backward<decltype(s)>(a); });
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
