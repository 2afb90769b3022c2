// linear:  y = x W^T + b                        x (M, K), W (N, K), b (N), y (M, N)
// mlp:     y = act(x W1^T + b1) W2^T + b2       W1 (H, K), W2 (N, H)
//
// Each is a chain of one GEMM with a fused epilogue. Forward, bias and activation are applied to the float32 sums;
// kept for backward are hidden = act(pre) (M, H), which dW2 needs, and, but for relu, pre itself, which act' is
// found from. Backward:
//
//     dW2 = dy^T hidden        db2 = sums over the rows of dy
//     dpre = (dy W2) act'(pre)             <- in the GEMM's epilogue, with the sums of its rows,
//     dW1 = dpre^T x           db1            still unrounded, tile by tile
//     dx = dpre W1
//
// The two products of the mlp are not one kernel: a tile of rows would need its whole hidden row (4C wide) at once.
// Floor of a forward in 16 bits (N = C, a gelu): 4 M C H FLOP against 2 (2 M C + 3 M H + 2 C H) bytes, of which M H
// is pre and M H hidden read again. With H = 4 C = 3072 and many rows that is 440 FLOP a byte; an A100 computes 150
// in the time of a byte, an H100 300. The tensor cores bound it.
#include "gemm.cuh"

namespace pygpt::cuda {
namespace {

// A (lines, width) matrix as a GEMM reads it.
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
  Epilogue<T> e{static_cast<T*>(out), stride};
  e.bias = static_cast<const T*>(bias);
  return e;
}

template <class T>
T* none() {
  return nullptr;
}

// dW = dy^T x (N, K) and db = column sums of dy (N), over M rows; either may be unwanted (null).
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
  Epilogue<T> e = store_to<T>(a.hidden, a.hidden_dim, a.fc_bias);
  e.pre = static_cast<T*>(a.pre), e.activates = true, e.activation = a.activation;
  return gemm<Layout::NT>(a.rows, a.hidden_dim, a.in, matrix<T>(a.x, a.in), matrix<T>(a.fc_weight, a.in), e, none<T>(),
                          stream);
}

// dpre, and from its unrounded values db1.
template <class T>
Error hidden_bwd(const MlpArgs& a, const Stream& stream) {
  Epilogue<T> e = store_to<T>(a.dpre, a.hidden_dim);
  e.saved = static_cast<const T*>(a.pre ? a.pre : a.hidden), e.activation = a.activation;
  return gemm<Layout::NN>(a.rows, a.hidden_dim, a.out, matrix<T>(a.dy, a.out), matrix<T>(a.proj_weight, a.hidden_dim),
                          e, static_cast<T*>(a.dfc_bias), stream);
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
    const int64_t M = a.rows, H = a.hidden_dim;
    const Rows hidden{a.hidden, H}, dpre{a.dpre, H};
    Error error = weight_gradient<T>(M, a.out, H, a.dy, hidden, a.dproj_weight, a.dproj_bias, stream);
    if (error) return error;
    if (!a.dx && !a.dfc_weight && !a.dfc_bias) return nullptr;
    error = hidden_bwd<T>(a, stream);
    if (!error) error = weight_gradient<T>(M, H, a.in, dpre, a.x, a.dfc_weight, nullptr, stream);
    if (error || !a.dx) return error;
    return gemm<Layout::NN>(M, a.in, H, matrix<T>(dpre, H), matrix<T>(a.fc_weight, a.in), store_to<T>(a.dx, a.in),
                            none<T>(), stream);
  });
}

}  // namespace pygpt::cuda
