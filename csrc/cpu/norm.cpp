// layer_norm, add_layer_norm and rms_norm over rows x of width n.
//
//     y = (x - mean) rstd w + b,   mean = sum(x) / n,   rstd = 1 / sqrt(sum((x - mean)^2) / n + eps)
//     dx = rstd (g - sum(g) / n - xhat sum(g xhat) / n) + dsum,   g = dy w,   xhat = (x - mean) rstd
//     dw = sum over rows of dy xhat,   db = sum over rows of dy
//
// rms_norm is the same without the mean (x - mean becomes x, and sum(g) goes). add_layer_norm first
// stores sum = x + residual, rounded to the dtype, and normalises that; dsum is the gradient that
// reaches the sum by its other road. mean and rstd are saved, one number each per row, so that
// backward forms xhat from x without a reduction.
//
// The mean is found twice: once plainly, then, with the variance, as the mean of what centring left
// over. This corrected two-pass scheme (Chan, Golub and LeVeque 1983) takes the rounding error of the
// first mean out of the variance and out of y, even where the mean is a thousand deviations wide.
//
// A row is read from memory once; its other passes find it in cache, and the last, where results go past the caches,
// prefetches the next row. dw and db are summed over chunks of rows, then chunk by chunk in order, each sum in groups
// to keep its chains short; the chunks depend on the shape alone.
#include <algorithm>
#include <cmath>

