// cross_entropy of logits x (N, V), and linear_cross_entropy, whose logits x W^T + b exist for one chunk of rows at a
// time. pygpt/ops/loss.py has the formulas.
//
// Forward reads a row of logits once: block by block, it takes the block's maximum and then, from L1, the sum of
// exp(x - maximum so far), to which the sum of the blocks before is rescaled (Milakov and Gimelshein 2018). Smoothing
// reads the row again, from cache, as its terms are exact only with the final maximum. Backward is one pass, which
// writes past the caches where the logits exceed them.
//
// linear_cross_entropy runs the GEMMs of gemm/gemm.h on a chunk of rows:
//     logits = x W^T + b      dlogits over logits      dx = dlogits W      dW += dlogits^T x      db += sums of dlogits
// Logits are float, also of 16-bit operands; dlogits have the operands' type, and forward scales those of float16. dW
// is summed chunk by chunk.
//
// Losses are summed pairwise. Chunks and the order of every sum depend on the shape alone.
#include <algorithm>
#include <cmath>

#include "gemm/gemm.h"
#include "parallel.h"
#include "rows.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {
namespace {

constexpr int64_t kWork = 12;  // the cost of a logit in multiply-adds

// f(begin) + ... + f(end - 1), in halves.
template <class F>
auto pairwise_sum(int64_t begin, int64_t end, const F& f) -> decltype(f(begin)) {
  if (end - begin > 32) {
    const int64_t middle = begin + (end - begin) / 2;
    return pairwise_sum(begin, middle, f) + pairwise_sum(middle, end, f);
  }
  decltype(f(begin)) sum = 0;
  for (; begin < end; begin++) sum += f(begin);
  return sum;
}

// The rows of a call: their targets, and what is computed of each. T is the type of statistics.
template <class T>
struct Loss {
  explicit Loss(const CrossEntropyArgs& a)
      : args(a), classes(a.classes), weight(static_cast<const T*>(a.weight)), smoothing(T(a.label_smoothing)),
        z_loss(T(a.z_loss)), row_max(static_cast<T*>(a.stats)), row_sum(static_cast<T*>(a.stats) + a.rows),
        totals(static_cast<T*>(a.totals)) {}

  bool kept(int64_t i) const { return args.target[i] != args.ignore_index; }
  T weight_of(int64_t c) const { return weight ? canonical_nan(weight[c]) : T(1); }
  T lse(int64_t i) const { return row_max[i] + std::log(row_sum[i]); }
  T squared_lse(int64_t i) const { return kept(i) ? z_loss * lse(i) * lse(i) : T(0); }

  void set_totals() const {
    const auto sum = [&](auto f) {
      return pairwise_sum(0, args.rows, [&](int64_t i) { return kept(i) ? f(args.target[i]) : T(0); });
    };
    totals[0] = sum([&](int64_t c) { return weight_of(c); }), totals[1] = sum([](int64_t) { return T(1); });
  }
  // From the losses of the rows without their squared lse.
  void reduce(const T* row_losses) const {
    const T sum = pairwise_sum(0, args.rows, [&](int64_t i) { return row_losses[i]; });
    const T squares = z_loss == 0 ? T(0) : pairwise_sum(0, args.rows, [&](int64_t i) { return squared_lse(i); });
    const bool mean = args.reduction == Reduction::mean;
    T& loss = *static_cast<T*>(args.loss);
    loss = mean ? sum / totals[0] : sum;
    if (z_loss != 0) loss += mean ? squares / totals[1] : squares;
  }

