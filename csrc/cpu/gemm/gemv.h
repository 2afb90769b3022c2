// Products of at most 16 rows (decoding) with a matrix W: reading W once is all the work, and packing it would triple
// that.
//
//     gemv_nt   y = x W^T     dot products of rows of x with rows of W, both read along K
//     gemv_nn   dx = dy W     weighted sums of rows of W
//
// Rows of A are taken kRows at a time, so that the sums of a tile of C fill half of the registers.
#pragma once
#include "../arena.h"
#include "../vmath.h"
#include "pack.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

constexpr int64_t kGemvRows = 16;

// The tile of C for kRows rows of A: kVectors vectors of columns (gemv_nn) or kColumns columns (gemv_nt). Of the
// latter's sums, kRowsTogether rows share a vector, of which one row alone may fill only a half.
template <int kRows, class T>
struct GemvTile {
  static constexpr int kVectors = std::min(kRegisters / 2 / kRows, 8), kColumns = std::min(kVectors, W<T>);
  static constexpr int kRowsTogether = std::min(kRows, W<T> / kColumns);
};

// f(how many rows of A to take at a time), a compile-time constant, for M <= kGemvRows.
template <class F>
void visit_gemv_rows(int64_t M, const F& f) {
  if (M == 1) f(std::integral_constant<int, 1>());
  else if (M == 2) f(std::integral_constant<int, 2>());
  else if (kRegisters == 32 && (M - 1) % 8 >= 4) f(std::integral_constant<int, 8>());
  else f(std::integral_constant<int, 4>());
}

// ---------------------------------------------------------------- y = x W^T
// Dot products of kRows rows of a (lda packs apart, padded with zeros to whole vectors) with kColumns rows of b (the
// last of `columns` again where there are fewer). Each kRowsTogether rows of a give a vector of out; such vectors lie
// kRowsTogether vectors apart. Prefetches the next rows of b (docs/measured.md C8). It takes no Matrix, which GCC would
// copy through memory in pieces that stall its reading (docs/measured.md C9).
template <int kRows, class S, class E, class T = Acc<E>>
__attribute__((noinline)) void dot_tile(int64_t K, const E* a, int64_t lda, const S* b, int64_t ldb, int64_t columns,
                                        T* out) {
  using Gemv = GemvTile<kRows, T>;
  constexpr int d = PackElement<E>::kPackK, w = W<T>;
  Vec<T> c[kRows * Gemv::kColumns] = {};
  auto add_packs = [&](int64_t k, auto load_b) {
    Vec<T> v[Gemv::kColumns];
#pragma GCC unroll 8
    for (int64_t j = 0; j < Gemv::kColumns; j++) {
      const S* row = b + std::min(j, columns - 1) * ldb;
      __builtin_prefetch(row + Gemv::kColumns * ldb + k * d);
      v[j] = load_b(row + k * d);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const Vec<T> ar = no_fma(PackElement<E>::load(a + r * lda + k));  // loaded once, not with every multiplication
#pragma GCC unroll 8
      for (int j = 0; j < Gemv::kColumns; j++)
        c[r * Gemv::kColumns + j] = PackElement<E>::multiply_add(ar, v[j], c[r * Gemv::kColumns + j]);
    }
  };
  int64_t k = 0;
  for (; (k + w) * d <= K; k += w) add_packs(k, [](const S* p) { return PackReader<E>().load_k(p); });
  if (k * d < K) add_packs(k, [&](const S* p) { return PackReader<E>().load_k(p, K - k * d); });
#pragma GCC unroll 8
  for (int i = 0; i < kRows; i += Gemv::kRowsTogether)
    store(out + i * W<T>, transpose_sum<T, Gemv::kRowsTogether * Gemv::kColumns>(c + i * Gemv::kColumns));
}

// The same for a single row of a, one row of b after the other: memory delivers far more in order than from eight
// places at once. Two rows of a and more are faster with dot_tile wherever W is in cache (docs/measured.md C10).
template <class S, class E, class T = Acc<E>>
__attribute__((noinline)) void dot_row(int64_t K, const E* a, const S* b, int64_t ldb, int64_t columns, T* out) {
  constexpr int64_t d = PackElement<E>::kPackK, w = W<T>, kColumns = GemvTile<1, T>::kColumns, kSums = 4;
  Vec<T> c[kColumns] = {};
  for (int64_t j = 0; j < std::min(kColumns, columns); j++, b += ldb) {
    Vec<T> part[kSums] = {};
    int64_t k = 0;
    for (; (k + kSums * w) * d <= K; k += kSums * w)
#pragma GCC unroll 4
      for (int64_t u = k, i = 0; i < kSums; u += w, i++)
        part[i] = PackElement<E>::multiply_add(PackElement<E>::load(a + u), PackReader<E>().load_k(b + u * d), part[i]);
    for (; k * d < K; k += w)
      part[0] = PackElement<E>::multiply_add(PackElement<E>::load(a + k), PackReader<E>().load_k(b + k * d, K - k * d),
                                             part[0]);
    c[j] = (part[0] + part[1]) + (part[2] + part[3]);
  }
  store(out, transpose_sum<T, kColumns>(c));
}

