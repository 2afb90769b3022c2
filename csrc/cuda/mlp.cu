// linear:  y = x W^T + b                        x (M, K), W (N, K), b (N), y (M, N)
// mlp:     y = act(x W1^T + b1) W2^T + b2       W1 (H, K), W2 (N, H)
//          y = (act(gate) value) W2^T + b2      [gate | value] = x W1^T + b1, W1 (2 H, K)
//
// linear and mlp are sequences of GEMMs (gemm.cuh) with fused epilogues. Forward applies bias and activation to the
// float32 accumulators. Saved for backward: hidden = act(pre) (M, H), which dW2 needs, and, except for relu, pre (M,
// H), from which act' is computed. Backward:
//
//     dW2  = dy^T hidden             db2 = column sums of dy
//     dpre = (dy W2) act'(pre)       db1 = column sums of dpre, formed in this GEMM's epilogue before dpre is rounded
//     dW1  = dpre^T x
//     dx   = dpre W1
//
// A gated activation computes pre (M, 2 H) by two GEMMs, each of one half of W1. The first one leaves the gate in pre,
// or in hidden where nothing is saved, and the second one's epilogue reads it there. Backward's epilogue writes both
// halves of dpre (M, 2 H), whose column sums are then db1:
//
//     d    = dy W2                   dpre = [d value act'(gate) | d act(gate)]
//
// The mlp's two products are separate kernels, because a fused kernel would need a tile's complete hidden rows (4C
// wide) at once. A 16-bit gelu forward with N = C computes 4 M C H FLOP and moves 2 (2 M C + 3 M H + 2 C H) bytes: M H
// for pre, 2 M H for hidden, which is written and read. With H = 4 C = 3072 and many rows that is 440 FLOP per byte. An
// A100 can compute 150 FLOP per byte and an H100 300, so the tensor cores are the limit.
#include "gemm.cuh"

namespace pygpt::cuda {
namespace {

// A GEMM operand of lines of `width` elements.
template <class T>
Operand<T> matrix(const Rows& x, int64_t width) {
  return operand<T>(x.data, x.stride, width);
}
template <class T>
Operand<T> matrix(const void* data, int64_t width) {
  return operand<T>(data, width, width);
}

template <class T>
Epilogue<T> store_to(void* out, int64_t stride, const void* bias = nullptr) {
  Epilogue<T> e{static_cast<T*>(out), stride, stride};
  e.bias = static_cast<const T*>(bias);
  return e;
}

template <class T>
T* none() {
  return nullptr;
}

// dW (N, K) = dy^T x and db (N) = column sums of dy, over M rows. dw and db may be null.
template <class T>
Error weight_gradient(int64_t M, int64_t N, int64_t K, const Rows& dy, const Rows& x, void* dw, void* db,
                      const Stream& stream) {
  if (dw) {
    const Error error =
        gemm<Layout::TN>(N, K, M, matrix<T>(dy, N), matrix<T>(x, K), store_to<T>(dw, K), none<T>(), stream);
    if (error) return error;
  }
  return db ? column_sums(static_cast<const T*>(dy.data), M, N, dy.stride, static_cast<T*>(db), stream) : nullptr;
}

template <class T>
Error hidden_fwd(const MlpArgs& a, const Stream& stream) {
  const int64_t H = a.hidden_dim;
  Epilogue<T> e = store_to<T>(a.hidden, H, a.fc_bias);
  e.pre = static_cast<T*>(a.pre), e.activate = true, e.activation = a.activation;
  Rows weight = a.fc_weight;
  if (a.gated) {
    T* gate = e.pre ? e.pre : e.out;
    e.gate = gate, e.pre_stride = e.pre ? 2 * H : H;
    const Error error = gemm<Layout::NT>(a.rows, H, a.in, matrix<T>(a.x, a.in), matrix<T>(weight, a.in),
                                         store_to<T>(gate, e.pre_stride, a.fc_bias), none<T>(), stream);
    if (error) return error;
    weight.data = static_cast<T*>(weight.data) + H * weight.stride;
    if (e.pre) e.pre += H;
    if (e.bias) e.bias += H;
  }
  return gemm<Layout::NT>(a.rows, H, a.in, matrix<T>(a.x, a.in), matrix<T>(weight, a.in), e, none<T>(), stream);
}

// dpre, and db1, unless gated, as the column sums of dpre before rounding.
template <class T>
Error hidden_bwd(const MlpArgs& a, const Stream& stream) {
  Epilogue<T> e = store_to<T>(a.dpre, a.fc_dim());
  e.saved = static_cast<const T*>(a.pre ? a.pre : a.hidden), e.activation = a.activation;
  e.to_value = a.gated ? a.hidden_dim : 0;
  return gemm<Layout::NN>(a.rows, a.hidden_dim, a.out, matrix<T>(a.dy, a.out), matrix<T>(a.proj_weight, a.hidden_dim),
                          e, a.gated ? nullptr : static_cast<T*>(a.dfc_bias), stream);
}

}  // namespace

Error linear_fwd(const LinearArgs& a, const Stream& stream) {
  return by_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    return gemm<Layout::NT>(a.rows, a.out, a.in, matrix<T>(a.x, a.in), matrix<T>(a.weight, a.in),
                            store_to<T>(a.y.data, a.y.stride, a.bias), none<T>(), stream);
  });
}

Error linear_bwd(const LinearArgs& a, const Stream& stream) {
  return by_dtype(a.dtype, [&](auto t) -> Error {
    using T = decltype(t);
    if (a.dx) {
      const Error error = gemm<Layout::NN>(a.rows, a.in, a.out, matrix<T>(a.dy, a.out), matrix<T>(a.weight, a.in),
                                           store_to<T>(a.dx, a.in), none<T>(), stream);
      if (error) return error;
    }
    return weight_gradient<T>(a.rows, a.out, a.in, a.dy, a.x, a.dw, a.db, stream);
  });
}

Error mlp_fwd(const MlpArgs& a, const Stream& stream) {
  return by_dtype(a.dtype, [&](auto t) -> Error {
    using T = decltype(t);
    if (const Error error = hidden_fwd<T>(a, stream)) return error;
    return gemm<Layout::NT>(a.rows, a.out, a.hidden_dim, matrix<T>(a.hidden, a.hidden_dim),
                            matrix<T>(a.proj_weight, a.hidden_dim), store_to<T>(a.y, a.out, a.proj_bias), none<T>(),
                            stream);
  });
}

Error mlp_bwd(const MlpArgs& a, const Stream& stream) {
  return by_dtype(a.dtype, [&](auto t) -> Error {
    using T = decltype(t);
    const int64_t M = a.rows, H = a.hidden_dim, F = a.fc_dim();
    const Rows hidden{a.hidden, H}, dpre{a.dpre, F};
    Error error = weight_gradient<T>(M, a.out, H, a.dy, hidden, a.dproj_weight, a.dproj_bias, stream);
    if (error) return error;
    if (!a.dx && !a.dfc_weight && !a.dfc_bias) return nullptr;
    error = hidden_bwd<T>(a, stream);
    void* db = a.gated ? a.dfc_bias : nullptr;
    if (!error) error = weight_gradient<T>(M, F, a.in, dpre, a.x, a.dfc_weight, db, stream);
    if (error || !a.dx) return error;
    return gemm<Layout::NN>(M, a.in, F, matrix<T>(dpre, F), matrix<T>(a.fc_weight, a.in), store_to<T>(a.dx, a.in),
                            none<T>(), stream);
  });
}

}  // namespace pygpt::cuda
