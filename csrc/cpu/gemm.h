// One packed GEMM for everything: C = A B with A (M, K), B (K, N), any strides, any storage type.
//
// Goto and van de Geijn's scheme (2008), as BLIS writes it: a register tile of MR x NR accumulators
// is updated by rank-1 steps k = 0..KC-1 from two packed panels,
//     A panel [k][MR]  (streams from L2)         B panel [k][NR]  (stays in L1)
// Packing converts 16-bit types, so that they run at float32 speed. A block of K is summed in
// registers from zero and then added to the sum so far: blocked summation, which is more exact than
// one long chain. B is packed once per column chunk by all threads, A block by block by the thread
// that uses it. Each element of C is computed the same way however the work is split.
//
// The result leaves through an epilogue: epilogue(i, j, c, n) gets n <= W lanes of row i from column
// j, once, after the whole sum; it adds a bias, applies an activation, stores.
#pragma once
#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

#if defined(__AVX512F__)
constexpr int MR = 14, NV = 2;
#else
constexpr int MR = 6, NV = 2;  // 16 registers
#endif
template <class T>
constexpr int NR = NV * W<T>;
constexpr int64_t KC = 384;
constexpr int64_t kStripsPerBlock = 168 / MR;  // of A, so that a block of it (168 x KC) stays in L2
constexpr int64_t kPackedB = 4 << 20;           // elements of B packed at once, more where K is above 8192

template <class T>
struct Tile {
  Vec<T> c[MR][NV];
};

// A strided operand: element (i, j) is data[i * rs + j * cs].
template <class S>
struct Matrix {
  const S* data;
  int64_t rs, cs;
  Matrix transposed() const { return {data, cs, rs}; }
  Matrix at(int64_t i, int64_t j) const { return {data + i * rs + j * cs, rs, cs}; }
};

// A B over K steps, summed from zero. Element (r, k) of A is a[r * RS + k * CS], row k of B is b + k * ldb.
// Never inlined: a caller's constants would take registers from the accumulators (measured: attention's
// backward with AVX2 lost a third that way).
template <int RS, int CS, class T>
__attribute__((noinline)) Tile<T> multiply(int64_t K, const T* __restrict a, const T* __restrict b, int64_t ldb) {
  Vec<T> c[MR][NV] = {};
  for (int64_t k = 0; k < K; k++) {
    Vec<T> bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) bv[v] = load(b + v * W<T>);
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++) {
      Vec<T> ar = set1(a[r * RS]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) c[r][v] += ar * bv[v];
    }
    a += CS;
    b += ldb;
  }
  Tile<T> tile;
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) tile.c[r][v] = c[r][v];
  return tile;
}

template <class T>
PYGPT_INLINE void add(Tile<T>& sum, const Tile<T>& tile) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) sum.c[r][v] += tile.c[r][v];
}

// dst[k][P] = scale times the P rows of A, zero beyond `rows`. May write up to a vector behind its end.
template <int P, class S>
void pack_panel(Acc<S>* __restrict dst, Matrix<S> a, int64_t rows, int64_t K, Acc<S> scale = 1) {
  using T = Acc<S>;
  constexpr int w = W<T>;
  const S* __restrict p = a.data;
  int64_t k = 0;
  if (a.rs == 1 && rows == P && (P % w == 0 || a.cs >= w)) {
    // Where P is no multiple of w, a column is read and written past its P rows: into the next one.
    for (; k + (P % w != 0) < K; k++)
#pragma GCC unroll 4
      for (int r0 = 0; r0 < P; r0 += w) store(dst + k * P + r0, load(p + k * a.cs + r0) * scale);
  } else if (a.cs == 1) {
    // Squares of w rows, the last first: what it writes past the P rows, the others then overwrite.
    for (; k + w <= K; k += w)
      for (int r0 = (P - 1) / w * w; r0 >= 0; r0 -= w) {
        Vec<T> square[w];
#pragma GCC unroll 16
        for (int r = 0; r < w; r++) square[r] = r0 + r < rows ? load(p + (r0 + r) * a.rs + k) * scale : Vec<T>{};
        transpose<T>(square);
#pragma GCC unroll 16
        for (int c = 0; c < w; c++) store(dst + (k + c) * P + r0, square[c]);
      }
  }
  for (; k < K; k++)
    for (int r = 0; r < P; r++) dst[k * P + r] = r < rows ? to_acc(p[r * a.rs + k * a.cs]) * scale : T(0);
}

// The n rows of m, P at a time: panel p holds rows p P .. as [k][P].
template <int P, class S>
void pack_rows(Acc<S>* dst, Matrix<S> m, int64_t n, int64_t K, Acc<S> scale = 1) {
  for (int64_t i = 0; i < n; i += P) pack_panel<P>(dst + i * K, m.at(i, 0), std::min<int64_t>(P, n - i), K, scale);
}

