// C (M, N) = epilogue(A (M, K) B (K, N)), accumulated in float32, in the three layouts that a linear layer needs:
//
//     NT   y  = x W^T      A is stored (M, K), B (N, K): both K-major (contiguous along K)
//     NN   dx = dy W       A is stored (M, K), B (K, N)
//     TN   dW = dy^T x     A is stored (K, M), B (K, N): both MN-major (contiguous across K)
//
// mma_gemm_kernel: 16-bit types on tensor cores. A block of 4 warps computes a 128 x 128 tile. Each warp computes 64 x
// 64 of it, 4 x 8 products mma.m16n8k16 per k-step. These sizes follow from
//   - registers: the 64 x 64 accumulators of a warp take 128 of a thread's 255 registers, and two blocks fill a
//     multiprocessor's 65,536. One block's epilogue overlaps with the other block's products.
//   - shared memory: per 16 of K, a warp reads 8 fragments of 16 x 16 (4 KB: 32 cycles at 128 bytes per cycle) for 32
//     mma, which occupy an A100's tensor cores for 64 cycles (2048 FLOP per cycle and multiprocessor). A warp tile of
//     64 x 32 would need 24 cycles of reads for 32 cycles of mma. Writing the tiles adds half as many cycles again.
//   - L2: (128 + 128) 2 bytes for 2 * 128 * 128 FLOP are 64 FLOP per byte, that is 4.9 TB/s at an A100's 312 TFLOP/s.
//     The tile scheduler takes 8 rows of tiles at a time, so that concurrent blocks share operands in L2.
//   - depth: tiles are 32 deep along K, in 4 stages of cp.async: 64 KB, so two blocks fit into an A100's 164 KB.
// Small problems use 64 x 64 tiles, 64 deep, in 3 stages (48 KB, three blocks per multiprocessor).
// Shared tiles are XOR-swizzled in 16-byte chunks, so that the 8 lines of an ldmatrix lie in 8 different groups of
// banks in both layouts.
//
// ffma_gemm_kernel: float32 on the ordinary cores, in full precision. A thread has 8 x 8 accumulators; tiles are 8 deep
// and double-buffered through registers. A warp computes 32 x 64: per k it reads 192 bytes of shared memory (2 cycles)
// for 2048 FFMA (16 cycles of a multiprocessor). After every 256 products the accumulators are added to a tile in
// shared memory and cleared: rounding errors then grow with sqrt(256 + K / 256) instead of sqrt(K).
//
// Split-K: a product with few tiles and a long K (a weight gradient) is split along K, by its shape alone. Each part
// leaves float partial sums in scratch memory, and splitk_reduce_kernel adds them in order.
//
// gemv_kernel: for a few rows (decoding) the time goes into reading the weights, so each warp streams 4 rows of W once.
//
// Both tiled kernels leave their tile in shared memory as floats for epilogue.cuh.
#pragma once
#include <algorithm>

#include "epilogue.cuh"
#include "reduce.cuh"

