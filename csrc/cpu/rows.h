// Passes over a row of values, a vector at a time: sums over it, and element-wise results.
#pragma once
#include <algorithm>

#include "nontemporal.h"
#include "vmath.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

// Values of a call in S. Those that came from floats of the caller's may be NaNs that would not survive the rounding to
// bf16 (simd.h).
template <class S>
PYGPT_INLINE Vec<Acc<S>> canonical(Vec<Acc<S>> v) {
  if constexpr (std::is_base_of_v<bf16, S>) return v == v ? v : set1(std::numeric_limits<float>::quiet_NaN());
  return v;
}

constexpr int64_t kSumColumns = 2048;  // columns summed before they are added to a total

// n <= W columns from j on or, where half is 0 or 1, the W of the 2 W columns from j on that load_even_odd(.., half)
// reads.
struct Columns {
  int64_t j, n;
  int half = -1;
};
template <class S>
PYGPT_INLINE Vec<Acc<S>> at(const S* row, Columns c) {
  return c.half < 0 ? load(row + c.j, c.n) : load_even_odd(row + c.j, c.half);
}
// Where these columns are in a row of parameters, which is stored in the order of lanes that load_even_odd gives.
template <class T>
PYGPT_INLINE int64_t lanes(Columns c) {
  return c.j + std::max(c.half, 0) * W<T>;
}

// f(columns, u) for all columns j .. end; u is 0 .. 3 in turn, so that a caller can keep four sums.
template <class T, class F>
PYGPT_INLINE void each_vector(int64_t j, int64_t end, const F& f) {
  constexpr int64_t w = W<T>;
  for (; j + 4 * w <= end; j += 4 * w)
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) f(Columns{j + u / 2 * 2 * w, w, u % 2}, u);
  for (; j + 2 * w <= end; j += 2 * w)
#pragma GCC unroll 2
    for (int u = 0; u < 2; u++) f(Columns{j, w, u}, u);
  for (; j < end; j += w) f(Columns{j, std::min(w, end - j)}, 0);
}
// out = f(columns) for all columns j .. end.
template <class S, class Writer, class F>
PYGPT_INLINE void write_each(int64_t j, int64_t end, const Writer& write, S* out, const F& f) {
  constexpr int64_t w = W<Acc<S>>;
  for (; j + 4 * w <= end; j += 4 * w)
#pragma GCC unroll 2
    for (int64_t i = j; i < j + 4 * w; i += 2 * w) write(out + i, f(Columns{i, w, 0}), f(Columns{i, w, 1}));
  for (; j + 2 * w <= end; j += 2 * w) write(out + j, f(Columns{j, w, 0}), f(Columns{j, w, 1}));
  for (; j < end; j += w) {
    const int64_t n = std::min(w, end - j);
    write(out + j, f(Columns{j, n}), n);
  }
}

// f(columns, sums) adds to the K vectors of sums; out[k] is the total of sums[k] over the row.
template <int K, class T, class F>
PYGPT_INLINE void row_sums(int64_t cols, T (&out)[K], const F& f) {
  Vec<T> total[K] = {};
  for (int64_t j = 0; j < cols; j += kSumColumns) {
    Vec<T> part[4][K] = {};
    each_vector<T>(j, std::min(cols, j + kSumColumns), [&](Columns c, int u) { f(c, part[u]); });
    for (int k = 0; k < K; k++) total[k] += (part[0][k] + part[1][k]) + (part[2][k] + part[3][k]);
  }
  for (int k = 0; k < K; k++) out[k] = hsum<T>(total[k]);
}

template <class T>
PYGPT_INLINE Vec<T> keep_lanes(Vec<T> v, int64_t n) {  // the first n lanes of v, and 0 in the others
  return n < W<T> ? lane_index<T>() < IVec<T>{} + typename IntOf<T>::type(n) ? v : Vec<T>{} : v;
}

template <class S>
struct RowMatrix {
  S* data;
  int64_t stride;
  RowMatrix(Rows r) : data(static_cast<S*>(r.data)), stride(r.stride) {}
  RowMatrix(const void* p, int64_t cols) : data(static_cast<S*>(const_cast<void*>(p))), stride(cols) {}
  S* row(int64_t i) const { return data ? data + i * stride : nullptr; }
};

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
