// Tiles of attention in shared memory, and the two products that all its kernels are made of.
//
// A tile is ROWS x D elements, D a head dimension padded to 64, 128 or 256. It is XOR-swizzled in 16-byte chunks: chunk
// c of row r is stored at c ^ (r & 7). ldmatrix and the float loops read the same column of chunks in 8 consecutive
// rows; swizzled, these 8 chunks lie in 8 different groups of banks.
//
// All products are held in the accumulators of mma.m16n8k16. Of each 16 x 8 mma tile, lane 4g + t holds
//   acc[0], acc[1] = (g, 2t), (g, 2t + 1)      acc[2], acc[3] = (g + 8, 2t), (g + 8, 2t + 1)
// A warp owns M x N mma tiles, and no other warp has elements of its rows. Row maxima and sums are therefore exchanged
// among 4 lanes only, and a result P is, register for register, the A operand of the next product. Hence
//   warp_gemm_nt   acc += A B^T    A: the warp's rows of a tile, B: a tile      scores, dO V^T and their transposes
//   warp_gemm_nn   acc += P B      P: the warp's accumulators, B: a tile        P V, dS K, P^T dO, dS^T Q
// are all that forward and backward need. 16-bit types run on tensor cores. float runs in full float32 on the ordinary
// cores with the same layout of accumulators: both operands are read from shared memory, P from the 4 lanes that share
// a row.
#pragma once
#include "../platform.cuh"

namespace pygpt::cuda::attention {

// One head: element (i, c) is data[i * row_stride + c * channel_stride], c < width. vectorized: rows are contiguous and
// aligned, so that inputs can be read 16 bytes at a time and outputs written 2 elements at a time.
template <class T>
struct Head {
  T* data;
  int64_t row_stride, channel_stride;
  int width;
  bool vectorized;
};

// ---------------------------------------------------------------- tiles
// The address of element (row, channel) of a swizzled tile.
template <int D, class T>
__device__ __forceinline__ T* element(T* tile, int row, int channel) {
  constexpr int kChunk = 16 / sizeof(T);
  return tile + row * D + (((channel / kChunk) ^ (row & 7)) * kChunk + channel % kChunk);
}

// Starts to copy rows row0 .. row0 + ROWS - 1 of a head that has `rows` rows into a tile; zeros outside the head. The
// tile is complete when each thread has waited for its cp.async and the block has passed a barrier.
//
// Rows for which skips(row) is true become zeros.
struct NoRow {
  __device__ __forceinline__ bool operator()(int) const { return false; }
};
template <int ROWS, int D, int THREADS, class T, class Skips = NoRow>
__device__ __forceinline__ void load_tile(T* tile, const Head<const T>& from, int row0, int rows, Skips skips = {}) {
  constexpr int kChunk = 16 / sizeof(T), kChunks = D / kChunk, kStep = THREADS / kChunks;
  static_assert(THREADS % kChunks == 0 && ROWS % kStep == 0);
  const int first = threadIdx.x / kChunks, channel = threadIdx.x % kChunks * kChunk;
  const int inside = channel < from.width ? rows - row0 : 0;
  if (from.vectorized) {
    const T* source = from.data + (first < inside ? int64_t(row0 + first) * from.row_stride + channel : 0);
#pragma unroll
    for (int n = 0, row = first; n < ROWS / kStep; n++, row += kStep) {
      ptx::cp_async_16(element<D>(tile, row, channel), source, row < inside && !skips(row0 + row));
      if (row + kStep < inside) source += kStep * from.row_stride;
    }
  } else {
#pragma unroll 1
    for (int row = first; row < ROWS; row += kStep) {
      const int64_t offset = int64_t(row0 + row) * from.row_stride + channel * from.channel_stride;
      const T* source = from.data + (row < inside ? offset : 0);
      T* target = element<D>(tile, row, channel);
#pragma unroll 1
      for (int c = 0; c < kChunk; c++)
        target[c] = row < inside && channel + c < from.width && !skips(row0 + row) ? source[c * from.channel_stride]
                                                                                   : from_float<T>(0.0f);
    }
  }
}

// The warp's A operand, 16 M rows of a tile. 16-bit types: ldmatrix fragments of 16 channels, resident in registers or
// reloaded for each k. float: a pointer to shared memory.
template <class T, int D, int M, bool resident>
class WarpA {
 public:
  // `tile` points to the warp's first row of a tile that load_tile has filled.
  __device__ __forceinline__ explicit WarpA(const T* tile) : tile_(tile) {
    if constexpr (resident)
#pragma unroll
      for (int k = 0; k < D / 16; k++) load(k);
  }