  const CrossEntropyArgs& args;
  int64_t classes;
  const T* weight;
  T smoothing, z_loss;
  T *row_max, *row_sum, *totals;
};

// ---------------------------------------------------------------- forward
template <class T>
PYGPT_INLINE Vec<T> replace_tail(Vec<T> v, int64_t n, T value) {
  return n < W<T> ? lane_index<T>() < IVec<T>{} + typename IntOf<T>::type(n) ? v : set1(value) : v;
}

// max = the row's maximum, and sum = the sum of exp(x - max). A NaN makes the sum NaN.
template <class S, class T = Acc<S>>
void set_stats(int64_t cols, const S* x, T& max_out, T& sum_out) {
  constexpr T kInf = std::numeric_limits<T>::infinity();
  T row_max = -kInf, sum = 0;
  for (int64_t j = 0; j < cols; j += kSumColumns) {
    const int64_t end = std::min(cols, j + kSumColumns);
    Vec<T> top[4] = {set1(-kInf), set1(-kInf), set1(-kInf), set1(-kInf)}, part[4] = {};
    each_vector<T>(j, end, [&](Columns c, int u) { top[u] = max<T>(replace_tail<T>(at(x, c), c.n, -kInf), top[u]); });
    const T block_max = hmax<T>(max<T>(max<T>(top[0], top[1]), max<T>(top[2], top[3])));
    if (block_max > row_max) sum *= std::exp(row_max - block_max), row_max = block_max;
    const T shift = row_max == -kInf ? T(0) : row_max;  // -inf - -inf would be NaN
    each_vector<T>(j, end, [&](Columns c, int u) { part[u] += keep_lanes<T>(exp<T>(at(x, c) - shift), c.n); });
    sum += hsum<T>((part[0] + part[1]) + (part[2] + part[3]));
  }
  max_out = row_max, sum_out = sum;
}

// The sum of w (lse - x) over the row, w = 1 where it is null. Every term is positive.
template <class S, class T = Acc<S>>
T smoothing_sum(int64_t cols, const S* x, const T* w, T row_max, T log_sum) {
  T sums[1];
  if (w) {
    Vec<T> total = {};
    for (int64_t j = 0; j < cols; j += kSumColumns) {
      Vec<T> part = {};
      for (int64_t i = j, end = std::min(cols, j + kSumColumns); i < end; i += W<T>)
        part += keep_lanes<T>(load(w + i, end - i) * (log_sum - (load(x + i, end - i) - row_max)), end - i);
      total += part;
    }
    return hsum<T>(total);
  }
  row_sums<1>(cols, sums, [&](Columns c, Vec<T>* s) { s[0] += keep_lanes<T>(log_sum - (at(x, c) - row_max), c.n); });
  return sums[0];
}

// The statistics of rows `first` .. first + rows, whose logits begin at x, and their losses: complete ones for
// Reduction::none, else without the squared lse.
template <class S, class T = Acc<S>>
void row_losses(const Loss<T>& loss, int64_t first, int64_t rows, RowMatrix<S> x, T* out) {
  const int64_t cols = loss.classes;
  const T smoothing = loss.smoothing;
  parallel_for(rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const int64_t i = first + r;
      T &row_max = loss.row_max[i], &sum = loss.row_sum[i];
      if (!loss.kept(i)) {
        row_max = sum = out[i] = 0;
        continue;
      }
      const S* row = x.row(r);
      const int64_t target = loss.args.target[i];
      set_stats(cols, row, row_max, sum);
      const T log_sum = std::log(sum);
      out[i] = (1 - smoothing) * loss.weight_of(target) * (log_sum - (to_acc(row[target]) - row_max));
      if (smoothing != 0) out[i] += smoothing / T(cols) * smoothing_sum(cols, row, loss.weight, row_max, log_sum);
      if (loss.args.reduction == Reduction::none && loss.z_loss != 0) out[i] += loss.squared_lse(i);
    }
  }, cols * kWork);
}

template <class T>
T* losses_of_rows(const Loss<T>& loss) {
  const bool none = loss.args.reduction == Reduction::none;
  return none ? static_cast<T*>(loss.args.loss) : scratch<T>(Region::row_losses, loss.args.rows);
}

