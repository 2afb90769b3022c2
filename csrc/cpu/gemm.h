// One packed GEMM for everything: C = A B with A (M, K), B (K, N), any strides, any storage type.
//
// Goto and van de Geijn's scheme (2008), as BLIS writes it: a register tile of MR x NR accumulators
// is updated by rank-1 steps k = 0..KC-1 from two packed panels,
//     A panel [k][MR]  (streams from L2)         B panel [k][NR]  (stays in L1)
// Packing converts 16-bit types, so that they run at float32 speed; where the machine multiplies pairs
// of bf16, a step takes two neighbours along k at once, at twice that speed. A block of K is summed in
// registers from zero and then added to the sum so far: blocked summation, which is more exact than
// one long chain. B is packed once per column chunk by all threads, A block by block by the thread
// that uses it. Each element of C is computed the same way however the work is split.
//
// The result leaves through an epilogue: epilogue(i, j, c, n) gets n <= W lanes of row i from column
// j, once, after the whole sum; it adds a bias, applies an activation, stores.
#pragma once
#include <algorithm>
#include <type_traits>

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
constexpr int64_t KC = 384;  // steps
constexpr int64_t kStripsPerBlock = 168 / MR;  // of A, so that a block of it (168 x KC) stays in L2
constexpr int64_t kPackedB = 4 << 20;           // steps of B packed at once, more where K is above 8192

template <class T>
struct Tile {
  Vec<T> c[MR][NV];
  T* data() { return reinterpret_cast<T*>(c); }  // rows of NR
};

// body(i, how many) for i = 0 .. n - 1, N at a time and the rest one by one.
template <int N, class F>
PYGPT_INLINE void in_groups(int64_t n, const F& body) {
  int64_t i = 0;
  for (; i + N <= n; i += N) body(i, std::integral_constant<int, N>());
  for (; i < n; i++) body(i, std::integral_constant<int, 1>());
}

// A strided operand: element (i, j) is data[i * rs + j * cs].
template <class S>
struct Matrix {
  const S* data;
  int64_t rs, cs;
  Matrix transposed() const { return {data, cs, rs}; }
  Matrix at(int64_t i, int64_t j) const { return {data + i * rs + j * cs, rs, cs}; }
};

// ---------------------------------------------------------------- steps
// What a panel holds. One step of a row is a value, in the type that is summed, ...
template <class E>
struct Step {
  using Sum = E;
  static constexpr int kDepth = 1;  // neighbours along k
  static Vec<E> lanes(const E* p) { return load(p); }
  static void store(E* p, Vec<E> x) { cpu::PYGPT_ISA::store(p, x); }  // values of one row, as W / kDepth steps
  static Vec<E> join(const Vec<E> (&rows)[1]) { return rows[0]; }     // values of kDepth rows, as W steps down
  static Vec<E> all(E x) { return set1(x); }
  static Vec<E> multiply_add(Vec<E> a, Vec<E> b, Vec<E> c) { return a * b + c; }
  static E total(E x) { return x; }
};
// How it is read from a matrix: a vector of steps of one row, or of its first n elements; of one step of neighbouring
// rows; or one alone.
template <class E>
struct Read {
  E scale = 1;
  template <class S>
  PYGPT_INLINE Vec<E> along(const S* p) const { return load(p) * scale; }
  template <class S>
  PYGPT_INLINE Vec<E> first(const S* p, int64_t n) const { return load(p, n) * scale; }
  template <class S>
  PYGPT_INLINE Vec<E> across(const S* p, int64_t) const { return load(p) * scale; }
  template <class S>
  PYGPT_INLINE E one(const S* p, int64_t, bool) const { return to_acc(*p) * scale; }
};

#if defined(__AVX512BF16__)
// ... or two bf16, the first in the low half, whose products are summed in float32.
struct Pair {
  uint32_t bits;
};
template <>
struct Step<Pair> {
  using Sum = float;
  static constexpr int kDepth = 2;
  static Vec<float> lanes(const Pair* p) { return load(reinterpret_cast<const float*>(p)); }
  static void store(Pair* p, Vec<float> x) {  // subnormals become 0
    const __m256bh pairs = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(p, &pairs, sizeof pairs);
  }
  static Vec<float> join(const Vec<float> (&rows)[2]) {
    const U16 low = (U16)_mm512_cvtneps_pbh((__m512)rows[0]), high = (U16)_mm512_cvtneps_pbh((__m512)rows[1]);
    return bit_cast<Vec<float>>(zero_extend(low) | zero_extend(high) << 16);
  }
  static Vec<float> all(Pair x) { return (Vec<float>)_mm512_set1_epi32(int(x.bits)); }
  static Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  static float total(Pair x) { return to_acc(bf16{uint16_t(x.bits)}) + to_acc(bf16{uint16_t(x.bits >> 16)}); }
};
template <>
struct Read<Pair> {
  PYGPT_INLINE Vec<float> along(const bf16* p) const { return load(reinterpret_cast<const float*>(p)); }
  PYGPT_INLINE Vec<float> first(const bf16* p, int64_t n) const {
    return n >= 2 * W<float> ? along(p) : (Vec<float>)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
  }
  PYGPT_INLINE Vec<float> across(const bf16* p, int64_t cs) const {
    U16 low, high;
    std::memcpy(&low, p, sizeof low), std::memcpy(&high, p + cs, sizeof high);
    return bit_cast<Vec<float>>(zero_extend(low) | zero_extend(high) << 16);
  }
  PYGPT_INLINE Pair one(const bf16* p, int64_t cs, bool last) const { return {p[0].bits | (last ? 0u : uint32_t(p[cs].bits) << 16)}; }
};
template <class S>
using StepOf = std::conditional_t<std::is_same_v<S, bf16>, Pair, Acc<S>>;
#else
template <class S>
using StepOf = Acc<S>;
#endif

