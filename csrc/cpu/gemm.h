// One packed GEMM for everything: C = A B with A (M, K), B (K, N), any strides, any storage type.
//
// Goto and van de Geijn's scheme (2008), as BLIS writes it: a register tile of MR x NR accumulators
// is updated by rank-1 steps k = 0..KC-1 from two packed panels,
//     A panel [k][MR]  (streams from L2)         B panel [k][NR]  (stays in L1)
// Packing converts 16-bit types, so that they run at float32 speed; where the machine multiplies pairs
// of bf16, a step takes two neighbours along k at once, at twice that speed, and with AMX (amx.h) sixteen
// steps are one instruction. A block of K is summed in registers from zero and then added to the sum so
// far: blocked summation, which is more exact than one long chain. B is packed once per column chunk by
// all threads, A block by block by the thread that uses it. Each element of C is computed the same way
// however the work is split.
//
// The result leaves through an epilogue: epilogue(i, j, c, n) gets n <= W lanes of row i from column
// j, once, after the whole sum; it adds a bias, applies an activation, stores.
#pragma once
#include <algorithm>
#include <type_traits>

#include "memory.h"
#include "parallel.h"
#include "simd.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace pygpt::cpu {
namespace PYGPT_ISA {

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
  static constexpr int kGroup = 1;  // steps that the microkernel takes at a time
  static constexpr int kRows = kRegisters == 32 ? 14 : 6;  // of a register tile
  struct Registers {};  // to hold while the microkernel is called
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
#if defined(__AMX_BF16__)
  static constexpr int kGroup = 16, kRows = 32;
  using Registers = TileRegisters;
#else
  static constexpr int kGroup = 1, kRows = Step<float>::kRows;
  struct Registers {};
#endif
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
  PYGPT_INLINE Vec<float> across(const bf16* p, int64_t cs, int64_t n, int64_t rows) const {  // n columns, of two rows or fewer
    const auto row = [&](bool there, const bf16* at) {
      return zero_extend((U16)_mm256_maskz_loadu_epi16(uint16_t(there ? (1u << n) - 1 : 0), at));
    };
    return bit_cast<Vec<float>>(row(rows > 0, p) | row(rows > 1, p + cs) << 16);
  }
  PYGPT_INLINE Pair one(const bf16* p, int64_t cs, bool last) const {
    return {p[0].bits | (last ? 0u : uint32_t(p[cs].bits) << 16)};
  }
};
template <class S>
using StepOf = std::conditional_t<std::is_same_v<S, bf16>, Pair, Acc<S>>;
#else
template <class S>
using StepOf = Acc<S>;
#endif

// ---------------------------------------------------------------- the register tile
constexpr int NV = 2;
template <class E>
constexpr int MR = Step<E>::kRows;
template <class T>
constexpr int NR = NV * W<T>;
template <class E>
constexpr bool kInTiles = Step<E>::kGroup > 1;
template <class E>
constexpr int64_t KC = kInTiles<E> ? 768 : 384;  // steps
template <class E>
constexpr int64_t kBlock = kInTiles<E> ? 1 << 18 : 168 * KC<E>;  // steps of A that stay in L2
template <class E>
constexpr int64_t kShort = kInTiles<E> ? 32 : 256;  // steps, of which as much of B is packed as half of L2 holds
// AMX multiplies faster than L2 delivers: shorter runs of a panel of B stay in L1 for as many strips of A as have their sums
// there too. (Measured, 4096 x 768 -> 3072 without its results: 1100 GFLOP/s by whole panels, 1500 by runs.)
template <class E>
constexpr int64_t kRun = kInTiles<E> ? 128 : KC<E>;
template <class E>
constexpr int64_t kTogether = kInTiles<E> ? 8 : 1;
constexpr int64_t kPackedB = 4 << 20;   // steps of B packed at once, more where K is above 8192

template <class E>
struct Tile {
  using T = typename Step<E>::Sum;
  Vec<T> c[MR<E>][NV];
  T* data() { return reinterpret_cast<T*>(c); }  // rows of NR
};

