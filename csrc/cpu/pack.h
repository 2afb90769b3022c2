// The packed GEMM's operands: strided matrices of any storage type, and the panels that its microkernel reads.
//
// A panel holds a few rows of a matrix, of A's or of B's transposed, step by step along k. A step is one value, converted;
// where the machine multiplies pairs of bf16, it is two neighbours along k. AMX takes sixteen steps of A at a time, which
// then lie together: MR rows of sixteen.
#pragma once
#include <algorithm>
#include <type_traits>

#include "parallel.h"
#include "simd.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace pygpt::cpu {
namespace PYGPT_ISA {

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
struct PackElement {
  using Sum = E;
  static constexpr int kPackK = 1;  // neighbours along k
  static constexpr int kTileK = 1;  // steps that the microkernel takes at a time
  static constexpr int kRows = kRegisters == 32 ? 14 : 6;  // of a register tile
  struct TileScope {};  // to hold while the microkernel is called
  static Vec<E> load(const E* p) { return cpu::PYGPT_ISA::load(p); }
  static void store_row(E* p, Vec<E> x) { cpu::PYGPT_ISA::store(p, x); }  // values of one row, as W / kPackK steps
  static Vec<E> zip_rows(const Vec<E> (&rows)[1]) { return rows[0]; }     // values of kPackK rows, as W steps down
  static Vec<E> broadcast(E x) { return set1(x); }
  static Vec<E> multiply_add(Vec<E> a, Vec<E> b, Vec<E> c) { return a * b + c; }
  static E sum(E x) { return x; }
};
// How it is read from a matrix: a vector of steps of one row, or of its first n elements; of one step of neighbouring
// rows; or one alone.
template <class E>
struct PackReader {
  E scale = 1;
  template <class S>
  PYGPT_INLINE Vec<E> load_k(const S* p) const { return load(p) * scale; }
  template <class S>
  PYGPT_INLINE Vec<E> load_k(const S* p, int64_t n) const { return load(p, n) * scale; }
  template <class S>
  PYGPT_INLINE Vec<E> load_rows(const S* p, int64_t) const { return load(p) * scale; }
  template <class S>
  PYGPT_INLINE E load_one(const S* p, int64_t, bool) const { return to_acc(*p) * scale; }
};

#if defined(__AVX512BF16__)
// ... or two bf16, the first in the low half, whose products are summed in float32.
struct BF16Pair {
  uint32_t bits;
};
template <>
struct PackElement<BF16Pair> {
  using Sum = float;
  static constexpr int kPackK = 2;
#if defined(__AMX_BF16__)
  static constexpr int kTileK = 16, kRows = 32;
  using TileScope = TileRegisters;
#else
  static constexpr int kTileK = 1, kRows = PackElement<float>::kRows;
  struct TileScope {};
#endif
  static Vec<float> load(const BF16Pair* p) { return cpu::PYGPT_ISA::load(reinterpret_cast<const float*>(p)); }
  static void store_row(BF16Pair* p, Vec<float> x) {  // subnormals become 0
    const __m256bh pairs = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(p, &pairs, sizeof pairs);
  }
  static Vec<float> zip_rows(const Vec<float> (&rows)[2]) {
    const U16 low = (U16)_mm512_cvtneps_pbh((__m512)rows[0]), high = (U16)_mm512_cvtneps_pbh((__m512)rows[1]);
    return bit_cast<Vec<float>>(zero_extend(low) | zero_extend(high) << 16);
  }
  static Vec<float> broadcast(BF16Pair x) { return (Vec<float>)_mm512_set1_epi32(int(x.bits)); }
  static Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  static float sum(BF16Pair x) { return to_acc(bf16{uint16_t(x.bits)}) + to_acc(bf16{uint16_t(x.bits >> 16)}); }
};
template <>
struct PackReader<BF16Pair> {
  PYGPT_INLINE Vec<float> load_k(const bf16* p) const { return load(reinterpret_cast<const float*>(p)); }
  PYGPT_INLINE Vec<float> load_k(const bf16* p, int64_t n) const {
    return n >= 2 * W<float> ? load_k(p) : (Vec<float>)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
  }
  PYGPT_INLINE Vec<float> load_rows(const bf16* p, int64_t cs) const {
    U16 low, high;
    std::memcpy(&low, p, sizeof low), std::memcpy(&high, p + cs, sizeof high);
    return bit_cast<Vec<float>>(zero_extend(low) | zero_extend(high) << 16);
  }
  PYGPT_INLINE Vec<float> load_rows(const bf16* p, int64_t cs, int64_t n, int64_t rows) const {  // n columns, of two rows or fewer
    const auto row = [&](bool there, const bf16* at) {
      return zero_extend((U16)_mm256_maskz_loadu_epi16(uint16_t(there ? (1u << n) - 1 : 0), at));
    };
    return bit_cast<Vec<float>>(row(rows > 0, p) | row(rows > 1, p + cs) << 16);
  }
  PYGPT_INLINE BF16Pair load_one(const bf16* p, int64_t cs, bool last) const {
    return {p[0].bits | (last ? 0u : uint32_t(p[cs].bits) << 16)};
  }
};
template <class S>
using Packed = std::conditional_t<std::is_same_v<S, bf16>, BF16Pair, Acc<S>>;
#else
template <class S>
using Packed = Acc<S>;
#endif

// The register tile: MR rows by NV vectors, NR columns.
constexpr int NV = 2;
template <class E>
constexpr int MR = PackElement<E>::kRows;
template <class T>
constexpr int NR = NV * W<T>;
template <class E>
constexpr bool kUsesAmx = PackElement<E>::kTileK > 1;

// K values are so many steps, in whole groups.
template <class E>
constexpr int64_t packs_of(int64_t K) {
  return round_up(ceil_div(K, PackElement<E>::kPackK), PackElement<E>::kTileK);
}

// ---------------------------------------------------------------- panels
// dst[step][P] = the P rows of m, zero beyond `rows` and K. May write up to a vector behind its end.
template <int P, class E, class S>
void pack_panel(E* __restrict dst, Matrix<S> m, int64_t rows, int64_t K, PackReader<E> read = {}) {
  using T = Acc<E>;
  constexpr int w = W<T>, depth = PackElement<E>::kPackK;
  T* to = reinterpret_cast<T*>(dst);
  const S* __restrict p = m.data;
  int64_t k = 0;
  if (m.rs == 1 && rows == P && (P % w == 0 || m.cs >= w)) {
    // Where P is no multiple of w, a column is read and written past its P rows: into the next one.
    for (; k + depth - 1 + (P % w != 0) < K; k += depth)
#pragma GCC unroll 4
      for (int r0 = 0; r0 < P; r0 += w) store(to + k / depth * P + r0, read.load_rows(p + k * m.cs + r0, m.cs));
  } else if (m.cs == 1) {
    // Squares of w rows, the last first: what it writes past the P rows, the others then overwrite.
    for (; k + w * depth <= K; k += w * depth)
      for (int r0 = (P - 1) / w * w; r0 >= 0; r0 -= w) {
        Vec<T> square[w];
#pragma GCC unroll 16
        for (int r = 0; r < w; r++) square[r] = r0 + r < rows ? read.load_k(p + (r0 + r) * m.rs + k) : Vec<T>{};
        transpose<T>(square);
#pragma GCC unroll 16
        for (int c = 0; c < w; c++) store(to + (k / depth + c) * P + r0, square[c]);
      }
  }
  for (; k < K; k += depth)
    for (int r = 0; r < P; r++) dst[k / depth * P + r] = r < rows ? read.load_one(p + r * m.rs + k * m.cs, m.cs, k + 1 == K) : E{};
  std::fill(dst + ceil_div(K, depth) * P, dst + packs_of<E>(K) * P, E{});
}

// A panel of A: dst[step][MR], and where steps are taken in groups, dst[group][MR][step].
template <class E, class S>
void pack_left(E* __restrict dst, Matrix<S> a, int64_t rows, int64_t K, PackReader<E> read = {}) {
  constexpr int G = PackElement<E>::kTileK, d = PackElement<E>::kPackK;
  if constexpr (G == 1) {
    pack_panel<MR<E>>(dst, a, rows, K, read);
  } else {
    for (int64_t k = 0; k < K; k += G * d)
    for (int64_t r0 = 0; r0 < MR<E>; r0 += G) {
      const int64_t n = std::clamp<int64_t>(rows - r0, 0, G), values = std::min<int64_t>(G * d, K - k);
      const S* __restrict p = a.at(r0, k).data;
      Vec<float> square[G];  // row by row
      if (a.cs == 1) {
        for (int r = 0; r < G; r++) square[r] = r < n ? read.load_k(p + r * a.rs, values) : Vec<float>{};
      } else {
        for (int s = 0; s < G; s++) {
          const int64_t there = std::clamp<int64_t>(values - s * d, 0, d);
          if (a.rs == 1)
            square[s] = read.load_rows(p + s * d * a.cs, a.cs, n, there);
          else
            for (int r = 0; r < G; r++)
              square[s][r] = bit_cast<float>(r < n && there ? read.load_one(p + r * a.rs + s * d * a.cs, a.cs, there < d) : E{});
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
  constexpr int64_t P = NR<Acc<E>>;
  for (int64_t i = 0; i < n; i += P) pack_panel<P>(dst + i * packs_of<E>(K), m.at(i, 0), std::min(P, n - i), K);
}
template <class E, class S>
void pack_rows(E* dst, Matrix<S> m, int64_t n, int64_t K, PackReader<E> read = {}) {
  constexpr int64_t P = MR<E>;
  for (int64_t i = 0; i < n; i += P) pack_left(dst + i * packs_of<E>(K), m.at(i, 0), std::min(P, n - i), K, read);
}

// sums[r] += row r of a packed panel of A, r < rows. Three levels (16, KC, all) keep the rounding small.
template <class E, class T = Acc<E>>
void add_row_sums(T* sums, const E* panel, int64_t rows, int64_t steps) {
  constexpr int G = PackElement<E>::kTileK;
  T block[MR<E>] = {};
  for (int64_t k0 = 0; k0 < steps; k0 += 16) {
    T part[MR<E>] = {};
    for (int64_t k = k0; k < std::min(steps, k0 + 16); k += G)
      for (int r = 0; r < MR<E>; r++)
        for (int g = 0; g < G; g++) part[r] += PackElement<E>::sum(panel[k * MR<E> + r * G + g]);
    for (int r = 0; r < MR<E>; r++) block[r] += part[r];
  }
  for (int64_t r = 0; r < rows; r++) sums[r] += block[r];
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
