// float32 products of 17 to 256 rows with a matrix W of 64 Ki values or more: W is read once, where it lies, because
// packing it would take a good part of the time (docs/measured.md C12). A smaller W costs nothing to pack.
//
//     small_m_nt   y = x W^T    computed as (W x^T)^T, as then W's rows need only be broadcast from
//     small_m_nn   dx = dy W    W's rows are vectors already, but so far apart that cache and TLB lose them: the first
//                               strip of dy leaves them packed for the other strips, a panel in L1
//
// Both pack x or dy once, by all threads, and hold the sums of eight panels of columns in scratch memory.
#pragma once
#include "../arena.h"
#include "pack.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

inline bool is_small_m(int64_t M, int64_t N, int64_t K) { return M > 16 && M <= 256 && N * K >= 1 << 16; }

// ---------------------------------------------------------------- y = x W^T
// Hands rows of C to the epilogue: columns j0 .. j0 + n of M rows, whose transpose is sum (kColumns, rows).
template <int64_t kColumns, class T, class Epilogue>
void finish_transposed(const T* sum, int64_t M, int64_t rows, int64_t j0, int64_t n, const Epilogue& epilogue) {
  constexpr int64_t w = W<T>;
  for (int64_t i = 0; i < M; i += w) {
    alignas(kVectorBytes) T block[w][kColumns];
    for (int64_t j = 0; j < n; j += w) {
      Vec<T> square[w];
#pragma GCC unroll 16
      for (int c = 0; c < w; c++) square[c] = load(sum + (j + c) * rows + i);
      transpose<T>(square);
#pragma GCC unroll 16
      for (int r = 0; r < w; r++) store(&block[r][j], square[r]);
    }
    for (int64_t r = 0; r < std::min(w, M - i); r++)
      for (int64_t j = 0; j < n; j += w) epilogue(i + r, j0 + j, load(&block[r][j]), std::min(w, n - j));
  }
}

// C = A B^T; the rows of A and of B are contiguous.
template <class T, class Epilogue>
void small_m_nt(int64_t M, int64_t N, int64_t K, Matrix<T> A, Matrix<T> B, const Epilogue& epilogue) {
  constexpr int64_t MR = Tiling<T>::MR, NR = Tiling<T>::NR, w = W<T>;
  constexpr int64_t KC = kL1Bytes / 2 / int64_t(sizeof(T)) / NR;  // a panel of A takes half of L1
  constexpr int64_t kColumns = 8 * MR;
  static_assert(kColumns % w == 0);
  const int64_t rows = round_up(M, w), panels = ceil_div(rows, NR);
  T* a = scratch<T>(Region::packed_a, rows * K);  // panels [k][NR], the last perhaps of one vector only
  // f(row, vectors) for each panel begin .. end of A.
  auto for_panels = [rows](int64_t begin, int64_t end, auto f) {
    for (int64_t i = begin * NR; i < std::min(rows, end * NR); i += NR)
      if (i + w < rows) f(i, std::integral_constant<int, NV>());
      else f(i, std::integral_constant<int, 1>());
  };
  auto pack = [&](int64_t begin, int64_t end) {
    for_panels(begin, end, [&](int64_t i, auto vectors) {
      constexpr int P = vectors.value * w;
      pack_panel<P>(a + i * K, A.at(i, 0), std::min<int64_t>(P, M - i), K);
    });
  };
  parallel_for(panels, pack, 4 * NR * K);

  // A task computes MR columns of C.
  auto columns = [&](int64_t begin, int64_t end) {
    T* last = scratch<T>(Region::b_panel, MR * KC);  // rows of B fewer than MR, packed
    T* sum = scratch<T>(Region::sums, kColumns * rows);
    const int64_t j1 = std::min(N, end * MR);
    for (int64_t j0 = begin * MR; j0 < j1; j0 += kColumns) {
      const int64_t n = std::min(kColumns, j1 - j0), whole = n / MR * MR;
      std::fill(sum, sum + kColumns * rows, T(0));
      for (int64_t pc = 0; pc < K; pc += KC) {
        const int64_t kc = std::min(KC, K - pc);
        if (whole < n) pack_panel<MR>(last, B.at(j0 + whole, pc), n - whole, kc);
        for_panels(0, panels, [&](int64_t i, auto vectors) {
          constexpr int V = vectors.value;
          const T* panel = a + i * K + pc * V * w;
          auto multiply = [&](int64_t j, auto b) {
            micro_kernel_unpacked<MR, V>(kc, b, panel, V * w, sum + j * rows + i, rows, NoPrefetch());
          };
          for (int64_t j = 0; j < whole; j += MR) multiply(j, StridedRows<MR, T>(&B.data[(j0 + j) * B.rs + pc], B.rs));
          if (whole < n) multiply(whole, PackedRows<MR, T>{last});
        });
      }
      finish_transposed<kColumns>(sum, M, rows, j0, n, epilogue);
    }
  };
  parallel_for(ceil_div(N, MR), columns, MR * K * M);
}

