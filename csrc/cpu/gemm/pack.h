// The packed GEMM's operands: strided matrices of any storage type, and how they become the micro-kernel's panels.
#pragma once
#include "micro_kernel.h"

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

// dst[pack][P] = the P rows of m over K values, zero beyond `rows` and K. May write up to a vector behind its end.
template <int P, class E, class S>
void pack_panel(E* __restrict dst, Matrix<S> m, int64_t rows, int64_t K, PackReader<E> read = {}) {
  using T = Acc<E>;
  constexpr int w = W<T>, d = PackElement<E>::kPackK;
  T* to = reinterpret_cast<T*>(dst);
  const S* __restrict p = m.data;
  int64_t k = 0;
  if (m.rs == 1 && rows == P && (P % w == 0 || m.cs >= w)) {
    // Where P is no multiple of w, a column is read and written past its P rows: into the next one.
    for (; k + d - 1 + (P % w != 0) < K; k += d)
#pragma GCC unroll 4
      for (int r0 = 0; r0 < P; r0 += w) store(to + k / d * P + r0, read.load_rows(p + k * m.cs + r0, m.cs));
  } else if (m.cs == 1) {
    // Squares of w rows, the last first: the others then overwrite what it writes past the P rows.
    for (; k + w * d <= K; k += w * d)
      for (int r0 = (P - 1) / w * w; r0 >= 0; r0 -= w) {
        Vec<T> square[w];
#pragma GCC unroll 16
        for (int r = 0; r < w; r++) square[r] = r0 + r < rows ? read.load_k(p + (r0 + r) * m.rs + k) : Vec<T>{};
        transpose<T>(square);
#pragma GCC unroll 16
        for (int c = 0; c < w; c++) store(to + (k / d + c) * P + r0, square[c]);
      }
  }
  for (; k < K; k += d)
    for (int r = 0; r < P; r++)
      dst[k / d * P + r] = r < rows ? read.load_one(p + r * m.rs + k * m.cs, m.cs, k + 1 == K) : E{};
  std::fill(dst + ceil_div(K, d) * P, dst + packs_of<E>(K) * P, E{});
}

// A panel of A for AMX: dst[step][MR][kTileK].
template <class E, class S>
void pack_amx_panel(E* __restrict dst, Matrix<S> a, int64_t rows, int64_t K, PackReader<E> read) {
  constexpr int G = PackElement<E>::kTileK, d = PackElement<E>::kPackK, MR = Tiling<E>::MR;
  for (int64_t k = 0; k < K; k += G * d)
    for (int64_t r0 = 0; r0 < MR; r0 += G) {
      const int64_t n = std::clamp<int64_t>(rows - r0, 0, G), values = std::min<int64_t>(G * d, K - k);
      const S* __restrict p = a.at(r0, k).data;
      Vec<float> square[G];  // row by row
      if (a.cs == 1) {
        for (int r = 0; r < G; r++) square[r] = r < n ? read.load_k(p + r * a.rs, values) : Vec<float>{};
      } else {
        for (int s = 0; s < G; s++) {
          const S* column = p + s * d * a.cs;
          const int64_t exist = std::clamp<int64_t>(values - s * d, 0, d);
          if (a.rs == 1) {
            square[s] = read.load_rows(column, a.cs, n, exist);
          } else {
            for (int r = 0; r < G; r++)
              square[s][r] = bit_cast<float>(r < n && exist ? read.load_one(column + r * a.rs, a.cs, exist < d) : E{});
          }
        }
        transpose<float>(square);
      }
      for (int r = 0; r < G; r++) store(reinterpret_cast<float*>(dst) + k / d * MR + (r0 + r) * G, square[r]);
    }
}

// The n rows of m as panels of P rows, each of which has room for `stride` packs. Rows that lie next to each other in
// memory, as those of a transposed matrix do, are packed kAtOnce values along k at a time, so that a line, and a page,
// is read for all panels while it is at hand (docs/measured.md C21). Rows that overlap are packed panel by panel,
// because pack_panel writes past the end of a panel of contiguous rows, into the next panel.
template <int P, class E, class S, class Pack>
PYGPT_INLINE void pack_panels(E* dst, Matrix<S> m, int64_t n, int64_t K, int64_t stride, const Pack& pack) {
  constexpr int64_t d = PackElement<E>::kPackK, kAtOnce = 32 * d;
  const int64_t at_once = m.rs == 1 && m.cs != 1 && n > P ? kAtOnce : std::max<int64_t>(K, 1);
  for (int64_t k = 0; k == 0 || k < K; k += at_once)
    for (int64_t i = 0; i < n; i += P)
      pack(dst + i * stride + k / d * P, m.at(i, k), std::min<int64_t>(P, n - i), std::min(at_once, K - k));
}

// The n rows of a as panels of A.
template <class E, class S>
void pack_a(E* dst, Matrix<S> a, int64_t n, int64_t K, int64_t stride, PackReader<E> read = {}) {
  constexpr int MR = Tiling<E>::MR;
  pack_panels<MR>(dst, a, n, K, stride, [=](E* panel, Matrix<S> rows, int64_t count, int64_t k) {
    if constexpr (kUsesAmx<E>) pack_amx_panel(panel, rows, count, k, read);
    else pack_panel<MR>(panel, rows, count, k, read);
  });
}
template <class E, class S>
void pack_a(E* dst, Matrix<S> a, int64_t n, int64_t K, PackReader<E> read = {}) {
  pack_a(dst, a, n, K, packs_of<E>(K), read);
}
// The n columns of b as panels of B.
template <class E, class S>
void pack_b(E* dst, Matrix<S> b, int64_t n, int64_t K) {
  constexpr int NR = Tiling<E>::NR;
  pack_panels<NR>(dst, b.transposed(), n, K, packs_of<E>(K), [](E* panel, Matrix<S> columns, int64_t count, int64_t k) {
    pack_panel<NR>(panel, columns, count, k);
  });
}

// sums[r] += row r of a packed panel of A, r < rows. Three levels of sums (16 packs, a chain, all) keep the rounding
// small.
template <class E, class T = Acc<E>>
void add_row_sums(T* sums, const E* panel, int64_t rows, int64_t packs) {
  constexpr int G = PackElement<E>::kTileK, MR = Tiling<E>::MR;
  T block[MR] = {};
  for (int64_t k0 = 0; k0 < packs; k0 += 16) {
    T part[MR] = {};
    for (int64_t k = k0; k < std::min(packs, k0 + 16); k += G)
      for (int r = 0; r < MR; r++)
        for (int g = 0; g < G; g++) part[r] += PackElement<E>::sum(panel[k * MR + r * G + g]);
    for (int r = 0; r < MR; r++) block[r] += part[r];
  }
  for (int64_t r = 0; r < rows; r++) sums[r] += block[r];
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
