// What the attention kernels share besides their products: arguments, the order of the blocks, the walk over the keys.
//
// A block keeps a tile of rows of one side (queries, or in attention_dkdv_kernel keys) and walks the other side, a
// `step` at a time, through two stages of shared memory: the next step arrives while one is computed with. Two
// ratios set the shapes, in FLOP per byte, where a kernel does n products with each tile that it walks over:
//   from L2              n / 2 * rows of the block     64 or 128, as A100 (312 TFLOP/s over 5 TB/s) wants
//   from shared memory   16 * rows of patches a warp   16 is what an A100 multiprocessor can read while it computes
// so 16-bit warps take two rows of patches, where their sums fit into registers. All blocks fit into the 99 KB that
// any GPU since sm_80 has.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "attention_tiles.cuh"

namespace pygpt::cuda::attention {

constexpr float kInf = HUGE_VALF;

// Up to here an exponent of 2 may be computed as x c - y, where y is as large as x c (see attention.cu): eps 2^21.
template <class T>
constexpr float kExponentLimit = std::is_same_v<T, bf16> ? 0x1p14f : std::is_same_v<T, f16> ? 0x1p11f : 0.0f;

// ---------------------------------------------------------------- arguments
// (batch, head, position, channel); wide: as in Head.
struct Operand {
  void* data;
  int64_t stride[4];
  int width;
  bool wide;
};

// A call as all kernels see it. heads: of all batch entries; group: see place().
struct Problem {
  int batch_heads, heads, group, q_len, k_len, padded_q_len;
  bool is_causal;
  float scale, scale_log2;  // scale log2(e)
  Operand q, k, v, out, dout, dq, dk, dv;
  float* lse;
  const float* dlse;
  float *row_lse, *row_minus_delta, *row_lse2;  // of backward: (heads, padded_q_len)
  float lse_to_log2[2];  // scale_log2 / scale as the sum of two floats; infinite where that is not 1.44
};

template <class T>
__device__ __forceinline__ Head<T> head(const Problem& x, const Operand& t, int n) {
  const int64_t at = n / x.batch_heads * t.stride[0] + n % x.batch_heads * t.stride[1];
  return {static_cast<T*>(t.data) + at, t.stride[2], t.stride[3], t.width, t.wide};
}

template <class T>
Operand operand(const Heads& t, int64_t width, int access) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(t.data);
  bool wide = t.stride[3] == 1 && width % access == 0 && address % (access * sizeof(T)) == 0;
  for (int d = 0; d < 3; d++) wide = wide && t.stride[d] % access == 0;
  return {t.data, {t.stride[0], t.stride[1], t.stride[2], t.stride[3]}, static_cast<int>(width), wide};
}

template <class T>
Problem problem(const AttentionArgs& a) {
  constexpr int kChunk = 16 / sizeof(T), kPair = 2;
  Problem x{};
  x.batch_heads = static_cast<int>(a.heads), x.heads = static_cast<int>(a.batch * a.heads);
  x.q_len = static_cast<int>(a.q_len), x.k_len = static_cast<int>(a.k_len);
  x.is_causal = a.is_causal, x.scale = static_cast<float>(a.scale);
  x.q = operand<T>(a.q, a.head_dim, kChunk), x.k = operand<T>(a.k, a.head_dim, kChunk);
  x.v = operand<T>(a.v, a.v_dim, kChunk), x.dout = operand<T>(a.dout, a.v_dim, kChunk);
  x.out = operand<T>(a.out, a.v_dim, kPair), x.dq = operand<T>(a.dq, a.head_dim, kPair);
  x.dk = operand<T>(a.dk, a.head_dim, kPair), x.dv = operand<T>(a.dv, a.v_dim, kPair);
  x.scale_log2 = x.scale * kLog2e;
  const bool is_normal = std::isnormal(x.scale_log2);
  const double lse_to_log2 = is_normal ? double(x.scale_log2) / x.scale : HUGE_VAL;
  x.lse_to_log2[0] = float(lse_to_log2), x.lse_to_log2[1] = is_normal ? float(lse_to_log2 - x.lse_to_log2[0]) : 0.0f;
  x.lse = static_cast<float*>(a.lse), x.dlse = static_cast<const float*>(a.dlse);
  return x;
}

// ---------------------------------------------------------------- shapes
// `warps` warps of 16 * patches rows each; held: the warps' rows stay in registers, too.
struct Shape {
  int warps, patches, step;
  bool held;
  constexpr __host__ __device__ int threads() const { return 32 * warps; }
  constexpr __host__ __device__ int blocks() const { return 8 / warps; }  // on a multiprocessor at least, by registers
  constexpr __host__ __device__ int rows() const { return 16 * patches * warps; }
};

