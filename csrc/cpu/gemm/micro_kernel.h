// The innermost loop of every product: a register tile of MR x NR sums, updated by rank-1 steps along k from panels.
//
// A panel holds MR rows of A, or NR columns of B, pack by pack along k. A pack is what one lane multiplies at a time:
// one value in the accumulator's type or, where the processor multiplies pairs of bf16, two neighbours along k. In
// panels and blocks, lengths along k count packs. AMX reads A in tiles of 16 packs, so there a panel of A is made of
// such tiles. Packing converts 16-bit types, so that they run at float32's speed; pairs run at twice that speed.
//
// This header has the pack's arithmetic (PackElement) and how it is read from a matrix (PackReader), the sizes of tiles
// and blocks (Tiling), the micro-kernel on packed panels, and one for a B that is read where it lies.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../parallel.h"
#include "../simd.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace pygpt::cpu {
namespace PYGPT_ISA {

// ---------------------------------------------------------------- packs
// A pack of one value.
template <class E>
struct PackElement {
  static constexpr int kPackK = 1;  // values along k in a pack
  static constexpr int kTileK = 1;  // packs along k that one step of the micro-kernel takes
  struct TileScope {};  // to be alive while the micro-kernel is called
  static Vec<E> load(const E* p) { return cpu::PYGPT_ISA::load(p); }
  static void store_row(E* p, Vec<E> x) { cpu::PYGPT_ISA::store(p, x); }  // W values of one row as W / kPackK packs
  static Vec<E> zip_rows(const Vec<E> (&rows)[1]) { return rows[0]; }  // W values of each of kPackK rows as W packs
  static Vec<E> broadcast(E x) { return set1(x); }
  static Vec<E> multiply_add(Vec<E> a, Vec<E> b, Vec<E> c) { return a * b + c; }
  static E sum(E x) { return x; }
};
// Reads packs from a matrix of any storage type. load_k reads a vector of packs from one row, or from its first n
// values; load_rows reads one pack of each of W neighbouring rows, whose next value along k is cs elements away.
template <class E>
struct PackReader {
  E scale = 1;
  template <class S>
  PYGPT_INLINE Vec<E> load_k(const S* p) const {
    return load(p) * scale;
  }
  template <class S>
  PYGPT_INLINE Vec<E> load_k(const S* p, int64_t n) const {
    return load(p, n) * scale;
  }
  template <class S>
  PYGPT_INLINE Vec<E> load_rows(const S* p, int64_t) const {
    return load(p) * scale;
  }
  template <class S>
  PYGPT_INLINE E load_one(const S* p, int64_t, bool) const {
    return to_acc(*p) * scale;
  }
};

#if defined(__AVX512BF16__)
// A pack of two bf16, the first in the low half. Their products are summed in float32.
struct BF16Pair {
  uint32_t bits;
};
template <>
struct PackElement<BF16Pair> {
  static constexpr int kPackK = 2;
#if defined(__AMX_BF16__)
  static constexpr int kTileK = 16;
  using TileScope = TileRegisters;
#else
  static constexpr int kTileK = 1;
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
  // The same for n < W rows, of which only the first `values` of a pack's two values exist.
  PYGPT_INLINE Vec<float> load_rows(const bf16* p, int64_t cs, int64_t n, int64_t values) const {
    const auto load_n = [&](bool exists, const bf16* from) {
      return zero_extend((U16)_mm256_maskz_loadu_epi16(uint16_t(exists ? (1u << n) - 1 : 0), from));
    };
    return bit_cast<Vec<float>>(load_n(values > 0, p) | load_n(values > 1, p + cs) << 16);
  }
  PYGPT_INLINE BF16Pair load_one(const bf16* p, int64_t cs, bool last) const {
    return {p[0].bits | (last ? 0u : uint32_t(p[cs].bits) << 16)};
  }
};
// The type in which panels hold values that are stored as S.
template <class S>
using Packed = std::conditional_t<std::is_same_v<S, bf16>, BF16Pair, Acc<S>>;
#else
template <class S>
using Packed = Acc<S>;
#endif

// ---------------------------------------------------------------- sizes
template <class E>
constexpr bool kUsesAmx = PackElement<E>::kTileK > 1;
constexpr int NV = 2;  // vectors in a row of the register tile

// The caches of a Sapphire Rapids core, the first with AMX. Block sizes are chosen for them; no result depends on them.
constexpr int64_t kL1Bytes = 48 << 10, kL2Bytes = 2 << 20;

// The sizes of BLIS's loops (see gemm.h) for packs of type E.
template <class E>
struct Tiling {
  // The accumulators, a row of B and one broadcast of A fill the registers: 14 * 2 + 2 + 1 of 32, 6 * 2 + 2 + 1 of 16.
  // AMX has a tile of 32 x 32 (see amx.h).
  static constexpr int MR = kUsesAmx<E> ? 32 : kRegisters == 32 ? 14 : 6;
  static constexpr int NR = NV * W<Acc<E>>;
  // The packs that are summed in a chain, from zero; the sums of chains are then added. A chain's length is part of the
  // result, so it is the same on every machine.
  static constexpr int64_t kChain = kUsesAmx<E> ? 768 : 384;
  // The packs along k in a block of A. If the sum has more of them, its part so far waits in memory between blocks.
  static constexpr int64_t KC = kUsesAmx<E> || kRegisters == 16 ? kChain : 2 * kChain;
  // The packs of A (or of B, where B is the smaller one) that stay in L2: for AMX, which is bound by it, half of L2;
  // for AVX-512 640 KiB of the 1 MiB or more that a server's core has; else half of 512 KiB.
  static constexpr int64_t kBlock = (kUsesAmx<E>        ? kL2Bytes / 2
                                     : kRegisters == 32 ? 640 << 10
                                                        : 256 << 10) /
                                    int64_t(sizeof(E));
  // Where the sum is as short as this, writing C takes the time, not multiplying.
  static constexpr int64_t kShortK = kUsesAmx<E> ? 32 : 256;
  // AMX multiplies faster than L2 delivers. There, kKRun packs of a panel of B stay in L1 for kStripsTogether strips of
  // A, whose sums are in L1 too (docs/measured.md C3).
  static constexpr int64_t kKRun = kUsesAmx<E> ? 128 : kChain;
  static constexpr int64_t kStripsTogether = kUsesAmx<E> ? 8 : 1;

