// What the attention kernels share besides their products: parameters, tile shapes, the tile scheduler, the loop over
// keys.
//
// A block owns a tile of rows of one side (queries, or keys in attention_dkdv_kernel) and loops over the other side,
// tile_n rows at a time, through two stages of shared memory: the next stage is loaded while the current one is used.
// Two ratios determine the tile shapes, in FLOP per byte, for a kernel that does n products with each inner tile:
//   from L2              n / 2 * tile_m                64 or 128 is enough for an A100 (312 TFLOP/s over 5 TB/s)
//   from shared memory   16 * m_tiles of a warp        16 is what an A100 multiprocessor can read while it computes
// 16-bit warps therefore take two m_tiles if their accumulators fit into registers. Every block fits into 99 KB of
// shared memory, which all GPUs since sm_80 have.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "attention_tiles.cuh"

namespace pygpt::cuda::attention {

constexpr float kInf = HUGE_VALF;

// The fused form of the exponent, fma(x, c, -y) with y as large as x c, is accurate enough while |y| is below this
// limit (see attention.cu): 2^21 times the type's epsilon. float never uses the fused form.
template <class T>
constexpr float kExponentLimit = std::is_same_v<T, bf16>  ? 0x1p14f
                                 : std::is_same_v<T, f16> ? 0x1p11f
                                                          : 0.0f;

// ---------------------------------------------------------------- parameters
// A tensor (batch, head, position, channel) of `width` channels; vectorized as in Head.
struct Tensor {
  void* data;
  int64_t stride[4];
  int width;
  bool vectorized;
};

// The parameters of one attention call, common to all kernels.
struct Params {
  int heads_per_batch, total_heads;  // heads of one batch entry, and of the whole batch
  int head_group;                    // heads that the tile scheduler takes together, see tile_coord()
  int q_len, k_len, padded_q_len;
  bool is_causal;
  float scale, scale_log2;  // scale_log2 = scale * log2(e)
  Tensor q, k, v, out, dout, dq, dk, dv;
  float* lse;
  const float* dlse;
  float *padded_lse, *padded_neg_delta, *padded_lse_log2;  // workspaces of backward, (total_heads, padded_q_len)
  float lse_to_log2[2];  // scale_log2 / scale as the sum of two floats; infinite if scale_log2 is not a normal float
};

template <class T>
__device__ __forceinline__ Head<T> slice_head(const Params& params, const Tensor& t, int head) {
  const int64_t offset = head / params.heads_per_batch * t.stride[0] + head % params.heads_per_batch * t.stride[1];
  return {static_cast<T*>(t.data) + offset, t.stride[2], t.stride[3], t.width, t.vectorized};
}

// `elements`: the number of elements that one vectorized access takes.
template <class T>
Tensor make_tensor(const Heads& t, int64_t width, int elements) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(t.data);
  bool vectorized = t.stride[3] == 1 && width % elements == 0 && address % (elements * sizeof(T)) == 0;
  for (int d = 0; d < 3; d++) vectorized = vectorized && t.stride[d] % elements == 0;
  return {t.data, {t.stride[0], t.stride[1], t.stride[2], t.stride[3]}, static_cast<int>(width), vectorized};
}

template <class T>
Params make_params(const AttentionArgs& a) {
  constexpr int kChunk = 16 / sizeof(T), kPair = 2;
  Params p{};
  p.heads_per_batch = static_cast<int>(a.heads), p.total_heads = static_cast<int>(a.batch * a.heads);
  p.q_len = static_cast<int>(a.sequences.q_len), p.k_len = static_cast<int>(a.sequences.k_len);
  p.is_causal = a.reach.right == 0, p.scale = static_cast<float>(a.scores.scale);
  p.q = make_tensor<T>(a.q, a.head_dim, kChunk), p.k = make_tensor<T>(a.k, a.head_dim, kChunk);
  p.v = make_tensor<T>(a.v, a.v_dim, kChunk), p.dout = make_tensor<T>(a.dout, a.v_dim, kChunk);
  p.out = make_tensor<T>(a.out, a.v_dim, kPair), p.dq = make_tensor<T>(a.dq, a.head_dim, kPair);
  p.dk = make_tensor<T>(a.dk, a.head_dim, kPair), p.dv = make_tensor<T>(a.dv, a.v_dim, kPair);
  p.scale_log2 = p.scale * kLog2e;
  const bool is_normal = std::isnormal(p.scale_log2);
  const double lse_to_log2 = is_normal ? double(p.scale_log2) / p.scale : HUGE_VAL;
  p.lse_to_log2[0] = float(lse_to_log2), p.lse_to_log2[1] = is_normal ? float(lse_to_log2 - p.lse_to_log2[0]) : 0.0f;
  p.lse = static_cast<float*>(a.lse), p.dlse = static_cast<const float*>(a.dlse);
  return p;
}

