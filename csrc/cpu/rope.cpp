// rope: each head of q and k at each position, a row of D channels, after an optional RMSNorm.
//
//     x^ = x rstd w, rstd = 1 / sqrt(sum(x^2) / D + eps), or x^ = x
//     y_a = x^_a cos - x^_b sin, y_b = x^_b cos + x^_a sin for each pair (a, b); y = x^ in the channels that remain
//     g = dy rotated by -angle;  dw = sum over rows of g xhat, xhat = x rstd
//     dx = rstd (g w - xhat sum(g w xhat) / D), or dx = g
//
// A task computes all heads of a chunk of positions, whose rows of cos and sin it finds in cache, in the order in which
// these rows lie in memory. dw is summed over groups of rows, group by group in a task, and task by task in order. The
// chunks and the groups depend on the shape alone.
#include <algorithm>
#include <cmath>

#include "arena.h"
#include "parallel.h"
#include "rows.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {
namespace {

constexpr int64_t kTaskElements = 32768;  // the least number of elements of q and k in a task
constexpr int64_t kTasks = 64;  // tasks become larger, up to four times, rather than more than these
constexpr int64_t kHeads = 4;  // heads whose positions are computed side by side, with one row of cos and sin
constexpr int64_t kGroup = 16;  // rows, or tasks, summed before they are added to a total
constexpr int64_t kWork = 4;  // the cost of an element in multiply-adds

// Lanes that separate pairs of neighbours, and that join them again.
struct Evens {
  static constexpr int at(int i) { return 2 * i; }
};
struct Odds {
  static constexpr int at(int i) { return 2 * i + 1; }
};
template <int Lanes, int First>
struct Zip {
  static constexpr int at(int i) { return First + i / 2 + i % 2 * Lanes; }
};

// Where the pairs are in a row of S.
template <class S, bool Interleaved>
struct Pairs {
  using T = Acc<S>;
  static constexpr int64_t w = W<T>;
  int64_t half;

  // The first members a and the second members b of n <= w pairs from pair i on, and 0 in the other lanes.
  PYGPT_INLINE void load(const S* row, int64_t i, int64_t n, Vec<T>& a, Vec<T>& b) const {
    if constexpr (!Interleaved) {
      a = PYGPT_ISA::load(row + i, n), b = PYGPT_ISA::load(row + half + i, n);
    } else if (n == w) {
      separate(row + 2 * i, a, b);
    } else {
      S tail[2 * w] = {};
      std::memcpy(tail, row + 2 * i, size_t(2 * n) * sizeof(S));
      separate(tail, a, b);
    }
  }
  template <class Writer>
  PYGPT_INLINE void store(const Writer& write, S* row, int64_t i, int64_t n, Vec<T> a, Vec<T> b) const {
    if constexpr (!Interleaved) {
      write(row + i, a, n), write(row + half + i, b, n);
    } else if (n == w) {
      join(write, row + 2 * i, a, b);
    } else {
      S tail[2 * w];
      join(PYGPT_ISA::Writer<false>(), tail, a, b);
      std::memcpy(row + 2 * i, tail, size_t(2 * n) * sizeof(S));
    }
  }

 private:
  static constexpr auto lanes = std::make_integer_sequence<int, int(w)>();

  static PYGPT_INLINE void separate(const S* p, Vec<T>& a, Vec<T>& b) {
    a = load_even_odd(p, 0), b = load_even_odd(p, 1);
    if constexpr (std::is_same_v<S, bf16>) return;  // they are the pairs' members already
    const Vec<T> low = a, high = b;
    a = shuffle<T>(low, high, lanes, Evens()), b = shuffle<T>(low, high, lanes, Odds());
  }
  template <class Writer>
  static PYGPT_INLINE void join(const Writer& write, S* p, Vec<T> a, Vec<T> b) {
    if constexpr (std::is_same_v<S, bf16>) return write(p, a, b);
    write(p, shuffle<T>(a, b, lanes, Zip<int(w), 0>()), shuffle<T>(a, b, lanes, Zip<int(w), int(w / 2)>()));
  }
};

template <class S>
PYGPT_INLINE Vec<Acc<S>> load_constant(const Acc<S>* p, int64_t n) {
  return canonical<S>(load(p, n));
}

template <class S>
struct Row {
  using T = Acc<S>;
  const T *cos, *sin, *weight;  // weight may be null in a rotation alone
  const S *x, *dy;
  S *y, *dx;
  T* dw;  // in the order in which a row is walked, padded to whole vectors
  T rstd;
};

template <class S, bool Interleaved>
struct Rotation {
  using T = Acc<S>;
  static constexpr int64_t w = W<T>;
  int64_t cols;
  Pairs<S, Interleaved> pairs;
  Pairs<T, Interleaved> parameters;  // in a row of weights

