// C (M, N) = epilogue(A (M, K) B (K, N)), accumulated in float32, in the three layouts of a linear layer:
//
//     NT   y  = x W^T      A (M, K) and B (N, K) as they lie in memory: both contiguous along K
//     NN   dx = dy W       A (M, K), B (K, N)
//     TN   dW = dy^T x     A (K, M), B (K, N): both contiguous across K
//
// 16-bit types go through the tensor cores. A block of 4 warps computes a 128 x 128 tile, each warp 64 x 64 of it
// as 4 x 8 mma.m16n8k16 a step. What sets these sizes:
//   - registers: 64 x 64 sums are 128 of a thread's 255, and two blocks fill an SM's 65,536; one block's
//     epilogue hides behind the other's products;
//   - shared memory: 16 deep, a warp reads 8 16x16 fragments (4 KB, 32 cycles at 128 B a cycle) for 32 mma, which
//     occupy an A100's tensor cores for 64 cycles (2048 FLOP a cycle and SM). 64 x 32 a warp would need 24 for 32.
//     Writing the tiles adds half as much again;
//   - L2: (128 + 128) 2 bytes for 2 * 128 * 128 FLOP is 64 FLOP a byte, 4.9 TB/s at an A100's 312 TFLOP/s.
//     Tiles are taken 8 rows of tiles at a time, so that blocks running together share operands there.
//   - depth: 32 along K, 4 stages of cp.async: 64 KB in flight or in use, two blocks in an A100's 164 KB.
// Small problems take 64 x 64 tiles, 64 deep in 3 stages (48 KB, three blocks an SM).
// A chunk of 16 bytes stands in shared memory at its place xor its line number (swizzled), so that the 8 lines
// of an ldmatrix lie in 8 different groups of banks, in both directions.
//
// float32 is float32: FFMA, 8 x 8 sums a thread, 8 deep, double-buffered through registers. A warp takes
// 32 x 64, that is 192 bytes of shared memory (2 cycles) for 2048 FFMA (16 cycles an SM) a step along K. Its sums
// are added to a tile in shared memory every 256 products: rounding errors grow with sqrt(256 + K / 256), not sqrt(K).
//
// A product with few tiles and a long K (a weight gradient) is split along K into parts, by shape alone: each
// leaves float sums in scratch memory and finish_kernel adds them in order. A handful of rows (decoding) reads
// the weights once and does nothing else worth counting: few_rows_kernel streams them, a warp to 4 rows of W.
//
// Both tiled kernels leave their tile in shared memory as floats, for epilogue.cuh.
#pragma once
#include <algorithm>

#include "epilogue.cuh"
#include "reduce.cuh"