  // The rows of A in a block, for a sum over K packs.
  static int64_t MC(int64_t K) { return kBlock / std::clamp(K, kChain / 4, KC) / MR * MR; }
  // The columns of B packed at once: 4 Mi packs, where the sum is short half of L2, but at least 512 columns
  // (docs/measured.md C4).
  static int64_t NC(int64_t K) {
    const int64_t packs = K <= kShortK ? kL2Bytes / 2 / int64_t(sizeof(E)) : 4 << 20;
    return std::max<int64_t>(512, packs / std::max<int64_t>(K, 1)) / NR * NR;
  }
};

// The packs of K values, in whole steps of the micro-kernel.
template <class E>
constexpr int64_t packs_of(int64_t K) {
  return round_up(ceil_div(K, PackElement<E>::kPackK), PackElement<E>::kTileK);
}

// ---------------------------------------------------------------- the register tile
template <class E>
struct Tile {
  using T = Acc<E>;
  Vec<T> c[Tiling<E>::MR][NV];
  T* data() { return reinterpret_cast<T*>(c); }  // MR rows of NR
};

template <class E, class T = Acc<E>>
PYGPT_INLINE void add(T* sum, int64_t ld, const Tile<E>& tile) {
#pragma GCC unroll 16
  for (int r = 0; r < Tiling<E>::MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(sum + r * ld + v * W<T>, load(sum + r * ld + v * W<T>) + tile.c[r][v]);
}
template <class E>
PYGPT_INLINE void add(Tile<E>& sum, const Tile<E>& tile) {
  add(sum.data(), Tiling<E>::NR, tile);
}

// ---------------------------------------------------------------- the micro-kernel
// out = A B for MR rows (ldo apart) and NR columns, over K packs. Row r of A starts at a + r * kRowStride, its steps of
// kTileK packs are kStepStride apart; pack k of B's columns is at b + k * ldb. With `accumulate`, which only AMX has,
// out += A B. With kPrefetches, which AMX has not, every fourth step fetches one more line, from `next` on, into L2.
// The function is never inlined: a caller's constants would take registers from the accumulators (docs/measured.md C2).
template <int kRowStride, int kStepStride, bool kPrefetches = false, class E, class T = Acc<E>>
__attribute__((noinline)) void micro_kernel(int64_t K, const E* __restrict a, const E* __restrict b, int64_t ldb,
                                            T* out, int64_t ldo, [[maybe_unused]] bool accumulate = false,
                                            [[maybe_unused]] const E* next = nullptr) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<E, BF16Pair>)
    return amx_micro_kernel(K, {&a->bits, kRowStride, kStepStride}, {&b->bits, ldb}, out, ldo, accumulate);
#endif
  constexpr int MR = Tiling<E>::MR;
  Vec<T> c[MR][NV] = {};
  const auto step = [&]() __attribute__((always_inline)) {
    Vec<T> bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) bv[v] = PackElement<E>::load(b + v * W<T>);
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++) {
      const Vec<T> ar = PackElement<E>::broadcast(a[r * kRowStride]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) c[r][v] = PackElement<E>::multiply_add(ar, bv[v], c[r][v]);
    }
    a += kStepStride;
    b += ldb;
  };
  int64_t k = 0;
  if constexpr (kPrefetches)
    for (; k + 4 <= K; k += 4, next += 64 / sizeof(E)) {
      __builtin_prefetch(next, 0, 2);
      step(), step(), step(), step();
    }
  for (; k < K; k++) step();
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(out + r * ldo + v * W<T>, c[r][v]);
}