namespace pygpt::cuda {

enum class Layout { NT, NN, TN };
constexpr __host__ __device__ bool a_k_major(Layout layout) { return layout != Layout::TN; }
constexpr __host__ __device__ bool b_k_major(Layout layout) { return layout == Layout::NT; }

// ---------------------------------------------------------------- tensor cores
// The offset of 16-byte chunk c (8 elements) of a line in a swizzled tile whose lines have WIDTH elements.
template <int WIDTH>
__device__ __forceinline__ int swizzled_offset(int line, int c) {
  return line * WIDTH + 8 * (c ^ (WIDTH == 32 ? line / 2 % 4 : line % 8));
}

// Starts to copy LINES x WIDTH elements from (line, col) of x, which has `lines` lines of `width` elements; zeros
// outside.
template <int LINES, int WIDTH, int THREADS, class T>
__device__ __forceinline__ void load_tile_async(T* tile, const Operand<T>& x, int64_t line, int64_t col, int64_t lines,
                                                int64_t width) {
  constexpr int kThreadsPerLine = WIDTH / 8, kLinesPerPass = THREADS / kThreadsPerLine;
  static_assert(kLinesPerPass % 8 == 0, "all chunks of a thread must have the same swizzle");
  const int l = threadIdx.x / kThreadsPerLine, c = threadIdx.x % kThreadsPerLine;
  const int lines_left = static_cast<int>(min(lines - line, int64_t{LINES})) - l;
  const int cols_left = static_cast<int>(min(width - col, int64_t{WIDTH})) - 8 * c;
  const T* from = x.data + (line + l) * x.stride + col + 8 * c;
  T* to = tile + swizzled_offset<WIDTH>(l, c);
  if (x.vectorized) {
#pragma unroll
    for (int i = 0; i < LINES; i += kLinesPerPass)
      ptx::cp_async_16(to + i * WIDTH, from + i * x.stride, cols_left > 0 && i < lines_left);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < LINES; i += kLinesPerPass) {
    alignas(16) T v[8];
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = e < cols_left && i < lines_left ? from[i * x.stride + e] : from_float<T>(0.0f);
    *reinterpret_cast<uint4*>(to + i * WIDTH) = *reinterpret_cast<const uint4*>(v);
  }
}

// Loads four 8 x 8 matrices of an operand's tile into registers. (mn, k) is the corner of matrix lane / 8.
template <bool K_MAJOR, int TILE, int TILE_K, class T>
__device__ __forceinline__ void load_fragments(uint32_t (&r)[4], const T* tile, int mn, int k) {
  const int line = threadIdx.x % 8;
  if constexpr (K_MAJOR) ptx::ldmatrix_x4(r, tile + swizzled_offset<TILE_K>(mn + line, k / 8));
  else ptx::ldmatrix_x4_trans(r, tile + swizzled_offset<TILE>(k + line, mn / 8));
}

template <int TILE>
struct MmaTile {
  static constexpr int kThreads = 128, kWarpTile = TILE / 2;
  static constexpr int kTileK = TILE == 128 ? 32 : 64, kStages = TILE == 128 ? 4 : 3;
  static constexpr int kMinBlocksPerSm = TILE == 128 ? 2 : 3;
  static constexpr int kOperandElements = TILE * kTileK, kStageElements = 2 * kOperandElements;
  static constexpr int kStride = TILE + 8;  // of the float tile: the rows of an mma tile are 8 banks apart
  static constexpr int kPipelineBytes = kStages * kStageElements * 2, kTileBytes = TILE * kStride * 4;
  static constexpr int kSharedBytes = kPipelineBytes > kTileBytes ? kPipelineBytes : kTileBytes;
};

template <class T, Layout L, int TILE>
__global__ void __launch_bounds__(MmaTile<TILE>::kThreads, MmaTile<TILE>::kMinBlocksPerSm)
    mma_gemm_kernel(const GemmParams<T> g) {
  using S = MmaTile<TILE>;
  constexpr bool kAKMajor = a_k_major(L), kBKMajor = b_k_major(L);
  constexpr int kMTiles = S::kWarpTile / 16, kNTiles = S::kWarpTile / 8;  // mma tiles of a warp
  PYGPT_DYNAMIC_SHARED(shared);
  T* stages = reinterpret_cast<T*>(shared);
  const TileCoord coord = tile_coord<TILE>(g.M, g.N);
  const int64_t m0 = int64_t{coord.m} * TILE, n0 = int64_t{coord.n} * TILE, k_begin = coord.split * g.k_per_split;
  const int k_steps = static_cast<int>(ceil_div(min(g.K - k_begin, g.k_per_split), S::kTileK));

  auto load = [&](int step) {
    T *a = stages + step % S::kStages * S::kStageElements, *b = a + S::kOperandElements;
    const int64_t k = k_begin + int64_t{step} * S::kTileK;
    if (step < k_steps) {
      if constexpr (kAKMajor) load_tile_async<TILE, S::kTileK, S::kThreads>(a, g.a, m0, k, g.M, g.K);
      else load_tile_async<S::kTileK, TILE, S::kThreads>(a, g.a, k, m0, g.K, g.M);
      if constexpr (kBKMajor) load_tile_async<TILE, S::kTileK, S::kThreads>(b, g.b, n0, k, g.N, g.K);
      else load_tile_async<S::kTileK, TILE, S::kThreads>(b, g.b, k, n0, g.K, g.N);
    }
    ptx::cp_async_commit();
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp / 2 * S::kWarpTile, warp_n = warp % 2 * S::kWarpTile;
  // The order of an ldmatrix's four 8 x 8 matrices: for A, M varies faster than K; for B, K varies faster than N.
  const int fast = lane / 8 % 2 * 8, slow = lane / 16 * 8;
  float acc[kMTiles][kNTiles][4] = {};
#pragma unroll
  for (int step = 0; step < S::kStages - 1; step++) load(step);
  for (int step = 0; step < k_steps; step++) {
    ptx::cp_async_wait<S::kStages - 2>();
    __syncthreads();  // this step's stage has arrived, and no warp reads the last step's any more
    load(step + S::kStages - 1);
    const T *a = stages + step % S::kStages * S::kStageElements, *b = a + S::kOperandElements;
#pragma unroll
    for (int k = 0; k < S::kTileK; k += 16) {
      uint32_t a_frag[kMTiles][4], b_frag[kNTiles / 2][4];
#pragma unroll
      for (int i = 0; i < kMTiles; i++)
        load_fragments<kAKMajor, TILE, S::kTileK>(a_frag[i], a, warp_m + 16 * i + fast, k + slow);
#pragma unroll
      for (int j = 0; j < kNTiles / 2; j++)
        load_fragments<kBKMajor, TILE, S::kTileK>(b_frag[j], b, warp_n + 16 * j + slow, k + fast);
#pragma unroll
      for (int i = 0; i < kMTiles; i++)
#pragma unroll
        for (int j = 0; j < kNTiles; j++)
          ptx::mma_m16n8k16<T>(acc[i][j], a_frag[i], b_frag[j / 2][j % 2 * 2], b_frag[j / 2][j % 2 * 2 + 1]);
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  float* tile = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < kMTiles; i++)
#pragma unroll
    for (int j = 0; j < kNTiles; j++) {
      float* to = tile + (warp_m + 16 * i + lane / 4) * S::kStride + warp_n + 8 * j + lane % 4 * 2;
      *reinterpret_cast<float2*>(to) = make_float2(acc[i][j][0], acc[i][j][1]);
      *reinterpret_cast<float2*>(to + 8 * S::kStride) = make_float2(acc[i][j][2], acc[i][j][3]);
    }
  __syncthreads();
  store_tile<T, TILE, S::kStride, S::kThreads>(g, coord, tile);
}

// ---------------------------------------------------------------- float32
template <int TILE>
struct FfmaTile {
  static constexpr int kThreads = TILE * TILE / 64, kTileK = 8;
  static constexpr int kChainLength = 256;  // products that an accumulator adds up before it is cleared
  static constexpr int kMinBlocksPerSm = TILE == 128 ? 2 : 6;
  static constexpr int kStride = TILE + 4;  // the transposing stores of 16 lines x 2 vectors hit all 32 banks
  static constexpr int kOperandElements = kTileK * kStride, kVectors = TILE * kTileK / 4 / kThreads;
  static constexpr int kSharedBytes = (4 * kOperandElements + TILE * TILE) * 4;
};

// A thread's part of an operand's TILE x 8 tile, on its way from global memory through registers to shared memory
// [8][TILE + 4]: kVectors vectors of 4 elements, kLinesPerPass lines apart.
template <bool K_MAJOR, int TILE>
struct RegisterStage {
  using S = FfmaTile<TILE>;
  static constexpr int kThreadsPerLine = K_MAJOR ? 2 : TILE / 4, kLinesPerPass = S::kThreads / kThreadsPerLine;
  const float* from;  // the thread's first vector of the next tile
  int left;  // lines (MN-major: columns) of the operand from there on
  float4 v[S::kVectors];

  static __device__ __forceinline__ int line() { return threadIdx.x / kThreadsPerLine; }
  static __device__ __forceinline__ int col() { return threadIdx.x % kThreadsPerLine * 4; }

  __device__ __forceinline__ RegisterStage(const Operand<float>& x, int64_t mn, int64_t k, int64_t MN) {
    from = x.data + ((K_MAJOR ? mn : k) + line()) * x.stride + (K_MAJOR ? k : mn) + col();
    left = static_cast<int>(min(MN - mn, int64_t{TILE})) - (K_MAJOR ? line() : col());
  }
  __device__ __forceinline__ void load(const Operand<float>& x, int k_left) {
#pragma unroll
    for (int u = 0; u < S::kVectors; u++) {
      const bool inside = K_MAJOR ? u * kLinesPerPass < left : line() + u * kLinesPerPass < k_left;
      const int n = inside ? (K_MAJOR ? k_left - col() : left) : 0;
      v[u] = load4(from + u * kLinesPerPass * x.stride, n, x.vectorized && n > 0);
    }
    from += K_MAJOR ? S::kTileK : S::kTileK * x.stride;
  }
  __device__ __forceinline__ void store(float* tile) const {
#pragma unroll
    for (int u = 0; u < S::kVectors; u++) {
      if constexpr (K_MAJOR) {
        float* to = tile + col() * S::kStride + line() + u * kLinesPerPass;
        to[0] = v[u].x, to[S::kStride] = v[u].y, to[2 * S::kStride] = v[u].z, to[3 * S::kStride] = v[u].w;
      } else {
        *reinterpret_cast<float4*>(tile + (line() + u * kLinesPerPass) * S::kStride + col()) = v[u];
      }
    }
  }
};

// A warp is 4 x 8 lanes. Lane (y, x) accumulates 8 x 8 elements: rows 4y .. 4y + 3 and 16 below, columns 4x .. 4x + 3
// and 32 to the right.
template <Layout L, int TILE>
__global__ void __launch_bounds__(FfmaTile<TILE>::kThreads, FfmaTile<TILE>::kMinBlocksPerSm)
    ffma_gemm_kernel(const GemmParams<float> g) {
  using S = FfmaTile<TILE>;
  PYGPT_DYNAMIC_SHARED(shared);
  float *tile = reinterpret_cast<float*>(shared), *buffers = tile + TILE * TILE;
  const TileCoord coord = tile_coord<TILE>(g.M, g.N);
  const int64_t k_begin = coord.split * g.k_per_split, k_length = min(g.K - k_begin, g.k_per_split);
  const int k_steps = static_cast<int>(ceil_div(k_length, S::kTileK));
  const int last_k = static_cast<int>((k_length - 1) % S::kTileK + 1);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int m = warp / (TILE / 64) * 32 + lane / 8 * 4, n = warp % (TILE / 64) * 64 + lane % 8 * 4;

  RegisterStage<a_k_major(L), TILE> a(g.a, int64_t{coord.m} * TILE, k_begin, g.M);
  RegisterStage<b_k_major(L), TILE> b(g.b, int64_t{coord.n} * TILE, k_begin, g.N);
  auto k_left = [&](int step) { return step + 1 < k_steps ? S::kTileK : step < k_steps ? last_k : 0; };
  float acc[8][8] = {};
  auto add_to_tile = [&] {
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        float4& to = *reinterpret_cast<float4*>(tile + (m + i % 4 + i / 4 * 16) * TILE + n + j * 8);
        const float4 sum = make_float4(acc[i][j], acc[i][j + 1], acc[i][j + 2], acc[i][j + 3]);
        to = to + sum;
        acc[i][j] = acc[i][j + 1] = acc[i][j + 2] = acc[i][j + 3] = 0.0f;
      }
  };

  for (int i = threadIdx.x * 4; i < TILE * TILE; i += S::kThreads * 4)
    *reinterpret_cast<float4*>(tile + i) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (k_steps) {
    a.load(g.a, k_left(0)), b.load(g.b, k_left(0));
    a.store(buffers), b.store(buffers + S::kOperandElements);
  }
  for (int step = 0; step < k_steps; add_to_tile())
    for (const int end = min(k_steps, step + S::kChainLength / S::kTileK); step < end; step++) {
      __syncthreads();  // this step's buffer is filled, and no thread reads the other one any more
      const float* current = buffers + step % 2 * 2 * S::kOperandElements;
      a.load(g.a, k_left(step + 1)), b.load(g.b, k_left(step + 1));
#pragma unroll
      for (int k = 0; k < S::kTileK; k++) {
        alignas(16) float x[8], y[8];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          reinterpret_cast<float4&>(x[4 * h]) = *reinterpret_cast<const float4*>(current + k * S::kStride + m + 16 * h);
          reinterpret_cast<float4&>(y[4 * h]) =
              *reinterpret_cast<const float4*>(current + S::kOperandElements + k * S::kStride + n + 32 * h);
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
          for (int j = 0; j < 8; j++) acc[i][j] = fmaf(x[i], y[j], acc[i][j]);
      }
      float* next = buffers + (step + 1) % 2 * 2 * S::kOperandElements;
      a.store(next), b.store(next + S::kOperandElements);
    }
  __syncthreads();
  store_tile<float, TILE, TILE, S::kThreads>(g, coord, tile);
}

// ---------------------------------------------------------------- a few rows
// Loads the 16 bytes at column c of a line that has `left` elements from there on; zeros after them.
template <class T>
__device__ __forceinline__ void load_vector(const Operand<T>& x, int64_t line, int64_t c, int64_t left,
                                            float (&v)[kVector<T>]) {
  const T* from = x.data + line * x.stride + c;
  if (x.vectorized) return to_floats<T>(*reinterpret_cast<const uint4*>(from), v);
#pragma unroll
  for (int e = 0; e < kVector<T>; e++) v[e] = e < left ? to_float(from[e]) : 0.0f;
}

// Layout NT for at most ROWS rows of A. A warp computes 4 columns of C; its lanes divide up K.
template <class T, int ROWS>
__global__ void __launch_bounds__(128) gemv_kernel(const GemmParams<T> g) {
  constexpr int kWidth = kVector<T>;
  const int lane = threadIdx.x % 32;
  const int64_t j = (int64_t{blockIdx.x} * 4 + threadIdx.x / 32) * 4;
  if (j >= g.N) return;
  float sums[ROWS][4] = {};
  for (int64_t k = lane * kWidth; k < g.K; k += 32 * kWidth) {
    float w[4][kWidth];
#pragma unroll
    for (int c = 0; c < 4; c++) load_vector(g.b, min(j + c, g.N - 1), k, g.K - k, w[c]);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (r >= g.M) continue;
      float x[kWidth];
      load_vector(g.a, r, k, g.K - k, x);
#pragma unroll
      for (int c = 0; c < 4; c++) {
        float dot = x[0] * w[c][0];  // added up first, which keeps the chain of additions short
#pragma unroll
        for (int e = 1; e < kWidth; e++) dot = fmaf(x[e], w[c][e], dot);
        sums[r][c] += dot;
      }
    }
  }
  float4 row = make_float4(0.0f, 0.0f, 0.0f, 0.0f);  // lane r stores row r
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float4 sum =
        make_float4(warp_sum(sums[r][0]), warp_sum(sums[r][1]), warp_sum(sums[r][2]), warp_sum(sums[r][3]));
    if (lane == r) row = sum;
  }
  const int n = static_cast<int>(min(g.N - j, int64_t{4}));
  if (lane < g.M) apply_epilogue(g.epilogue, lane, j, n, row + load_bias(g.epilogue, j, n));
}