namespace pygpt::cuda {

enum class Layout { NT, NN, TN };
constexpr __host__ __device__ bool a_along_k(Layout layout) { return layout != Layout::TN; }
constexpr __host__ __device__ bool b_along_k(Layout layout) { return layout == Layout::NT; }

// ---------------------------------------------------------------- tensor cores
// Where chunk c (8 elements) of a line stands in a tile of lines of WIDTH.
template <int WIDTH>
__device__ __forceinline__ int swizzled(int line, int c) {
  return line * WIDTH + 8 * (c ^ (WIDTH == 32 ? line / 2 % 4 : line % 8));
}

// Starts the copy of LINES x WIDTH elements from (line, col) of x (lines, width), zeros outside.
template <int LINES, int WIDTH, int THREADS, class T>
__device__ __forceinline__ void fetch(T* tile, const Operand<T>& x, int64_t line, int64_t col, int64_t lines,
                                      int64_t width) {
  constexpr int kAcross = WIDTH / 8, kStep = THREADS / kAcross;  // the threads take kStep lines at a time
  static_assert(kStep % 8 == 0, "a thread's chunks must be swizzled alike");
  const int l = threadIdx.x / kAcross, c = threadIdx.x % kAcross;
  const int high = static_cast<int>(min(lines - line, int64_t{LINES})) - l;
  const int wide = static_cast<int>(min(width - col, int64_t{WIDTH})) - 8 * c;
  const T* from = x.data + (line + l) * x.stride + col + 8 * c;
  T* to = tile + swizzled<WIDTH>(l, c);
  if (x.vector) {
#pragma unroll
    for (int i = 0; i < LINES; i += kStep) ptx::cp_async_16(to + i * WIDTH, from + i * x.stride, wide > 0 && i < high);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < LINES; i += kStep) {
    alignas(16) T v[8];
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = e < wide && i < high ? from[i * x.stride + e] : from_float<T>(0.0f);
    *reinterpret_cast<uint4*>(to + i * WIDTH) = *reinterpret_cast<const uint4*>(v);
  }
}

// Four 8 x 8 blocks of an operand's tile, from rows of A or columns of B to registers. The lane names the
// corner (mn, k) of block lane / 8.
template <bool ALONG_K, int TILE, int DEPTH, class T>
__device__ __forceinline__ void fragments(uint32_t (&r)[4], const T* tile, int mn, int k) {
  const int line = threadIdx.x % 8;
  if constexpr (ALONG_K) ptx::ldmatrix_x4(r, tile + swizzled<DEPTH>(mn + line, k / 8));
  else ptx::ldmatrix_x4_trans(r, tile + swizzled<TILE>(k + line, mn / 8));
}

template <int TILE>
struct MmaTile {
  static constexpr int kThreads = 128, kWarp = TILE / 2, kDepth = TILE == 128 ? 32 : 64, kStages = TILE == 128 ? 4 : 3;
  static constexpr int kBlocks = TILE == 128 ? 2 : 3;                          // an SM
  static constexpr int kOperand = TILE * kDepth, kStage = 2 * kOperand;        // elements
  static constexpr int kStride = TILE + 8;  // a fragment's rows lie 8 banks apart
  static constexpr int kPipeline = kStages * kStage * 2, kResult = TILE * kStride * 4;
  static constexpr int kShared = kPipeline > kResult ? kPipeline : kResult;    // bytes
};

template <class T, Layout L, int TILE>
__global__ void __launch_bounds__(MmaTile<TILE>::kThreads, MmaTile<TILE>::kBlocks) mma_gemm_kernel(const Gemm<T> g) {
  using S = MmaTile<TILE>;
  constexpr bool kA = a_along_k(L), kB = b_along_k(L);
  constexpr int kRows = S::kWarp / 16, kCols = S::kWarp / 8;  // mma tiles of a warp
  PYGPT_DYNAMIC_SHARED(shared);
  T* stages = reinterpret_cast<T*>(shared);
  const Place at = place<TILE>(g.M, g.N);
  const int64_t row0 = int64_t{at.line} * TILE, col0 = int64_t{at.column} * TILE, begin = at.split * g.part;
  const int steps = static_cast<int>(ceil_div(min(g.K - begin, g.part), S::kDepth));

  auto load = [&](int step) {
    T *a = stages + step % S::kStages * S::kStage, *b = a + S::kOperand;
    const int64_t k = begin + int64_t{step} * S::kDepth;
    if (step < steps) {
      if constexpr (kA) fetch<TILE, S::kDepth, S::kThreads>(a, g.a, row0, k, g.M, g.K);
      else fetch<S::kDepth, TILE, S::kThreads>(a, g.a, k, row0, g.K, g.M);
      if constexpr (kB) fetch<TILE, S::kDepth, S::kThreads>(b, g.b, col0, k, g.N, g.K);
      else fetch<S::kDepth, TILE, S::kThreads>(b, g.b, k, col0, g.K, g.N);
    }
    ptx::cp_async_commit();
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / 2 * S::kWarp, col = warp % 2 * S::kWarp;  // the warp's corner of the tile
  const int near = lane / 8 % 2 * 8, far = lane / 16 * 8;          // mma wants A's blocks down first, B's along K
  float sums[kRows][kCols][4] = {};
#pragma unroll
  for (int step = 0; step < S::kStages - 1; step++) load(step);
  for (int step = 0; step < steps; step++) {
    ptx::cp_async_wait<S::kStages - 2>();
    __syncthreads();  // this step's tiles are there, and the last step's are free
    load(step + S::kStages - 1);
    const T *a = stages + step % S::kStages * S::kStage, *b = a + S::kOperand;
#pragma unroll
    for (int k = 0; k < S::kDepth; k += 16) {
      uint32_t x[kRows][4], y[kCols / 2][4];
#pragma unroll
      for (int i = 0; i < kRows; i++) fragments<kA, TILE, S::kDepth>(x[i], a, row + 16 * i + near, k + far);
#pragma unroll
      for (int j = 0; j < kCols / 2; j++) fragments<kB, TILE, S::kDepth>(y[j], b, col + 16 * j + far, k + near);
#pragma unroll
      for (int i = 0; i < kRows; i++)
#pragma unroll
        for (int j = 0; j < kCols; j++)
          ptx::mma_m16n8k16<T>(sums[i][j], x[i], y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]);
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  float* tile = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < kRows; i++)
#pragma unroll
    for (int j = 0; j < kCols; j++) {
      float* to = tile + (row + 16 * i + lane / 4) * S::kStride + col + 8 * j + lane % 4 * 2;
      *reinterpret_cast<float2*>(to) = make_float2(sums[i][j][0], sums[i][j][1]);
      *reinterpret_cast<float2*>(to + 8 * S::kStride) = make_float2(sums[i][j][2], sums[i][j][3]);
    }
  __syncthreads();
  write_tile<T, TILE, S::kStride, S::kThreads>(g, at, tile);
}

// ---------------------------------------------------------------- float32
template <int TILE>
struct FfmaTile {
  static constexpr int kThreads = TILE * TILE / 64, kDepth = 8, kChain = 256;  // products a sum takes in
  static constexpr int kBlocks = TILE == 128 ? 2 : 6;
  static constexpr int kStride = TILE + 4;  // transposing stores of 16 lines x 2 vectors hit 32 banks
  static constexpr int kOperand = kDepth * kStride, kUnits = TILE * kDepth / 4 / kThreads;
  static constexpr int kShared = (4 * kOperand + TILE * TILE) * 4;
};

// A thread's share of an operand's TILE x 8 tiles, on its way from global to shared memory [8][TILE + 4]:
// vectors of 4, kUnits of them kLines lines apart.
template <bool ALONG_K, int TILE>
struct Share {
  using S = FfmaTile<TILE>;
  static constexpr int kAcross = ALONG_K ? 2 : TILE / 4, kLines = S::kThreads / kAcross;
  const float* from;  // the next tile's first vector
  int left;           // lines (columns, if not along K) of the operand from there on
  float4 v[S::kUnits];

  static __device__ __forceinline__ int line() { return threadIdx.x / kAcross; }
  static __device__ __forceinline__ int col() { return threadIdx.x % kAcross * 4; }

  __device__ __forceinline__ Share(const Operand<float>& x, int64_t mn, int64_t k, int64_t MN) {
    from = x.data + ((ALONG_K ? mn : k) + line()) * x.stride + (ALONG_K ? k : mn) + col();
    left = static_cast<int>(min(MN - mn, int64_t{TILE})) - (ALONG_K ? line() : col());
  }
  __device__ __forceinline__ void load(const Operand<float>& x, int k_left) {
#pragma unroll
    for (int u = 0; u < S::kUnits; u++) {
      const bool inside = ALONG_K ? u * kLines < left : line() + u * kLines < k_left;
      const int n = inside ? (ALONG_K ? k_left - col() : left) : 0;
      v[u] = load4(from + u * kLines * x.stride, n, x.vector && n > 0);
    }
    from += ALONG_K ? S::kDepth : S::kDepth * x.stride;
  }
  __device__ __forceinline__ void store(float* tile) const {
#pragma unroll
    for (int u = 0; u < S::kUnits; u++) {
      if constexpr (ALONG_K) {
        float* to = tile + col() * S::kStride + line() + u * kLines;
        to[0] = v[u].x, to[S::kStride] = v[u].y, to[2 * S::kStride] = v[u].z, to[3 * S::kStride] = v[u].w;
      } else {
        *reinterpret_cast<float4*>(tile + (line() + u * kLines) * S::kStride + col()) = v[u];
      }
    }
  }
};

// A warp's 4 x 8 lanes have 8 x 8 sums each: rows 4y..4y+3 and 16 further, columns 4x..4x+3 and 32 further.
template <Layout L, int TILE>
__global__ void __launch_bounds__(FfmaTile<TILE>::kThreads, FfmaTile<TILE>::kBlocks)
    ffma_gemm_kernel(const Gemm<float> g) {
  using S = FfmaTile<TILE>;
  PYGPT_DYNAMIC_SHARED(shared);
  float *tile = reinterpret_cast<float*>(shared), *buffers = tile + TILE * TILE;
  const Place at = place<TILE>(g.M, g.N);
  const int64_t begin = at.split * g.part, depth = min(g.K - begin, g.part);
  const int steps = static_cast<int>(ceil_div(depth, S::kDepth)), last = static_cast<int>((depth - 1) % S::kDepth + 1);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / (TILE / 64) * 32 + lane / 8 * 4, col = warp % (TILE / 64) * 64 + lane % 8 * 4;

  Share<a_along_k(L), TILE> a(g.a, int64_t{at.line} * TILE, begin, g.M);
  Share<b_along_k(L), TILE> b(g.b, int64_t{at.column} * TILE, begin, g.N);
  auto k_left = [&](int step) { return step + 1 < steps ? S::kDepth : step < steps ? last : 0; };
  float sums[8][8] = {};
  auto add_to_tile = [&] {
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        float4& to = *reinterpret_cast<float4*>(tile + (row + i % 4 + i / 4 * 16) * TILE + col + j * 8);
        const float4 sum = make_float4(sums[i][j], sums[i][j + 1], sums[i][j + 2], sums[i][j + 3]);
        to = to + sum;
        sums[i][j] = sums[i][j + 1] = sums[i][j + 2] = sums[i][j + 3] = 0.0f;
      }
  };

  for (int i = threadIdx.x * 4; i < TILE * TILE; i += S::kThreads * 4)
    *reinterpret_cast<float4*>(tile + i) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (steps) {
    a.load(g.a, k_left(0)), b.load(g.b, k_left(0));
    a.store(buffers), b.store(buffers + S::kOperand);
  }
  for (int step = 0; step < steps; add_to_tile())
    for (const int end = min(steps, step + S::kChain / S::kDepth); step < end; step++) {
      __syncthreads();  // this step's buffer is filled, the other one read
      const float* now = buffers + step % 2 * 2 * S::kOperand;
      a.load(g.a, k_left(step + 1)), b.load(g.b, k_left(step + 1));
#pragma unroll
      for (int k = 0; k < S::kDepth; k++) {
        alignas(16) float x[8], y[8];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          reinterpret_cast<float4&>(x[4 * h]) = *reinterpret_cast<const float4*>(now + k * S::kStride + row + 16 * h);
          reinterpret_cast<float4&>(y[4 * h]) =
              *reinterpret_cast<const float4*>(now + S::kOperand + k * S::kStride + col + 32 * h);
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
          for (int j = 0; j < 8; j++) sums[i][j] = fmaf(x[i], y[j], sums[i][j]);
      }
      float* other = buffers + (step + 1) % 2 * 2 * S::kOperand;
      a.store(other), b.store(other + S::kOperand);
    }
  __syncthreads();
  write_tile<float, TILE, TILE, S::kThreads>(g, at, tile);
}

// ---------------------------------------------------------------- a few rows
// 16 bytes of a line at c, of which `left` elements exist.
template <class T>
__device__ __forceinline__ void load_vector(const Operand<T>& x, int64_t line, int64_t c, int64_t left,
                                            float (&v)[kVector<T>]) {
  const T* from = x.data + line * x.stride + c;
  if (x.vector) return to_floats<T>(*reinterpret_cast<const uint4*>(from), v);
#pragma unroll
  for (int e = 0; e < kVector<T>; e++) v[e] = e < left ? to_float(from[e]) : 0.0f;
}

// NT for at most ROWS rows: a warp computes 4 columns, its lanes go along K.
template <class T, int ROWS>
__global__ void __launch_bounds__(128) few_rows_kernel(const Gemm<T> g) {
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
        float dot = x[0] * w[c][0];  // summed first: keeps the chain of sums short
#pragma unroll
        for (int e = 1; e < kWidth; e++) dot = fmaf(x[e], w[c][e], dot);
        sums[r][c] += dot;
      }
    }
  }
  float4 row = make_float4(0.0f, 0.0f, 0.0f, 0.0f);  // lane r finishes row r
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float4 sum =
        make_float4(warp_sum(sums[r][0]), warp_sum(sums[r][1]), warp_sum(sums[r][2]), warp_sum(sums[r][3]));
    if (lane == r) row = sum;
  }
  const int n = static_cast<int>(min(g.N - j, int64_t{4}));
  if (lane < g.M) finish(g.epilogue, lane, j, n, row + bias_at(g.epilogue, j, n));
}

