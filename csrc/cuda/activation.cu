// gelu, gelu_tanh, relu and relu2 by themselves: y = act(x), dx = dy act'(x). The mathematics is in activation.cuh.
//
// gelu saves x, relu its own output y, which the next op keeps anyway. Forward reads and writes each
// element once, backward reads two and writes one: 4 and 6 bytes in 16 bits. At 4.3 TB/s that leaves an
// H200 28 and 42 instructions an element, and the exact gelu takes about 25 and 30: hence the approximate
// division in activation.cuh.
#include "activation.cuh"
#include "vector.cuh"

namespace pygpt::cuda {
namespace {

constexpr int kThreads = 256, kUnroll = 2;  // vectors a thread
template <class T>
constexpr int64_t kTile = kThreads * kUnroll * kVector<T>;  // elements a block

// out = f(a) or f(a, b), element by element over n. The block after the last whole one, if the grid has
// one, takes the tail; without `vectors` every element is by itself.
template <class T, class F>
__device__ __forceinline__ void for_each(const T* a, const T* b, T* out, int64_t n, bool vectors, F f) {
  constexpr int V = kVector<T>;
  const int64_t start = blockIdx.x * kTile<T>;
  if (!vectors || start + kTile<T> > n) {
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

template <Activation kind, class T>
__global__ __launch_bounds__(kThreads, 4) void activation_fwd_kernel(const T* x, T* y, int64_t n, bool vectors) {
  for_each<T>(x, nullptr, y, n, vectors, [](float x, float) { return activate(kind, x); });
}

template <Activation kind, class T>
__global__ __launch_bounds__(kThreads, 4) void activation_bwd_kernel(const T* dy, const T* saved, T* dx, int64_t n,
                                                                  bool vectors) {
  for_each<T>(dy, saved, dx, n, vectors, [](float dy, float saved) { return activation_gradient(kind, dy, saved); });
}

}  // namespace

Error activation_fwd(const ActivationArgs& a, const Stream& stream) {
  if (a.n == 0) return nullptr;
  return by_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    return by_activation(a.activation, [&](auto kind) {
      return launch(activation_fwd_kernel<decltype(kind)::value, T>, blocks(ceil_div(a.n, kTile<T>)), dim3(kThreads), 0,
                    stream, x, y, a.n, takes_vectors(x) && takes_vectors(y));
    });
  });
}

Error activation_bwd(const ActivationArgs& a, const Stream& stream) {
  if (a.n == 0) return nullptr;
  return by_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* dy = static_cast<const T*>(a.dy);
    T* dx = static_cast<T*>(a.dx);
    return by_activation(a.activation, [&](auto kind) {
      const T* saved = static_cast<const T*>(saves_input(kind.value) ? a.x : a.y);
      return launch(activation_bwd_kernel<decltype(kind)::value, T>, blocks(ceil_div(a.n, kTile<T>)), dim3(kThreads), 0,
                    stream, dy, saved, dx, a.n, takes_vectors(dy) && takes_vectors(saved) && takes_vectors(dx));
    });
  });
}

}  // namespace pygpt::cuda
