// Products with a matrix W that only a few rows, or some hundred, meet: the packed GEMM's work without its packing of W.
//
// A few rows (decoding): reading W once is all the work, and packing it would triple that. So x W^T takes dot products
// straight from W's rows, and dy W adds up weighted rows. Some hundred rows: W is not packed ahead either, but goes through
// the microkernel.
#pragma once
#include "gemm.h"
#include "vmath.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

constexpr int64_t kFewRows = 16;
struct FewRows;

// What Rows rows of A are multiplied with at a time, so that registers hold the sums: kVectors of B's columns, or kColumns
// columns, which with kSet of the rows make a vector (with one row perhaps half of it).
template <int Rows, class T>
struct Few {
  static constexpr int kVectors = std::min(kRegisters / 2 / Rows, 8), kColumns = std::min(kVectors, W<T>);
  static constexpr int kSet = std::min(Rows, W<T> / kColumns);
};

// Dot products of Rows rows of a (K long, in steps, padded with zeros to whole vectors) with kColumns rows of b (the last
// of `columns` again where there are fewer): kSet x kColumns to a vector, vectors kSet apart in out. The next rows of b
// are prefetched meanwhile (8 rows, 768 -> 3072, float32: 350 us instead of 410). No Matrix is passed: GCC copies it through
// memory, in pieces that stall its reading (20 ns a call).
template <int Rows, class S, class U, class T = Acc<U>>
__attribute__((noinline)) void dots(int64_t K, const U* a, int64_t lda, const S* b, int64_t ldb, int64_t columns, T* out) {
  using F = Few<Rows, T>;
  constexpr int d = PackElement<U>::kPackK;
  Vec<T> c[Rows * F::kColumns] = {};
  auto steps = [&](int64_t s, auto load_b) {
    Vec<T> v[F::kColumns];
#pragma GCC unroll 8
    for (int64_t j = 0; j < F::kColumns; j++) {
      const S* row = b + std::min(j, columns - 1) * ldb;
      __builtin_prefetch(row + F::kColumns * ldb + s * d);
      v[j] = load_b(row + s * d);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) {
      const Vec<T> ar = no_fma(PackElement<U>::load(a + r * lda + s));  // loaded once, not with every multiplication
#pragma GCC unroll 8
      for (int j = 0; j < F::kColumns; j++) c[r * F::kColumns + j] = PackElement<U>::multiply_add(ar, v[j], c[r * F::kColumns + j]);
    }
  };
  int64_t s = 0;
  for (; (s + W<T>) * d <= K; s += W<T>) steps(s, [](const S* p) { return PackReader<U>().load_k(p); });
  if (s * d < K) steps(s, [&](const S* p) { return PackReader<U>().load_k(p, K - s * d); });
#pragma GCC unroll 8
  for (int i = 0; i < Rows; i += F::kSet) store(out + i * W<T>, transpose_sum<T, F::kSet * F::kColumns>(c + i * F::kColumns));
}

// The same for one row of a, which needs no sharing: the rows of b one after the other, as memory delivers far more in order
// than from eight places at once. (Measured in turns, one core, 768 -> 50304 with AVX2: bf16 24 GB/s instead of 10, float32 25
// instead of 17. For two rows and more it is slower, wherever W is in cache.)
template <class S, class U, class T = Acc<U>>
__attribute__((noinline)) void dots_in_order(int64_t K, const U* a, const S* b, int64_t ldb, int64_t columns, T* out) {
  constexpr int64_t d = PackElement<U>::kPackK, w = W<T>, kColumns = Few<1, T>::kColumns, kSums = 4;
  Vec<T> c[kColumns] = {};
  for (int64_t j = 0; j < std::min(kColumns, columns); j++, b += ldb) {
    Vec<T> part[kSums] = {};
    int64_t s = 0;
    for (; (s + kSums * w) * d <= K; s += kSums * w)
#pragma GCC unroll 4
      for (int64_t u = s, i = 0; i < kSums; u += w, i++)
        part[i] = PackElement<U>::multiply_add(PackElement<U>::load(a + u), PackReader<U>().load_k(b + u * d), part[i]);
    for (; s * d < K; s += w) part[0] = PackElement<U>::multiply_add(PackElement<U>::load(a + s), PackReader<U>().load_k(b + s * d, K - s * d), part[0]);
    c[j] = (part[0] + part[1]) + (part[2] + part[3]);
  }
  store(out, transpose_sum<T, kColumns>(c));
}

