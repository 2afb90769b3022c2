// linear:  y = x W^T + b                        x (M, K), W (N, K), b (N), y (M, N)
// mlp:     y = act(x W1^T + b1) W2^T + b2       W1 (H, K), W2 (N, H)
//          y = (act(gate) value) W2^T + b2      [gate | value] = x W1^T + b1, W1 (2 H, K)
//
// Both are chains of matrix products (gemm/gemm.h). In forward, bias and activation are applied to a finished tile in
// registers. Backward gets hidden = act(pre) (M, H), which dW2 needs, and pre, which gives act' (relu needs only
// hidden):
//     dW2 = dy^T hidden        db2 = row sums of dy^T
//     dpre = (dy W2) act'(pre)             <- in the GEMM's epilogue
//     dW1 = dpre^T x           db1 = row sums of dpre^T
//     dx = dpre W1
// The bias gradients are summed, in a fixed order, while the GEMM packs the transposed operand, so they cost no pass
// over memory.
//
// A gated activation computes pre (M, 2 H) by two GEMMs, each of one half of W1. The first one leaves the gate in pre,
// or in hidden where nothing is saved, and the second one's epilogue reads it there. Backward's epilogue writes both
// halves of dpre (M, 2 H):
//     d = dy W2                dpre = [d value act'(gate) | d act(gate)]
#include "gemm/gemm.h"
#include "nontemporal.h"
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

template <class S>
PYGPT_INLINE Vec<Acc<S>> bias_at(const S* bias, int64_t j, int64_t n) {
  return bias ? load(bias + j, n) : Vec<Acc<S>>{};
}

// Stores a product's results. What is larger than L2 twice over is written past the caches where the rows of a tile are
// whole cache lines, which would otherwise be read first (docs/measured.md C15).
template <class S>
struct ResultWriter {
  static constexpr int64_t kLine = 64 / sizeof(S);
  bool nontemporal;
  ResultWriter(int64_t rows, int64_t stride)
      : nontemporal(rows > kGemvRows && stride % kLine == 0 && rows * stride * int64_t(sizeof(S)) > 2 * kL2Bytes) {}
  PYGPT_INLINE void operator()(S* p, Vec<Acc<S>> x, int64_t n) const {
    Tiling<Packed<S>>::NR % kLine == 0 && nontemporal ? store_nontemporal(p, x, n) : store(p, x, n);
  }
};

// What an epilogue reads beside the bias. With AMX it prefetches the same row's part of the next panel.
template <class S>
PYGPT_INLINE Vec<Acc<S>> load_and_prefetch(const S* p, int64_t n) {
  if (kUsesAmx<Packed<S>>) __builtin_prefetch(p + Tiling<Packed<S>>::NR, 0, 2);
  return load(p, n);
}

template <class S>
auto store_epilogue(void* out, int64_t rows, int64_t stride, const void* bias = nullptr) {
  S* y = static_cast<S*>(out);
  const S* b = static_cast<const S*>(bias);
  return [=, write = ResultWriter<S>(rows, stride)](int64_t i, int64_t j, Vec<Acc<S>> c, int64_t n) {
    write(y + i * stride + j, c + bias_at(b, j, n), n);
  };
}

// dW = dy^T x (N, K) and db = column sums of dy (N), over M rows. Either is null if it is not wanted.
template <class S>
void weight_gradient(int64_t M, int64_t N, int64_t K, Matrix<S> dy, Matrix<S> x, void* dw, void* db) {
  if (!dw && !db) return;
  using T = Acc<S>;
  T* sums = db ? scratch<T>(Region::bias_gradient, N) : nullptr;
  gemm_tn(N, dw ? K : 0, M, dy, x, sums, store_epilogue<S>(dw, N, K));
  if (db)
    for (int64_t j = 0; j < N; j += W<T>) store(static_cast<S*>(db) + j, load(sums + j, N - j), N - j);
}

// The activation is a run-time branch for every vector, not a template parameter: the branch is predicted, and the GEMM
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

template <class S>
void hidden_fwd(const MlpArgs& a) {
  const int64_t H = a.hidden_dim;
  S *hidden = static_cast<S*>(a.hidden), *pre = static_cast<S*>(a.pre);
  const S* bias = static_cast<const S*>(a.fc_bias);
  const ResultWriter<S> write(a.rows, H);
  const auto store_hidden = [=, activation = a.activation](int64_t i, int64_t j, Vec<Acc<S>> c, int64_t n) {
    c += bias_at(bias, j, n);
    if (pre) write(pre + i * H + j, c, n);
    write(hidden + i * H + j, activated<S>(activation, c), n);
  };
  gemm_nt(a.rows, H, a.in, matrix<S>(a.x), matrix<S>(a.fc_weight), store_hidden);
}

template <class S>
void dpre_bwd(const MlpArgs& a) {
  const int64_t H = a.hidden_dim;
  const S* saved = static_cast<const S*>(a.pre ? a.pre : a.hidden);
  S* out = static_cast<S*>(a.dpre);
  const ResultWriter<S> write(a.rows, H);
  const auto store_dpre = [=, activation = a.activation](int64_t i, int64_t j, Vec<Acc<S>> c, int64_t n) {
    write(out + i * H + j, backpropagated<S>(activation, c, load_and_prefetch(saved + i * H + j, n)), n);
  };
  gemm_nn(a.rows, H, a.out, matrix<S>(a.dy), matrix<S>(a.proj_weight), store_dpre);
}