// sums[r] += row r of a packed panel, r < rows. Three levels (16, KC, all) keep the rounding small.
template <class T>
void add_row_sums(T* sums, const T* panel, int64_t rows, int64_t K) {
  T block[MR] = {};
  for (int64_t k0 = 0; k0 < K; k0 += 16) {
    T part[MR] = {};
    for (int64_t k = k0; k < std::min(K, k0 + 16); k++)
      for (int r = 0; r < MR; r++) part[r] += panel[k * MR + r];
    for (int r = 0; r < MR; r++) block[r] += part[r];
  }
  for (int64_t r = 0; r < rows; r++) sums[r] += block[r];
}

// Hands the valid part of a finished tile at (i, j) to the epilogue.
template <class T, class Epilogue>
PYGPT_INLINE void finish(const Tile<T>& tile, int64_t i, int64_t j, int64_t M, int64_t N, const Epilogue& epilogue) {
  const int64_t rows = std::min<int64_t>(MR, M - i), cols = std::min<int64_t>(NR<T>, N - j);
  for (int r = 0; r < rows; r++)
    for (int v = 0; v * W<T> < cols; v++)
      epilogue(i + r, j + v * W<T>, tile.c[r][v], std::min<int64_t>(W<T>, cols - v * W<T>));
}

struct PackedB;
struct PackedA;
struct Partial;

// A chunk of columns j0 .. j0 + n of the product, its part of B packed as panels [K][NR].
template <class S, class Epilogue>
struct Chunk {
  using T = Acc<S>;
  int64_t M, K, j0, n;
  Matrix<S> A;
  const T* b;
  T* a_sums;  // or null
  const Epilogue& epilogue;

  // Rows i0 .. i0 + rows, B panels p0 .. p1.
  void block(int64_t i0, int64_t rows, int64_t p0, int64_t p1) const {
    T* a = scratch<T, PackedA>(round_up(rows, MR) * KC);
    Tile<T>* partial = scratch<Tile<T>, Partial>((p1 - p0) * ceil_div(rows, MR));
    const bool sums = a_sums && p0 == 0;
    if (sums) std::fill(a_sums + i0, a_sums + i0 + rows, T(0));
    for (int64_t k0 = 0; k0 < std::max<int64_t>(K, 1); k0 += KC) {
      const int64_t k = std::min(KC, K - k0);
      const bool last = k0 + KC >= K;
      for (int64_t i = 0; i < rows; i += MR) {
        pack_panel<MR>(a + i * KC, A.at(i0 + i, k0), std::min<int64_t>(MR, rows - i), k);
        if (sums) add_row_sums(a_sums + i0 + i, a + i * KC, std::min<int64_t>(MR, rows - i), k);
      }
      Tile<T>* sofar = partial;
      for (int64_t p = p0; p < p1; p++)
        for (int64_t i = 0; i < rows; i += MR, sofar++) {
          Tile<T> tile = multiply<1, MR>(k, a + i * KC, b + (p * K + k0) * NR<T>, NR<T>);
          if (k0 > 0) add(tile, *sofar);
          if (last)
            finish(tile, i0 + i, j0 + p * NR<T>, M, j0 + n, epilogue);
          else
            *sofar = tile;
        }
    }
  }
};

// C = A B; a_sums, if not null, receives the sum of every row of A (length M).
template <class S, class Epilogue>
void gemm(int64_t M, int64_t N, int64_t K, Matrix<S> A, Matrix<S> B, Acc<S>* a_sums, const Epilogue& epilogue) {
  using T = Acc<S>;
  // As many row blocks as divide evenly among the threads, each of an almost equal number of strips.
  const int64_t strips = ceil_div(M, MR), blocks = std::min(strips, round_up(ceil_div(strips, kStripsPerBlock), threads.count()));
  const int64_t columns = std::max<int64_t>(512, kPackedB / std::max<int64_t>(K, 1)) / NR<T> * NR<T>;
  for (int64_t j0 = 0; j0 < N || (j0 == 0 && a_sums); j0 += columns) {
    const int64_t n = std::min(columns, N - j0), panels = ceil_div(n, NR<T>);
    T* b = scratch<T, PackedB>(panels * NR<T> * K);
    parallel_for(
        panels,
        [&](int64_t begin, int64_t end) {
          const Matrix<S> part = B.at(0, j0 + begin * NR<T>).transposed();
          pack_rows<NR<T>>(b + begin * NR<T> * K, part, std::min(n, end * NR<T>) - begin * NR<T>, K);
        },
        4 * NR<T> * K);
    // Where row blocks are fewer than threads, the columns are split too; each part packs A for itself.
    const int64_t splits = std::clamp<int64_t>(threads.count() / std::max<int64_t>(blocks, 1), 1, std::max<int64_t>(panels, 1));
    const Chunk<S, Epilogue> chunk = {M, K, j0, n, A, b, j0 == 0 ? a_sums : nullptr, epilogue};
    parallel_for(
        blocks * splits,
        [&](int64_t begin, int64_t end) {
          for (int64_t task = begin; task < end; task++) {
            const int64_t block = task / splits, split = task % splits;
            const int64_t i0 = strips * block / blocks * MR, i1 = std::min(M, strips * (block + 1) / blocks * MR);
            chunk.block(i0, i1 - i0, panels * split / splits, panels * (split + 1) / splits);
          }
        },
        ceil_div(M, std::max<int64_t>(blocks, 1)) * ceil_div(n, splits) * K);
  }
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
