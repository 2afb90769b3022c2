// linear:  y = x W^T + b                        x (M, K), W (N, K), b (N), y (M, N)
// mlp:     y = act(x W1^T + b1) W2^T + b2       W1 (H, K), W2 (N, H)
//
// Each is a chain of the one packed GEMM. Forward, bias and activation are applied to the finished
// tile in registers; kept for backward are hidden = act(pre) (M, H), which dW2 needs, and for the
// gelus pre itself, whose derivative is not a function of hidden. Backward:
//     dW2 = dy^T hidden        db2 = row sums of dy^T
//     dpre = (dy W2) act'(pre)             <- in the GEMM's epilogue
//     dW1 = dpre^T x           db1 = row sums of dpre^T
//     dx = dpre W1
// The bias gradients are gathered while the panels of the transposed operand are packed, so they
// cost no pass over memory, and in a fixed order.
//
// A few rows (decoding) are another problem: reading W once is all the work, and packing it would
// triple that. So x W^T takes dot products straight from W's rows, and dy W adds up weighted rows.
#include "gemm.h"
#include "vmath.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {
namespace {

template <class S>
Matrix<S> matrix(Rows r) {
  return {static_cast<const S*>(r.data), r.stride, 1};
}
template <class S>
Matrix<S> matrix(const void* data, int64_t stride) {
  return {static_cast<const S*>(data), stride, 1};
}

constexpr int64_t kFewRows = 16;
struct FewRows;

// What Rows rows of A are multiplied with at a time, so that registers hold the sums: kVectors of B's columns, or kColumns
// columns, which with kSet of the rows make a vector (with one row perhaps half of it).
template <int Rows, class T>
struct Few {
  static constexpr int kVectors = std::min(kRegisters / 2 / Rows, 8), kColumns = std::min(kVectors, W<T>);
  static constexpr int kSet = std::min(Rows, W<T> / kColumns);
};

// Dot products of Rows rows of a (K long, in steps, padded with zeros to whole vectors) with kColumns rows of b (the last
// of `columns` again where there are fewer): kSet x kColumns to a vector, vectors kSet apart in out. The next rows of b
// are asked for meanwhile: 8 rows then take little longer than one (768 -> 3072, float32: 350 us instead of 410; one
// row 315). No Matrix is passed: GCC copies it through memory, in pieces that stall its reading (20 ns a call).
template <int Rows, class S, class U, class T = typename Step<U>::Sum>
__attribute__((noinline)) void dots(int64_t K, const U* a, int64_t lda, const S* b, int64_t ldb, int64_t columns, T* out) {
  using F = Few<Rows, T>;
  constexpr int d = Step<U>::kDepth;
  Vec<T> c[Rows * F::kColumns] = {};
  auto steps = [&](int64_t s, auto load_b) {
    Vec<T> v[F::kColumns];
#pragma GCC unroll 8
    for (int64_t j = 0; j < F::kColumns; j++) {
      const S* row = b + std::min(j, columns - 1) * ldb;
      if (Rows > 1) __builtin_prefetch(row + F::kColumns * ldb + s * d);
      v[j] = load_b(row + s * d);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) {
      const Vec<T> ar = rounded(Step<U>::lanes(a + r * lda + s));  // loaded once, not with every multiplication
#pragma GCC unroll 8
      for (int j = 0; j < F::kColumns; j++) c[r * F::kColumns + j] = Step<U>::multiply_add(ar, v[j], c[r * F::kColumns + j]);
    }
  };
  int64_t s = 0;
  for (; (s + W<T>) * d <= K; s += W<T>) steps(s, [](const S* p) { return Read<U>().along(p); });
  if (s * d < K) steps(s, [&](const S* p) { return Read<U>().first(p, K - s * d); });
#pragma GCC unroll 8
  for (int i = 0; i < Rows; i += F::kSet) store(out + i * W<T>, sums<T, F::kSet * F::kColumns>(c + i * F::kColumns));
}

// C = A B^T for M <= kFewRows rows, Rows at a time; the rows of A and of B are contiguous.
template <int Rows, class S, class Epilogue>
void few_rows_transposed(int64_t M, int64_t N, int64_t K, Matrix<S> A, Matrix<S> B, const Epilogue& epilogue) {
  using T = Acc<S>;
  using U = StepOf<S>;
  using F = Few<Rows, T>;
  constexpr int d = Step<U>::kDepth;
  const int64_t rows = round_up(M, Rows), lda = round_up(ceil_div(K, d), W<T>);
  U* a = scratch<U, FewRows>(rows * lda);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t s = 0; s < lda; s += W<T>)
      store(reinterpret_cast<T*>(a + i * lda + s), i < M ? Read<U>().first(A.data + i * A.rs + s * d, K - s * d) : Vec<T>{});
  parallel_for(ceil_div(N, W<T>), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      const int64_t j0 = block * W<T>, n = std::min<int64_t>(W<T>, N - j0);
      alignas(kVectorBytes) T c[kFewRows + 1][W<T>];  // and a vector that half of the last may reach into
      for (int64_t j = 0; j < n; j += F::kColumns)
        for (int64_t i = 0; i < rows; i += Rows)
          dots<Rows>(K, a + i * lda, lda, B.data + (j0 + j) * B.rs, B.rs, n - j, &c[i][0] + j * F::kSet);
      for (int64_t i = 0; i < M; i += F::kSet) {
        Vec<T> set[F::kSet];
        for (int r = 0; r < F::kSet; r++) set[r] = load(c[i + r]);
        transpose<T>(set);
        for (int r = 0; r < F::kSet && i + r < M; r++) epilogue(i + r, j0, set[r], n);
      }
    }
  }, W<T> * K * M);
}

