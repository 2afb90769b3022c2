// Tiles of attention in shared memory, and the two products that all its kernels are made of.
//
// A tile is ROWS x D elements, D a head dimension padded to 64, 128 or 256. Its 16-byte chunks are permuted
// within each row, chunk c of row r lying at c ^ (r & 7): 8 rows' worth of one column of chunks, which is what
// ldmatrix and the float loops read at a time, then lies in 8 different groups of banks.
//
// All products live in the accumulators of mma.m16n8k16. Of each 16 x 8 patch, lane 4g + t holds
//   acc[0], acc[1] = (g, 2t), (g, 2t + 1)      acc[2], acc[3] = (g + 8, 2t), (g + 8, 2t + 1)
// A warp owns M x N patches, and its rows alone: row maxima and sums are exchanged among 4 lanes, and a result P
// is, register for register, the left operand of the next product. Therefore
//   multiply_rows     acc += A B^T     A the warp's rows of a tile, B a tile       scores, dO V^T and transposes
//   multiply_columns  acc += P B       P the warp's accumulators, B a tile         P V, dS K, P^T dO, dS^T Q
// are all that forward and backward need. 16-bit types run on tensor cores. float, in full float32, runs on the
// ordinary ones in the same layout: both operands from shared memory, P from the 4 lanes that share a row.
#pragma once
#include "platform.cuh"

namespace pygpt::cuda::attention {

// One head: element (i, c) is data[i * row + c * channel], c < width. wide: aligned for accesses of 16 bytes (inputs)
// or of 2 elements (outputs).
template <class T>
struct Head {
  T* data;
  int64_t row, channel;
  int width;
  bool wide;
};

// ---------------------------------------------------------------- tiles
template <int D, class T>
__device__ __forceinline__ T* at(T* tile, int row, int channel) {
  constexpr int kChunk = 16 / sizeof(T);
  return tile + row * D + (((channel / kChunk) ^ (row & 7)) * kChunk + channel % kChunk);
}

// Starts to bring ROWS rows from row0 on, of the `rows` that there are; zeros outside. They are there when each thread
// has waited for its cp.async and the block has met at a barrier.
template <int ROWS, int D, int THREADS, class T>
__device__ __forceinline__ void load_tile(T* tile, const Head<const T>& from, int row0, int rows) {
  constexpr int kChunk = 16 / sizeof(T), kChunks = D / kChunk, kStep = THREADS / kChunks;
  static_assert(THREADS % kChunks == 0 && ROWS % kStep == 0);
  const int first = threadIdx.x / kChunks, channel = threadIdx.x % kChunks * kChunk;
  const int inside = channel < from.width ? rows - row0 : 0;
  if (from.wide) {
    const T* source = from.data + (first < inside ? int64_t(row0 + first) * from.row + channel : 0);
#pragma unroll
    for (int n = 0, row = first; n < ROWS / kStep; n++, row += kStep) {
      ptx::cp_async_16(at<D>(tile, row, channel), source, row < inside);
      if (row + kStep < inside) source += kStep * from.row;
    }
  } else {
#pragma unroll 1
    for (int row = first; row < ROWS; row += kStep) {
      const T* source = from.data + (row < inside ? int64_t(row0 + row) * from.row + channel * from.channel : 0);
      T* target = at<D>(tile, row, channel);
#pragma unroll 1
      for (int c = 0; c < kChunk; c++)
        target[c] = row < inside && channel + c < from.width ? source[c * from.channel] : from_float<T>(0.0f);
    }
  }
}

// The warp's rows of a tile, 16 M of them, as left operand: mma fragments of 16 channels, all held or one loaded at a
// time, or where float rows lie.
template <class T, int D, int M, bool held>
class Left {
 public:
  // tile: what load_tile has brought, from the warp's first row on.
  __device__ __forceinline__ explicit Left(const T* tile) : tile_(tile) {
    if constexpr (held)
#pragma unroll
      for (int k = 0; k < D / 16; k++) load(k);
  }

  // Channels 16 k .. 16 k + 15.
  __device__ __forceinline__ const uint32_t (&fragments(int k))[M][4] {
    if constexpr (!held) load(k);
    return fragments_[held ? k : 0];
  }

 private:
  __device__ __forceinline__ void load(int k) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < M; m++)
      ptx::ldmatrix_x4(fragments_[held ? k : 0][m], at<D>(tile_, 16 * m + lane % 16, 16 * k + lane / 16 * 8));
  }

  const T* tile_;
  uint32_t fragments_[held ? D / 16 : 1][M][4];
};

template <int D, int M, bool held>
class Left<float, D, M, held> {
 public:
  __device__ __forceinline__ explicit Left(const float* tile) : tile(tile) {}
  const float* tile;
};

// ---------------------------------------------------------------- products
// f(m, n, i, row, column) for all of the warp's accumulators [m][n][i].
template <int M, int N, class F>
__device__ __forceinline__ void for_each(F f) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) f(m, n, i, 16 * m + i / 2 * 8 + g, 8 * n + 2 * t + i % 2);
}

