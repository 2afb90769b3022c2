// The epilogue of a GEMM: what happens to the accumulated sums between the kernel's registers and global memory. The
// epilogue adds the bias, applies the activation or its gradient, and forms column sums; a split-K kernel stores
// partial sums instead.
//
// The main loop leaves a tile of float accumulators in shared memory. The epilogue reads the tile row by row in vectors
// of 4, so global memory is accessed in whole rows, and the activation is compiled once, not once per register.
#pragma once
#include <type_traits>

#include "activation.cuh"

namespace pygpt::cuda {

// A matrix in global memory. A line is a run of contiguous elements (a row as stored): element (l, c) is
// data[l * stride + c]. vectorized: lines can be read 16 bytes at a time.
template <class T>
struct Operand {
  const T* data;
  int64_t stride;
  bool vectorized;
};

// The epilogue of C (M, N), in this order: add bias; add the floats in addend; store the result as floats in wide, and
// nothing else; store it in pre; apply the activation, or multiply by that of the gate, or by its gradient at `saved`;
// store in out; store the column sums of every tile in tile_sums. Null pointers skip their step.
template <class T>
struct Epilogue {
  T* out;
  int64_t stride;  // row stride of out
  int64_t pre_stride;  // row stride of pre, saved and gate
  const T* bias = nullptr;  // (N)
  T* pre = nullptr;
  const T* saved = nullptr;
  const T* gate = nullptr;
  int64_t to_value = 0;  // not 0: saved has gates, the values lie so far behind them, and out's rows are alike
  bool activate = false;
  Activation activation = Activation::relu;
  float* tile_sums = nullptr;  // (ceil(M / tile), N)
  const float* addend = nullptr;  // addend and wide have out's row stride
  float* wide = nullptr;
  bool vectorized = false;  // out, bias, pre, saved and gate can be accessed 4 elements at a time
};

template <class T>
struct GemmParams {
  int64_t M, N, K;
  Operand<T> a, b;
  Epilogue<T> epilogue;
  int64_t k_per_split;  // K is split into `splits` parts of k_per_split
  int splits;
  float* partials;  // (splits, M, N) partial sums, if splits > 1
};

// ---------------------------------------------------------------- vectors of 4
// The n <= 4 elements at `from`, zeros after them. vectorized: all 4 exist and are aligned.
template <class T>
__device__ __forceinline__ float4 load4(const T* from, int n, bool vectorized) {
  if (vectorized) {
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
__device__ __forceinline__ void store4(T* to, float4 v, int n, bool vectorized) {
  if (vectorized) {
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
__device__ __forceinline__ float4 operator*(float4 a, float4 b) {
  return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
__device__ __forceinline__ float4 activate(Activation act, float4 x) {
  return make_float4(activate(act, x.x), activate(act, x.y), activate(act, x.z), activate(act, x.w));
}

// ---------------------------------------------------------------- epilogue
template <class T>
__device__ __forceinline__ float4 load_bias(const Epilogue<T>& e, int64_t j, int n) {
  return e.bias ? load4(e.bias + j, n, e.vectorized) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// Applies the epilogue to elements (i, j .. j + n - 1), whose bias is already in c. Returns the stored values before
// rounding.
template <class T>
__device__ __forceinline__ float4 apply_epilogue(const Epilogue<T>& e, int64_t i, int64_t j, int n, float4 c) {
  const int64_t offset = i * e.stride + j, pre_offset = i * e.pre_stride + j;
  if (e.addend) c = c + load4(e.addend + offset, n, e.vectorized);
  if (e.wide) {
    store4(e.wide + offset, c, n, e.vectorized);
    return c;
  }
  if (e.pre) store4(e.pre + pre_offset, c, n, e.vectorized);
  if (e.saved) {
    const float4 s = load4(e.saved + pre_offset, n, e.vectorized);
    if (e.to_value) {
      store4(e.out + offset + e.to_value, c * activate(e.activation, s), n, e.vectorized);
      c = c * load4(e.saved + pre_offset + e.to_value, n, e.vectorized);
    }
    c = make_float4(activation_gradient(e.activation, c.x, s.x), activation_gradient(e.activation, c.y, s.y),
                    activation_gradient(e.activation, c.z, s.z), activation_gradient(e.activation, c.w, s.w));
  } else if (e.activate) {
    const float4 x = e.gate ? load4(e.gate + pre_offset, n, e.vectorized) : c, h = activate(e.activation, x);
    c = e.gate ? h * c : h;
  }
  store4(e.out + offset, c, n, e.vectorized);
  return c;
}

// The tile of C that a block computes: tile indices along M and N, and the part of K.
struct TileCoord {
  int m, n, split;
};

// The tile scheduler. kGroup rows of tiles are taken together, column by column, so that blocks that run at the same
// time share operands in the L2 cache.
template <int TILE>
__device__ __forceinline__ TileCoord tile_coord(int64_t M, int64_t N) {
  constexpr int kGroup = 8;
  const int m_tiles = static_cast<int>(ceil_div(M, TILE)), n_tiles = static_cast<int>(ceil_div(N, TILE));
  const int split = blockIdx.x / (m_tiles * n_tiles), tile = blockIdx.x % (m_tiles * n_tiles);
  const int first_m = tile / (kGroup * n_tiles) * kGroup, within = tile % (kGroup * n_tiles);
  const int height = min(m_tiles - first_m, kGroup);
  return {first_m + within % height, within / height, split};
}

// Stores a TILE x TILE tile of accumulators, rows STRIDE floats apart in shared memory, as partial sums or through the
// epilogue.
template <class T, int TILE, int STRIDE, int THREADS>
__device__ void store_tile(const GemmParams<T>& g, const TileCoord& coord, float* tile) {
  constexpr int kLanes = TILE / 4, kGroups = THREADS / kLanes;  // kLanes threads share a row
  const int c = threadIdx.x % kLanes * 4, group = threadIdx.x / kLanes;
  const int64_t row = int64_t{coord.m} * TILE, j = int64_t{coord.n} * TILE + c;
  const int n = static_cast<int>(min(g.N - j, int64_t{4})), rows = static_cast<int>(min(g.M - row, int64_t{TILE}));
  if (g.splits > 1) {
    float* partial = g.partials + (coord.split * g.M + row) * g.N + j;
    for (int r = group; r < rows; r += kGroups)
      store4(partial + r * g.N, *reinterpret_cast<const float4*>(tile + r * STRIDE + c), n, g.N % 4 == 0 && n > 0);
    return;
  }
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (n > 0) {
    const float4 bias = load_bias(g.epilogue, j, n);
    for (int r = group; r < rows; r += kGroups) {
      const float4 x = *reinterpret_cast<const float4*>(tile + r * STRIDE + c) + bias;
      sum = sum + apply_epilogue(g.epilogue, row + r, j, n, x);
    }
  }
  if (!g.epilogue.tile_sums) return;
  __syncthreads();
  *reinterpret_cast<float4*>(tile + group * TILE + c) = sum;
  __syncthreads();
  if (group || n <= 0) return;
  for (int other = 1; other < kGroups; other++) sum = sum + *reinterpret_cast<const float4*>(tile + other * TILE + c);
  store4(g.epilogue.tile_sums + coord.m * g.N + j, sum, n, g.N % 4 == 0);
}

// Adds the partial sums of a split-K GEMM, in order, and applies the epilogue.
template <class T>
__global__ void __launch_bounds__(256) splitk_reduce_kernel(const GemmParams<T> g) {
  const int64_t columns = ceil_div(g.N, 4), index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t i = index / columns, j = index % columns * 4;
  if (i >= g.M) return;
  const int n = static_cast<int>(min(g.N - j, int64_t{4}));
  float4 c = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int s = 0; s < g.splits; s++) c = c + load4(g.partials + (s * g.M + i) * g.N + j, n, g.N % 4 == 0);
  apply_epilogue(g.epilogue, i, j, n, c + load_bias(g.epilogue, j, n));
}

}  // namespace pygpt::cuda