  // Calls pair(i, n, slot) for n <= w pairs from pair i on, until all are walked, then rest(j, n, slot) for n <= w of
  // the remaining channels from channel j on. slot counts the vectors.
  template <class Pair, class Rest>
  PYGPT_INLINE void walk(const Pair& pair, const Rest& rest) const {
    int64_t slot = 0, i = 0, j = 2 * pairs.half;
    for (; i + w <= pairs.half; i += w, slot += 2) pair(i, w, slot);
    if (i < pairs.half) pair(i, pairs.half - i, slot), slot += 2;
    for (; j < cols; j += w, slot++) rest(j, std::min(w, cols - j), slot);
  }
  int64_t width() const { return (2 * ceil_div(pairs.half, w) + ceil_div(cols - 2 * pairs.half, w)) * w; }

  // y = x rotated by the angle, or with Back by -angle.
  template <bool Back, class Writer>
  PYGPT_INLINE void rotate(const Row<S>& row, const Writer& write) const {
    const S* x = row.x;
    S* y = row.y;
    walk([&](int64_t i, int64_t n, int64_t) {
      Vec<T> a, b;
      pairs.load(x, i, n, a, b);
      const Vec<T> c = load_constant<S>(row.cos + i, n), s = load_constant<S>(row.sin + i, n);
      if constexpr (Back) pairs.store(write, y, i, n, a * c + b * s, b * c - a * s);
      else pairs.store(write, y, i, n, a * c - b * s, b * c + a * s);
    }, [&](int64_t j, int64_t n, int64_t) { write(y + j, load(x + j, n), n); });
  }

  // y = the norm of x, rotated; returns rstd.
  template <class Writer>
  PYGPT_INLINE T normalise(const Row<S>& row, T eps, const Writer& write) const {
    const S* x = row.x;
    Vec<T> even = {}, odd = {};
    int64_t j = 0;
    for (; j + 2 * w <= cols; j += 2 * w) {
      const Vec<T> a = load_even_odd(x + j, 0), b = load_even_odd(x + j, 1);
      even += a * a, odd += b * b;
    }
    for (; j < cols; j += w) {
      const Vec<T> a = load(x + j, cols - j);
      even += a * a;
    }
    const T rstd = 1 / std::sqrt(hsum<T>(even + odd) / T(cols) + eps);
    walk([&](int64_t i, int64_t n, int64_t) {
      Vec<T> a, b, wa, wb;
      pairs.load(x, i, n, a, b), parameters.load(row.weight, i, n, wa, wb);
      a *= rstd * canonical<S>(wa), b *= rstd * canonical<S>(wb);
      const Vec<T> c = load_constant<S>(row.cos + i, n), s = load_constant<S>(row.sin + i, n);
      pairs.store(write, row.y, i, n, a * c - b * s, b * c + a * s);
    }, [&](int64_t j, int64_t n, int64_t) {
      write(row.y + j, load(x + j, n) * (rstd * load_constant<S>(row.weight + j, n)), n);
    });
    return rstd;
  }