// ---------------------------------------------------------------- launching
// As many blocks as keep some 130 SMs busy, from the shape alone: tiles of 128 where there are enough of them,
// and parts of K no shorter than what pays for writing and reading their sums.
struct Plan {
  int tile, splits;
};
inline Plan plan(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t kBlocks = 384, kEnough = 128, kMost = 16;
  auto tiles = [&](int tile) { return ceil_div(M, tile) * ceil_div(N, tile); };
  auto splits = [&](int tile, int64_t shortest) {
    return static_cast<int>(std::clamp<int64_t>(std::min(kBlocks / tiles(tile), K / shortest), 1, kMost));
  };
  const Plan large{128, splits(128, 2048)}, small{64, splits(64, 256)};
  return tiles(128) * large.splits >= kEnough ? large : small;
}

template <class T, Layout L, int TILE>
Error launch_tiles(const Gemm<T>& g, const Stream& stream) {
  const dim3 grid = blocks(ceil_div(g.M, TILE) * ceil_div(g.N, TILE) * g.splits);
  if constexpr (std::is_same_v<T, float>)
    return launch(ffma_gemm_kernel<L, TILE>, grid, dim3(FfmaTile<TILE>::kThreads), FfmaTile<TILE>::kShared, stream, g);
  else
    return launch(mma_gemm_kernel<T, L, TILE>, grid, dim3(MmaTile<TILE>::kThreads), MmaTile<TILE>::kShared, stream, g);
}