// ---------------------------------------------------------------- backward
// The upstream gradients of the loss and of the squared lse, for every row or, where per_row is not null, row by row.
template <class T>
struct Upstream {
  T of_loss, of_squares;
  const T* per_row;
  T scale = 1;  // what the gradients are to be divided by

  explicit Upstream(const Loss<T>& loss) {
    const T* dloss = static_cast<const T*>(loss.args.dloss);
    const Reduction reduction = loss.args.reduction;
    per_row = reduction == Reduction::none ? dloss : nullptr;
    of_loss = of_squares = reduction == Reduction::none ? T(0) : *dloss;
    if (reduction == Reduction::mean) of_loss /= loss.totals[0], of_squares /= loss.totals[1];
  }
  Upstream(T scale, T of_squares) : of_loss(scale), of_squares(scale * of_squares), per_row(nullptr), scale(scale) {}
};

// The power of two that scales float16's dlogits in forward (pygpt/ops/loss.py).
template <class T>
T scale_of_float16(const Loss<T>& loss, T of_squares) {
  const CrossEntropyArgs& a = loss.args;
  T bound = 0;
  for (int64_t i = 0; i < a.rows; i++)
    if (const T w = loss.kept(i) ? std::abs(loss.weight_of(a.target[i])) : T(0); std::isfinite(w))
      bound = std::max(bound, w);
  bound *= 1 - loss.smoothing;
  if (loss.smoothing != 0)
    bound += loss.smoothing / T(loss.classes) *
             pairwise_sum(0, loss.classes, [&](int64_t c) { return std::abs(loss.weight_of(c)); });
  if (loss.z_loss != 0) bound += T(1 << 14) * std::abs(loss.z_loss * of_squares);
  return std::ldexp(T(1), 13 - std::clamp(std::ilogb(bound), -100, 127));
}

// dx[c] = softmax exp(x[c] - row_max) - others w[c] - (one if c is the target)
template <class T>
struct GradientRow {
  T row_max, softmax, others, one;
  const T* w;  // or null
  int64_t target;

  // x for a result that is stored as S.
  template <class S>
  PYGPT_INLINE Vec<T> operator()(Vec<T> x, Vec<T> w) const {
    const Vec<T> d = x - row_max;
    if constexpr (std::is_same_v<S, bf16>) return softmax * exp2<S>(d * kLog2e<T>) - others * w;
    else return softmax * exp<T>(d) - others * w;
  }
};

// x may be where dx is, in a wider type.
template <class In, class Out, class Writer, class T = Acc<In>>
void write_gradient(int64_t cols, const In* x, const GradientRow<T>& g, const Writer& write, Out* dx) {
  const T at_target = to_acc(x[g.target]);
  const auto in_order = [&](const T* w) {
    for (int64_t j = 0; j < cols; j += W<T>) {
      Vec<T> v = set1(T(1));
      if (w) v = load(w + j, cols - j), v = v == v ? v : set1(std::numeric_limits<T>::quiet_NaN());
      write(dx + j, g.template operator()<Out>(load(x + j, cols - j), v), cols - j);
    }
  };
  if (g.w) {
    in_order(g.w);
  } else if constexpr (!std::is_same_v<In, Out>) {
    in_order(nullptr);
  } else {
    const int64_t to_line = (-reinterpret_cast<uintptr_t>(dx) & 63) / sizeof(Out), head = std::min(cols, to_line);
    const auto value = [&](Columns c) { return g.template operator()<Out>(at(x, c), set1(T(1))); };
    write_each(0, head, write, dx, value);
    write_each(head, cols, write, dx, value);
  }
  write.fence();
  const T w = g.w ? canonical_nan(g.w[g.target]) : T(1);
  store(dx + g.target, g.template operator()<Out>(set1(at_target), set1(w)) - g.one, 1);
}