// C = A B^T for M <= kFewRows rows, Rows at a time; the rows of A and of B are contiguous.
template <int Rows, class S, class Epilogue>
void few_rows_transposed(int64_t M, int64_t N, int64_t K, Matrix<S> A, Matrix<S> B, const Epilogue& epilogue) {
  using T = Acc<S>;
  using U = Packed<S>;
  using F = Few<Rows, T>;
  constexpr int d = PackElement<U>::kPackK;
  const int64_t rows = round_up(M, Rows), lda = round_up(ceil_div(K, d), W<T>);
  U* a = scratch<U, FewRows>(rows * lda);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t s = 0; s < lda; s += W<T>)
      store(reinterpret_cast<T*>(a + i * lda + s), i < M ? PackReader<U>().load_k(A.data + i * A.rs + s * d, K - s * d) : Vec<T>{});
  parallel_for(ceil_div(N, W<T>), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      const int64_t j0 = block * W<T>, n = std::min<int64_t>(W<T>, N - j0);
      alignas(kVectorBytes) T c[kFewRows + 1][W<T>];  // and a vector that half of the last may reach into
      for (int64_t j = 0; j < n; j += F::kColumns)
        for (int64_t i = 0; i < rows; i += Rows) {
          const S* b = B.data + (j0 + j) * B.rs;
          T* to = &c[i][0] + j * F::kSet;
          if constexpr (Rows == 1) dots_in_order(K, a, b, B.rs, n - j, to);
          else dots<Rows>(K, a + i * lda, lda, b, B.rs, n - j, to);
        }
      for (int64_t i = 0; i < M; i += F::kSet) {
        Vec<T> set[F::kSet];
        for (int r = 0; r < F::kSet; r++) set[r] = load(c[i + r]);
        transpose<T>(set);
        for (int r = 0; r < F::kSet && i + r < M; r++) epilogue(i + r, j0, set[r], n);
      }
    }
  }, W<T> * K * M);
}

// ---------------------------------------------------------------- the microkernel for a B that is not packed
// R rows to multiply with: packed as [step][R], ...
template <int R, class U>
struct PackedRows {
  const U* a;
  PYGPT_INLINE U at(int64_t k, int r) const { return a[k * R + r]; }
};
// ... or lying ld apart. Three share a pointer: an address may add a register once or twice.
template <int R, class T>
struct StridedRows {
  const T* a[(R + 2) / 3];
  int64_t ld;
  StridedRows(const T* first, int64_t ld) : ld(ld) {
    for (int i = 0; i < (R + 2) / 3; i++) a[i] = first + 3 * i * ld;
  }
  PYGPT_INLINE T at(int64_t k, int r) const { return a[r / 3][k + r % 3 * ld]; }
};

// What is done meanwhile with each step of B: nothing, ...
struct Nothing {
  template <class S, class V>
  PYGPT_INLINE void operator()(const S*, const V*) {}
};
// ... or what lies behind it in its `depth` rows, as much again, is prefetched, ...
template <int depth, int columns>
struct PrefetchBehind {
  int64_t ld;
  template <class S, class V>
  PYGPT_INLINE void operator()(const S* b, const V*) {
    constexpr int64_t vector = kVectorBytes / int64_t(sizeof(S));
    for (int k = 0; k < depth; k++)
#pragma GCC unroll 8
      for (int64_t j = 0; j < columns; j += vector) __builtin_prefetch(b + k * ld + columns + j);
  }
};
// ... or a panel's width of each of the `rows` from `at`, a row at a time, ...
template <class T>
struct PrefetchRows {
  const T* at;
  int64_t ld, rows;
  PYGPT_INLINE void operator()(const T*, const Vec<T>*) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < NR<T>; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(at + j);
    at += --rows > 0 ? ld : 0;
  }
};
// ... and the step is left packed.
template <class T>
struct PrefetchAndPack {
  PrefetchRows<T> prefetch;
  T* packed;
  PYGPT_INLINE void operator()(const T* b, const Vec<T>* row) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(packed + v * W<T>, row[v]);
    packed += NR<T>;
    prefetch(b, row);
  }
};