// The same for a packed panel of A.
template <bool kPrefetches = false, class E, class T = Acc<E>>
PYGPT_INLINE void micro_kernel(int64_t K, const E* a, const E* b, int64_t ldb, T* out, int64_t ldo,
                               bool accumulate = false, const E* next = nullptr) {
  constexpr int kTileK = PackElement<E>::kTileK;
  micro_kernel<kTileK, Tiling<E>::MR * kTileK, kPrefetches>(K, a, b, ldb, out, ldo, accumulate, next);
}

// sum += A B.
template <int kRowStride, int kStepStride, class E, class T = Acc<E>>
PYGPT_INLINE void add_product(Tile<E>& sum, int64_t K, const E* a, const E* b, int64_t ldb) {
  Tile<E> product;
  micro_kernel<kRowStride, kStepStride>(K, a, b, ldb, product.data(), Tiling<E>::NR);
  add(sum, product);
}

// ---------------------------------------------------------------- the micro-kernel for a B that is not packed
// Operand: R rows of A, packed as [k][R].
template <int R, class E>
struct PackedRows {
  const E* a;
  PYGPT_INLINE E at(int64_t k, int r) const { return a[k * R + r]; }
};
// Operand: R rows of A where they lie, ld apart. Three share a pointer: an address can add a register once or twice.
template <int R, class T>
struct StridedRows {
  const T* a[(R + 2) / 3];
  int64_t ld;
  StridedRows(const T* first, int64_t ld) : ld(ld) {
    for (int i = 0; i < (R + 2) / 3; i++) a[i] = first + 3 * i * ld;
  }
  PYGPT_INLINE T at(int64_t k, int r) const { return a[r / 3][k + r % 3 * ld]; }
};

// Policy: do nothing else at each step.
struct NoPrefetch {
  template <class S, class V>
  PYGPT_INLINE void operator()(const S*, const V*) {}
};
// Policy: prefetch the next tile of B, which is `columns` further in the same kPackK rows.
template <int kPackK, int columns>
struct PrefetchNextTile {
  int64_t ld;
  template <class S, class V>
  PYGPT_INLINE void operator()(const S* b, const V*) {
    constexpr int64_t vector = kVectorBytes / int64_t(sizeof(S));
    for (int k = 0; k < kPackK; k++)
#pragma GCC unroll 8
      for (int64_t j = 0; j < columns; j += vector) __builtin_prefetch(b + k * ld + columns + j);
  }
};
// Policy: prefetch NR columns of the next of `rows` rows.
template <class T>
struct PrefetchRows {
  const T* row;
  int64_t ld, rows;
  PYGPT_INLINE void operator()(const T*, const Vec<T>*) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < Tiling<T>::NR; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + j);
    row += --rows > 0 ? ld : 0;
  }
};
// Policy: prefetch rows, and store this step's row of B as the next row of a packed panel.
template <class T>
struct PrefetchAndPack {
  PrefetchRows<T> prefetch;
  T* packed;
  PYGPT_INLINE void operator()(const T* b, const Vec<T>* row) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(packed + v * W<T>, row[v]);
    packed += Tiling<T>::NR;
    prefetch(b, row);
  }
};

// sum (R rows, ld apart) += A B over K packs, where B's rows are ldb apart and kVectors wide.
template <int R, int kVectors, template <int, class> class Rows, class E, class S, class Policy, class T = Acc<E>>
__attribute__((noinline)) void micro_kernel_unpacked(int64_t K, Rows<R, E> a, const S* __restrict b, int64_t ldb,
                                                     T* __restrict sum, int64_t ld, Policy policy) {
  Vec<T> c[R][kVectors] = {};
  for (int64_t k = 0; k < K; k++, b += PackElement<E>::kPackK * ldb) {
    Vec<T> bv[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) bv[v] = PackReader<E>().load_rows(b + v * W<T>, ldb);
    policy(b, bv);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Vec<T> ar = PackElement<E>::broadcast(a.at(k, r));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) c[r][v] = PackElement<E>::multiply_add(ar, bv[v], c[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) store(sum + r * ld + v * W<T>, load(sum + r * ld + v * W<T>) + c[r][v]);
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
