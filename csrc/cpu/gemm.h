// One packed GEMM for everything: C = A B with A (M, K), B (K, N), any strides, any storage type.
//
// Goto and van de Geijn's scheme (2008), as BLIS writes it: a register tile of MR x NR accumulators
// is updated by rank-1 steps k = 0..KC-1 from two packed panels,
//     A panel [k][MR]  (streams from L2)         B panel [k][NR]  (stays in L1)
// Packing converts 16-bit types, so that they run at float32 speed; where the machine multiplies pairs
// of bf16, a step takes two neighbours along k at once, at twice that speed, and with AMX (amx.h) sixteen
// steps are one instruction. A block of K is summed in registers from zero and then added to the sum so
// far: blocked summation, which is more exact than one long chain. B is packed once per column chunk by
// all threads, A block by block by the thread that uses it (with few rows, B too). Each element of C is
// computed the same way however the work is split.
//
// The result leaves through an epilogue: epilogue(i, j, c, n) gets n <= W lanes of row i from column
// j, once, after the whole sum; it adds a bias, applies an activation, stores.
#pragma once
#include <algorithm>
#include <type_traits>

#include "pack.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

// body(i, how many) for i = 0 .. n - 1, N at a time and the rest one by one.
template <int N, class F>
PYGPT_INLINE void unroll_by(int64_t n, const F& body) {
  int64_t i = 0;
  for (; i + N <= n; i += N) body(i, std::integral_constant<int, N>());
  for (; i < n; i++) body(i, std::integral_constant<int, 1>());
}

// ---------------------------------------------------------------- the register tile
template <class E>
constexpr int64_t KC = kUsesAmx<E> ? 768 : 384;  // steps
template <class E>
constexpr int64_t kBlock = kUsesAmx<E> ? 1 << 18 : 168 * KC<E>;  // steps of A, or of B, that stay in L2
template <class E>
constexpr int64_t kShort = kUsesAmx<E> ? 32 : 256;  // steps, of which as much of B is packed as half of L2 holds
// AMX multiplies faster than L2 delivers: shorter runs of a panel of B stay in L1 for as many strips of A as have their sums
// there too. (Measured, 4096 x 768 -> 3072 without its results: 1100 GFLOP/s by whole panels, 1500 by runs.)
template <class E>
constexpr int64_t kRun = kUsesAmx<E> ? 128 : KC<E>;
template <class E>
constexpr int64_t kTogether = kUsesAmx<E> ? 8 : 1;
constexpr int64_t kPackedB = 4 << 20;  // steps of B packed at once; more where K is above 8192, for at least 512 columns (192: 4 to 8 % slower)

template <class E>
struct Tile {
  using T = Acc<E>;
  Vec<T> c[MR<E>][NV];
  T* data() { return reinterpret_cast<T*>(c); }  // rows of NR
};

// ---------------------------------------------------------------- the microkernel
// MR rows of out, ldo apart, = A B over K steps, summed from zero, or onto what is there (AMX only). Row r of A is a + r * RS,
// its groups of steps are GS apart; step k of B's columns is b + k * ldb. Never inlined: a caller's constants would take
// registers from the accumulators (measured: attention's backward with AVX2 lost a third that way).
template <int RS, int GS, class E, class T = Acc<E>>
__attribute__((noinline)) void multiply(int64_t K, const E* __restrict a, const E* __restrict b, int64_t ldb, T* out,
                                        int64_t ldo, [[maybe_unused]] bool onto = false) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<E, BF16Pair>) return multiply_tiles(K, &a->bits, RS, GS, &b->bits, ldb, out, ldo, onto);
#endif
  Vec<T> c[MR<E>][NV] = {};
  for (int64_t k = 0; k < K; k++) {
    Vec<T> bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) bv[v] = PackElement<E>::load(b + v * W<T>);
#pragma GCC unroll 16
    for (int r = 0; r < MR<E>; r++) {
      const Vec<T> ar = PackElement<E>::broadcast(a[r * RS]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) c[r][v] = PackElement<E>::multiply_add(ar, bv[v], c[r][v]);
    }
    a += GS;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR<E>; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(out + r * ldo + v * W<T>, c[r][v]);
}
// The same for a packed panel of A.
template <class E, class T = Acc<E>>
PYGPT_INLINE void multiply_panels(int64_t K, const E* a, const E* b, int64_t ldb, T* out, int64_t ldo, bool onto = false) {
  multiply<PackElement<E>::kTileK, MR<E> * PackElement<E>::kTileK>(K, a, b, ldb, out, ldo, onto);
}

