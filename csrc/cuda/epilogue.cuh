// What happens to a sum of products between a GEMM's registers and memory: bias, activation or its gradient,
// column sums, or a place among the parts of a K that was split.
//
// A tile arrives in shared memory as floats, however it was computed, and is gone over row by row in vectors
// of 4: global memory sees whole rows, and the activation's code stands once, not once per register.
#pragma once
#include <type_traits>

#include "activation.cuh"

namespace pygpt::cuda {

// Lines of adjacent elements: element (l, c) is data[l * stride + c]. vector: read 16 bytes at a time.
template <class T>
struct Operand {
  const T* data;
  int64_t stride;
  bool vector;
};

// What becomes of c (M, N): + bias; kept in pre; through the activation, or with saved through its gradient; out.
// sums receives, for every row of tiles, a line (N) of the sums over its rows. Null pointers are left out.
template <class T>
struct Epilogue {
  T* out;
  int64_t stride;             // of the rows of out, pre and saved
  const T* bias = nullptr;    // (N)
  T* pre = nullptr;
  const T* saved = nullptr;
  bool activates = false;
  Activation activation = Activation::relu;
  float* sums = nullptr;      // (ceil(M / tile), N)
  bool vector = false;        // 4 elements at a time
};

template <class T>
struct Gemm {
  int64_t M, N, K;
  Operand<T> a, b;
  Epilogue<T> epilogue;
  int64_t part;               // K is taken in parts of so many,
  int splits;                 // this many;
  float* parts;               // (splits, M, N) their sums, if more than one
};

// ---------------------------------------------------------------- vectors of 4
template <class T>
__device__ __forceinline__ float4 load4(const T* from, int n, bool vector) {
  if (vector) {
    if constexpr (std::is_same_v<T, float>) {
      return *reinterpret_cast<const float4*>(from);
    } else {
      const uint2 raw = *reinterpret_cast<const uint2*>(from);
      const float2 low = unpack<T>(raw.x), high = unpack<T>(raw.y);
      return make_float4(low.x, low.y, high.x, high.y);
    }
  }
  return make_float4(n > 0 ? to_float(from[0]) : 0.0f, n > 1 ? to_float(from[1]) : 0.0f,
                     n > 2 ? to_float(from[2]) : 0.0f, n > 3 ? to_float(from[3]) : 0.0f);
}

template <class T>
__device__ __forceinline__ void store4(T* to, float4 v, int n, bool vector) {
  if (vector) {
    if constexpr (std::is_same_v<T, float>) {
      *reinterpret_cast<float4*>(to) = v;
    } else {
      *reinterpret_cast<uint2*>(to) = make_uint2(pack<T>(v.x, v.y), pack<T>(v.z, v.w));
    }
    return;
  }
  if (n > 0) to[0] = from_float<T>(v.x);
  if (n > 1) to[1] = from_float<T>(v.y);
  if (n > 2) to[2] = from_float<T>(v.z);
  if (n > 3) to[3] = from_float<T>(v.w);
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// ---------------------------------------------------------------- epilogue
template <class T>
__device__ __forceinline__ float4 bias_at(const Epilogue<T>& e, int64_t j, int n) {
  return e.bias ? load4(e.bias + j, n, e.vector) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// Elements (i, j..j+n-1), bias included; returns what was stored, unrounded.
template <class T>
__device__ __forceinline__ float4 finish(const Epilogue<T>& e, int64_t i, int64_t j, int n, float4 c) {
  const int64_t at = i * e.stride + j;
  if (e.pre) store4(e.pre + at, c, n, e.vector);
  if (e.saved) {
    const float4 s = load4(e.saved + at, n, e.vector);
    c = make_float4(activation_gradient(e.activation, c.x, s.x), activation_gradient(e.activation, c.y, s.y),
                    activation_gradient(e.activation, c.z, s.z), activation_gradient(e.activation, c.w, s.w));
  } else if (e.activates) {
    c = make_float4(activate(e.activation, c.x), activate(e.activation, c.y), activate(e.activation, c.z),
                    activate(e.activation, c.w));
  }
  store4(e.out + at, c, n, e.vector);
  return c;
}

// The tile of C that a block computes, counted in tiles, over part `split` of K.
struct Place {
  int line, column, split;
};

template <int TILE>
__device__ __forceinline__ Place place(int64_t M, int64_t N) {
  constexpr int kGroup = 8;  // lines of tiles taken together, column by column
  const int lines = static_cast<int>(ceil_div(M, TILE)), columns = static_cast<int>(ceil_div(N, TILE));
  const int split = blockIdx.x / (lines * columns), tile = blockIdx.x % (lines * columns);
  const int first = tile / (kGroup * columns) * kGroup, within = tile % (kGroup * columns);
  const int height = min(lines - first, kGroup);
  return {first + within % height, within / height, split};
}

// A finished TILE x TILE tile, rows STRIDE floats apart in shared memory, to its part or through the epilogue.
template <class T, int TILE, int STRIDE, int THREADS>
__device__ void write_tile(const Gemm<T>& g, const Place& at, float* tile) {
  constexpr int kLanes = TILE / 4, kGroups = THREADS / kLanes;  // a group of threads to a row
  const int c = threadIdx.x % kLanes * 4, group = threadIdx.x / kLanes;
  const int64_t row = int64_t{at.line} * TILE, j = int64_t{at.column} * TILE + c;
  const int n = static_cast<int>(min(g.N - j, int64_t{4})), rows = static_cast<int>(min(g.M - row, int64_t{TILE}));
  if (g.splits > 1) {
    float* part = g.parts + (at.split * g.M + row) * g.N + j;
    for (int r = group; r < rows; r += kGroups)
      store4(part + r * g.N, *reinterpret_cast<const float4*>(tile + r * STRIDE + c), n, g.N % 4 == 0 && n > 0);
    return;
  }
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (n > 0) {
    const float4 bias = bias_at(g.epilogue, j, n);
    for (int r = group; r < rows; r += kGroups) {
      const float4 x = *reinterpret_cast<const float4*>(tile + r * STRIDE + c) + bias;
      sum = sum + finish(g.epilogue, row + r, j, n, x);
    }
  }
  if (!g.epilogue.sums) return;
  __syncthreads();
  *reinterpret_cast<float4*>(tile + group * TILE + c) = sum;
  __syncthreads();
  if (group || n <= 0) return;
  for (int other = 1; other < kGroups; other++)
    sum = sum + *reinterpret_cast<const float4*>(tile + other * TILE + c);
  store4(g.epilogue.sums + at.line * g.N + j, sum, n, g.N % 4 == 0);
}

// Adds the parts of K, in order.
template <class T>
__global__ void __launch_bounds__(256) finish_kernel(const Gemm<T> g) {
  const int64_t columns = ceil_div(g.N, 4), index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t i = index / columns, j = index % columns * 4;
  if (i >= g.M) return;
  const int n = static_cast<int>(min(g.N - j, int64_t{4}));
  float4 c = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int s = 0; s < g.splits; s++) c = c + load4(g.parts + (s * g.M + i) * g.N + j, n, g.N % 4 == 0);
  finish(g.epilogue, i, j, n, c + bias_at(g.epilogue, j, n));
}

}  // namespace pygpt::cuda