#include "memory.h"
#include "parallel.h"
#include "vmath.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {
namespace {

constexpr int64_t kSumColumns = 2048;    // columns summed before they are added to a total
constexpr int64_t kRowGroup = 8;       // rows summed before they are added to a total
constexpr int64_t kChunkElements = 16384;   // least number of elements in such a chunk
constexpr int64_t kWork = 8;        // what an element costs, in multiply-adds

// n <= W columns from j on, or the columns that one half of load_even_odd's 2 W from j holds.
struct Columns {
  int64_t j, n;
  int half = -1;
};
template <class S>
PYGPT_INLINE Vec<Acc<S>> at(const S* row, Columns c) {
  return c.half < 0 ? load(row + c.j, c.n) : load_even_odd(row + c.j, c.half);
}
// Where a row of T in the same lanes has them.
template <class T>
PYGPT_INLINE int64_t lanes(Columns c) {
  return c.j + std::max(c.half, 0) * W<T>;
}

// f(columns, u) for all columns j .. end; u = 0..3 in turn, to keep four sums apart.
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
// out[j ..] = f(columns)
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

// out[k] = sum over the row of what f(columns, sums) adds to sums[k].
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
PYGPT_INLINE Vec<T> keep_lanes(Vec<T> v, int64_t n) {  // 0 in the others
  return n < W<T> ? lane_index<T>() < IVec<T>{} + typename IntOf<T>::type(n) ? v : Vec<T>{} : v;
}

// A row of parameters as Acc<S>, in the lanes of each_vector, `value` throughout if there is none.
template <class Tag, class S>
const Acc<S>* parameters(const void* data, int64_t cols, Acc<S> value) {
  using T = Acc<S>;
  const S* p = static_cast<const S*>(data);
  if constexpr (sizeof(S) == sizeof(T))
    if (p) return p;
  T* row = scratch<T, Tag>(cols);
  each_vector<T>(0, cols, [&](Columns c, int) { store(row + lanes<T>(c), p ? at(p, c) : set1(value)); });
  return row;
}
struct Weight;
struct Bias;
struct Partials;
struct Group;
struct Sum;

template <class S>
struct RowMatrix {
  S* data;
  int64_t stride;
  RowMatrix(Rows r) : data(static_cast<S*>(r.data)), stride(r.stride) {}
  RowMatrix(const void* p, int64_t cols) : data(static_cast<S*>(const_cast<void*>(p))), stride(cols) {}
  S* row(int64_t i) const { return data ? data + i * stride : nullptr; }
};

template <class T>
struct Statistics {
  T mean, rstd;
};

// One row forward: y from x, and a copy of x unless that is null. prefetch(j): of column j of the next row.
template <class S, bool Centre, class Writer, class F, class T = Acc<S>>
Statistics<T> forward(int64_t cols, const S* x, const T* w, const T* b, T eps, const Writer& write, S* y, S* copy, const F& prefetch) {
  T shift = 0, left = 0, sums[2];
  if constexpr (Centre) {
    T total[1];
    row_sums<1>(cols, total, [&](Columns c, Vec<T>* s) { s[0] += at(x, c); });
    shift = total[0] / T(cols);
  }
  row_sums<2>(cols, sums, [&](Columns c, Vec<T>* s) {
    Vec<T> d = at(x, c);
    if constexpr (Centre) {
      d = keep_lanes<T>(d - shift, c.n);
      s[0] += d;
    }
    s[1] += d * d;
  });
  if constexpr (Centre) left = sums[0] / T(cols);
  const T variance = sums[1] / T(cols) - left * left;
  const T rstd = 1 / std::sqrt((variance < 0 ? T(0) : variance) + eps), offset = -left * rstd;
  write_each(0, cols, write, y, [&](Columns c) {
    const Vec<T> v = at(x, c), xhat = Centre ? (v - shift) * rstd + offset : v * rstd;
    prefetch(lanes<T>(c));
    return xhat * at(w, c) + at(b, c);
  });
  if (copy) write_each(0, cols, write, copy, [&](Columns c) { return at(x, c); });
  return {shift + left, rstd};
}

template <class S>
void add(int64_t cols, const S* x, const S* residual, S* sum) {
  write_each(0, cols, Writer<false>(), sum, [&](Columns c) { return at(x, c) + at(residual, c); });
}

// One row backward: dx unless it is null; with Params, adds to dw and db (padded to whole vectors).
template <class S, bool Centre, bool Params, class Writer, class F, class T = Acc<S>>
void backward(int64_t cols, const S* dy, const S* dsum, const S* x, const T* w, Statistics<T> saved, const Writer& write,
              S* dx, T* dw, T* db, const F& prefetch) {
  auto xhat = [&](Columns c) {
    Vec<T> v = at(x, c);
    return Centre ? (v - saved.mean) * saved.rstd : v * saved.rstd;
  };
  T sums[2];
  row_sums<2>(cols, sums, [&](Columns c, Vec<T>* s) {
    Vec<T> d = at(dy, c), h = keep_lanes<T>(xhat(c), c.n), g = no_fma(d * at(w, c));
    s[0] += g;
    s[1] += g * h;
    if constexpr (Params) {
      const int64_t j = lanes<T>(c);
      store(dw + j, load(dw + j) + d * h);
      store(db + j, load(db + j) + d);
    }
  });
  if (!dx) return;
  const T mean_g = Centre ? sums[0] / T(cols) : T(0), mean_gh = sums[1] / T(cols);
  write_each(0, cols, write, dx, [&](Columns c) {
    Vec<T> g = no_fma(at(dy, c) * at(w, c));  // in a row of one column g - mean_g is 0
    Vec<T> d = no_fma((g - mean_g - xhat(c) * mean_gh) * saved.rstd);  // fused with dsum it might be here but not there
    prefetch(lanes<T>(c));
    return dsum ? d + at(dsum, c) : d;
  });
}

template <class S, bool Centre, bool Nontemporal>
void norm_fwd(const NormArgs& a) {
  using T = Acc<S>;
  const RowMatrix<S> x(a.x), residual(a.residual), sum(a.sum, a.cols), y(a.y, a.cols);
  const T* w = parameters<Weight, S>(a.weight, a.cols, 1);
  const T* b = parameters<Bias, S>(a.bias, a.cols, 0);
  T *mean = static_cast<T*>(a.mean), *rstd = static_cast<T*>(a.rstd);
  auto body = [&](int64_t begin, int64_t end) {
    const Writer<Nontemporal> write;
    S* unwritten = Nontemporal && residual.data ? scratch<S, Sum>(a.cols) : nullptr;  // sum, until it is written with y
    for (int64_t i = begin; i < end; i++) {
      const S* row = x.row(i);
      if (residual.data) {
        S* summed = unwritten ? unwritten : sum.row(i);
        add(a.cols, row, residual.row(i), summed);
        row = summed;
      }
      auto prefetch = [&](int64_t j) {
        write.prefetch(x.row(i + 1) + j);
        if (residual.data) write.prefetch(residual.row(i + 1) + j);
      };
      Statistics<T> s = forward<S, Centre>(a.cols, row, w, b, T(a.eps), write, y.row(i), unwritten ? sum.row(i) : nullptr, prefetch);
      if (Centre) mean[i] = s.mean;
      rstd[i] = s.rstd;
    }
  };
  parallel_for(a.rows, body, a.cols * kWork);
}

// out = the sum of `chunks` rows of partial sums, `step` apart, in order, kRowGroup at a time.
template <class S>
void reduce(int64_t chunks, int64_t step, int64_t cols, const Acc<S>* partials, void* out) {
  using T = Acc<S>;
  if (!out) return;
  constexpr int64_t kColumns = 1024;
  auto body = [&](int64_t begin, int64_t end) {
    write_each(begin * kColumns, std::min(cols, end * kColumns), Writer<false>(), static_cast<S*>(out), [&](Columns columns) {
      Vec<T> total = {};
      for (int64_t c = 0; c < chunks;) {
        Vec<T> group = {};
        for (int64_t last = std::min(chunks, c + kRowGroup); c < last; c++) group += load(partials + c * step + lanes<T>(columns));
        total += group;
      }
      return total;
    });
  };
  parallel_for(ceil_div(cols, kColumns), body, chunks * kColumns);
}

template <class S, bool Centre, bool Params, bool Nontemporal>
void norm_bwd(const NormArgs& a) {
  using T = Acc<S>;
  const RowMatrix<S> x(a.x), dy(a.dy), dsum(a.dsum), dx(a.dx, a.cols);
  const T* w = parameters<Weight, S>(a.weight, a.cols, 1);
  const T *mean = static_cast<T*>(a.mean), *rstd = static_cast<T*>(a.rstd);
  const int64_t chunk = std::max({int64_t(8), kChunkElements / std::max<int64_t>(a.cols, 1), ceil_div(a.rows, 64)});
  const int64_t chunks = ceil_div(a.rows, chunk), width = round_up(a.cols, W<T>);
  T* partials = Params ? scratch<T, Partials>(chunks * 2 * width) : nullptr;
  auto body = [&](int64_t begin, int64_t end) {
    const Writer<Nontemporal> write;
    T* group = Params ? scratch<T, Group>(2 * width) : nullptr;
    for (int64_t c = begin; c < end; c++) {
      T* total = partials + c * 2 * width;
      if (Params) std::fill(total, total + 2 * width, T(0));
      for (int64_t i = c * chunk, last = std::min(a.rows, i + chunk); i < last;) {
        if (Params) std::fill(group, group + 2 * width, T(0));
        for (int64_t stop = std::min(last, i + kRowGroup); i < stop; i++) {
          auto prefetch = [&](int64_t j) {
            write.prefetch(x.row(i + 1) + j), write.prefetch(dy.row(i + 1) + j);
            if (dsum.data) write.prefetch(dsum.row(i + 1) + j);
          };
          backward<S, Centre, Params>(a.cols, dy.row(i), dsum.row(i), x.row(i), w, {Centre ? canonical_nan(mean[i]) : T(0), canonical_nan(rstd[i])}, write,
                                      dx.row(i), group, group + width, prefetch);
        }
        if (Params)
          for (int64_t j = 0; j < 2 * width; j++) total[j] += group[j];
      }
    }
  };
  parallel_for(chunks, body, chunk * a.cols * 2 * kWork);
  if (Params) {
    reduce<S>(chunks, 2 * width, a.cols, partials, a.dw);
    reduce<S>(chunks, 2 * width, a.cols, partials + width, a.db);
  }
}

template <class S>
int64_t bytes(const NormArgs& a, int tensors) {
  return a.rows * a.cols * int64_t(sizeof(S)) * tensors;
}

}  // namespace

void norm_fwd(const NormArgs& a) {
  visit(a.dtype, [&](auto s) {
    visit(exceeds_caches(bytes<decltype(s)>(a, a.residual.data ? 4 : 2)), [&](auto nontemporal) {
      visit(a.mean != nullptr, [&](auto centre) { norm_fwd<decltype(s), centre, nontemporal>(a); });
    });
  });
}

void norm_bwd(const NormArgs& a) {
  visit(a.dtype, [&](auto s) {
    visit(exceeds_caches(bytes<decltype(s)>(a, a.dsum.data ? 4 : 3)), [&](auto nontemporal) {
      visit(a.mean != nullptr, [&](auto centre) {
        visit(a.dw || a.db, [&](auto params) { norm_bwd<decltype(s), centre, params, nontemporal>(a); });
      });
    });
  });
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