template <class E, class T = Acc<E>>
PYGPT_INLINE void add(T* sum, int64_t ld, const Tile<E>& tile) {
#pragma GCC unroll 16
  for (int r = 0; r < MR<E>; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(sum + r * ld + v * W<T>, load(sum + r * ld + v * W<T>) + tile.c[r][v]);
}
template <class E>
PYGPT_INLINE void add(Tile<E>& sum, const Tile<E>& tile) {
  add(sum.data(), NR<Acc<E>>, tile);
}

// sum += A B.
template <int RS, int GS, class E, class T = Acc<E>>
PYGPT_INLINE void add_product(Tile<E>& sum, int64_t K, const E* a, const E* b, int64_t ldb) {
  Tile<E> product;
  multiply<RS, GS>(K, a, b, ldb, product.data(), NR<T>);
  add(sum, product);
}

// Hands the valid part of a finished tile at (i, j) to the epilogue.
template <class E, class Epilogue>
PYGPT_INLINE void finish(const Tile<E>& tile, int64_t i, int64_t j, int64_t M, int64_t N, const Epilogue& epilogue) {
  using T = Acc<E>;
  const int64_t rows = std::min<int64_t>(MR<E>, M - i), cols = std::min<int64_t>(NR<T>, N - j);
  for (int r = 0; r < rows; r++)
    for (int v = 0; v * W<T> < cols; v++)
      epilogue(i + r, j + v * W<T>, tile.c[r][v], std::min<int64_t>(W<T>, cols - v * W<T>));
}

struct PackedB;
struct PackedA;
struct Partial;

// A chunk of columns j0 .. j0 + n of the product, its part of B packed as panels [step][NR].
template <class S, class Epilogue>
struct Chunk {
  using T = Acc<S>;
  using E = Packed<S>;
  static constexpr int64_t kPackK = PackElement<E>::kPackK, kRows = MR<E>, kTogether = cpu::PYGPT_ISA::kTogether<E>;
  static constexpr int64_t KC = cpu::PYGPT_ISA::KC<E>;
  int64_t M, K, j0, n;
  Matrix<S> A;
  const E* b;
  T* a_sums;  // or null
  const Epilogue& epilogue;

  // Rows i0 .. i0 + rows, B panels p0 .. p1.
  void block(int64_t i0, int64_t rows, int64_t p0, int64_t p1) const {
    const int64_t steps = packs_of<E>(K), most = std::min(steps, KC);
    E* a = scratch<E, PackedA>(round_up(rows, kRows) * most);
    Tile<E>* partial = scratch<Tile<E>, Partial>(steps > KC ? (p1 - p0) * ceil_div(rows, kRows) : 0);
    const bool sums = a_sums && p0 == 0;
    if (sums) std::fill(a_sums + i0, a_sums + i0 + rows, T(0));
    // A panel of B stays in L1 for all strips of A; but where K is short, writing C is what takes time, and C goes by rows
    // (measured, dW of 8 rows, 768 -> 3072 in float32: 0.52 ms instead of 0.78; of 64: 2.0, 3.6).
    const bool by_rows = steps <= kShort<E>;
    for (int64_t s0 = 0; s0 < std::max<int64_t>(steps, 1); s0 += KC) {
      const int64_t n_steps = std::min(KC, steps - s0), k0 = s0 * kPackK;
      const bool last = s0 + KC >= steps;
      for (int64_t i = 0; i < rows; i += kRows) {
        const int64_t strip = std::min(kRows, rows - i);
        pack_left(a + i * most, A.at(i0 + i, k0), strip, std::min(KC * kPackK, K - k0));
        if (sums) add_row_sums(a_sums + i0 + i, a + i * most, strip, n_steps);
      }
      Tile<E>* sofar = partial;
      const int64_t strips = ceil_div(rows, kRows), sets = ceil_div(strips, kTogether), panels = p1 - p0;
      for (int64_t u = 0; u < (by_rows ? sets : panels); u++)
        for (int64_t v = 0; v < (by_rows ? panels : sets); v++) {
          const int64_t p = p0 + (by_rows ? v : u), strip = (by_rows ? u : v) * kTogether;
          const int64_t together = kTogether == 1 ? 1 : std::min(kTogether, strips - strip);
          Tile<E> more[kTogether], *tiles = s0 == 0 && !last ? sofar : more;
          for (int64_t k = 0; k == 0 || (kRun<E> < KC && k < n_steps); k += kRun<E>)
            for (int64_t t = 0; t < together; t++)
              multiply_panels(std::min(kRun<E>, n_steps - k), a + (strip + t) * kRows * most + k * kRows,
                              b + (p * steps + s0 + k) * NR<T>, NR<T>, tiles[t].data(), NR<T>, k > 0);
          for (int64_t t = 0; t < together; t++, sofar++) {
            if (s0 > 0) last ? add(more[t], *sofar) : add(*sofar, more[t]);
            if (last) finish(more[t], i0 + (strip + t) * kRows, j0 + p * NR<T>, M, j0 + n, epilogue);
          }
        }
    }
  }
};

// C = A B; a_sums, if not null, receives the sum of every row of A (length M).
template <class S, class Epilogue>
void gemm(int64_t M, int64_t N, int64_t K, Matrix<S> A, Matrix<S> B, Acc<S>* a_sums, const Epilogue& epilogue) {
  using T = Acc<S>;
  using E = Packed<S>;
  const int64_t steps = packs_of<E>(K);
  // Few rows for AMX: columns of B are better packed by the core that needs them, as many as stay in its L2 (another core's
  // arrive slowly: measured, 64 x 768 -> 768 on two, 0.09 ms instead of 0.17); each time A, no more of it, is packed too.
  const int64_t at_once = kBlock<E> / std::max<int64_t>(steps, 1) / NR<T>, all_panels = ceil_div(N, NR<T>);
  if (kUsesAmx<E> && M * steps <= kBlock<E> && at_once > 0 && all_panels >= threads.count()) {
    parallel_for(
        all_panels,
        [&](int64_t begin, int64_t end) {
          [[maybe_unused]] const typename PackElement<E>::TileScope held;
          for (int64_t p = begin; p < end; p += at_once) {
            const int64_t panels = std::min(at_once, end - p), j0 = p * NR<T>, n = std::min(N - j0, panels * NR<T>);
            E* b = scratch<E, PackedB>(panels * NR<T> * steps);
            pack_columns(b, B.at(0, j0).transposed(), n, K);
            Chunk<S, Epilogue>{M, K, j0, n, A, b, p == 0 ? a_sums : nullptr, epilogue}.block(0, M, 0, panels);
          }
        },
        M * NR<T> * K);
    return;
  }
  // As many row blocks as divide evenly among the threads, each of an almost equal number of strips.
  const int64_t strips = ceil_div(M, MR<E>), strips_in_l2 = kBlock<E> / std::clamp(steps, KC<E> / 4, KC<E>) / MR<E>;
  const int64_t blocks = std::min(strips, round_up(ceil_div(strips, strips_in_l2), threads.count()));
  const int64_t packed = steps <= kShort<E> ? (1 << 20) / sizeof(E) : kPackedB;
  const int64_t columns = std::max<int64_t>(512, packed / std::max<int64_t>(steps, 1)) / NR<T> * NR<T>;
  for (int64_t j0 = 0; j0 < N || (j0 == 0 && a_sums); j0 += columns) {
    const int64_t n = std::min(columns, N - j0), panels = ceil_div(n, NR<T>);
    E* b = scratch<E, PackedB>(panels * NR<T> * steps);
    parallel_for(
        panels,
        [&](int64_t begin, int64_t end) {
          const Matrix<S> part = B.at(0, j0 + begin * NR<T>).transposed();
          pack_columns(b + begin * NR<T> * steps, part, std::min(n, end * NR<T>) - begin * NR<T>, K);
        },
        4 * NR<T> * K);
    // Where row blocks are fewer than threads, the columns are split too; each part packs A for itself.
    const int64_t splits = std::clamp<int64_t>(threads.count() / std::max<int64_t>(blocks, 1), 1, std::max<int64_t>(panels, 1));
    const Chunk<S, Epilogue> chunk = {M, K, j0, n, A, b, j0 == 0 ? a_sums : nullptr, epilogue};
    parallel_for(
        blocks * splits,
        [&](int64_t begin, int64_t end) {
          [[maybe_unused]] const typename PackElement<E>::TileScope held;
          for (int64_t task = begin; task < end; task++) {
            const int64_t block = task / splits, split = task % splits;
            const int64_t i0 = strips * block / blocks * MR<E>, i1 = std::min(M, strips * (block + 1) / blocks * MR<E>);
            chunk.block(i0, i1 - i0, panels * split / splits, panels * (split + 1) / splits);
          }
        },
        ceil_div(M, std::max<int64_t>(blocks, 1)) * ceil_div(n, splits) * K);
  }
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