template <int kRows, class S, class Epilogue>
void gemv_nt_rows(int64_t M, int64_t N, int64_t K, Matrix<S> A, Matrix<S> B, const Epilogue& epilogue) {
  using T = Acc<S>;
  using E = Packed<S>;
  using Gemv = GemvTile<kRows, T>;
  constexpr int d = PackElement<E>::kPackK;
  const int64_t rows = round_up(M, kRows), lda = round_up(ceil_div(K, d), W<T>);
  E* a = scratch<E>(Region::packed_a, rows * lda);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t k = 0; k < lda; k += W<T>) {
      const S* from = A.data + i * A.rs + k * d;
      store(reinterpret_cast<T*>(a + i * lda + k), i < M ? PackReader<E>().load_k(from, K - k * d) : Vec<T>{});
    }
  // A task computes W columns of C.
  auto columns = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t j0 = task * W<T>, n = std::min<int64_t>(W<T>, N - j0);
      alignas(kVectorBytes) T c[kGemvRows + 1][W<T>];  // and a vector that half of the last may reach into
      for (int64_t j = 0; j < n; j += Gemv::kColumns)
        for (int64_t i = 0; i < rows; i += kRows) {
          const S* b = B.data + (j0 + j) * B.rs;
          T* to = &c[i][0] + j * Gemv::kRowsTogether;
          if constexpr (kRows == 1) dot_row(K, a, b, B.rs, n - j, to);
          else dot_tile<kRows>(K, a + i * lda, lda, b, B.rs, n - j, to);
        }
      for (int64_t i = 0; i < M; i += Gemv::kRowsTogether) {
        Vec<T> rows_together[Gemv::kRowsTogether];
        for (int r = 0; r < Gemv::kRowsTogether; r++) rows_together[r] = load(c[i + r]);
        transpose<T>(rows_together);
        for (int r = 0; r < Gemv::kRowsTogether && i + r < M; r++) epilogue(i + r, j0, rows_together[r], n);
      }
    }
  };
  parallel_for(ceil_div(N, W<T>), columns, W<T> * K * M);
}

// C = A B^T for M <= kGemvRows; the rows of A and of B are contiguous.
template <class S, class Epilogue>
void gemv_nt(int64_t M, int64_t N, int64_t K, Matrix<S> A, Matrix<S> B, const Epilogue& epilogue) {
  visit_gemv_rows(M, [&](auto rows) { gemv_nt_rows<rows.value>(M, N, K, A, B, epilogue); });
}

// ---------------------------------------------------------------- dx = dy W
template <int kRows, class S, class Epilogue>
void gemv_nn_rows(int64_t M, int64_t N, int64_t K, Matrix<S> A, Matrix<S> B, const Epilogue& epilogue) {
  using T = Acc<S>;
  using E = Packed<S>;
  constexpr int64_t d = PackElement<E>::kPackK, kVectors = GemvTile<kRows, T>::kVectors, kColumns = kVectors * W<T>;
  // A shorter sum than in gemm.h, as every row of B is a page or more of its own (docs/measured.md C11).
  constexpr int64_t KC = 64;
  const int64_t rows = round_up(M, kRows), packs = K / d, lda = packs_of<E>(K);
  E* a = scratch<E>(Region::packed_a, rows * lda);
  for (int64_t i = 0; i < M; i += kRows) pack_panel<kRows>(a + i * lda, A.at(i, 0), std::min<int64_t>(kRows, M - i), K);
  // A task computes kColumns columns of C, and a range of tasks all of its columns together.
  auto columns = [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kColumns, n = std::min(N, end * kColumns) - first;
    T* sum = scratch<T>(Region::sums, rows * n);
    std::fill(sum, sum + rows * n, T(0));
    for (int64_t k = 0; k < packs; k += KC)
      unroll_by<kVectors>(n / W<T>, [&](int64_t v, auto vectors) {
        constexpr int V = vectors.value;
        const PrefetchNextTile<d, V * W<T>> prefetch = {B.rs};
        const S* b = B.data + k * d * B.rs + first + v * W<T>;
        for (int64_t i = 0; i < rows; i += kRows) {
          const PackedRows<kRows, E> from = {a + i * lda + k * kRows};
          micro_kernel_unpacked<kRows, V>(std::min(KC, packs - k), from, b, B.rs, sum + i * n + v * W<T>, n, prefetch);
        }
      });
    for (int64_t i = 0; i < M; i++)
      for (int64_t j = 0; j < n; j += W<T>) epilogue(i, first + j, load(sum + i * n + j), int64_t(W<T>));
  };
  parallel_for(ceil_div(N, kColumns), columns, kColumns * K * M);
}

// C = A B for M <= kGemvRows; the rows of A and of B are contiguous, and N and K are whole vectors and packs.
template <class S, class Epilogue>
void gemv_nn(int64_t M, int64_t N, int64_t K, Matrix<S> A, Matrix<S> B, const Epilogue& epilogue) {
  visit_gemv_rows(M, [&](auto rows) { gemv_nn_rows<rows.value>(M, N, K, A, B, epilogue); });
}
template <class S>
bool takes_gemv_nn(int64_t N, int64_t K) {
  return N % W<Acc<S>> == 0 && K % PackElement<Packed<S>>::kPackK == 0;
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