// K values are so many steps, in whole groups.
template <class E>
constexpr int64_t steps_of(int64_t K) {
  return round_up(ceil_div(K, Step<E>::kDepth), Step<E>::kGroup);
}

// ---------------------------------------------------------------- the microkernel
// MR rows of out, ldo apart, = A B over K steps, summed from zero, or onto what is there (AMX only). Row r of A is a + r * RS, its groups of steps are GS
// apart; step k of B's columns is b + k * ldb. Never inlined: a caller's constants would take registers from the
// accumulators (measured: attention's backward with AVX2 lost a third that way).
template <int RS, int GS, class E, class T = typename Step<E>::Sum>
__attribute__((noinline)) void multiply(int64_t K, const E* __restrict a, const E* __restrict b, int64_t ldb, T* out,
                                        int64_t ldo, [[maybe_unused]] bool onto = false) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<E, Pair>) return multiply_tiles(K, &a->bits, RS, GS, &b->bits, ldb, out, ldo, onto);
#endif
  Vec<T> c[MR<E>][NV] = {};
  for (int64_t k = 0; k < K; k++) {
    Vec<T> bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) bv[v] = Step<E>::lanes(b + v * W<T>);
#pragma GCC unroll 16
    for (int r = 0; r < MR<E>; r++) {
      const Vec<T> ar = Step<E>::all(a[r * RS]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) c[r][v] = Step<E>::multiply_add(ar, bv[v], c[r][v]);
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
template <class E, class T = typename Step<E>::Sum>
PYGPT_INLINE void multiply_panels(int64_t K, const E* a, const E* b, int64_t ldb, T* out, int64_t ldo, bool onto = false) {
  multiply<Step<E>::kGroup, MR<E> * Step<E>::kGroup>(K, a, b, ldb, out, ldo, onto);
}

template <class E, class T = typename Step<E>::Sum>
PYGPT_INLINE void add(T* sum, int64_t ld, const Tile<E>& tile) {
#pragma GCC unroll 16
  for (int r = 0; r < MR<E>; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(sum + r * ld + v * W<T>, load(sum + r * ld + v * W<T>) + tile.c[r][v]);
}
template <class E>
PYGPT_INLINE void add(Tile<E>& sum, const Tile<E>& tile) {
  add(sum.data(), NR<typename Step<E>::Sum>, tile);
}

// sum += A B.
template <int RS, int GS, class E, class T = typename Step<E>::Sum>
PYGPT_INLINE void add_product(Tile<E>& sum, int64_t K, const E* a, const E* b, int64_t ldb) {
  Tile<E> product;
  multiply<RS, GS>(K, a, b, ldb, product.data(), NR<T>);
  add(sum, product);
}

// ---------------------------------------------------------------- packing
// dst[step][P] = the P rows of m, zero beyond `rows` and K. May write up to a vector behind its end.
template <int P, class E, class S>
void pack_panel(E* __restrict dst, Matrix<S> m, int64_t rows, int64_t K, Read<E> read = {}) {
  using T = typename Step<E>::Sum;
  constexpr int w = W<T>, depth = Step<E>::kDepth;
  T* to = reinterpret_cast<T*>(dst);
  const S* __restrict p = m.data;
  int64_t k = 0;
  if (m.rs == 1 && rows == P && (P % w == 0 || m.cs >= w)) {
    // Where P is no multiple of w, a column is read and written past its P rows: into the next one.
    for (; k + depth - 1 + (P % w != 0) < K; k += depth)
#pragma GCC unroll 4
      for (int r0 = 0; r0 < P; r0 += w) store(to + k / depth * P + r0, read.across(p + k * m.cs + r0, m.cs));
  } else if (m.cs == 1) {
    // Squares of w rows, the last first: what it writes past the P rows, the others then overwrite.
    for (; k + w * depth <= K; k += w * depth)
      for (int r0 = (P - 1) / w * w; r0 >= 0; r0 -= w) {
        Vec<T> square[w];
#pragma GCC unroll 16
        for (int r = 0; r < w; r++) square[r] = r0 + r < rows ? read.along(p + (r0 + r) * m.rs + k) : Vec<T>{};
        transpose<T>(square);
#pragma GCC unroll 16
        for (int c = 0; c < w; c++) store(to + (k / depth + c) * P + r0, square[c]);
      }
  }
  for (; k < K; k += depth)
    for (int r = 0; r < P; r++) dst[k / depth * P + r] = r < rows ? read.one(p + r * m.rs + k * m.cs, m.cs, k + 1 == K) : E{};
  std::fill(dst + ceil_div(K, depth) * P, dst + steps_of<E>(K) * P, E{});
}

// A panel of A: dst[step][MR], and where steps are taken in groups, dst[group][MR][step].
template <class E, class S>
void pack_left(E* __restrict dst, Matrix<S> a, int64_t rows, int64_t K, Read<E> read = {}) {
  constexpr int G = Step<E>::kGroup, d = Step<E>::kDepth;
  if constexpr (G == 1) {
    pack_panel<MR<E>>(dst, a, rows, K, read);
  } else {
    for (int64_t k = 0; k < K; k += G * d)
    for (int64_t r0 = 0; r0 < MR<E>; r0 += G) {
      const int64_t n = std::clamp<int64_t>(rows - r0, 0, G), values = std::min<int64_t>(G * d, K - k);
      const S* __restrict p = a.at(r0, k).data;
      Vec<float> square[G];  // row by row
      if (a.cs == 1) {
        for (int r = 0; r < G; r++) square[r] = r < n ? read.first(p + r * a.rs, values) : Vec<float>{};
      } else {
        for (int s = 0; s < G; s++) {
          const int64_t there = std::clamp<int64_t>(values - s * d, 0, d);
          if (a.rs == 1)
            square[s] = read.across(p + s * d * a.cs, a.cs, n, there);
          else
            for (int r = 0; r < G; r++)
              square[s][r] = bit_cast<float>(r < n && there ? read.one(p + r * a.rs + s * d * a.cs, a.cs, there < d) : E{});
        }
        transpose<float>(square);
      }
      for (int r = 0; r < G; r++) store(reinterpret_cast<float*>(dst) + k / d * MR<E> + (r0 + r) * G, square[r]);
    }
  }
}

// The n rows of m as panels: NR at a time as B's columns, or MR at a time as A's rows.
template <class E, class S>
void pack_columns(E* dst, Matrix<S> m, int64_t n, int64_t K) {
  constexpr int64_t P = NR<typename Step<E>::Sum>;
  for (int64_t i = 0; i < n; i += P) pack_panel<P>(dst + i * steps_of<E>(K), m.at(i, 0), std::min(P, n - i), K);
}
template <class E, class S>
void pack_rows(E* dst, Matrix<S> m, int64_t n, int64_t K, Read<E> read = {}) {
  constexpr int64_t P = MR<E>;
  for (int64_t i = 0; i < n; i += P) pack_left(dst + i * steps_of<E>(K), m.at(i, 0), std::min(P, n - i), K, read);
}

// sums[r] += row r of a packed panel of A, r < rows. Three levels (16, KC, all) keep the rounding small.
template <class E, class T = typename Step<E>::Sum>
void add_row_sums(T* sums, const E* panel, int64_t rows, int64_t steps) {
  constexpr int G = Step<E>::kGroup;
  T block[MR<E>] = {};
  for (int64_t k0 = 0; k0 < steps; k0 += 16) {
    T part[MR<E>] = {};
    for (int64_t k = k0; k < std::min(steps, k0 + 16); k += G)
      for (int r = 0; r < MR<E>; r++)
        for (int g = 0; g < G; g++) part[r] += Step<E>::total(panel[k * MR<E> + r * G + g]);
    for (int r = 0; r < MR<E>; r++) block[r] += part[r];
  }
  for (int64_t r = 0; r < rows; r++) sums[r] += block[r];
}

// Hands the valid part of a finished tile at (i, j) to the epilogue.
template <class E, class Epilogue>
PYGPT_INLINE void finish(const Tile<E>& tile, int64_t i, int64_t j, int64_t M, int64_t N, const Epilogue& epilogue) {
  using T = typename Step<E>::Sum;
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
  using E = StepOf<S>;
  static constexpr int64_t kDepth = Step<E>::kDepth, kRows = MR<E>, kTogether = cpu::PYGPT_ISA::kTogether<E>;
  static constexpr int64_t KC = cpu::PYGPT_ISA::KC<E>;
  int64_t M, K, j0, n;
  Matrix<S> A;
  const E* b;
  T* a_sums;  // or null
  const Epilogue& epilogue;

  // Rows i0 .. i0 + rows, B panels p0 .. p1.
  void block(int64_t i0, int64_t rows, int64_t p0, int64_t p1) const {
    const int64_t steps = steps_of<E>(K), most = std::min(steps, KC);
    E* a = scratch<E, PackedA>(round_up(rows, kRows) * most);
    Tile<E>* partial = scratch<Tile<E>, Partial>((p1 - p0) * ceil_div(rows, kRows));
    const bool sums = a_sums && p0 == 0;
    if (sums) std::fill(a_sums + i0, a_sums + i0 + rows, T(0));
    // A panel of B stays in L1 for all strips of A; but where K is short, writing C is what takes time, and C goes by rows
    // (measured, dW of 8 rows, 768 -> 3072 in float32: 0.52 ms instead of 0.78; of 64: 2.0, 3.6).
    const bool by_rows = steps <= kShort<E>;
    for (int64_t s0 = 0; s0 < std::max<int64_t>(steps, 1); s0 += KC) {
      const int64_t n_steps = std::min(KC, steps - s0), k0 = s0 * kDepth;
      const bool last = s0 + KC >= steps;
      for (int64_t i = 0; i < rows; i += kRows) {
        const int64_t strip = std::min(kRows, rows - i);
        pack_left(a + i * most, A.at(i0 + i, k0), strip, std::min(KC * kDepth, K - k0));
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
  using E = StepOf<S>;
  const int64_t steps = steps_of<E>(K);
  // As many row blocks as divide evenly among the threads, each of an almost equal number of strips.
  const int64_t strips = ceil_div(M, MR<E>), strips_in_l2 = kBlock<E> / std::clamp(steps, KC<E> / 4, KC<E>) / MR<E>;
  const int64_t blocks_in_l2 = ceil_div(strips, strips_in_l2);
  const int64_t blocks = std::min(strips, round_up(blocks_in_l2, threads.count()));
  const int64_t packed = steps <= kShort<E> ? (1 << 20) / sizeof(E) : kPackedB;
  if (blocks_in_l2 == 1 && N > M) {  // W's columns go through L2 once, in the core that packs them
    const int64_t per_task = std::max<int64_t>(1, kBlock<E> / std::max<int64_t>(steps, 1) / NR<T>), tasks = ceil_div(N, NR<T>);
    parallel_for(
        tasks,
        [&](int64_t begin, int64_t end) {
          [[maybe_unused]] const typename Step<E>::Registers held;
          [[maybe_unused]] const PastCaches written;
          for (int64_t p = begin; p < end; p += per_task) {
            const int64_t panels = std::min(per_task, end - p), j0 = p * NR<T>, n = std::min(N - j0, panels * NR<T>);
            E* b = scratch<E, PackedB>(panels * NR<T> * steps);
            pack_columns(b, B.at(0, j0).transposed(), n, K);
            Chunk<S, Epilogue>{M, K, j0, n, A, b, p == 0 ? a_sums : nullptr, epilogue}.block(0, M, 0, panels);
          }
        },
        M * NR<T> * K);
    return;
  }
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
          [[maybe_unused]] const typename Step<E>::Registers held;
          [[maybe_unused]] const PastCaches written;
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