// ---------------------------------------------------------------- dx = dy W
template <int kRows, class T, class Epilogue>
void small_m_nn_rows(int64_t M, int64_t N, int64_t K, Matrix<T> A, Matrix<T> B, const Epilogue& epilogue) {
  constexpr int64_t NR = Tiling<T>::NR, w = W<T>, KC = 96, kColumns = 8 * NR;
  const int64_t strips = ceil_div(M, kRows), strip_size = kRows * K + w;  // packing may write a vector more
  T* a = scratch<T>(Region::packed_a, strips * strip_size);
  auto pack = [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++)
      pack_panel<kRows>(a + s * strip_size, A.at(s * kRows, 0), std::min<int64_t>(kRows, M - s * kRows), K);
  };
  parallel_for(strips, pack, 4 * kRows * K);

  // A task computes NR columns of C.
  auto columns = [&](int64_t begin, int64_t end) {
    T* panel = scratch<T>(Region::b_panel, NR * KC);
    T* sum = scratch<T>(Region::sums, strips * kRows * kColumns);
    const int64_t j1 = std::min<int64_t>(N, end * NR);
    for (int64_t j0 = begin * NR; j0 < j1; j0 += kColumns) {
      const int64_t n = std::min(kColumns, j1 - j0);
      std::fill(sum, sum + strips * kRows * kColumns, T(0));
      for (int64_t pc = 0; pc < K; pc += KC)
        for (int64_t j = 0; j < n; j += NR) {
          const int64_t kc = std::min(KC, K - pc);
          const Matrix<T> b = B.at(pc, j0 + j);
          const bool whole = n - j >= NR;
          if (!whole) pack_panel<NR>(panel, b.transposed(), n - j, kc);
          // Each strip prefetches its share of the next panel: all at once, they would keep the first waiting.
          const int64_t share = ceil_div(kc, strips);
          const T* next = j + NR < n ? b.data + NR : &B.data[(pc + KC) * B.rs + j0];
          for (int64_t s = 0; s < strips; s++, next += share * B.rs) {
            const PrefetchRows<T> prefetch = {next, B.rs, share};
            const PackedRows<kRows, T> from = {a + s * strip_size + pc * kRows};
            T* to = sum + s * kRows * kColumns + j;
            if (whole && s == 0)
              micro_kernel_unpacked<kRows, NV>(kc, from, b.data, b.rs, to, kColumns,
                                               PrefetchAndPack<T>{prefetch, panel});
            else micro_kernel_unpacked<kRows, NV>(kc, from, panel, NR, to, kColumns, prefetch);
          }
        }
      for (int64_t i = 0; i < M; i++)
        for (int64_t j = 0; j < n; j += w) epilogue(i, j0 + j, load(sum + i * kColumns + j), std::min(w, n - j));
    }
  };
  parallel_for(ceil_div(N, NR), columns, NR * K * M);
}

// C = A B; the rows of A and of B are contiguous. The rows of A are taken in as few strips as MR allows, and as evenly
// as possible, so that the last strip is not mostly padding. More than 16 rows are strips of at least 9.
template <class T, class Epilogue>
void small_m_nn(int64_t M, int64_t N, int64_t K, Matrix<T> A, Matrix<T> B, const Epilogue& epilogue) {
  constexpr int MR = Tiling<T>::MR;
  auto run = [&](auto rows) { small_m_nn_rows<rows.value>(M, N, K, A, B, epilogue); };
  if constexpr (MR == 14) {
    switch (ceil_div(M, ceil_div(M, MR))) {
      case 9: return run(std::integral_constant<int, 9>());
      case 10: return run(std::integral_constant<int, 10>());
      case 11: return run(std::integral_constant<int, 11>());
      case 12: return run(std::integral_constant<int, 12>());
      case 13: return run(std::integral_constant<int, 13>());
    }
  }
  run(std::integral_constant<int, MR>());
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