// sum += A B: R rows by Vectors of columns of B's rows, ldb apart.
template <int R, int Vectors, template <int, class> class Rows, class U, class S, class Each, class T = Acc<U>>
__attribute__((noinline)) void add_tile(int64_t steps, Rows<R, U> a, const S* __restrict b, int64_t ldb, T* __restrict sum,
                                        int64_t ld, Each each) {
  Vec<T> c[R][Vectors] = {};
  for (int64_t k = 0; k < steps; k++, b += PackElement<U>::kPackK * ldb) {
    Vec<T> bv[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; v++) bv[v] = PackReader<U>().load_rows(b + v * W<T>, ldb);
    each(b, bv);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Vec<T> ar = PackElement<U>::broadcast(a.at(k, r));
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; v++) c[r][v] = PackElement<U>::multiply_add(ar, bv[v], c[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; v++) store(sum + r * ld + v * W<T>, load(sum + r * ld + v * W<T>) + c[r][v]);
}

// C = A B for M <= kFewRows rows, Rows at a time; the rows of A and of B are contiguous, those of B whole vectors. Blocks of
// B's rows are summed from zero, as in gemm.h, but of few rows, for each is a page or more of its own. (Measured, dx of 8 x
// 768 -> 3072 in float32: 0.40 ms, packed 1.22; to read W once takes 0.31.)
template <int Rows, class S, class Epilogue>
void few_rows(int64_t M, int64_t N, int64_t K, Matrix<S> A, Matrix<S> B, const Epilogue& epilogue) {
  using T = Acc<S>;
  using U = Packed<S>;
  struct Sums;
  constexpr int64_t d = PackElement<U>::kPackK, kBlock = 64, kVectors = Few<Rows, T>::kVectors;
  const int64_t rows = round_up(M, Rows), steps = K / d, apart = packs_of<U>(K);
  U* a = scratch<U, FewRows>(rows * apart);
  for (int64_t i = 0; i < M; i += Rows) pack_panel<Rows>(a + i * apart, A.at(i, 0), std::min<int64_t>(Rows, M - i), K);
  parallel_for(ceil_div(N, kVectors * W<T>), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kVectors * W<T>, n = std::min(N, end * kVectors * W<T>) - first;
    T* sum = scratch<T, Sums>(rows * n);
    std::fill(sum, sum + rows * n, T(0));
    for (int64_t s = 0; s < steps; s += kBlock)
      unroll_by<kVectors>(n / W<T>, [&](int64_t j, auto vectors) {
        for (int64_t i = 0; i < rows; i += Rows)
          add_tile<Rows, vectors.value>(std::min(kBlock, steps - s), PackedRows<Rows, U>{a + i * apart + s * Rows},
                                        B.data + s * d * B.rs + first + j * W<T>, B.rs, sum + i * n + j * W<T>, n,
                                        PrefetchBehind<d, vectors.value * W<T>>{B.rs});
      });
    for (int64_t i = 0; i < M; i++)
      for (int64_t j = 0; j < n; j += W<T>) epilogue(i, first + j, load(sum + i * n + j), int64_t(W<T>));
  }, kVectors * W<T> * K * M);
}

// f(how many rows to take at a time) for 1 .. kFewRows rows.
template <class F>
void visit_rows(int64_t M, const F& f) {
  if (M == 1) f(std::integral_constant<int, 1>());
  else if (M == 2) f(std::integral_constant<int, 2>());
  else if (kRegisters == 32 && (M - 1) % 8 >= 4) f(std::integral_constant<int, 8>());
  else f(std::integral_constant<int, 4>());
}