// ---------------------------------------------------------------- tile shapes
// A block has `warps` warps. Each owns m_tiles mma tiles of 16 rows and loops over tile_n rows of the other side at a
// time. a_resident: the warp's A operand stays in registers.
struct TileShape {
  int warps, m_tiles, tile_n;
  bool a_resident;
  constexpr __host__ __device__ int threads() const { return 32 * warps; }
  constexpr __host__ __device__ int tile_m() const { return 16 * m_tiles * warps; }
  constexpr __host__ __device__ int min_blocks_per_sm() const { return 8 / warps; }  // for __launch_bounds__
};

// table[0] is for the 16-bit types, table[1] for float; its columns are the padded head dimensions 64, 128, 256.
template <class T, int D>
constexpr __host__ __device__ TileShape select_shape(const TileShape (&table)[2][3]) {
  return table[sizeof(T) / 4][D / 128];
}

// Shared memory of a block that keeps `outer_tiles` tiles of tile_m rows. Each of its two stages holds two tiles of
// tile_n rows, and `floats_per_row` floats for each of these rows.
template <class T, int D>
constexpr int shared_bytes(const TileShape& shape, int outer_tiles, int floats_per_row = 0) {
  return (outer_tiles * shape.tile_m() + 4 * shape.tile_n) * D * int(sizeof(T)) +
         2 * floats_per_row * shape.tile_n * int(sizeof(float));
}

// Calls body(integral_constant<int, D>), D the head dimension padded to 64, 128 or 256.
template <class Body>
Error by_head_dim(int64_t head_dim, Body&& body) {
  if (head_dim <= 64) return body(std::integral_constant<int, 64>{});
  if (head_dim <= 128) return body(std::integral_constant<int, 128>{});
  return body(std::integral_constant<int, 256>{});
}

// ---------------------------------------------------------------- tile scheduler
// Launches one block per tile of tile_m of the outer_len rows of each head. Heads are taken in groups whose inner
// tensors (inner_len rows each) fit into the L2 cache together; within a group, all heads' first tiles come first.
template <class T>
Error launch_tiles(void (*kernel)(Params), Params params, int64_t outer_len, int64_t inner_len, const TileShape& shape,
                   int shared, const Stream& stream) {
  constexpr int64_t kMaxTiles = 1 << 30;
  const int64_t tiles = ceil_div(outer_len, shape.tile_m()) * params.total_heads;
  if (tiles == 0) return nullptr;
  if (std::max({tiles, outer_len, inner_len}) > kMaxTiles) return "attention: more than 2^30 positions or tiles";
  const int64_t head_bytes = inner_len * (params.q.width + params.v.width) * static_cast<int64_t>(sizeof(T));
  const int64_t heads_in_l2 = shared_l2_bytes() / std::max<int64_t>(head_bytes, 1);
  params.head_group = static_cast<int>(std::clamp<int64_t>(heads_in_l2, 1, params.total_heads));
  return launch(kernel, make_grid(tiles), dim3(shape.threads()), shared, stream, params);
}

struct TileCoord {
  int tile, head;
};
__device__ __forceinline__ TileCoord tile_coord(const Params& params) {
  const int tiles = gridDim.x / params.total_heads, block = blockIdx.x;
  const int blocks_of_group = params.head_group * tiles, first_head = block / blocks_of_group * params.head_group;
  const int within = block % blocks_of_group, heads = min(params.total_heads - first_head, params.head_group);
  return {within / heads, first_head + within % heads};
}

// ---------------------------------------------------------------- keys
// The loop of a query tile over its keys. The tile's rows row0 .. row0 + ROWS - 1 attend to keys 0 .. end() - 1, which
// are loaded KEYS at a time: a tile of k and a tile of v, in two stages of shared memory.
template <class T, int D, int ROWS, int KEYS, int THREADS>
struct KeyWalk {
  T* stages;  // 2 stages of a k tile and a v tile
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

  // Waits for the tiles that start at `key` and starts to load the next ones.
  __device__ __forceinline__ void wait_and_prefetch(int key) const {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage has arrived, and no warp reads the other one any more
    if (key + KEYS < end()) load(key + KEYS);
    ptx::cp_async_commit();
  }

  // True if none of the rows row .. row + rows - 1 attends to any key from `key` on.
  __device__ __forceinline__ bool fully_masked(int key, int row, int rows) const {
    return is_causal && key >= row + rows;
  }

  // Sets the masked elements of a warp's scores to `value`. The scores start at row `row` and key `key`.
  template <int M, int N>
  __device__ __forceinline__ void apply_mask(float (&acc)[M][N][4], int key, int row, float value) const {
    if (key + KEYS <= k_len && !(is_causal && key + KEYS > row + 1)) return;
    const int keys = k_len - key, diagonal = is_causal ? row - key : KEYS;
    for_each_accumulator<M, N>([&](int m, int n, int i, int r, int column) {
      if (column >= keys || column > r + diagonal) acc[m][n][i] = value;
    });
  }
};

}  // namespace pygpt::cuda::attention
