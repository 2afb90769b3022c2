// Rows of a norm and the teams of threads that they belong to: what forward and backward share.
//
// A row belongs to a team: 8, 16 or 32 lanes up to 1,024 elements, beyond that a block. A lane holds E of its
// row's elements, and reads and writes them 16 bytes at a time; where an address or a width does not allow
// that it takes every size-th element, which coalesces as well but takes more instructions.
#pragma once
#include <algorithm>

#include "vector.cuh"

namespace pygpt::cuda {

constexpr int kBlock = 0;          // the team that is a whole block; other teams are named by their size
constexpr int kThreads = 128;      // of a block of several teams
constexpr int kMostThreads = 512;  // of a block that is a team
constexpr int kWideE = 16;         // elements a lane of a block whose row is too long for registers

// E elements of a row, in registers.
template <class T, int E>
struct Row {
  static constexpr int V = kVector<T>, kChunks = E / V;
  uint4 chunks[kChunks];

  __device__ __forceinline__ void get(float (&x)[E]) const {
#pragma unroll
    for (int c = 0; c < kChunks; c++) to_floats<T>(chunks[c], reinterpret_cast<float(&)[V]>(x[c * V]));
  }
  __device__ __forceinline__ void set(const float (&x)[E]) {
#pragma unroll
    for (int c = 0; c < kChunks; c++) chunks[c] = from_floats<T>(reinterpret_cast<const float(&)[V]>(x[c * V]));
  }
};

// Where the elements of a lane, one of `size`, lie in a row of cols, from column `start` on; their columns ascend.
struct Lane {
  int rank, size;
  int64_t start, cols;
  bool vectors;

  template <class T>
  __device__ __forceinline__ int64_t column(int i) const {
    constexpr int V = kVector<T>;
    return start + (vectors ? (i / V * size + rank) * V + i % V : i * size + rank);
  }

  // So many of a lane's E elements lie in the row: the first ones.
  template <class T, int E>
  __device__ __forceinline__ int held() const {
    const int left = static_cast<int>(cols - start < size * E ? cols - start : size * E);
    const int unit = vectors ? kVector<T> : 1;
    return (left / unit + size - 1 - rank) / size * unit;
  }

  // Zeros beyond the row's end.
  template <int E, class T>
  __device__ __forceinline__ Row<T, E> load(const T* p) const {
    constexpr int V = kVector<T>;
    Row<T, E> row;
    if (vectors) {
#pragma unroll
      for (int c = 0; c < E / V; c++) {
        const int64_t col = column<T>(c * V);
        row.chunks[c] = col < cols ? *reinterpret_cast<const uint4*>(p + col) : uint4{0, 0, 0, 0};
      }
    } else {
      float x[E];
#pragma unroll
      for (int i = 0; i < E; i++) x[i] = column<T>(i) < cols ? to_float(p[column<T>(i)]) : 0.f;
      row.set(x);
    }
    return row;
  }

  template <int E, class T>
  __device__ __forceinline__ void store(T* p, const float (&x)[E]) const {
    constexpr int V = kVector<T>;
    if (vectors) {
      Row<T, E> row;
      row.set(x);
#pragma unroll
      for (int c = 0; c < E / V; c++)
        if (column<T>(c * V) < cols) *reinterpret_cast<uint4*>(p + column<T>(c * V)) = row.chunks[c];
    } else {
#pragma unroll
      for (int i = 0; i < E; i++)
        if (column<T>(i) < cols) p[column<T>(i)] = from_float<T>(x[i]);
    }
  }
};

template <int E>
__device__ __forceinline__ float sum_of(const float (&x)[E]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < E; i++) sum += x[i];
  return sum;
}

// x[k], summed over the team, in every lane. A block's warps meet in `shared`, which the caller does not write again
// before another barrier.
template <int team, int K>
__device__ __forceinline__ void team_sum(float (&x)[K], float (*shared)[32]) {
  if constexpr (team != kBlock) {
#pragma unroll
    for (int k = 0; k < K; k++) x[k] = warp_sum<team>(x[k]);
  } else {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int k = 0; k < K; k++) {
      x[k] = warp_sum(x[k]);
      if (lane == 0) shared[k][warp] = x[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; k++) x[k] = warp_sum(lane < warps ? shared[k][lane] : 0.f);
  }
}

template <int elements, int size>
struct Shape {
  static constexpr int E = elements, team = size, teams = size == kBlock ? 1 : kThreads / std::max(size, 1);

  // Of a block: whole warps, no more than a row keeps busy.
  static int threads(int64_t cols) {
    return team == kBlock ? static_cast<int>(ceil_div(cols, E * 32) * 32) : kThreads;
  }
};

// body(Shape) with the smallest team that holds a row, up to most elements a lane.
template <int most, class Body>
Error by_width(int64_t cols, Body&& body) {
  if (cols <= 64) return body(Shape<8, 8>{});
  if (cols <= 128) return body(Shape<8, 16>{});
  if (cols <= 256) return body(Shape<8, 32>{});
  if (cols <= 512) return body(Shape<16, 32>{});
  if (cols <= 768) return body(Shape<24, 32>{});
  if (cols <= 1024) return body(Shape<32, 32>{});
  if (cols <= 16 * kMostThreads) return body(Shape<16, kBlock>{});
  return body(Shape<most, kBlock>{});
}

}  // namespace pygpt::cuda
