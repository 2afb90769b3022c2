// Matrix products. gemm_nt and gemm_nn, at the end of this file, choose an algorithm by the number of rows:
//
//     rows         algorithm
//     1 .. 16      gemv.h: reading W once is all the work (gemv_nn: if N and K are whole vectors and packs)
//     17 .. 256    small_m.h: packing W would take a good part of the time (float32, and W not small)
//     otherwise    packed_gemm: Goto and van de Geijn's scheme (2008) in BLIS's words
//
// gemm_tn, whose sum is over the rows, is always a packed_gemm.
//
// packed_gemm computes C = A B with A (M, K), B (K, N), any strides, any storage type, in five loops around the
// micro-kernel:
//
//     5  jc   NC columns of B and C      all threads pack B (K x NC) as panels of NR columns
//     4  ic   MC rows of A and C         the threads' tasks
//     3  pc   KC packs of the sum        the thread packs A (MC x KC) as panels of MR rows, which stay in L2
//     2  jr   NR columns, a panel of B   half of L1 with AVX2, else L2     \ macro_kernel
//     1  ir   MR rows, a panel of A      streams from L2                   /
//             micro_kernel               MR x NR sums in registers
//
// Loops 3 and 4 are the other way round than in BLIS, as B is packed for the whole sum. Chains of 384 packs (768 with
// AMX) are summed in registers from zero and then added to the sum so far: blocked summation, which is more exact than
// one long chain. An element of C is computed the same way however the work is split.
//
// The result leaves through an epilogue: epilogue(i, j, c, n) gets n <= W lanes of row i from column j, once, after the
// whole sum; it adds a bias, applies an activation, stores.
#pragma once
#include "../arena.h"
#include "gemv.h"
#include "pack.h"
#include "small_m.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

// Hands the valid part of a finished tile at (i, j) to the epilogue.
template <class E, class Epilogue>
PYGPT_INLINE void finish(const Tile<E>& tile, int64_t i, int64_t j, int64_t M, int64_t N, const Epilogue& epilogue) {
  using T = Acc<E>;
  const int64_t rows = std::min<int64_t>(Tiling<E>::MR, M - i), cols = std::min<int64_t>(Tiling<E>::NR, N - j);
  const Epilogue store = epilogue;  // a copy, whose fields stay in registers: no store can change them
  for (int r = 0; r < rows; r++)
    for (int v = 0; v * W<T> < cols; v++)
      store(i + r, j + v * W<T>, tile.c[r][v], std::min<int64_t>(W<T>, cols - v * W<T>));
}

// One round of loop 5: columns jc .. jc + n of the product, whose part of B is packed as panels [k][NR].
template <class S, class Epilogue>
struct ColumnBlock {
  using T = Acc<S>;
  using E = Packed<S>;
  using Tiles = Tiling<E>;
  static constexpr int64_t MR = Tiles::MR, NR = Tiles::NR, KC = Tiles::KC, kChain = Tiles::kChain;
  static constexpr int64_t kTogether = Tiles::kStripsTogether;

  int64_t M, K, jc, n;
  Matrix<S> A;
  const E* b;
  T* a_sums;  // receives the sum of every row of A, or null
  const Epilogue& epilogue;

  // Rows ic .. ic + mc and panels p0 .. p1 of B.
  struct RowBlock {
    int64_t ic, mc, p0, p1;
  };

  // Loop 3.
  void multiply(RowBlock rows) const {
    const int64_t packs = packs_of<E>(K), kc_max = std::min(packs, KC), mc = rows.mc;
    E* a = scratch<E>(Region::packed_a, round_up(mc, MR) * kc_max);
    const int64_t tiles = (rows.p1 - rows.p0) * ceil_div(mc, MR);
    Tile<E>* partial = scratch<Tile<E>>(Region::partial_tiles, packs > KC ? tiles : 0);
    T* sums = a_sums && rows.p0 == 0 ? a_sums + rows.ic : nullptr;
    if (sums) std::fill(sums, sums + mc, T(0));
    for (int64_t pc = 0; pc < std::max<int64_t>(packs, 1); pc += KC) {
      const int64_t kc = std::min(KC, packs - pc), k0 = pc * PackElement<E>::kPackK;
      pack_a(a, A.at(rows.ic, k0), mc, std::min(KC * PackElement<E>::kPackK, K - k0), kc_max);
      for (int64_t i = 0; sums && i < mc; i += MR)
        for (int64_t k = 0; k < kc; k += kChain)
          add_row_sums(sums + i, a + i * kc_max + k * MR, std::min(MR, mc - i), std::min(kChain, kc - k));
      macro_kernel(rows, pc, kc, a, partial);
    }
  }