// sum += A B: Rows rows, packed as [step][Rows], by Vectors of columns of b's rows; what lies behind those is asked for.
template <int Rows, int Vectors, class S, class U, class T = typename Step<U>::Sum>
__attribute__((noinline)) void add_rows(int64_t steps, const U* a, const S* b, int64_t ldb, T* sum, int64_t ld) {
  constexpr int d = Step<U>::kDepth;
  Vec<T> c[Rows][Vectors] = {};
  for (int64_t s = 0; s < steps; s++, a += Rows, b += d * ldb) {
    Vec<T> v[Vectors];
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; j++) {
      for (int k = 0; k < d; k++) __builtin_prefetch(b + k * ldb + (Vectors + j) * W<T>);
      v[j] = Read<U>().across(b + j * W<T>, ldb);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) {
      const Vec<T> ar = Step<U>::all(a[r]);
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; j++) c[r][j] = Step<U>::multiply_add(ar, v[j], c[r][j]);
    }
  }
  for (int r = 0; r < Rows; r++)
    for (int j = 0; j < Vectors; j++) store(sum + r * ld + j * W<T>, load(sum + r * ld + j * W<T>) + c[r][j]);
}

// C = A B for M <= kFewRows rows, Rows at a time; the rows of A and of B are contiguous, those of B whole vectors. Blocks of
// B's rows are summed from zero, as in gemm.h, but of few rows, for each is a page or more of its own. (Measured, dx of 8 x
// 768 -> 3072 in float32: 0.40 ms, packed 1.22; to read W once takes 0.31.)
template <int Rows, class S, class Epilogue>
void few_rows(int64_t M, int64_t N, int64_t K, Matrix<S> A, Matrix<S> B, const Epilogue& epilogue) {
  using T = Acc<S>;
  using U = StepOf<S>;
  struct Sums;
  constexpr int64_t d = Step<U>::kDepth, kBlock = 64, kVectors = Few<Rows, T>::kVectors;
  const int64_t rows = round_up(M, Rows), steps = K / d, apart = steps_of<U>(K);
  U* a = scratch<U, FewRows>(rows * apart);
  for (int64_t i = 0; i < M; i += Rows) pack_panel<Rows>(a + i * apart, A.at(i, 0), std::min<int64_t>(Rows, M - i), K);
  parallel_for(ceil_div(N, kVectors * W<T>), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kVectors * W<T>, n = std::min(N, end * kVectors * W<T>) - first;
    T* sum = scratch<T, Sums>(rows * n);
    std::fill(sum, sum + rows * n, T(0));
    for (int64_t s = 0; s < steps; s += kBlock)
      in_groups<kVectors>(n / W<T>, [&](int64_t j, auto vectors) {
        for (int64_t i = 0; i < rows; i += Rows)
          add_rows<Rows, vectors.value>(std::min(kBlock, steps - s), a + i * apart + s * Rows,
                                        B.data + s * d * B.rs + first + j * W<T>, B.rs, sum + i * n + j * W<T>, n);
      });
    for (int64_t i = 0; i < M; i++)
      for (int64_t j = 0; j < n; j += W<T>) epilogue(i, first + j, load(sum + i * n + j), int64_t(W<T>));
  }, kVectors * W<T> * K * M);
}

