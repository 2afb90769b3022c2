// Attention without the matrix, forward: FlashAttention-2 (Dao 2023) for CPUs.
//
//   S = scale Q K^T   P = softmax(S)   O = P V        Q (L, E), K (S, E), V (S, Ev), per batch entry and head
//
// A strip of MR query rows meets the keys in blocks of BC. Its scores stay in L1. The running row maximum m and sum l
// rescale the strip's output, which is held as register tiles:
//   m' = max(m, max_j s_j)   P = exp(s - m')   l' = l exp(m - m') + sum_j P   O' = O exp(m - m') + P V
// Backward gets O and lse = m + log l. Tiles above the causal diagonal are skipped, and only tiles that the diagonal or
// the last key crosses are masked.
//
// Both products use the GEMM's micro-kernel (gemm/micro_kernel.h). Q, K and V are packed a head at a time, which
// converts 16-bit types and takes any strides. P is an operand where it lies, without packing. Where the processor
// multiplies pairs of bf16, both products use them: P is rounded to bf16, but the sum of a row is not.
#include "attention.h"

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

// BR query rows of head (b, h), from row i0 on, against packed keys and values.
template <class S>
void forward_block(const AttentionArgs& a, int64_t b, int64_t h, int64_t i0, const Packed<S>* k, const Packed<S>* v) {
  using T = Acc<S>;
  using U = Packed<S>;
  constexpr int64_t d = PackElement<U>::kPackK, MR = Tiling<U>::MR, NR = Tiling<U>::NR, BR = cpu::PYGPT_ISA::BR<U>,
                    kStrips = BR / MR;
  constexpr int64_t kTogether = kStripsTogether<U>;
  const int64_t rows = std::min(BR, a.q_len - i0), v_panels = ceil_div(a.v_dim, NR);
  const int64_t packs = packs_of<U>(a.head_dim), v_packs = packs_of<U>(a.k_len);
  U* q = scratch<U>(Region::packed_q, BR * packs);
  pack_a(q, head<S>(a.q, b, h).at(i0, 0), rows, a.head_dim, scaling_reader<U>(a.scale));
  T* s = scratch<T>(Region::scores, kTogether * MR * kScoreStride);
  Tile<U>* out = scratch<Tile<U>>(Region::output_tiles, kStrips * v_panels);
  std::fill(out, out + kStrips * v_panels, Tile<U>{});
  Row<T> state[BR];

  for (int64_t j0 = 0; j0 < a.k_len && unmasked_in_block(a, i0, rows, j0) > 0; j0 += BC)
    for (int64_t first = 0; first * MR < rows; first += kTogether) {
      const int64_t end = std::min(first + kTogether, ceil_div(rows, MR));
      // Does not decrease from strip to strip.
      auto unmasked = [&](int64_t strip) { return unmasked_in_block(a, i0 + strip * MR, MR, j0); };
      for (int64_t p = 0; p * NR < unmasked(end - 1); p++)
        for (int64_t strip = first; strip < end; strip++) {
          if (p * NR >= unmasked(strip)) continue;
          const int64_t j = j0 + p * NR;
          T* to = s + (strip - first) * MR * kScoreStride + p * NR;
          score_tile(a, q + strip * MR * packs, k + j * packs, packs, i0 + strip * MR, j, to, kScoreStride);
        }
      T rescale[kTogether * MR];
      for (int64_t r = 0; r < (end - first) * MR; r++) {
        Row<T>& row = state[first * MR + r];
        const int64_t vectors = ceil_div(unmasked(first + r / MR), NR) * NV;
        rescale[r] = vectors ? softmax_row<U>(a.scale, s + r * kScoreStride, vectors, row.m, row.l) : T(1);
      }
      for (int64_t p = 0; p < v_panels; p++)
        for (int64_t strip = first; strip < end; strip++) {
          const U* x = reinterpret_cast<const U*>(s + (strip - first) * MR * kScoreStride);
          const U* y = v + (p * v_packs + j0 / d) * NR;
          Tile<U> product, &sum = out[strip * v_panels + p];
          micro_kernel<kScoreStride, PackElement<U>::kTileK>(packs_of<U>(unmasked(strip)), x, y, NR, product.data(),
                                                             NR);
          for (int r = 0; r < MR; r++)
            for (int w = 0; w < NV; w++)
              sum.c[r][w] = sum.c[r][w] * rescale[(strip - first) * MR + r] + product.c[r][w];
        }
    }

  for (int64_t i = 0; i < rows; i++) {
    const Tile<U>* tiles = out + i / MR * v_panels;
    finish_row<S>(a, b, h, i0 + i, state[i].m, state[i].l,
                  [&](int64_t j) { return tiles[j / NR].c[i % MR][j % NR / W<T>]; });
  }
}

template <class S>
void forward(const AttentionArgs& a) {
  using U = Packed<S>;
  constexpr int64_t NR = Tiling<U>::NR;
  const int64_t blocks = ceil_div(a.q_len, BR<U>);
  parallel_for(a.batch * a.heads * blocks, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const typename PackElement<U>::TileScope held;
    U* k = scratch<U>(Region::packed_k, round_up(a.k_len, NR) * packs_of<U>(a.head_dim));
    U* v = scratch<U>(Region::packed_v, round_up(a.v_dim, NR) * packs_of<U>(a.k_len));
    int64_t packed = -1;
    for (int64_t task = begin; task < end; task++) {
      const int64_t problem = task / blocks, b = problem / a.heads, h = problem % a.heads;
      if (problem != packed) {
        pack_b(k, head<S>(a.k, b, h).transposed(), a.k_len, a.head_dim);
        pack_b(v, head<S>(a.v, b, h), a.v_dim, a.k_len);
        packed = problem;
      }
      // Takes blocks from both ends in turn, so that every range of tasks has short and long causal rows alike.
      const int64_t n = task % blocks, block = n % 2 ? blocks - 1 - n / 2 : n / 2;
      forward_block<S>(a, b, h, block * BR<U>, k, v);
    }
  }, std::min(BR<U>, a.q_len) * a.k_len * (a.head_dim + a.v_dim));
}

}  // namespace

void attention_fwd(const AttentionArgs& a) {
  if (is_decode(a)) return decode_fwd(a);
  visit(a.dtype, [&](auto s) { forward<decltype(s)>(a); });
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