  // Loops 2 and 1 for packs pc .. pc + kc. If the sum has more packs, its part so far stays in `partial`, tile by tile.
  void macro_kernel(RowBlock rows, int64_t pc, int64_t kc, const E* a, Tile<E>* partial) const {
    const int64_t packs = packs_of<E>(K), lda = std::min(packs, KC) * MR, panels = rows.p1 - rows.p0;
    const int64_t strips = ceil_div(rows.mc, MR), groups = ceil_div(strips, kTogether);
    const int64_t share = std::min(kChain, kc) * NR / std::max<int64_t>(strips, 1);
    // BLIS's order keeps a panel of B at hand for all strips of A. Where the sum is short, the strips are the outer
    // loop, so that C is written row by row (docs/measured.md C6).
    const bool by_rows = packs <= Tiles::kShortK;
    for (int64_t outer = 0; outer < (by_rows ? groups : panels); outer++)
      for (int64_t inner = 0; inner < (by_rows ? panels : groups); inner++) {
        const int64_t p = rows.p0 + (by_rows ? inner : outer), strip = (by_rows ? outer : inner) * kTogether;
        const int64_t together = kTogether == 1 ? 1 : std::min(kTogether, strips - strip);
        const E* panel = b + (p * packs + pc) * NR;
        // Each strip has a share of the next panel, and fetches lines into L2 from there on (docs/measured.md C21).
        const E* next = panel + (p + 1 < rows.p1 ? packs * NR : 0) + strip * share;
        Tile<E> here[kTogether], chain[kTogether], *sum = packs > KC ? partial : here;
        for (int64_t k = 0; k == 0 || k < kc; k += kChain) {
          const bool first = pc + k == 0;
          multiply_chain(together, std::min(kChain, kc - k), a + strip * lda + k * MR, lda, panel + k * NR,
                         next + k * NR, first ? sum : chain);
          for (int64_t t = 0; !first && t < together; t++) add(sum[t], chain[t]);
        }
        if (pc + KC >= packs)
          for (int64_t t = 0; t < together; t++)
            finish(sum[t], rows.ic + (strip + t) * MR, jc + p * NR, M, jc + n, epilogue);
        partial += together;
      }
  }

  // The products of some strips of A, lda apart, and a panel of B over `count` packs.
  PYGPT_INLINE static void multiply_chain(int64_t strips, int64_t count, const E* a, int64_t lda, const E* panel,
                                          const E* next, Tile<E>* tiles) {
    for (int64_t k = 0; k == 0 || (Tiles::kKRun < kChain && k < count); k += Tiles::kKRun)
      for (int64_t t = 0; t < strips; t++)
        micro_kernel<!kUsesAmx<E>>(std::min(Tiles::kKRun, count - k), a + t * lda + k * MR, panel + k * NR, NR,
                                   tiles[t].data(), NR, k > 0, next);
  }
};

// Few rows for AMX: every thread packs the columns of B that it needs, as many at a time as stay in its L2, because
// panels packed by another core arrive slowly (docs/measured.md C7). A, which is no larger, is repacked for every
// range of columns.
template <class S, class Epilogue>
void gemm_with_private_b(int64_t M, int64_t N, int64_t K, Matrix<S> A, Matrix<S> B, Acc<S>* a_sums,
                         const Epilogue& epilogue) {
  using E = Packed<S>;
  constexpr int64_t NR = Tiling<E>::NR;
  const int64_t packs = packs_of<E>(K), at_once = Tiling<E>::kBlock / std::max<int64_t>(packs, 1) / NR;
  auto columns = [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const typename PackElement<E>::TileScope tile_registers;
    for (int64_t p = begin; p < end; p += at_once) {
      const int64_t panels = std::min(at_once, end - p), jc = p * NR, n = std::min(N - jc, panels * NR);
      E* b = scratch<E>(Region::packed_b, panels * NR * packs);
      pack_b(b, B.at(0, jc), n, K);
      ColumnBlock<S, Epilogue>{M, K, jc, n, A, b, p == 0 ? a_sums : nullptr, epilogue}.multiply({0, M, 0, panels});
    }
  };
  parallel_for(ceil_div(N, NR), columns, M * NR * K);
}