// The gradients of rows `first` .. first + rows, whose logits begin at x.
template <class In, class Out, bool nontemporal, class T = Acc<In>>
void row_gradients(const Loss<T>& loss, const Upstream<T>& upstream, int64_t first, int64_t rows, RowMatrix<In> x,
                   RowMatrix<Out> dx) {
  const int64_t cols = loss.classes;
  const T smoothing = loss.smoothing;
  T of_weights[1] = {T(cols)};
  if (smoothing != 0 && loss.weight)
    row_sums<1>(cols, of_weights, [&](Columns c, Vec<T>* s) { s[0] += at(loss.weight, c); });
  parallel_for(rows, [&](int64_t begin, int64_t end) {
    const Writer<nontemporal> write;
    for (int64_t r = begin; r < end; r++) {
      const int64_t i = first + r, target = loss.args.target[i];
      if (!loss.kept(i)) {
        std::memset(dx.row(r), 0, cols * sizeof(Out));
        continue;
      }
      const T of_loss = upstream.per_row ? upstream.per_row[i] : upstream.of_loss;
      const T of_squares = upstream.per_row ? of_loss : upstream.of_squares;
      const T one = (1 - smoothing) * of_loss * loss.weight_of(target), others = of_loss * smoothing / T(cols);
      T factor = one;
      if (smoothing != 0) factor += others * of_weights[0];
      if (loss.z_loss != 0) factor += 2 * loss.z_loss * of_squares * loss.lse(i);
      const GradientRow<T> g = {loss.row_max[i],    canonical_nan(factor / loss.row_sum[i]), canonical_nan(others),
                                canonical_nan(one), smoothing != 0 ? loss.weight : nullptr,  target};
      write_gradient(cols, x.row(r), g, write, dx.row(r));
    }
  }, cols * kWork);
}

// ---------------------------------------------------------------- linear_cross_entropy
template <class S>
struct LinearLoss {
  using T = Acc<S>;

  explicit LinearLoss(const LinearCrossEntropyArgs& a)
      : args(a), loss(a.loss), logits(a.logits, a.loss.classes), V(a.loss.classes), K(a.in) {}

  Matrix<S> x(int64_t first) const {
    return {static_cast<const S*>(args.x.data) + first * args.x.stride, args.x.stride, 1};
  }
  Matrix<S> linear_weight() const {
    return {static_cast<const S*>(args.linear_weight.data), args.linear_weight.stride, 1};
  }

  void set_logits(int64_t first, int64_t rows) const {
    const S* bias = static_cast<const S*>(args.linear_bias);
    gemm_nt(rows, V, K, x(first), linear_weight(),
            [=, out = logits.data, V = V](int64_t i, int64_t j, Vec<T> c, int64_t n) {
      store(out + i * V + j, bias ? c + load(bias + j, n) : c, n);
    });
  }

  // Adds the gradients of rows `first` .. first + rows, from their logits. Dx is S in backward and T in forward,
  // where the sums of dw and db are the results.
  template <class Dx>
  void add_gradients(const Upstream<T>& upstream, int64_t first, int64_t rows, T* dw_sums, T* db_sums) const {
    RowMatrix<S> dlogits(logits.data, V * int64_t(sizeof(T) / sizeof(S)));
    row_gradients<T, S, false>(loss, upstream, first, rows, logits, dlogits);
    const Matrix<S> d = {dlogits.data, dlogits.stride, 1};
    const T unscale = 1 / upstream.scale;
    if (args.dx)
      gemm_nn(rows, K, V, d, linear_weight(),
              [=, out = static_cast<Dx*>(args.dx) + first * K, K = K](int64_t i, int64_t j, Vec<T> c, int64_t n) {
        store(out + i * K + j, c * unscale, n);
      });
    if (!dw_sums && !db_sums) return;
    T* chunk_sums = db_sums ? scratch<T>(Region::class_sums, V) : nullptr;
    // The last chunk rounds dw, where its sums are not the result.
    S* rounded = first + rows == args.loss.rows && args.dw != dw_sums ? static_cast<S*>(args.dw) : nullptr;
    gemm_tn(V, dw_sums ? K : 0, rows, d, x(first), chunk_sums, [=, K = K](int64_t i, int64_t j, Vec<T> c, int64_t n) {
      T* sum = dw_sums + i * K + j;
      c *= unscale;
      if (first > 0) c += load(sum, n);
      rounded ? store(rounded + i * K + j, c, n) : store(sum, c, n);
    });
    for (int64_t j = 0; db_sums && j < V; j++) {
      const T sum = chunk_sums[j] * unscale;
      db_sums[j] = first > 0 ? db_sums[j] + sum : sum;
    }
  }