// f(how many rows to take at a time) for 1 .. kFewRows rows.
template <class F>
void visit_rows(int64_t M, const F& f) {
  if (M == 1) f(std::integral_constant<int, 1>());
  else if (M == 2) f(std::integral_constant<int, 2>());
  else if (kRegisters == 32 && (M - 1) % 8 >= 4) f(std::integral_constant<int, 8>());
  else f(std::integral_constant<int, 4>());
}

// y = epilogue(x W^T): rows times a weight matrix.
template <class S, class Epilogue>
void times_transposed(int64_t M, int64_t N, int64_t K, Matrix<S> x, Matrix<S> w, const Epilogue& epilogue) {
  if (M <= kFewRows)
    visit_rows(M, [&](auto rows) { few_rows_transposed<rows.value>(M, N, K, x, w, epilogue); });
  else
    gemm<S>(M, N, K, x, w.transposed(), nullptr, epilogue);
}

// y = epilogue(x W).
template <class S, class Epilogue>
void times(int64_t M, int64_t N, int64_t K, Matrix<S> x, Matrix<S> w, const Epilogue& epilogue) {
  if (M <= kFewRows && N % W<Acc<S>> == 0 && K % Step<StepOf<S>>::kDepth == 0)
    visit_rows(M, [&](auto rows) { few_rows<rows.value>(M, N, K, x, w, epilogue); });
  else
    gemm<S>(M, N, K, x, w, nullptr, epilogue);
}

template <class S>
PYGPT_INLINE Vec<Acc<S>> bias_at(const S* bias, int64_t j, int64_t n) {
  return bias ? load(bias + j, n) : Vec<Acc<S>>{};
}

// Stores results, `size` in all. Where AMX makes them so fast that to read the lines they lie in would be a third of the time,
// more than L2 holds go past the caches (4096 x 768 -> 3072: 15.9 ms instead of 20.2; with AVX-512 it makes no difference).
template <class S>
struct Results {
  bool many;
  explicit Results(int64_t size) : many(size * int64_t(sizeof(S)) > 4 << 20) {}
  PYGPT_INLINE void operator()(S* p, Vec<Acc<S>> x, int64_t n) const {
    kInTiles<StepOf<S>> && many ? store_past(p, x, n) : store(p, x, n);
  }
};

template <class S>
auto store_to(void* out, int64_t rows, int64_t stride, const void* bias = nullptr) {
  return [write = Results<S>(rows * stride), out = static_cast<S*>(out), stride, bias = static_cast<const S*>(bias)](
             int64_t i, int64_t j, Vec<Acc<S>> c, int64_t n) { write(out + i * stride + j, c + bias_at(bias, j, n), n); };
}

// dW = dy^T x (N, K) and db = column sums of dy (N), over M rows; either may be unwanted (null).
template <class S>
void weight_gradient(int64_t M, int64_t N, int64_t K, Matrix<S> dy, Matrix<S> x, void* dw, void* db) {
  if (!dw && !db) return;
  using T = Acc<S>;
  struct Sums;
  T* sums = db ? scratch<T, Sums>(N) : nullptr;
  gemm<S>(N, dw ? K : 0, M, dy.transposed(), x, sums, store_to<S>(dw, N, K));
  if (db)
    for (int64_t j = 0; j < N; j += W<T>) store(static_cast<S*>(db) + j, load(sums + j, N - j), N - j);
}

