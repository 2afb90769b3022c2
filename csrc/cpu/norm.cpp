// layer_norm and rms_norm over rows x of width n, or over rows of a sum, with and without dropout.
//
//     y = (x - mean) rstd w + b,   mean = sum(x) / n,   rstd = 1 / sqrt(sum((x - mean)^2) / n + eps)
//     dx = rstd (g - sum(g) / n - xhat sum(g xhat) / n) + dsum,   g = dy w,   xhat = (x - mean) rstd
//     dw = sum over rows of dy xhat,   db = sum over rows of dy
//
// rms_norm is the same with x instead of x - mean, and without sum(g). With a residual (add_layer_norm, add_rms_norm)
// the kernel first stores sum = x + residual, rounded to the dtype, and normalises the stored sum; dsum is the gradient
// from the sum's other consumer (the residual stream). mean and rstd are saved, one value each per row, so that
// backward forms xhat from x without a reduction. With dropout, sum = x f + residual for its factors f, which backward
// draws again: dresidual is the dx above, and dx is dresidual f.
//
// S is the type of x, y, dy and dx, and R that of residual, sum, dsum and dresidual. `General` kernels have dropout, or
// an R or parameters of another type than S.
//
// The corrected two-pass scheme (Chan, Golub and LeVeque 1983) sums x - mean along with its squares. The mean of these
// differences is the rounding error of the mean, and is taken out of the variance and of y, so both are exact even
// where the mean is a thousand standard deviations wide.
//
// A row is read from memory once, and later passes find it in cache. The last pass prefetches the next row where
// results are written past the caches. dw and db are summed over chunks of rows, then chunk by chunk in order, and each
// sum is made of short sums, which round less. The chunks depend on the shape alone.
#include <algorithm>
#include <cmath>