// ---------------------------------------------------------------- gated
// These have GEMMs of their own, so that the epilogues above are not burdened.
template <class S>
void gated_hidden_fwd(const MlpArgs& a) {
  const int64_t H = a.hidden_dim, stride = a.pre ? 2 * H : H;
  S *hidden = static_cast<S*>(a.hidden), *gate = a.pre ? static_cast<S*>(a.pre) : hidden;
  const S* bias = static_cast<const S*>(a.fc_bias);
  const auto x = matrix<S>(a.x), weight = matrix<S>(a.fc_weight);
  gemm_nt(a.rows, H, a.in, x, weight, store_epilogue<S>(gate, a.rows, stride, bias));
  S* value = a.pre ? gate + H : nullptr;
  const S* value_bias = bias ? bias + H : nullptr;
  const ResultWriter<S> write(a.rows, H);
  const auto store_hidden = [=, is_silu = a.activation == Activation::silu](int64_t i, int64_t j, Vec<Acc<S>> c,
                                                                            int64_t n) {
    c += bias_at(value_bias, j, n);
    if (value) write(value + i * stride + j, c, n);
    const Vec<Acc<S>> g = load_and_prefetch(gate + i * stride + j, n);
    const Vec<Acc<S>> h = is_silu ? activate<Activation::silu, S>(g) : activate<Activation::gelu, S>(g);
    write(hidden + i * H + j, h * c, n);
  };
  gemm_nt(a.rows, H, a.in, x, weight.at(H, 0), store_hidden);
}

template <class S>
void gated_dpre_bwd(const MlpArgs& a) {
  const int64_t H = a.hidden_dim;
  const S* pre = static_cast<const S*>(a.pre);
  S* out = static_cast<S*>(a.dpre);
  const ResultWriter<S> write(a.rows, H);
  const auto store_dpre = [=, is_silu = a.activation == Activation::silu](int64_t i, int64_t j, Vec<Acc<S>> d,
                                                                          int64_t n) {
    const int64_t at = i * 2 * H + j;
    const Vec<Acc<S>> g = load_and_prefetch(pre + at, n), dv = d * load_and_prefetch(pre + at + H, n);
    if (is_silu) {
      write(out + at, backpropagate<Activation::silu, S>(dv, g), n);
      write(out + at + H, d * activate<Activation::silu, S>(g), n);
    } else {
      write(out + at, backpropagate<Activation::gelu, S>(dv, g), n);
      write(out + at + H, d * activate<Activation::gelu, S>(g), n);
    }
  };
  gemm_nn(a.rows, H, a.out, matrix<S>(a.dy), matrix<S>(a.proj_weight), store_dpre);
}

}  // namespace

void linear_fwd(const LinearArgs& a) {
  visit(a.dtype, [&](auto s) {
    using S = decltype(s);
    gemm_nt(a.rows, a.out, a.in, matrix<S>(a.x), matrix<S>(a.weight),
            store_epilogue<S>(a.y.data, a.rows, a.y.stride, a.bias));
  });
}

void linear_bwd(const LinearArgs& a) {
  visit(a.dtype, [&](auto s) {
    using S = decltype(s);
    const auto dy = matrix<S>(a.dy);
    if (a.dx) gemm_nn(a.rows, a.in, a.out, dy, matrix<S>(a.weight), store_epilogue<S>(a.dx, a.rows, a.in));
    weight_gradient(a.rows, a.out, a.in, dy, matrix<S>(a.x), a.dw, a.db);
  });
}

void mlp_fwd(const MlpArgs& a) {
  visit(a.dtype, [&](auto s) {
    using S = decltype(s);
    a.gated ? gated_hidden_fwd<S>(a) : hidden_fwd<S>(a);
    gemm_nt(a.rows, a.out, a.hidden_dim, matrix<S>(a.hidden, a.hidden_dim), matrix<S>(a.proj_weight),
            store_epilogue<S>(a.y, a.rows, a.out, a.proj_bias));
  });
}

void mlp_bwd(const MlpArgs& a) {
  visit(a.dtype, [&](auto s) {
    using S = decltype(s);
    const int64_t M = a.rows, H = a.hidden_dim, F = a.fc_dim();
    weight_gradient(M, a.out, H, matrix<S>(a.dy), matrix<S>(a.hidden, H), a.dproj_weight, a.dproj_bias);
    if (!a.dx && !a.dfc_weight && !a.dfc_bias) return;
    a.gated ? gated_dpre_bwd<S>(a) : dpre_bwd<S>(a);
    const auto dpre = matrix<S>(a.dpre, F);
    weight_gradient(M, F, a.in, dpre, matrix<S>(a.x), a.dfc_weight, a.dfc_bias);
    if (a.dx) gemm_nn(M, a.in, F, dpre, matrix<S>(a.fc_weight), store_epilogue<S>(a.dx, a.rows, a.in));
  });
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