// acc (16 M, 8 N) += A B^T, B the 8 N rows of a tile.
template <class T, int D, int M, int N, bool held>
__device__ __forceinline__ void multiply_rows(float (&acc)[M][N][4], Left<T, D, M, held>& a, const T* b) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    const auto& left = a.fragments(k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      ptx::ldmatrix_x4(right, at<D>(b, 8 * n + lane / 16 * 8 + lane % 8, 16 * k + lane / 8 % 2 * 8));
#pragma unroll
      for (int m = 0; m < M; m++) {
        ptx::mma_m16n8k16<T>(acc[m][n], left[m], right[0], right[1]);
        ptx::mma_m16n8k16<T>(acc[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// The same in float32, summed in runs of 32 channels, so that long rows round no worse than short ones.
template <int D, int M, int N, bool held>
__device__ __forceinline__ void multiply_rows(float (&acc)[M][N][4], Left<float, D, M, held>& a, const float* b) {
  constexpr int kRun = 32;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 1
  for (int run = 0; run < D; run += kRun) {
    float sum[M][N][4] = {};
#pragma unroll 1
    for (int e = run; e < run + kRun; e += 4) {
      float4 x[M][2];
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) x[m][r] = *reinterpret_cast<const float4*>(at<D>(a.tile, 16 * m + 8 * r + g, e));
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const float4 y = *reinterpret_cast<const float4*>(at<D>(b, 8 * n + 2 * t + c, e));
#pragma unroll
          for (int m = 0; m < M; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
              float& to = sum[m][n][2 * r + c];
              to = fmaf(x[m][r].x, y.x, to), to = fmaf(x[m][r].y, y.y, to);
              to = fmaf(x[m][r].z, y.z, to), to = fmaf(x[m][r].w, y.w, to);
            }
        }
    }
    for_each<M, N>([&](int m, int n, int i, int, int) { acc[m][n][i] += sum[m][n][i]; });
  }
}

// acc (16 M, 8 C) += P B, P (16 M, 8 N) in accumulators, B the 8 N rows of a tile.
template <class T, int M, int N, int C>
__device__ __forceinline__ void multiply_columns(float (&acc)[M][C][4], const float (&p)[M][N][4], const T* b) {
  constexpr int D = 8 * C;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) left[m][i] = pack<T>(p[m][j + i / 2][i % 2 * 2], p[m][j + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < C; n += 2) {
      uint32_t right[4];
      ptx::ldmatrix_x4_trans(right, at<D>(b, 8 * j + lane % 16, 8 * n + lane / 16 * 8));
#pragma unroll
      for (int m = 0; m < M; m++) {
        ptx::mma_m16n8k16<T>(acc[m][n], left[m], right[0], right[1]);
        ptx::mma_m16n8k16<T>(acc[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// In float32: the 4 lanes that share rows hand round their columns of P.
template <int M, int N, int C>
__device__ __forceinline__ void multiply_columns(float (&acc)[M][C][4], const float (&p)[M][N][4], const float* b) {
  constexpr int D = 8 * C;
  const int t = threadIdx.x % 4;
#pragma unroll 1
  for (int column = 0; column < 8; column++)
#pragma unroll
    for (int j = 0; j < N; j++) {
      float x[M][2];
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++)
          x[m][r] = __shfl_sync(0xffffffffu, column % 2 ? p[m][j][2 * r + 1] : p[m][j][2 * r], column / 2, 4);
#pragma unroll
      for (int n = 0; n < C; n++) {
        const float2 y = *reinterpret_cast<const float2*>(at<D>(b, 8 * j + column, 8 * n + 2 * t));
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int r = 0; r < 2; r++) {
            acc[m][n][2 * r] = fmaf(x[m][r], y.x, acc[m][n][2 * r]);
            acc[m][n][2 * r + 1] = fmaf(x[m][r], y.y, acc[m][n][2 * r + 1]);
          }
      }
    }
}

// The warp's accumulators times factor(m, r), where r is 0 in the upper and 1 in the lower 8 rows of a patch, into the
// rows from row0 on of a head that has `rows`, its channels contiguous.
template <class T, int M, int N, class F>
__device__ __forceinline__ void store_rows(const Head<T>& to, const float (&acc)[M][N][4], int row0, int rows,
                                           F factor) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = row0 + 16 * m + 8 * r + g;
      const float scale = factor(m, r);
#pragma unroll
      for (int n = 0; n < N; n++) {
        const int channel = 8 * n + 2 * t;
        if (row >= rows || channel >= to.width) continue;
        const float first = acc[m][n][2 * r] * scale, second = acc[m][n][2 * r + 1] * scale;
        T* target = to.data + int64_t(row) * to.row + channel;
        if (to.wide) {
          if constexpr (sizeof(T) == 4) *reinterpret_cast<float2*>(target) = make_float2(first, second);
          else *reinterpret_cast<uint32_t*>(target) = pack<T>(first, second);
        } else {
          target[0] = from_float<T>(first);
          if (channel + 1 < to.width) target[1] = from_float<T>(second);
        }
      }
    }
}

}  // namespace pygpt::cuda::attention