// ---------------------------------------------------------------- some rows
// Up to a few hundred float32 rows, packing W costs a good part of what the product does, as it goes through memory. Here
// it is read once, where it lies. x W^T is computed as (W x^T)^T, as then W's rows need only be broadcast from. In dy W
// they are vectors already, but so far apart that cache and TLB lose them: the first rows of dy leave them packed, a panel
// in L1, for the others. (Measured, 64 x 768 -> 768 on one core with AVX-512: 0.50 ms and 0.52, all packed 0.73 and 0.74;
// to read W once takes 0.1, to multiply 0.4. A small W costs nothing to pack.)
inline bool some_rows(int64_t M, int64_t N, int64_t K) { return M > kFewRows && M <= 256 && N * K >= 1 << 16; }

struct SomeRows;
struct SomeOfB;
struct SomeSums;

// C = A B^T; the rows of A and of B are contiguous.
template <class T, class Epilogue>
void some_rows_transposed(int64_t M, int64_t N, int64_t K, Matrix<T> A, Matrix<T> B, const Epilogue& epilogue) {
  constexpr int64_t MR = cpu::PYGPT_ISA::MR<T>, w = W<T>;
  constexpr int64_t kBlock = 24576 / sizeof(T) / NR<T>, kColumns = 8 * MR;  // half of L1; whole vectors
  static_assert(kColumns % w == 0);
  const int64_t rows = round_up(M, w);
  T* a = scratch<T, SomeRows>(rows * K);  // panels [step][NR], the last perhaps of one vector only
  auto in_panels = [rows](int64_t begin, int64_t end, auto f) {
    for (int64_t i = begin * NR<T>; i < std::min(rows, end * NR<T>); i += NR<T>)
      if (i + w < rows) f(i, std::integral_constant<int, NV>());
      else f(i, std::integral_constant<int, 1>());
  };
  const int64_t panels = ceil_div(rows, NR<T>);
  parallel_for(panels, [&](int64_t begin, int64_t end) {
    in_panels(begin, end, [&](int64_t i, auto vectors) {
      constexpr int P = vectors.value * w;
      pack_panel<P>(a + i * K, A.at(i, 0), std::min<int64_t>(P, M - i), K);
    });
  }, 4 * NR<T> * K);
  parallel_for(ceil_div(N, MR), [&](int64_t begin, int64_t end) {
    T* last = scratch<T, SomeOfB>(MR * kBlock);
    T* sum = scratch<T, SomeSums>(kColumns * rows);  // (columns, rows)
    const int64_t j1 = std::min(N, end * MR);
    for (int64_t j0 = begin * MR; j0 < j1; j0 += kColumns) {
      const int64_t n = std::min(kColumns, j1 - j0), whole = n / MR * MR;
      std::fill(sum, sum + kColumns * rows, T(0));
      for (int64_t k0 = 0; k0 < K; k0 += kBlock) {
        const int64_t steps = std::min(kBlock, K - k0);
        if (whole < n) pack_panel<MR>(last, B.at(j0 + whole, k0), n - whole, steps);
        in_panels(0, panels, [&](int64_t i, auto vectors) {
          constexpr int V = vectors.value;
          const T* panel = a + i * K + k0 * V * w;
          auto add = [&](int64_t j, auto from) {
            add_tile<MR, V>(steps, from, panel, V * w, sum + j * rows + i, rows, Nothing());
          };
          for (int64_t j = 0; j < whole; j += MR) add(j, StridedRows<MR, T>(&B.data[(j0 + j) * B.rs + k0], B.rs));
          if (whole < n) add(whole, PackedRows<MR, T>{last});
        });
      }
      for (int64_t i = 0; i < M; i += w) {
        alignas(kVectorBytes) T block[w][kColumns];  // of rows again
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
  }, MR * K * M);
}

// C = A B, R rows at a time; the rows of A and of B are contiguous.
template <int R, class T, class Epilogue>
void some_rows(int64_t M, int64_t N, int64_t K, Matrix<T> A, Matrix<T> B, const Epilogue& epilogue) {
  constexpr int64_t w = W<T>, kBlock = 96, kColumns = 8 * NR<T>;
  const int64_t strips = ceil_div(M, R), strip = R * K + w;  // for packing may write a vector more
  T* a = scratch<T, SomeRows>(strips * strip);
  parallel_for(strips, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++) pack_panel<R>(a + s * strip, A.at(s * R, 0), std::min<int64_t>(R, M - s * R), K);
  }, 4 * R * K);
  parallel_for(ceil_div(N, NR<T>), [&](int64_t begin, int64_t end) {
    T* panel = scratch<T, SomeOfB>(NR<T> * kBlock);
    T* sum = scratch<T, SomeSums>(strips * R * kColumns);
    const int64_t j1 = std::min<int64_t>(N, end * NR<T>);
    for (int64_t j0 = begin * NR<T>; j0 < j1; j0 += kColumns) {
      const int64_t n = std::min(kColumns, j1 - j0);
      std::fill(sum, sum + strips * R * kColumns, T(0));
      for (int64_t k0 = 0; k0 < K; k0 += kBlock)
        for (int64_t j = 0; j < n; j += NR<T>) {
          const int64_t steps = std::min(kBlock, K - k0);
          const Matrix<T> b = B.at(k0, j0 + j);
          const bool whole = n - j >= NR<T>;
          if (!whole) pack_panel<NR<T>>(panel, b.transposed(), n - j, steps);
          // Each strip prefetches its share of the next panel: all at once, they would keep the first waiting.
          const int64_t share = ceil_div(steps, strips);
          const T* next = j + NR<T> < n ? b.data + NR<T> : &B.data[(k0 + kBlock) * B.rs + j0];
          for (int64_t s = 0; s < strips; s++, next += share * B.rs) {
            const PrefetchRows<T> prefetch = {next, B.rs, share};
            const PackedRows<R, T> from = {a + s * strip + k0 * R};
            T* to = sum + s * R * kColumns + j;
            if (whole && s == 0)
              add_tile<R, NV>(steps, from, b.data, b.rs, to, kColumns, PrefetchAndPack<T>{prefetch, panel});
            else
              add_tile<R, NV>(steps, from, panel, NR<T>, to, kColumns, prefetch);
          }
        }
      for (int64_t i = 0; i < M; i++)
        for (int64_t j = 0; j < n; j += w) epilogue(i, j0 + j, load(sum + i * kColumns + j), std::min(w, n - j));
    }
  }, NR<T> * K * M);
}

