// gelu, gelu_tanh, relu and relu2 as ops of their own: y = act(x), dx = dy act'(x), over n contiguous elements. The
// mathematics is in activation.cuh.
//
// Saved for backward: x, but relu saves its output y, which the next op usually keeps anyway. Both kernels are
// memory-bound. Forward moves 4 bytes per element of a 16-bit type, backward 6. At an H200's 4.3 TB/s this time
// suffices for 28 and 42 instructions per element; the exact gelu takes about 25 and 30, because activation.cuh uses
// approximate division.
#include "activation.cuh"
#include "vector.cuh"

namespace pygpt::cuda {
namespace {

constexpr int kThreads = 256, kUnroll = 2;  // kUnroll: vectors per thread
template <class T>
constexpr int64_t kTile = kThreads * kUnroll * kVector<T>;  // elements per block

// out = f(a), or f(a, b) if b is not null, element by element over n. Elements are accessed one at a time if
// !vectorized, and in the last block if n is not a multiple of kTile.
template <class T, class F>
__device__ __forceinline__ void map_elements(const T* a, const T* b, T* out, int64_t n, bool vectorized, F f) {
  constexpr int V = kVector<T>;
  const int64_t start = blockIdx.x * kTile<T>;
  if (!vectorized || start + kTile<T> > n) {
    const int64_t end = start + kTile<T> < n ? start + kTile<T> : n;
#pragma unroll 1
    for (int64_t i = start + threadIdx.x; i < end; i += kThreads)
      out[i] = from_float<T>(f(to_float(a[i]), b ? to_float(b[i]) : 0.f));
    return;
  }
  uint4 a_bits[kUnroll], b_bits[kUnroll] = {};
#pragma unroll
  for (int u = 0; u < kUnroll; u++) {
    const int64_t i = start + (u * kThreads + threadIdx.x) * V;
    a_bits[u] = *reinterpret_cast<const uint4*>(a + i);
    if (b) b_bits[u] = *reinterpret_cast<const uint4*>(b + i);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; u++) {
    float x[V], y[V];
    to_floats<T>(a_bits[u], x);
    to_floats<T>(b_bits[u], y);
#pragma unroll
    for (int v = 0; v < V; v++) x[v] = f(x[v], y[v]);
    *reinterpret_cast<uint4*>(out + start + (u * kThreads + threadIdx.x) * V) = from_floats<T>(x);
  }
}

template <Activation act, class T>
__global__ __launch_bounds__(kThreads, 4) void activation_fwd_kernel(const T* x, T* y, int64_t n, bool vectorized) {
  map_elements<T>(x, nullptr, y, n, vectorized, [](float x, float) { return activate(act, x); });
}

template <Activation act, class T>
__global__ __launch_bounds__(kThreads, 4) void activation_bwd_kernel(const T* dy, const T* saved, T* dx, int64_t n,
                                                                     bool vectorized) {
  map_elements<T>(dy, saved, dx, n, vectorized, [](float dy, float s) { return activation_gradient(act, dy, s); });
}

}  // namespace

Error activation_fwd(const ActivationArgs& a, const Stream& stream) {
  if (a.n == 0) return nullptr;
  return by_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    return by_activation(a.activation, [&](auto act) {
      return launch(activation_fwd_kernel<decltype(act)::value, T>, make_grid(ceil_div(a.n, kTile<T>)), dim3(kThreads),
                    0, stream, x, y, a.n, can_vectorize(x) && can_vectorize(y));
    });
  });
}

Error activation_bwd(const ActivationArgs& a, const Stream& stream) {
  if (a.n == 0) return nullptr;
  return by_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* dy = static_cast<const T*>(a.dy);
    T* dx = static_cast<T*>(a.dx);
    return by_activation(a.activation, [&](auto act) {
      const T* saved = static_cast<const T*>(saves_input(act.value) ? a.x : a.y);
      return launch(activation_bwd_kernel<decltype(act)::value, T>, make_grid(ceil_div(a.n, kTile<T>)), dim3(kThreads),
                    0, stream, dy, saved, dx, a.n, can_vectorize(dy) && can_vectorize(saved) && can_vectorize(dx));
    });
  });
}

}  // namespace pygpt::cuda