  // The backward of normalise: writes dx, unless it is null, and adds to dw. g holds a row between its two passes.
  template <class Writer>
  PYGPT_INLINE void differentiate(const Row<S>& row, T* g, const Writer& write) const {
    const T rstd = row.rstd;
    Vec<T> sums[2] = {};
    const auto add = [&](int64_t slot, Vec<T> gradient, Vec<T> xhat, Vec<T> weight) {
      store(row.dw + slot * w, load(row.dw + slot * w) + gradient * xhat);
      gradient *= weight;
      store(g + slot * w, gradient);
      sums[slot % 2] += gradient * xhat;
    };
    walk([&](int64_t i, int64_t n, int64_t slot) {
      Vec<T> a, b, xa, xb, wa, wb;
      pairs.load(row.dy, i, n, a, b), pairs.load(row.x, i, n, xa, xb), parameters.load(row.weight, i, n, wa, wb);
      const Vec<T> c = load_constant<S>(row.cos + i, n), s = load_constant<S>(row.sin + i, n);
      add(slot, a * c + b * s, xa * rstd, canonical<S>(wa)), add(slot + 1, b * c - a * s, xb * rstd, canonical<S>(wb));
    }, [&](int64_t j, int64_t n, int64_t slot) {
      add(slot, load(row.dy + j, n), load(row.x + j, n) * rstd, load_constant<S>(row.weight + j, n));
    });
    if (!row.dx) return;
    const T mean = hsum<T>(sums[0] + sums[1]) / T(cols);
    walk([&](int64_t i, int64_t n, int64_t slot) {
      Vec<T> xa, xb;
      pairs.load(row.x, i, n, xa, xb);
      pairs.store(write, row.dx, i, n, (load(g + slot * w) - xa * rstd * mean) * rstd,
                  (load(g + (slot + 1) * w) - xb * rstd * mean) * rstd);
    }, [&](int64_t j, int64_t n, int64_t slot) {
      write(row.dx + j, (load(g + slot * w) - load(row.x + j, n) * rstd * mean) * rstd, n);
    });
  }
};

// The tasks of a call: chunks of positions of one batch entry.
struct Tasks {
  int64_t length, chunk, chunks, count, work;
  explicit Tasks(const RopeArgs& a) : length(a.length) {
    const int64_t elements = std::max<int64_t>((a.sides[0].heads + a.sides[1].heads) * a.head_dim, 1);
    const int64_t least = std::max<int64_t>(kTaskElements / elements, 1);
    chunk = std::clamp(ceil_div(a.batch * length, kTasks), least, 4 * least);
    chunks = ceil_div(length, chunk), count = a.batch * chunks, work = std::min(chunk, length) * elements * kWork;
  }
};

// Calls body(head, position) for all heads at the positions begin .. end - 1. Where the heads of a position do not lie
// together in x, a few heads take turns: memory is read in long runs, and a row of cos and sin is used several times.
template <class F>
PYGPT_INLINE void each_row(const RopeSide& side, const Heads& x, int64_t begin, int64_t end, const F& body) {
  const int64_t step = x.stride[1] <= x.stride[2] ? side.heads : kHeads;
  for (int64_t first = 0; first < side.heads; first += step)
    for (int64_t t = begin; t < end; t++)
      for (int64_t h = first; h < std::min(side.heads, first + step); h++) body(h, t);
}

template <class S>
PYGPT_INLINE S* at(const Heads& x, int64_t b, int64_t h, int64_t t) {
  return static_cast<S*>(x.data) + b * x.stride[0] + h * x.stride[1] + t * x.stride[2];
}

template <class S>
PYGPT_INLINE void set_tables(const RopeArgs& a, int64_t b, int64_t t, Row<S>& row) {
  int64_t r = t;
  if (a.positions) {
    const int64_t i = b * a.positions_stride + t;
    r = a.short_positions ? static_cast<const int32_t*>(a.positions)[i] : static_cast<const int64_t*>(a.positions)[i];
  }
  const int64_t offset = b * a.table_stride + r * a.half;
  row.cos = static_cast<const Acc<S>*>(a.cos) + offset, row.sin = static_cast<const Acc<S>*>(a.sin) + offset;
}

template <class S>
bool exceeds(const RopeArgs& a, int tensors) {
  return exceeds_caches(a.batch * a.length * (a.sides[0].heads + a.sides[1].heads) * a.head_dim * int64_t(sizeof(S)) *
                        tensors);
}

template <class S, bool Interleaved, bool Nontemporal>
void forward(const RopeArgs& a) {
  using T = Acc<S>;
  const Rotation<S, Interleaved> rotation{a.head_dim, {a.half}, {a.half}};
  const Tasks tasks(a);
  parallel_for(tasks.count, [&](int64_t first, int64_t last) {
    const Writer<Nontemporal> write;
    for (int64_t task = first; task < last; task++) {
      const int64_t b = task / tasks.chunks, begin = task % tasks.chunks * tasks.chunk;
      for (const RopeSide& side : a.sides)
        each_row(side, side.x, begin, std::min(a.length, begin + tasks.chunk), [&](int64_t h, int64_t t) {
          Row<S> row{};
          set_tables(a, b, t, row);
          row.x = at<S>(side.x, b, h, t), row.y = at<S>(side.y, b, h, t),
          row.weight = static_cast<const T*>(side.weight);
          if (!side.weight) return rotation.template rotate<false>(row, write);
          static_cast<T*>(side.rstd)[(b * side.heads + h) * a.length + t] = rotation.normalise(row, T(a.eps), write);
        });
    }
  }, tasks.work);
}

// One task's dw of one side, in the order in which a row is walked: sums of groups, each kGroup rows.
template <class T>
struct WeightGradient {
  T *group, *total;
  int64_t width, rows = 0;