  // f(first row, rows) for every chunk, and once where there are no rows.
  template <class F>
  void for_chunks(const F& f) const {
    int64_t first = 0;
    do {
      const int64_t rows = std::min(args.chunk, args.loss.rows - first);
      f(first, rows);
      first += rows;
    } while (first < args.loss.rows);
  }

  const LinearCrossEntropyArgs& args;
  Loss<T> loss;
  RowMatrix<T> logits;
  int64_t V, K;
};

}  // namespace

void cross_entropy_fwd(const CrossEntropyArgs& a) {
  visit(a.dtype, [&](auto s) {
    using S = decltype(s);
    const Loss<Acc<S>> loss(a);
    Acc<S>* of_rows = losses_of_rows(loss);
    loss.set_totals();
    row_losses<S>(loss, 0, a.rows, a.x, of_rows);
    if (a.reduction != Reduction::none) loss.reduce(of_rows);
  });
}

void cross_entropy_bwd(const CrossEntropyArgs& a) {
  visit(a.dtype, [&](auto s) {
    using S = decltype(s);
    const Loss<Acc<S>> loss(a);
    visit(exceeds_caches(2 * a.rows * a.classes * sizeof(S)), [&](auto nontemporal) {
      row_gradients<S, S, nontemporal>(loss, Upstream<Acc<S>>(loss), 0, a.rows, a.x, a.dx);
    });
  });
}

void linear_cross_entropy_fwd(const LinearCrossEntropyArgs& a) {
  visit(a.loss.dtype, [&](auto s) {
    using S = decltype(s);
    using T = Acc<S>;
    const LinearLoss<S> linear(a);
    const Loss<T>& loss = linear.loss;
    T* of_rows = losses_of_rows(loss);
    loss.set_totals();
    const bool mean = a.loss.reduction == Reduction::mean;
    const T of_squares = mean ? loss.totals[0] / loss.totals[1] : T(1);
    const Upstream<T> upstream(std::is_same_v<S, f16> ? scale_of_float16(loss, of_squares) : T(1), of_squares);
    linear.for_chunks([&](int64_t first, int64_t rows) {
      linear.set_logits(first, rows);
      row_losses<T>(loss, first, rows, linear.logits, of_rows);
      if (a.dx || a.dw || a.db)
        linear.template add_gradients<T>(upstream, first, rows, static_cast<T*>(a.dw), static_cast<T*>(a.db));
    });
    if (a.loss.reduction != Reduction::none) loss.reduce(of_rows);
  });
}

void linear_cross_entropy_bwd(const LinearCrossEntropyArgs& a) {
  visit(a.loss.dtype, [&](auto s) {
    using S = decltype(s);
    using T = Acc<S>;
    const LinearLoss<S> linear(a);
    T *dw_sums = static_cast<T*>(a.dw_sums), *db_sums = static_cast<T*>(a.db_sums);
    linear.for_chunks([&](int64_t first, int64_t rows) {
      linear.set_logits(first, rows);
      linear.template add_gradients<S>(Upstream<T>(linear.loss), first, rows, dw_sums, db_sums);
    });
    for (int64_t j = 0; a.db && j < linear.V; j += W<T>)
      store(static_cast<S*>(a.db) + j, load(db_sums + j, linear.V - j), linear.V - j);
  });
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