// ---------------------------------------------------------------- the microkernel
// MR rows of out, ldo apart, = A B over K steps, summed from zero. Step k of row r of A is a[r * RS + k * CS], of B's
// columns b + k * ldb. Never inlined: a caller's constants would take registers from the accumulators (measured:
// attention's backward with AVX2 lost a third that way).
template <int RS, int CS, class E, class T = typename Step<E>::Sum>
__attribute__((noinline)) void multiply(int64_t K, const E* __restrict a, const E* __restrict b, int64_t ldb, T* out, int64_t ldo) {
  Vec<T> c[MR][NV] = {};
  for (int64_t k = 0; k < K; k++) {
    Vec<T> bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) bv[v] = Step<E>::lanes(b + v * W<T>);
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++) {
      const Vec<T> ar = Step<E>::all(a[r * RS]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) c[r][v] = Step<E>::multiply_add(ar, bv[v], c[r][v]);
    }
    a += CS;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(out + r * ldo + v * W<T>, c[r][v]);
}

template <class T>
PYGPT_INLINE void add(T* sum, int64_t ld, const Tile<T>& tile) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(sum + r * ld + v * W<T>, load(sum + r * ld + v * W<T>) + tile.c[r][v]);
}
template <class T>
PYGPT_INLINE void add(Tile<T>& sum, const Tile<T>& tile) {
  add(sum.data(), NR<T>, tile);
}

// sum += A B.
template <int RS, int CS, class E, class T = typename Step<E>::Sum>
PYGPT_INLINE void add_product(Tile<T>& sum, int64_t K, const E* a, const E* b, int64_t ldb) {
  Tile<T> product;
  multiply<RS, CS>(K, a, b, ldb, product.data(), NR<T>);
  add(sum, product);
}

// ---------------------------------------------------------------- packing
// dst[step][P] = the P rows of A, zero beyond `rows` and K. May write up to a vector behind its end.
template <int P, class E, class S>
void pack_panel(E* __restrict dst, Matrix<S> a, int64_t rows, int64_t K, Read<E> read = {}) {
  using T = typename Step<E>::Sum;
  constexpr int w = W<T>, depth = Step<E>::kDepth;
  T* to = reinterpret_cast<T*>(dst);
  const S* __restrict p = a.data;
  int64_t k = 0;
  if (a.rs == 1 && rows == P && (P % w == 0 || a.cs >= w)) {
    // Where P is no multiple of w, a column is read and written past its P rows: into the next one.
    for (; k + depth - 1 + (P % w != 0) < K; k += depth)
#pragma GCC unroll 4
      for (int r0 = 0; r0 < P; r0 += w) store(to + k / depth * P + r0, read.across(p + k * a.cs + r0, a.cs));
  } else if (a.cs == 1) {
    // Squares of w rows, the last first: what it writes past the P rows, the others then overwrite.
    for (; k + w * depth <= K; k += w * depth)
      for (int r0 = (P - 1) / w * w; r0 >= 0; r0 -= w) {
        Vec<T> square[w];
#pragma GCC unroll 16
        for (int r = 0; r < w; r++) square[r] = r0 + r < rows ? read.along(p + (r0 + r) * a.rs + k) : Vec<T>{};
        transpose<T>(square);
#pragma GCC unroll 16
        for (int c = 0; c < w; c++) store(to + (k / depth + c) * P + r0, square[c]);
      }
  }
  for (; k < K; k += depth)
    for (int r = 0; r < P; r++) dst[k / depth * P + r] = r < rows ? read.one(p + r * a.rs + k * a.cs, a.cs, k + 1 == K) : E{};
}

// The n rows of m, P at a time: panel p holds rows p P .. as [step][P].
template <int P, class E, class S>
void pack_rows(E* dst, Matrix<S> m, int64_t n, int64_t K, Read<E> read = {}) {
  const int64_t steps = ceil_div(K, Step<E>::kDepth);
  for (int64_t i = 0; i < n; i += P) pack_panel<P>(dst + i * steps, m.at(i, 0), std::min<int64_t>(P, n - i), K, read);
}