// ---------------------------------------------------------------- launching
// The tile size and the number of splits along K depend on the shape alone. Tiles of 128 are used if they give enough
// blocks to keep about 130 multiprocessors busy. A split is not shorter than what pays for its partial sums.
struct Plan {
  int tile, splits;
};
inline Plan plan_gemm(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t kMaxBlocks = 384, kEnoughBlocks = 128, kMaxSplits = 16;
  auto tiles = [&](int tile) { return ceil_div(M, tile) * ceil_div(N, tile); };
  auto splits = [&](int tile, int64_t min_k) {
    return static_cast<int>(std::clamp<int64_t>(std::min(kMaxBlocks / tiles(tile), K / min_k), 1, kMaxSplits));
  };
  const Plan large{128, splits(128, 2048)}, small{64, splits(64, 256)};
  return tiles(128) * large.splits >= kEnoughBlocks ? large : small;
}

template <class T, Layout L, int TILE>
Error launch_tiles(const GemmParams<T>& g, const Stream& stream) {
  const dim3 grid = make_grid(ceil_div(g.M, TILE) * ceil_div(g.N, TILE) * g.splits);
  if constexpr (std::is_same_v<T, float>)
    return launch(ffma_gemm_kernel<L, TILE>, grid, dim3(FfmaTile<TILE>::kThreads), FfmaTile<TILE>::kSharedBytes, stream,
                  g);
  else
    return launch(mma_gemm_kernel<T, L, TILE>, grid, dim3(MmaTile<TILE>::kThreads), MmaTile<TILE>::kSharedBytes, stream,
                  g);
}