  // The fragments of channels 16 k .. 16 k + 15.
  __device__ __forceinline__ const uint32_t (&fragments(int k))[M][4] {
    if constexpr (!resident) load(k);
    return fragments_[resident ? k : 0];
  }

 private:
  __device__ __forceinline__ void load(int k) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < M; m++)
      ptx::ldmatrix_x4(fragments_[resident ? k : 0][m], element<D>(tile_, 16 * m + lane % 16, 16 * k + lane / 16 * 8));
  }

  const T* tile_;
  uint32_t fragments_[resident ? D / 16 : 1][M][4];
};

template <int D, int M, bool resident>
class WarpA<float, D, M, resident> {
 public:
  __device__ __forceinline__ explicit WarpA(const float* tile) : tile(tile) {}
  const float* tile;
};

// ---------------------------------------------------------------- products
// Calls f(m, n, i, row, column) for each of the warp's accumulators acc[m][n][i].
template <int M, int N, class F>
__device__ __forceinline__ void for_each_accumulator(F f) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) f(m, n, i, 16 * m + i / 2 * 8 + g, 8 * n + 2 * t + i % 2);
}

// acc (16 M, 8 N) += A B^T, where B is the 8 N rows of a tile.
template <class T, int D, int M, int N, bool resident>
__device__ __forceinline__ void warp_gemm_nt(float (&acc)[M][N][4], WarpA<T, D, M, resident>& a, const T* b) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    const auto& a_frag = a.fragments(k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b_frag[4];
      ptx::ldmatrix_x4(b_frag, element<D>(b, 8 * n + lane / 16 * 8 + lane % 8, 16 * k + lane / 8 % 2 * 8));
#pragma unroll
      for (int m = 0; m < M; m++) {
        ptx::mma_m16n8k16<T>(acc[m][n], a_frag[m], b_frag[0], b_frag[1]);
        ptx::mma_m16n8k16<T>(acc[m][n + 1], a_frag[m], b_frag[2], b_frag[3]);
      }
    }
  }
}

// The same in float32. Sums are formed over chunks of 32 channels first, which keeps the rounding error of long rows
// low.
template <int D, int M, int N, bool resident>
__device__ __forceinline__ void warp_gemm_nt(float (&acc)[M][N][4], WarpA<float, D, M, resident>& a, const float* b) {
  constexpr int kChannels = 32;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 1
  for (int first = 0; first < D; first += kChannels) {
    float sum[M][N][4] = {};
#pragma unroll 1
    for (int c0 = first; c0 < first + kChannels; c0 += 4) {
      float4 x[M][2];
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++)
          x[m][r] = *reinterpret_cast<const float4*>(element<D>(a.tile, 16 * m + 8 * r + g, c0));
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const float4 y = *reinterpret_cast<const float4*>(element<D>(b, 8 * n + 2 * t + c, c0));
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
    for_each_accumulator<M, N>([&](int m, int n, int i, int, int) { acc[m][n][i] += sum[m][n][i]; });
  }
}

// acc (16 M, 8 C) += P B, where P (16 M, 8 N) is in accumulators and B is the 8 N rows of a tile.
template <class T, int M, int N, int C>
__device__ __forceinline__ void warp_gemm_nn(float (&acc)[M][C][4], const float (&p)[M][N][4], const T* b) {
  constexpr int D = 8 * C;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    uint32_t a_frag[M][4];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) a_frag[m][i] = pack<T>(p[m][j + i / 2][i % 2 * 2], p[m][j + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < C; n += 2) {
      uint32_t b_frag[4];
      ptx::ldmatrix_x4_trans(b_frag, element<D>(b, 8 * j + lane % 16, 8 * n + lane / 16 * 8));
#pragma unroll
      for (int m = 0; m < M; m++) {
        ptx::mma_m16n8k16<T>(acc[m][n], a_frag[m], b_frag[0], b_frag[1]);
        ptx::mma_m16n8k16<T>(acc[m][n + 1], a_frag[m], b_frag[2], b_frag[3]);
      }
    }
  }
}

// The same in float32. The 4 lanes that share a row broadcast their columns of P to each other.
template <int M, int N, int C>
__device__ __forceinline__ void warp_gemm_nn(float (&acc)[M][C][4], const float (&p)[M][N][4], const float* b) {
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
        const float2 y = *reinterpret_cast<const float2*>(element<D>(b, 8 * j + column, 8 * n + 2 * t));
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

// Stores the warp's accumulators, multiplied by factor(m, r), from row row0 of a head that has `rows` rows and
// contiguous channels. r is 0 in the upper 8 rows of an mma tile and 1 in the lower 8.
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
        T* target = to.data + int64_t(row) * to.row_stride + channel;
        if (to.vectorized) {
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