#include "arena.h"
#include "dropout.h"
#include "parallel.h"
#include "rows.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {
namespace {

constexpr int64_t kRowGroup = 8;  // rows summed before they are added to a total
constexpr int64_t kChunkElements = 16384;  // the least number of elements in a chunk of rows
constexpr int64_t kWork = 8;  // the cost of an element in multiply-adds

// A row of parameters of type P plus `offset`, as Acc<S> and in the order of each_vector's lanes. If there are no
// parameters, every element is `value`.
template <class S, class P>
const Acc<S>* parameters(Region region, const void* data, int64_t cols, Acc<S> value, double offset) {
  using T = Acc<S>;
  const P* p = static_cast<const P*>(data);
  if constexpr (sizeof(P) == sizeof(T))
    if (p && offset == 0) return p;
  T* row = scratch<T>(region, cols);
  each_vector<T>(0, cols, [&](Columns c, int) {
    const Vec<T> v = p ? at(p, c) : set1(value);
    store(row + lanes<T>(c), p && offset != 0 ? v + T(offset) : v);
  });
  return row;
}
// The same for the parameters of a.
template <class S, bool General>
const Acc<S>* parameters(const NormArgs& a, Region region, const void* data, Acc<S> value, double offset = 0) {
  if constexpr (General && sizeof(S) == 2)
    if (a.parameter_dtype == DType::f32) return parameters<S, float>(region, data, a.cols, value, offset);
  return parameters<S, S>(region, data, a.cols, value, offset);
}

// out = f(columns) for all columns j .. end. General kernels in bf16, which alone have bf16_in_order, have floats of
// the caller's among their inputs.
template <class S, class Writer, class F>
PYGPT_INLINE void write_results(int64_t j, int64_t end, const Writer& write, S* out, const F& f) {
  if constexpr (std::is_same_v<S, bf16_in_order>)
    write_each(j, end, write, out, [&](Columns c) { return canonical<S>(f(c)); });
  else write_each(j, end, write, out, f);
}

template <class T>
struct Statistics {
  T mean, rstd;
};

template <class S, class R>
struct ForwardRow {
  using T = Acc<S>;
  const R* x;
  const T *w, *b;
  S* y;
  R* copy;  // receives x, unless it is null
};

// One row forward. prefetch(j) prefetches column j of the next row.
template <class S, class R, bool Centre, class Writer, class F, class T = Acc<S>>
PYGPT_INLINE Statistics<T> forward(int64_t cols, T eps, ForwardRow<S, R> row, const Writer& write, const F& prefetch) {
  const R* x = row.x;
  const T *w = row.w, *b = row.b;
  S* y = row.y;
  R* copy = row.copy;
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
  write_results(0, cols, write, y, [&](Columns c) {
    const Vec<T> v = at(x, c), xhat = Centre ? (v - shift) * rstd + offset : v * rstd;
    prefetch(lanes<T>(c));
    return xhat * at(w, c) + at(b, c);
  });
  if (copy) write_each(0, cols, write, copy, [&](Columns c) { return at(x, c); });
  return {shift + left, rstd};
}

template <class S, class R>
void add(int64_t cols, const S* x, const R* residual, R* sum) {
  write_each(0, cols, Writer<false>(), sum, [&](Columns c) { return at(x, c) + at(residual, c); });
}
// Not fused, so that the sum is the same on every instruction set.
template <class S, class R>
void add_dropped(int64_t cols, const S* x, const Acc<S>* factors, const R* residual, R* sum) {
  write_each(0, cols, Writer<false>(), sum,
             [&](Columns c) { return no_fma(at(x, c) * at(factors, c)) + at(residual, c); });
}

// This thread's factors of dropout for a row, or null without dropout.
template <class S, bool General>
const Acc<S>* factors_of(const NormArgs& a, int64_t row) {
  if (!General || !a.seed) return nullptr;
  Acc<S>* factors = scratch<Acc<S>>(Region::dropped_row, round_up(a.cols, 4 * W<float>));
  dropout_row(a.seed, a.threshold, a.keep, row, a.cols, factors);
  return factors;
}

template <class S, class R>
struct BackwardRow {
  using T = Acc<S>;
  const S* dy;
  const R *dsum, *x;  // dsum may be null
  const T* w;
  Statistics<T> saved;
  S* dx;  // not wanted if null
  T *dw, *db;  // padded to whole vectors
  const T* factors;  // dropout's, or null
  R* dresidual;  // not wanted if null, nor in kernels that aren't general
};

// One row backward: writes dx and dresidual and, with Params, adds to dw and db.
template <class S, class R, bool Centre, bool Params, bool General, class Writer, class F, class T = Acc<S>>
PYGPT_INLINE void backward(int64_t cols, const BackwardRow<S, R>& row, const Writer& write, const F& prefetch) {
  const S* dy = row.dy;
  const R *dsum = row.dsum, *x = row.x;
  const T* w = row.w;
  const Statistics<T> saved = row.saved;
  S* dx = row.dx;
  T *dw = row.dw, *db = row.db;
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
  if (!dx && !(General && row.dresidual)) return;
  const T mean_g = Centre ? sums[0] / T(cols) : T(0), mean_gh = sums[1] / T(cols);
  auto gradient = [&](Columns c) {
    Vec<T> g = no_fma(at(dy, c) * at(w, c));  // not fused, so that in a row of one column g - mean_g is 0
    // Not fused either, as the compiler might fuse these sums in one loop and not in another.
    Vec<T> d = no_fma((g - mean_g - no_fma(xhat(c) * mean_gh)) * saved.rstd);
    prefetch(lanes<T>(c));
    return dsum ? d + at(dsum, c) : d;
  };
  if constexpr (General) {
    if (row.dresidual) write_results(0, cols, write, row.dresidual, gradient);
    if (dx && row.factors)
      return write_results(0, cols, write, dx, [&](Columns c) { return gradient(c) * at(row.factors, c); });
    if (!dx) return;
  }
  write_results(0, cols, write, dx, gradient);
}

template <class S, class R, bool Centre, bool Nontemporal, bool General>
void norm_fwd(const NormArgs& a) {
  using T = Acc<S>;
  const RowMatrix<S> x(a.x), y(a.y, a.cols);
  const RowMatrix<R> residual(a.residual), sum(a.sum, a.cols);
  const T* w = parameters<S, General>(a, Region::weight, a.weight, 1, a.weight_offset);
  const T* b = parameters<S, General>(a, Region::bias, a.bias, 0);
  T *mean = static_cast<T*>(a.mean), *rstd = static_cast<T*>(a.rstd);
  auto body = [&](int64_t begin, int64_t end) {
    const Writer<Nontemporal> write;
    // The row of sum, until it is written along with y.
    R* summed_row = Nontemporal && residual.data ? scratch<R>(Region::summed_row, a.cols) : nullptr;
    for (int64_t i = begin; i < end; i++) {
      const R* row = nullptr;
      if constexpr (!General) row = x.row(i);
      if (General || residual.data) {
        R* summed = summed_row ? summed_row : sum.row(i);
        const T* factors = factors_of<S, General>(a, i);
        if (factors) add_dropped(a.cols, x.row(i), factors, residual.row(i), summed);
        else add(a.cols, x.row(i), residual.row(i), summed);
        row = summed;
      }
      auto prefetch = [&](int64_t j) {
        write.prefetch(x.row(i + 1) + j);
        if (residual.data) write.prefetch(residual.row(i + 1) + j);
      };
      const ForwardRow<S, R> out = {row, w, b, y.row(i), summed_row ? sum.row(i) : nullptr};
      const Statistics<T> s = forward<S, R, Centre>(a.cols, T(a.eps), out, write, prefetch);
      if (Centre) mean[i] = s.mean;
      rstd[i] = s.rstd;
    }
  };
  parallel_for(a.rows, body, a.cols * kWork);
}

// out = the sum of `chunks` rows of partial sums, `stride` elements apart, added in order, kRowGroup rows at a time.
template <class S, class P>
void reduce(int64_t chunks, int64_t stride, int64_t cols, const Acc<S>* partials, void* out) {
  using T = Acc<S>;
  if (!out) return;
  constexpr int64_t kColumns = 1024;
  auto body = [&](int64_t begin, int64_t end) {
    write_results(begin * kColumns, std::min(cols, end * kColumns), Writer<false>(), static_cast<P*>(out),
                  [&](Columns columns) {
      Vec<T> total = {};
      for (int64_t c = 0; c < chunks;) {
        Vec<T> group = {};
        for (int64_t last = std::min(chunks, c + kRowGroup); c < last; c++)
          group += load(partials + c * stride + lanes<T>(columns));
        total += group;
      }
      return total;
    });
  };
  parallel_for(ceil_div(cols, kColumns), body, chunks * kColumns);
}

template <class S, class R, bool Centre, bool Params, bool Nontemporal, bool General>
void norm_bwd(const NormArgs& a) {
  using T = Acc<S>;
  const RowMatrix<S> dy(a.dy), dx(a.dx, a.cols);
  const RowMatrix<R> x(a.x), dsum(a.dsum), dresidual(a.dresidual, a.cols);
  const T* w = parameters<S, General>(a, Region::weight, a.weight, 1, a.weight_offset);
  const T *mean = static_cast<T*>(a.mean), *rstd = static_cast<T*>(a.rstd);
  const int64_t chunk = std::max({int64_t(8), kChunkElements / std::max<int64_t>(a.cols, 1), ceil_div(a.rows, 64)});
  const int64_t chunks = ceil_div(a.rows, chunk), width = round_up(a.cols, W<T>);
  T* partials = Params ? scratch<T>(Region::parameter_gradient_partials, chunks * 2 * width) : nullptr;
  auto body = [&](int64_t begin, int64_t end) {
    const Writer<Nontemporal> write;
    T* group = Params ? scratch<T>(Region::parameter_gradients, 2 * width) : nullptr;
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
          const Statistics<T> saved = {Centre ? canonical_nan(mean[i]) : T(0), canonical_nan(rstd[i])};
          BackwardRow<S, R> row = {dy.row(i), dsum.row(i), x.row(i), w, saved, dx.row(i), group, group + width};
          if constexpr (General) row.factors = dx.data ? factors_of<S, true>(a, i) : nullptr;
          if constexpr (General) row.dresidual = dresidual.row(i);
          backward<S, R, Centre, Params, General>(a.cols, row, write, prefetch);
        }
        if (Params)
          for (int64_t j = 0; j < 2 * width; j++) total[j] += group[j];
      }
    }
  };
  parallel_for(chunks, body, chunk * a.cols * 2 * kWork);
  if constexpr (Params) {
    auto reduce_to = [&](auto p) {
      reduce<S, decltype(p)>(chunks, 2 * width, a.cols, partials, a.dw);
      reduce<S, decltype(p)>(chunks, 2 * width, a.cols, partials + width, a.db);
    };
    if (General && sizeof(S) == 2 && a.parameter_dtype == DType::f32) reduce_to(T{});
    else reduce_to(S{});
  }
}