template <class T, int ROWS>
Error launch_gemv(const GemmParams<T>& g, const Stream& stream) {
  return launch(gemv_kernel<T, ROWS>, make_grid(ceil_div(g.N, 16)), dim3(128), 0, stream, g);
}

// A matrix whose lines have `width` elements and are `stride` elements apart.
template <class T>
Operand<T> operand(const void* data, int64_t stride, int64_t width) {
  const T* p = static_cast<const T*>(data);
  return {p, stride, can_vectorize(p, stride) && width % kVector<T> == 0};
}

// C = epilogue(A B). sums (N), if not null, receives the column sums of what the epilogue stores, before rounding.
template <Layout L, class T>
Error gemm(int64_t M, int64_t N, int64_t K, Operand<T> a, Operand<T> b, Epilogue<T> epilogue, T* sums,
           const Stream& stream) {
  auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0; };
  epilogue.vectorized = N % 4 == 0 && epilogue.stride % 4 == 0 && aligned(epilogue.out) && aligned(epilogue.bias) &&
                        aligned(epilogue.pre) && aligned(epilogue.saved) && aligned(epilogue.gate) &&
                        can_vectorize(epilogue.addend) && can_vectorize(epilogue.wide);
  if (N == 0) return nullptr;
  if (M == 0) return sums ? column_sums(static_cast<const float*>(nullptr), 0, N, N, sums, stream) : nullptr;
  GemmParams<T> g{M, N, K, a, b, epilogue, K, 1, nullptr};
  if (L == Layout::NT && !sums) {
    if (M <= 4) return launch_gemv<T, 4>(g, stream);
    if constexpr (std::is_same_v<T, float>)
      if (M <= 16) return launch_gemv<T, 16>(g, stream);
  }
  const Plan p = plan_gemm(M, N, K);
  const int64_t m_tiles = ceil_div(M, p.tile);
  if (sums) {
    g.epilogue.tile_sums = static_cast<float*>(stream.scratch(m_tiles * N * sizeof(float)));
  } else if (p.splits > 1) {
    g.k_per_split = ceil_div(ceil_div(K, p.splits), 64) * 64;
    g.splits = static_cast<int>(ceil_div(K, g.k_per_split));
    g.partials = static_cast<float*>(stream.scratch(g.splits * M * N * sizeof(float)));
  }
  Error error = p.tile == 128 ? launch_tiles<T, L, 128>(g, stream) : launch_tiles<T, L, 64>(g, stream);
  if (!error && g.splits > 1)
    error = launch(splitk_reduce_kernel<T>, make_grid(ceil_div(M * ceil_div(N, 4), 256)), dim3(256), 0, stream, g);
  if (!error && sums) error = column_sums(static_cast<const float*>(g.epilogue.tile_sums), m_tiles, N, N, sums, stream);
  return error;
}

}  // namespace pygpt::cuda