// table[0] is for the 16-bit types, table[1] for float; by padded head dimension 64, 128, 256.
template <class T, int D>
constexpr __host__ __device__ Shape pick(const Shape (&table)[2][3]) {
  return table[sizeof(T) / 4][D / 128];
}

// Of `kept` tiles of rows, and in two stages two tiles of a step and `numbers` more floats for each of its positions.
template <class T, int D>
constexpr int shared_bytes(const Shape& shape, int kept, int numbers = 0) {
  return (kept * shape.rows() + 4 * shape.step) * D * int(sizeof(T)) + 2 * numbers * shape.step * int(sizeof(float));
}

// body(integral_constant<int, D>) for the padding D of a head dimension.
template <class Body>
Error by_width(int64_t width, Body&& body) {
  if (width <= 64) return body(std::integral_constant<int, 64>{});
  if (width <= 128) return body(std::integral_constant<int, 128>{});
  return body(std::integral_constant<int, 256>{});
}

// ---------------------------------------------------------------- blocks
// One block per tile of `positions` of each head. Heads are served in groups small enough for what their blocks walk
// over to stay in the L2 cache; within a group, all heads' first tiles come first.
template <class T>
Error launch_tiles(void (*kernel)(Problem), Problem x, int64_t positions, int64_t walked, const Shape& shape,
                   int shared, const Stream& stream) {
  constexpr int64_t kL2 = 16 << 20, kMost = 1 << 30;
  const int64_t tiles = ceil_div(positions, shape.rows()) * x.heads;
  if (tiles == 0) return nullptr;
  if (std::max({tiles, positions, walked}) > kMost) return "attention: more than 2^30 positions or tiles";
  const int64_t of_head = walked * (x.q.width + x.v.width) * static_cast<int64_t>(sizeof(T));
  x.group = static_cast<int>(std::clamp<int64_t>(kL2 / std::max<int64_t>(of_head, 1), 1, x.heads));
  return launch(kernel, blocks(tiles), dim3(shape.threads()), shared, stream, x);
}

struct Place {
  int tile, head;
};
__device__ __forceinline__ Place place(const Problem& x) {
  const int tiles = gridDim.x / x.heads, block = blockIdx.x;
  const int first = block / (x.group * tiles) * x.group, within = block % (x.group * tiles);
  const int size = min(x.heads - first, x.group);
  return {within / size, first + within % size};
}

// ---------------------------------------------------------------- keys
// The keys that ROWS query rows from row0 on see, KEYS at a time: tiles of k and v in two stages of shared memory.
template <class T, int D, int ROWS, int KEYS, int THREADS>
struct KeyWalk {
  T* stages;  // 4 tiles
  int k_len, row0;
  bool is_causal;
  Head<const T> k, v;

  __device__ __forceinline__ T* k_tile(int key) const { return stages + key / KEYS % 2 * (2 * KEYS * D); }
  __device__ __forceinline__ T* v_tile(int key) const { return k_tile(key) + KEYS * D; }
  __device__ __forceinline__ int end() const { return is_causal ? min(k_len, row0 + ROWS) : k_len; }

  __device__ __forceinline__ void load(int key) const {
    load_tile<KEYS, D, THREADS>(k_tile(key), k, key, k_len);
    load_tile<KEYS, D, THREADS>(v_tile(key), v, key, k_len);
  }

  // Waits for the tiles from `key`, and lets the following ones come while they are computed with.
  __device__ __forceinline__ void arrive(int key) const {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is there, and everyone has left the other
    if (key + KEYS < end()) load(key + KEYS);
    ptx::cp_async_commit();
  }

  // Whether none of the `rows` rows from `row` sees the keys from `key`.
  __device__ __forceinline__ bool unseen(int key, int row, int rows) const { return is_causal && key >= row + rows; }

  // Sets to `value` what rows from `row` may not see of the keys from `key`.
  template <int M, int N>
  __device__ __forceinline__ void mask(float (&acc)[M][N][4], int key, int row, float value) const {
    if (key + KEYS <= k_len && !(is_causal && key + KEYS > row + 1)) return;
    const int keys = k_len - key, diagonal = is_causal ? row - key : KEYS;
    for_each<M, N>([&](int m, int n, int i, int r, int column) {
      if (column >= keys || column > r + diagonal) acc[m][n][i] = value;
    });
  }
};

}  // namespace pygpt::cuda::attention