// f(S{}, R{}, whether the kernel is general)
template <class F>
void visit_types(const NormArgs& a, const F& f) {
  visit(a.dtype, [&](auto s) {
    using S = decltype(s);
    using InOrder = std::conditional_t<std::is_same_v<S, bf16>, bf16_in_order, S>;
    if (a.plain()) f(S{}, S{}, std::false_type{});
    else if (a.sum_dtype == a.dtype) f(InOrder{}, InOrder{}, std::true_type{});
    else if constexpr (sizeof(S) == 2) f(InOrder{}, float{}, std::true_type{});
  });
}

}  // namespace

void norm_fwd(const NormArgs& a) {
  visit_types(a, [&](auto s, auto r, auto general) {
    using S = decltype(s);
    using R = decltype(r);
    const int64_t row_bytes = a.residual.data ? 2 * (sizeof(S) + sizeof(R)) : 2 * sizeof(S);
    visit(exceeds_caches(a.rows * a.cols * row_bytes), [&](auto nontemporal) {
      visit(a.mean != nullptr, [&](auto centre) { norm_fwd<S, R, centre, nontemporal, general>(a); });
    });
  });
}

void norm_bwd(const NormArgs& a) {
  visit_types(a, [&](auto s, auto r, auto general) {
    using S = decltype(s);
    using R = decltype(r);
    const int64_t row_bytes = 2 * sizeof(S) + sizeof(R) * (1 + (a.dsum.data != nullptr) + (a.dresidual != nullptr));
    visit(exceeds_caches(a.rows * a.cols * row_bytes), [&](auto nontemporal) {
      visit(a.mean != nullptr, [&](auto centre) {
        visit(a.dw || a.db, [&](auto params) { norm_bwd<S, R, centre, params, nontemporal, general>(a); });
      });
    });
  });
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