// C = A B; a_sums, if not null, receives the sum of every row of A (length M).
template <class S, class Epilogue>
void packed_gemm(int64_t M, int64_t N, int64_t K, Matrix<S> A, Matrix<S> B, Acc<S>* a_sums, const Epilogue& epilogue) {
  using E = Packed<S>;
  constexpr int64_t MR = Tiling<E>::MR, NR = Tiling<E>::NR;
  const int64_t packs = packs_of<E>(K);
  if constexpr (kUsesAmx<E>)
    if (std::max(M, NR) * packs <= Tiling<E>::kBlock && ceil_div(N, NR) >= threads.count())
      return gemm_with_private_b(M, N, K, A, B, a_sums, epilogue);
  // Blocks of at most MC rows, as many as divide evenly among the threads, each of an almost equal number of strips.
  const int64_t strips = ceil_div(M, MR), mc_strips = Tiling<E>::MC(packs) / MR, nc = Tiling<E>::NC(packs);
  const int64_t blocks = std::min(strips, round_up(ceil_div(strips, mc_strips), threads.count()));
  for (int64_t jc = 0; jc < N || (jc == 0 && a_sums); jc += nc) {
    const int64_t n = std::min(nc, N - jc), panels = ceil_div(n, NR);
    E* b = scratch<E>(Region::packed_b, panels * NR * packs);
    auto pack = [&](int64_t begin, int64_t end) {
      pack_b(b + begin * NR * packs, B.at(0, jc + begin * NR), std::min(n, end * NR) - begin * NR, K);
    };
    parallel_for(panels, pack, 4 * NR * K);
    // The columns are split, too: where row blocks are fewer than threads, and into four tasks a thread, so that one
    // without a core can leave some to the others. Each split packs A for itself, which 256 columns are worth.
    const int64_t count = threads.count(), wanted = count > 1 ? 4 * count : 1;
    const int64_t splits =
        std::max<int64_t>({1, std::min(ceil_div(wanted, std::max<int64_t>(blocks, 1)), n / 256),
                           std::min(count / std::max<int64_t>(blocks, 1), std::max<int64_t>(panels, 1))});
    const ColumnBlock<S, Epilogue> column_block = {M, K, jc, n, A, b, jc == 0 ? a_sums : nullptr, epilogue};
    auto multiply = [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const typename PackElement<E>::TileScope tile_registers;
      for (int64_t task = begin; task < end; task++) {
        const int64_t block = task / splits, split = task % splits;
        const int64_t ic = strips * block / blocks * MR, end_of_rows = std::min(M, strips * (block + 1) / blocks * MR);
        column_block.multiply({ic, end_of_rows - ic, panels * split / splits, panels * (split + 1) / splits});
      }
    };
    parallel_for(blocks * splits, multiply, ceil_div(M, std::max<int64_t>(blocks, 1)) * ceil_div(n, splits) * K);
  }
}

// ---------------------------------------------------------------- BLAS's three
// C (M, N) = A (M, K) B^T, B (N, K): y = x W^T. The rows of A and of B are contiguous.
template <class S, class Epilogue>
void gemm_nt(int64_t M, int64_t N, int64_t K, Matrix<S> A, Matrix<S> B, const Epilogue& epilogue) {
  if constexpr (std::is_same_v<S, float>)
    if (is_small_m(M, N, K)) return small_m_nt(M, N, K, A, B, epilogue);
  if (M <= kGemvRows) return gemv_nt(M, N, K, A, B, epilogue);
  packed_gemm(M, N, K, A, B.transposed(), nullptr, epilogue);
}

// C (M, N) = A (M, K) B, B (K, N): dx = dy W. The rows of A and of B are contiguous.
template <class S, class Epilogue>
void gemm_nn(int64_t M, int64_t N, int64_t K, Matrix<S> A, Matrix<S> B, const Epilogue& epilogue) {
  if constexpr (std::is_same_v<S, float>)
    if (is_small_m(M, N, K)) return small_m_nn(M, N, K, A, B, epilogue);
  if (M <= kGemvRows && takes_gemv_nn<S>(N, K)) return gemv_nn(M, N, K, A, B, epilogue);
  packed_gemm(M, N, K, A, B, nullptr, epilogue);
}

// C (M, N) = A^T B, A (K, M), B (K, N): dW = dy^T x. a_sums, if not null, receives the sum of every column of A (length
// M).
template <class S, class Epilogue>
void gemm_tn(int64_t M, int64_t N, int64_t K, Matrix<S> A, Matrix<S> B, Acc<S>* a_sums, const Epilogue& epilogue) {
  packed_gemm(M, N, K, A.transposed(), B, a_sums, epilogue);
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