template <class T, int ROWS>
Error launch_few_rows(const Gemm<T>& g, const Stream& stream) {
  return launch(few_rows_kernel<T, ROWS>, blocks(ceil_div(g.N, 16)), dim3(128), 0, stream, g);
}

// Lines of `width` elements, `stride` apart.
template <class T>
Operand<T> operand(const void* data, int64_t stride, int64_t width) {
  const T* p = static_cast<const T*>(data);
  return {p, stride, takes_vectors(p, stride) && width % kVector<T> == 0};
}

// C = epilogue(A B); column_sums (N), if not null, receives the sums over all rows of what the epilogue stores.
template <Layout L, class T>
Error gemm(int64_t M, int64_t N, int64_t K, Operand<T> a, Operand<T> b, Epilogue<T> epilogue, T* sums,
           const Stream& stream) {
  auto in_fours = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0; };
  epilogue.vector = N % 4 == 0 && epilogue.stride % 4 == 0 && in_fours(epilogue.out) && in_fours(epilogue.bias) &&
                    in_fours(epilogue.pre) && in_fours(epilogue.saved);
  if (N == 0) return nullptr;
  if (M == 0) return sums ? column_sums(static_cast<const float*>(nullptr), 0, N, N, sums, stream) : nullptr;
  Gemm<T> g{M, N, K, a, b, epilogue, K, 1, nullptr};
  if (L == Layout::NT && !sums) {
    if (M <= 4) return launch_few_rows<T, 4>(g, stream);
    if constexpr (std::is_same_v<T, float>)
      if (M <= 16) return launch_few_rows<T, 16>(g, stream);
  }
  const Plan p = plan(M, N, K);
  const int64_t lines = ceil_div(M, p.tile);
  if (sums) {
    g.epilogue.sums = static_cast<float*>(stream.scratch(lines * N * sizeof(float)));
  } else if (p.splits > 1) {
    g.part = ceil_div(ceil_div(K, p.splits), 64) * 64;
    g.splits = static_cast<int>(ceil_div(K, g.part));
    g.parts = static_cast<float*>(stream.scratch(g.splits * M * N * sizeof(float)));
  }
  Error error = p.tile == 128 ? launch_tiles<T, L, 128>(g, stream) : launch_tiles<T, L, 64>(g, stream);
  if (!error && g.splits > 1)
    error = launch(finish_kernel<T>, blocks(ceil_div(M * ceil_div(N, 4), 256)), dim3(256), 0, stream, g);
  if (!error && sums) error = column_sums(static_cast<const float*>(g.epilogue.sums), lines, N, N, sums, stream);
  return error;
}

}  // namespace pygpt::cuda