// The activation is chosen vector by vector, not by template: the branch is predicted, and the GEMM
// around it is compiled once per type.
template <class S, class T = Acc<S>>
PYGPT_INLINE Vec<T> activated(Activation a, Vec<T> x) {
  switch (a) {
    case Activation::gelu: return activate<Activation::gelu, S>(x);
    case Activation::gelu_tanh: return activate<Activation::gelu_tanh, S>(x);
    case Activation::relu: return activate<Activation::relu, S>(x);
    default: return activate<Activation::relu2, S>(x);
  }
}
template <class S, class T = Acc<S>>
PYGPT_INLINE Vec<T> backpropagated(Activation a, Vec<T> d, Vec<T> saved) {
  switch (a) {
    case Activation::gelu: return backpropagate<Activation::gelu, S>(d, saved);
    case Activation::gelu_tanh: return backpropagate<Activation::gelu_tanh, S>(d, saved);
    case Activation::relu: return backpropagate<Activation::relu, S>(d, saved);
    default: return backpropagate<Activation::relu2, S>(d, saved);
  }
}

}  // namespace

void linear_fwd(const LinearArgs& a) {
  visit(a.dtype, [&](auto s) {
    using S = decltype(s);
    times_transposed(a.rows, a.out, a.in, matrix<S>(a.x), matrix<S>(a.weight), store_to<S>(a.y.data, a.rows, a.y.stride, a.bias));
  });
}

void linear_bwd(const LinearArgs& a) {
  visit(a.dtype, [&](auto s) {
    using S = decltype(s);
    const auto dy = matrix<S>(a.dy);
    if (a.dx) times(a.rows, a.in, a.out, dy, matrix<S>(a.weight), store_to<S>(a.dx, a.rows, a.in));
    weight_gradient(a.rows, a.out, a.in, dy, matrix<S>(a.x), a.dw, a.db);
  });
}

void mlp_fwd(const MlpArgs& a) {
  visit(a.dtype, [&](auto s) {
    using S = decltype(s);
    const int64_t H = a.hidden_dim;
    S *hidden = static_cast<S*>(a.hidden), *pre = static_cast<S*>(a.pre);
    const S* bias = static_cast<const S*>(a.fc_bias);
    times_transposed(a.rows, H, a.in, matrix<S>(a.x), matrix<S>(a.fc_weight),
                     [=, write = Results<S>(a.rows * H), activation = a.activation](int64_t i, int64_t j, Vec<Acc<S>> c, int64_t n) {
                       c += bias_at(bias, j, n);
                       if (pre) write(pre + i * H + j, c, n);
                       write(hidden + i * H + j, activated<S>(activation, c), n);
                     });
    times_transposed(a.rows, a.out, H, matrix<S>(hidden, H), matrix<S>(a.proj_weight), store_to<S>(a.y, a.rows, a.out, a.proj_bias));
  });
}

void mlp_bwd(const MlpArgs& a) {
  visit(a.dtype, [&](auto s) {
    using S = decltype(s);
    const int64_t M = a.rows, H = a.hidden_dim;
    const auto dy = matrix<S>(a.dy), hidden = matrix<S>(a.hidden, H), dpre = matrix<S>(a.dpre, H);
    weight_gradient(M, a.out, H, dy, hidden, a.dproj_weight, a.dproj_bias);
    if (!a.dx && !a.dfc_weight && !a.dfc_bias) return;
    const S* saved = static_cast<const S*>(a.pre ? a.pre : a.hidden);
    times(M, H, a.out, dy, matrix<S>(a.proj_weight),
          [=, write = Results<S>(M * H), out = static_cast<S*>(a.dpre), activation = a.activation](int64_t i, int64_t j,
                                                                                                    Vec<Acc<S>> c, int64_t n) {
            if (kInTiles<StepOf<S>>) __builtin_prefetch(saved + i * H + j + NR<Acc<S>>, 0, 2);  // for the next panel
            write(out + i * H + j, backpropagated<S>(activation, c, load(saved + i * H + j, n)), n);
          });
    weight_gradient(M, H, a.in, dpre, matrix<S>(a.x), a.dfc_weight, a.dfc_bias);
    if (a.dx) times(M, a.in, H, dpre, matrix<S>(a.fc_weight), store_to<S>(a.dx, a.rows, a.in));
  });
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
