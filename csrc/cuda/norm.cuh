// What the forward and the backward of the norms share: rows, and the teams of threads that process them.
//
// A team processes a row: 8, 16 or 32 lanes for rows of up to 1,024 elements, a whole block for longer rows. Each lane
// holds E of the row's elements. Lanes read and write 16 bytes at a time if addresses and widths allow it (vectorized).
// Otherwise a lane takes every size-th element; these accesses coalesce too, but take more instructions.
#pragma once
#include <algorithm>

#include "../attention/scores.h"
#include "vector.cuh"

namespace pygpt::cuda {

constexpr int kWholeBlock = 0;  // the team size that stands for a whole block
constexpr int kThreads = 128;  // threads of a block that consists of several teams
constexpr int kMaxThreads = 512;  // most threads of a block that is one team
constexpr int kLongRowE = 16;  // elements per lane and pass if the row is too long for registers

// A lane's E elements of a row, in registers and in the row's dtype.
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

// One lane of a team of `size` lanes, and the columns that it holds of a row of `cols` elements, from column `start`
// on. A lane's columns ascend.
struct Lane {
  int rank, size;
  int64_t start, cols;
  bool vectorized;

  template <class T>
  __device__ __forceinline__ int64_t column(int i) const {
    constexpr int V = kVector<T>;
    return start + (vectorized ? (i / V * size + rank) * V + i % V : i * size + rank);
  }

  // How many of the lane's E elements exist. They are the first ones; the others lie beyond the row's end.
  template <class T, int E>
  __device__ __forceinline__ int valid() const {
    const int left = static_cast<int>(cols - start < size * E ? cols - start : size * E);
    const int unit = vectorized ? kVector<T> : 1;
    return (left / unit + size - 1 - rank) / size * unit;
  }

  // Loads the lane's elements of a row of T; zeros beyond the row's end. The lane's columns are those that it has of a
  // row of Lead.
  template <int E, class Lead, class T>
  __device__ __forceinline__ Row<T, E> load(const T* p) const {
    constexpr int V = kVector<T>;
    Row<T, E> row;
    if (vectorized) {
#pragma unroll
      for (int c = 0; c < E / V; c++) {
        const int64_t col = column<Lead>(c * V);
        row.chunks[c] = col < cols ? *reinterpret_cast<const uint4*>(p + col) : uint4{0, 0, 0, 0};
      }
    } else {
      float x[E];
#pragma unroll
      for (int i = 0; i < E; i++) x[i] = column<Lead>(i) < cols ? to_float(p[column<Lead>(i)]) : 0.f;
      row.set(x);
    }
    return row;
  }

  template <class Lead, int E, class T>
  __device__ __forceinline__ void store(T* p, const float (&x)[E]) const {
    constexpr int V = kVector<T>;
    if (vectorized) {
      Row<T, E> row;
      row.set(x);
#pragma unroll
      for (int c = 0; c < E / V; c++)
        if (column<Lead>(c * V) < cols) *reinterpret_cast<uint4*>(p + column<Lead>(c * V)) = row.chunks[c];
    } else {
#pragma unroll
      for (int i = 0; i < E; i++)
        if (column<Lead>(i) < cols) p[column<Lead>(i)] = from_float<T>(x[i]);
    }
  }
};

// What general kernels do besides: dropout, and an offset of the weights, which may be float whatever T is.
struct General {
  const int64_t* seed;  // or null
  uint32_t threshold;
  float keep, weight_offset;
  bool float_parameters;

  General() = default;
  explicit General(const NormArgs& a)
      : seed(a.seed), threshold(static_cast<uint32_t>(std::min<uint64_t>(a.threshold, 0xffffffff))),
        keep(static_cast<float>(a.keep)), weight_offset(static_cast<float>(a.weight_offset)),
        float_parameters(a.parameter_dtype == DType::f32) {}

  __device__ __forceinline__ float factor(uint32_t word) const { return word >= threshold ? keep : 0.f; }

  // Multiplies the elements first .. first + V - 1 of the lane's E elements of a row by dropout's factors.
  template <class T, int V>
  __device__ __forceinline__ void drop(const Lane& lane, int64_t row, int first, float (&x)[V]) const {
    if (lane.vectorized) {
#pragma unroll
      for (int v = 0; v < V; v += 4) {
        const uint32_t group = static_cast<uint32_t>(lane.column<T>(first + v) / 4);
        const RandomWords drawn = random_words(*seed, group, static_cast<uint32_t>(row), 0);
#pragma unroll
        for (int word = 0; word < 4; word++) x[v + word] = __fmul_rn(x[v + word], factor(drawn.word[word]));
      }
    } else {
#pragma unroll
      for (int v = 0; v < V; v++) {
        const int64_t col = lane.column<T>(first + v);
        const RandomWords drawn = random_words(*seed, static_cast<uint32_t>(col / 4), static_cast<uint32_t>(row), 0);
        const bool odd = col & 1;  // an index that is not constant would put the words into local memory
        const uint32_t low = odd ? drawn.word[1] : drawn.word[0], high = odd ? drawn.word[3] : drawn.word[2];
        x[v] = __fmul_rn(x[v], factor(col & 2 ? high : low));
      }
    }
  }
};

// Calls body(T, R, whether the kernel is general): T is the type of x and y, R that of the sum.
template <class Body>
Error by_types(const NormArgs& a, Body&& body) {
  return by_dtype(a.dtype, [&](auto zero) -> Error {
    using T = decltype(zero);
    if (a.plain() && a.weight_offset == 0) return body(T{}, T{}, std::false_type{});
    if (a.sum_dtype == a.dtype) return body(T{}, T{}, std::true_type{});
    if constexpr (sizeof(T) == 2) return body(T{}, float{}, std::true_type{});
    return "the residual's dtype is not served";
  });
}

template <int E>
__device__ __forceinline__ float sum_of(const float (&x)[E]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < E; i++) sum += x[i];
  return sum;
}

// Sums each x[k] over the team; every lane gets the result. A whole block exchanges its warps' sums in `shared`, which
// must not be written again before another barrier.
template <int team, int K>
__device__ __forceinline__ void team_sum(float (&x)[K], float (*shared)[32]) {
  if constexpr (team != kWholeBlock) {
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

// E elements per lane, teams of `size` lanes.
template <int elements, int size>
struct TeamShape {
  static constexpr int E = elements, team = size, teams = size == kWholeBlock ? 1 : kThreads / std::max(size, 1);

  // Threads of a block: whole warps, and no more than a row keeps busy.
  static int threads(int64_t cols) {
    return team == kWholeBlock ? static_cast<int>(ceil_div(cols, E * 32) * 32) : kThreads;
  }
};

// Calls body(TeamShape) with the smallest team that holds a row of `cols` elements in registers; a whole block has up
// to max_elements per lane.
template <int max_elements, class Body>
Error by_cols(int64_t cols, Body&& body) {
  if (cols <= 64) return body(TeamShape<8, 8>{});
  if (cols <= 128) return body(TeamShape<8, 16>{});
  if (cols <= 256) return body(TeamShape<8, 32>{});
  if (cols <= 512) return body(TeamShape<16, 32>{});
  if (cols <= 768) return body(TeamShape<24, 32>{});
  if (cols <= 1024) return body(TeamShape<32, 32>{});
  if (cols <= 16 * kMaxThreads) return body(TeamShape<16, kWholeBlock>{});
  return body(TeamShape<max_elements, kWholeBlock>{});
}

}  // namespace pygpt::cuda