// sums[r] += row r of a packed panel, r < rows. Three levels (16, KC, all) keep the rounding small.
template <class E, class T = typename Step<E>::Sum>
void add_row_sums(T* sums, const E* panel, int64_t rows, int64_t steps) {
  T block[MR] = {};
  for (int64_t k0 = 0; k0 < steps; k0 += 16) {
    T part[MR] = {};
    for (int64_t k = k0; k < std::min(steps, k0 + 16); k++)
      for (int r = 0; r < MR; r++) part[r] += Step<E>::total(panel[k * MR + r]);
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

// A chunk of columns j0 .. j0 + n of the product, its part of B packed as panels [step][NR].
template <class S, class Epilogue>
struct Chunk {
  using T = Acc<S>;
  using E = StepOf<S>;
  static constexpr int64_t kDepth = Step<E>::kDepth;
  int64_t M, K, j0, n;
  Matrix<S> A;
  const E* b;
  T* a_sums;  // or null
  const Epilogue& epilogue;

  // Rows i0 .. i0 + rows, B panels p0 .. p1.
  void block(int64_t i0, int64_t rows, int64_t p0, int64_t p1) const {
    E* a = scratch<E, PackedA>(round_up(rows, MR) * KC);
    Tile<T>* partial = scratch<Tile<T>, Partial>((p1 - p0) * ceil_div(rows, MR));
    const bool sums = a_sums && p0 == 0;
    if (sums) std::fill(a_sums + i0, a_sums + i0 + rows, T(0));
    const int64_t steps = ceil_div(K, kDepth);
    // A panel of B stays in L1 for all strips of A; but where K is short, writing C is most of the work, and C goes by rows
    // (measured, dW of 8 rows, 768 -> 3072 in float32: 0.52 ms instead of 0.78).
    const bool by_rows = steps <= 32;
    for (int64_t s0 = 0; s0 < std::max<int64_t>(steps, 1); s0 += KC) {
      const int64_t n_steps = std::min(KC, steps - s0), k0 = s0 * kDepth;
      const bool last = s0 + KC >= steps;
      for (int64_t i = 0; i < rows; i += MR) {
        const int64_t strip = std::min<int64_t>(MR, rows - i);
        pack_panel<MR>(a + i * KC, A.at(i0 + i, k0), strip, std::min(KC * kDepth, K - k0));
        if (sums) add_row_sums(a_sums + i0 + i, a + i * KC, strip, n_steps);
      }
      Tile<T>* sofar = partial;
      const int64_t strips = ceil_div(rows, MR), panels = p1 - p0;
      for (int64_t u = 0; u < (by_rows ? strips : panels); u++)
        for (int64_t v = 0; v < (by_rows ? panels : strips); v++, sofar++) {
          const int64_t p = p0 + (by_rows ? v : u), i = (by_rows ? u : v) * MR;
          Tile<T> more, &tile = s0 == 0 && !last ? *sofar : more;
          multiply<1, MR>(n_steps, a + i * KC, b + (p * steps + s0) * NR<T>, NR<T>, tile.data(), NR<T>);
          if (s0 > 0) last ? add(more, *sofar) : add(*sofar, more);
          if (last) finish(more, i0 + i, j0 + p * NR<T>, M, j0 + n, epilogue);
        }
    }
  }
};

// C = A B; a_sums, if not null, receives the sum of every row of A (length M).
template <class S, class Epilogue>
void gemm(int64_t M, int64_t N, int64_t K, Matrix<S> A, Matrix<S> B, Acc<S>* a_sums, const Epilogue& epilogue) {
  using T = Acc<S>;
  using E = StepOf<S>;
  const int64_t steps = ceil_div(K, Step<E>::kDepth);
  // As many row blocks as divide evenly among the threads, each of an almost equal number of strips.
  const int64_t strips = ceil_div(M, MR), blocks = std::min(strips, round_up(ceil_div(strips, kStripsPerBlock), threads.count()));
  const int64_t columns = std::max<int64_t>(512, kPackedB / std::max<int64_t>(steps, 1)) / NR<T> * NR<T>;
  for (int64_t j0 = 0; j0 < N || (j0 == 0 && a_sums); j0 += columns) {
    const int64_t n = std::min(columns, N - j0), panels = ceil_div(n, NR<T>);
    E* b = scratch<E, PackedB>(panels * NR<T> * steps);
    parallel_for(
        panels,
        [&](int64_t begin, int64_t end) {
          const Matrix<S> part = B.at(0, j0 + begin * NR<T>).transposed();
          pack_rows<NR<T>>(b + begin * NR<T> * steps, part, std::min(n, end * NR<T>) - begin * NR<T>, K);
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