// f(how many rows to take at a time) for more than kFewRows: the fewest that need no more strips.
template <int R = MR<float>, class F>
void visit_strips(int64_t M, const F& f) {
  if constexpr (R > 9)
    if (ceil_div(M, R - 1) == ceil_div(M, R)) return visit_strips<R - 1>(M, f);
  f(std::integral_constant<int, R>());
}

// y = epilogue(x W^T): rows times a weight matrix.
template <class S, class Epilogue>
void times_transposed(int64_t M, int64_t N, int64_t K, Matrix<S> x, Matrix<S> w, const Epilogue& epilogue) {
  if constexpr (std::is_same_v<S, float>)
    if (some_rows(M, N, K)) return some_rows_transposed(M, N, K, x, w, epilogue);
  if (M <= kFewRows)
    visit_rows(M, [&](auto rows) { few_rows_transposed<rows.value>(M, N, K, x, w, epilogue); });
  else
    gemm<S>(M, N, K, x, w.transposed(), nullptr, epilogue);
}

// y = epilogue(x W).
template <class S, class Epilogue>
void times(int64_t M, int64_t N, int64_t K, Matrix<S> x, Matrix<S> w, const Epilogue& epilogue) {
  if constexpr (std::is_same_v<S, float>)
    if (some_rows(M, N, K))
      return visit_strips(M, [&](auto rows) { some_rows<rows.value>(M, N, K, x, w, epilogue); });
  if (M <= kFewRows && N % W<Acc<S>> == 0 && K % PackElement<Packed<S>>::kPackK == 0)
    visit_rows(M, [&](auto rows) { few_rows<rows.value>(M, N, K, x, w, epilogue); });
  else
    gemm<S>(M, N, K, x, w, nullptr, epilogue);
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