  WeightGradient(T* group, T* total, int64_t width) : group(group), total(total), width(width) {
    std::fill(group, group + width, T(0)), std::fill(total, total + width, T(0));
  }
  void count_row() {
    if (++rows % kGroup == 0) flush();
  }
  void flush() {
    for (int64_t j = 0; j < width; j += W<T>)
      store(total + j, load(total + j) + load(group + j)), store(group + j, Vec<T>{});
  }
};

// dweight = the sum of the tasks' lines, which are `stride` apart.
template <class T, bool Interleaved>
void sum_tasks(const RopeArgs& a, int64_t tasks, const T* lines, int64_t stride, T* dweight) {
  const Rotation<T, Interleaved> rotation{a.head_dim, {a.half}, {a.half}};
  const Writer<false> write;
  const auto sum = [&](int64_t slot) {
    Vec<T> total = {};
    for (int64_t i = 0; i < tasks;) {
      Vec<T> group = {};
      for (const int64_t last = std::min(tasks, i + kGroup); i < last; i++)
        group += load(lines + i * stride + slot * W<T>);
      total += group;
    }
    return total;
  };
  rotation.walk([&](int64_t i, int64_t n, int64_t slot) {
    rotation.pairs.store(write, dweight, i, n, sum(slot), sum(slot + 1));
  }, [&](int64_t j, int64_t n, int64_t slot) { write(dweight + j, sum(slot), n); });
}

template <class S, bool Interleaved, bool Nontemporal>
void backward(const RopeArgs& a) {
  using T = Acc<S>;
  const Rotation<S, Interleaved> rotation{a.head_dim, {a.half}, {a.half}};
  const Tasks tasks(a);
  const int64_t width = rotation.width();
  const bool has_lines = a.sides[0].dweight || a.sides[1].dweight;  // else the sums are thrown away
  T* lines = has_lines ? scratch<T>(Region::parameter_gradient_partials, tasks.count * 2 * width) : nullptr;
  parallel_for(tasks.count, [&](int64_t first, int64_t last) {
    const Writer<Nontemporal> write;
    T* const g = scratch<T>(Region::parameter_gradients, 3 * width);
    for (int64_t task = first; task < last; task++) {
      const int64_t b = task / tasks.chunks, begin = task % tasks.chunks * tasks.chunk;
      for (int i = 0; i < 2; i++) {
        const RopeSide& side = a.sides[i];
        WeightGradient<T> dw(g + width, lines ? lines + (task * 2 + i) * width : g + 2 * width, width);
        each_row(side, side.dy, begin, std::min(a.length, begin + tasks.chunk), [&](int64_t h, int64_t t) {
          Row<S> row{};
          set_tables(a, b, t, row);
          const S* dy = at<S>(side.dy, b, h, t);
          S* dx = side.dx.data ? at<S>(side.dx, b, h, t) : nullptr;
          if (!side.weight) {
            row.x = dy, row.y = dx;
            return rotation.template rotate<true>(row, write);
          }
          row.dy = dy, row.dx = dx, row.x = at<S>(side.x, b, h, t), row.dw = dw.group;
          row.weight = static_cast<const T*>(side.weight);
          row.rstd = canonical_nan(static_cast<const T*>(side.rstd)[(b * side.heads + h) * a.length + t]);
          rotation.differentiate(row, g, write);
          dw.count_row();
        });
        dw.flush();
      }
    }
  }, 2 * tasks.work);
  for (int i = 0; i < 2; i++)
    if (a.sides[i].dweight)
      sum_tasks<T, Interleaved>(a, tasks.count, lines + i * width, 2 * width, static_cast<T*>(a.sides[i].dweight));
}

}  // namespace

void rope_fwd(const RopeArgs& a) {
  visit(a.dtype, [&](auto s) {
    visit(exceeds<decltype(s)>(a, 2), [&](auto nontemporal) {
      visit(a.interleaved, [&](auto interleaved) { forward<decltype(s), interleaved, nontemporal>(a); });
    });
  });
}

void rope_bwd(const RopeArgs& a) {
  const bool with_norm = a.sides[0].weight || a.sides[1].weight;
  visit(a.dtype, [&](auto s) {
    visit(exceeds<decltype(s)>(a, with_norm ? 3 : 2), [&](auto nontemporal) {
      visit(a.interleaved, [&](auto interleaved) { backward<decltype(s), interleaved, nontemporal>(a); });
    });
  });
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
