// Attention without the matrix, forward: FlashAttention-2 (Dao 2023) for CPUs.
//
//   S = scale Q K^T   P = softmax(S)   O = P V        Q (L, E), K (S, E), V (S, Ev), per batch entry and head
//
// A strip of MR query rows meets the keys BC at a time. Its scores live in L1; the running row maximum m
// and sum l rescale the output strip, which stays in register tiles:
//   m' = max(m, max_j s_j)   P = exp(s - m')   l' = l exp(m - m') + sum_j P   O' = O exp(m - m') + P V
// Kept for backward: O and lse = m + log l. Tiles above the causal diagonal are skipped, and only those
// that the diagonal or the last key crosses are masked.
//
// Both products run on the packed GEMM's microkernel (gemm.h). Packing Q, K, V a head at a time converts
// 16-bit types and absorbs any strides; P is an operand as it lies. Where the machine multiplies pairs of
// bf16, both products take them: P is rounded to bf16, its sum over a row is not.
#include "attention.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {
namespace {

template <class E>
constexpr int64_t kStripsTogether = MR<E> == 6 ? 4 : MR<E> == 14 ? 2 : 1;  // that share a panel of K and V while it is in L1

template <class T>
struct Row {
  T m = -kInf<T>, l = 0;  // running maximum and sum
};

struct PackedQ;
struct PackedK;
struct PackedV;
struct Strip;
struct Output;

// One block of BR query rows of head (b, h) from row i0, against packed keys and values.
template <class S>
void forward_block(const AttentionArgs& a, int64_t b, int64_t h, int64_t i0, const Packed<S>* k, const Packed<S>* v) {
  using T = Acc<S>;
  using U = Packed<S>;
  constexpr int64_t d = PackElement<U>::kPackK, MR = cpu::PYGPT_ISA::MR<U>, BR = cpu::PYGPT_ISA::BR<U>, kStrips = BR / MR;
  constexpr int64_t kTogether = kStripsTogether<U>;
  const int64_t rows = std::min(BR, a.q_len - i0), v_panels = ceil_div(a.v_dim, NR<T>);
  const int64_t steps = packs_of<U>(a.head_dim), v_steps = packs_of<U>(a.k_len);
  U* q = scratch<U, PackedQ>(BR * steps);
  pack_rows(q, head<S>(a.q, b, h).at(i0, 0), rows, a.head_dim, scaled<U>(a.scale));
  T* s = scratch<T, Strip>(kTogether * MR * kScoreStride);
  Tile<U>* out = scratch<Tile<U>, Output>(kStrips * v_panels);
  std::fill(out, out + kStrips * v_panels, Tile<U>{});
  Row<T> state[BR];

  for (int64_t j0 = 0; j0 < a.k_len && unmasked_in_block(a, i0, rows, j0) > 0; j0 += BC)
    for (int64_t first = 0; first * MR < rows; first += kTogether) {
      const int64_t end = std::min(first + kTogether, ceil_div(rows, MR));
      auto unmasked = [&](int64_t strip) { return unmasked_in_block(a, i0 + strip * MR, MR, j0); };  // grows with strip
      for (int64_t p = 0; p * NR<T> < unmasked(end - 1); p++)
        for (int64_t strip = first; strip < end; strip++) {
          if (p * NR<T> >= unmasked(strip)) continue;
          const int64_t j = j0 + p * NR<T>;
          T* to = s + (strip - first) * MR * kScoreStride + p * NR<T>;
          score_tile(a, q + strip * MR * steps, k + j * steps, steps, i0 + strip * MR, j, to, kScoreStride);
        }
      T rescale[kTogether * MR];
      for (int64_t r = 0; r < (end - first) * MR; r++) {
        Row<T>& row = state[first * MR + r];
        const int64_t vectors = ceil_div(unmasked(first + r / MR), NR<T>) * NV;
        rescale[r] = vectors ? softmax_row<U>(a.scale, s + r * kScoreStride, vectors, row.m, row.l) : T(1);
      }
      for (int64_t p = 0; p < v_panels; p++)
        for (int64_t strip = first; strip < end; strip++) {
          const U* x = reinterpret_cast<const U*>(s + (strip - first) * MR * kScoreStride);
          const U* y = v + (p * v_steps + j0 / d) * NR<T>;
          Tile<U> more, &sum = out[strip * v_panels + p];
          multiply<kScoreStride, PackElement<U>::kTileK>(packs_of<U>(unmasked(strip)), x, y, NR<T>, more.data(), NR<T>);
          for (int r = 0; r < MR; r++)
            for (int w = 0; w < NV; w++) sum.c[r][w] = sum.c[r][w] * rescale[(strip - first) * MR + r] + more.c[r][w];
        }
    }

  for (int64_t i = 0; i < rows; i++) {
    const Tile<U>* tiles = out + i / MR * v_panels;
    finish_row<S>(a, b, h, i0 + i, state[i].m, state[i].l,
                  [&](int64_t j) { return tiles[j / NR<T>].c[i % MR][j % NR<T> / W<T>]; });
  }
}

template <class S>
void forward(const AttentionArgs& a) {
  using T = Acc<S>;
  using U = Packed<S>;
  const int64_t blocks = ceil_div(a.q_len, BR<U>);
  parallel_for(a.batch * a.heads * blocks, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const typename PackElement<U>::TileScope held;
    U* k = scratch<U, PackedK>(round_up(a.k_len, NR<T>) * packs_of<U>(a.head_dim));
    U* v = scratch<U, PackedV>(round_up(a.v_dim, NR<T>) * packs_of<U>(a.k_len));
    int64_t packed = -1;
    for (int64_t task = begin; task < end; task++) {
      const int64_t problem = task / blocks, b = problem / a.heads, h = problem % a.heads;
      if (problem != packed) {
        pack_columns(k, head<S>(a.k, b, h), a.k_len, a.head_dim);
        pack_columns(v, head<S>(a.v, b, h).transposed(), a.v_dim, a.k_len);
        packed = problem;
      }
      // First and last blocks in turn: any run of tasks then holds short and long causal rows alike.
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
