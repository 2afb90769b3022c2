// Attention without the matrix, forward: FlashAttention-2 (Dao 2023) for CPUs.
//
//   S = scale Q K^T   P = softmax(S)   O = P V        Q (L, E), K (S, E), V (S, Ev), per batch entry and head
//
// A strip of MR query rows meets the keys in blocks of BC. Its scores stay in L1. The running row maximum m and sum l
// rescale the strip's output, which is held as register tiles:
//   m' = max(m, max_j s_j)   P = exp(s - m')   l' = l exp(m - m') + sum_j P   O' = O exp(m - m') + P V
// Backward gets O and lse = m + log l. Keys that none of a strip's queries sees are skipped, and only tiles on the edge
// of what is visible are masked.
//
// Both products use the GEMM's micro-kernel (gemm/micro_kernel.h). Q, K and V are packed a head at a time, which
// converts 16-bit types and takes any strides. P is an operand where it lies, without packing. Where the processor
// multiplies pairs of bf16, both products use them: P is rounded to bf16, but the sum of a row is not.
#include "tile.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {
namespace {

// The strips that share a panel of K and V while it is in L1.
template <class E>
constexpr int64_t kStripsTogether = kUsesAmx<E> ? 1 : (kRegisters == 32 ? 2 : 4);

template <class T>
struct Row {
  T m = -kInf<T>, l = 0;  // running maximum and sum
};

// BR query rows of a head, from row i0 on, against packed keys and values.
template <bool general, class S>
void forward_block(const QueryHead<S>& x, int64_t i0, const Packed<S>* k, const Packed<S>* v) {
  using T = Acc<S>;
  using U = Packed<S>;
  constexpr int64_t d = PackElement<U>::kPackK, MR = Tiling<U>::MR, NR = Tiling<U>::NR, BR = cpu::PYGPT_ISA::BR<U>,
                    kStrips = BR / MR;
  constexpr int64_t kTogether = kStripsTogether<U>;
  const AttentionArgs& a = x.a;
  const double scale = a.scores.scale;
  const int64_t rows = std::min(BR, x.sequence.q_len - i0), v_panels = ceil_div(a.v_dim, NR);
  const int64_t packs = packs_of<U>(a.head_dim), v_packs = packs_of<U>(x.sequence.k_len);
  U* q = scratch<U>(Region::packed_q, BR * packs);
  pack_a(q, x.queries(a.q).at(i0, 0), rows, a.head_dim, scaling_reader<U>(scale));
  T* s = scratch<T>(Region::scores, kTogether * MR * kScoreStride);
  T* factors = general && a.scores.seed ? scratch<T>(Region::dropout_factors, kTogether * MR * BC) : nullptr;
  Tile<U>* out = scratch<Tile<U>>(Region::output_tiles, kStrips * v_panels);
  std::fill(out, out + kStrips * v_panels, Tile<U>{});
  Row<T> state[BR];

  const Range<int64_t> walk = x.visible.walk(i0, i0 + rows);
  for (int64_t j0 = walk.begin / NR * NR; j0 < walk.end; j0 += BC) {
    const MaskEffect of_block = general ? x.mask_effect(i0, rows, j0, BC) : MaskEffect::changes_none;
    if (of_block == MaskEffect::hides_all) continue;
    for (int64_t first = 0; first * MR < rows; first += kTogether) {
      const int64_t end = std::min(first + kTogether, ceil_div(rows, MR));
      // The keys of the block that a strip walks over, from j0 on; they start with a panel. Neither end decreases from
      // strip to strip.
      Range<int64_t> keys[kTogether];
      for (int64_t strip = first; strip < end; strip++) {
        const Range<int64_t> seen = x.visible.walk(i0 + strip * MR, i0 + strip * MR + MR);
        keys[strip - first] = {std::clamp<int64_t>(seen.begin - j0, 0, BC) / NR * NR,
                               std::clamp<int64_t>(seen.end - j0, 0, BC)};
      }
      for (int64_t c = keys[0].begin; c < keys[end - 1 - first].end; c += NR)
        for (int64_t strip = first; strip < end; strip++) {
          if (c < keys[strip - first].begin || c >= keys[strip - first].end) continue;
          T* to = s + (strip - first) * MR * kScoreStride + c;
          score_tile<general>(x, q + strip * MR * packs, k + (j0 + c) * packs, packs, i0 + strip * MR, j0 + c, to,
                              kScoreStride);
        }
      T rescale[kTogether * MR];
      for (int64_t strip = first; strip < end; strip++) {
        const Range<int64_t> seen = keys[strip - first];
        const int64_t vectors = ceil_div(seen.size(), NR) * NV, r0 = (strip - first) * MR;
        if (general && factors)
          x.dropout(i0 + strip * MR, MR, j0 + seen.begin, vectors * W<T>, factors + r0 * BC + seen.begin, BC);
        const MaskEffect effect = of_block == MaskEffect::mixed ? x.mask_effect(i0 + strip * MR, MR, j0, BC) : of_block;
        for (int64_t r = r0; r < r0 + MR; r++) {
          Row<T>& row = state[first * MR + r];
          const T* kept = factors ? factors + r * BC + seen.begin : nullptr;
          T* row_scores = s + r * kScoreStride + seen.begin;
          if (general && vectors)
            x.adjust(effect, {row_scores, 0, i0 + first * MR + r, 1, j0 + seen.begin, vectors * W<T>}, nullptr, 0);
          rescale[r] = vectors ? softmax_row<general, U>(scale, row_scores, vectors, row.m, row.l, kept) : T(1);
        }
      }
      for (int64_t p = 0; p < v_panels; p++)
        for (int64_t strip = first; strip < end; strip++) {
          const Range<int64_t> seen = keys[strip - first];
          const U* weights = reinterpret_cast<const U*>(s + (strip - first) * MR * kScoreStride + seen.begin);
          const U* values = v + (p * v_packs + (j0 + seen.begin) / d) * NR;
          Tile<U> product, &sum = out[strip * v_panels + p];
          micro_kernel<kScoreStride, PackElement<U>::kTileK>(packs_of<U>(seen.size()), weights, values, NR,
                                                             product.data(), NR);
          for (int r = 0; r < MR; r++)
            for (int w = 0; w < NV; w++)
              sum.c[r][w] = sum.c[r][w] * rescale[(strip - first) * MR + r] + product.c[r][w];
        }
    }
  }

  for (int64_t i = 0; i < rows; i++) {
    const Tile<U>* tiles = out + i / MR * v_panels;
    finish_row(x, i0 + i, state[i].m, state[i].l, [&](int64_t j) { return tiles[j / NR].c[i % MR][j % NR / W<T>]; });
  }
}

template <bool general, class S>
void forward(const AttentionArgs& a) {
  using U = Packed<S>;
  constexpr int64_t NR = Tiling<U>::NR;
  const int64_t q_len = a.sequences.q_len, k_len = a.sequences.k_len, blocks = ceil_div(q_len, BR<U>);
  parallel_for(a.batch * a.heads * blocks, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const typename PackElement<U>::TileScope held;
    U* k = scratch<U>(Region::packed_k, round_up(k_len, NR) * packs_of<U>(a.head_dim));
    U* v = scratch<U>(Region::packed_v, round_up(a.v_dim, NR) * packs_of<U>(k_len));
    int64_t packed = -1;
    for (int64_t task = begin; task < end; task++) {
      const QueryHead<S> x(a, task / blocks / a.heads, task / blocks % a.heads);
      // Takes blocks from both ends in turn, so that every range of tasks has short and long causal rows alike.
      const int64_t n = task % blocks, block = n % 2 ? blocks - 1 - n / 2 : n / 2;
      if (block * BR<U> >= x.sequence.q_len || is_decode(x)) continue;
      if (const int64_t problem = task / blocks / a.group(); problem != packed) {
        pack_b(k, x.keys(a.k).transposed(), x.sequence.k_len, a.head_dim);
        pack_b(v, x.keys(a.v), a.v_dim, x.sequence.k_len);
        packed = problem;
      }
      forward_block<general>(x, block * BR<U>, k, v);
    }
  }, std::min(BR<U>, q_len) * k_len * (a.head_dim + a.v_dim));
}

}  // namespace

void attention_fwd(const AttentionArgs& a) {
  by_length(a, decode_fwd, [](const AttentionArgs& a) {
    visit_scores(a, [&](auto s, auto general) { forward<general.value, decltype(s)>(a); });
  });
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
