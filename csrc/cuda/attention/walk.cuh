// What the attention kernels share besides their products: tile shapes, the tile scheduler, the
// loop over keys.
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

#include "params.cuh"

namespace pygpt::cuda::attention {

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
constexpr int64_t kMaxTiles = 1 << 30;

// Launches one block per tile of tile_m of the outer_len rows of each of `heads` heads. Heads are taken in groups whose
// inner tensors (inner_len rows each) fit into the L2 cache together; within a group, all heads' first tiles come
// first.
template <class T>
Error launch_tiles(void (*kernel)(Params), Params params, int64_t heads, int64_t outer_len, int64_t inner_len,
                   const TileShape& shape, int shared, const Stream& stream) {
  const int64_t tiles = ceil_div(outer_len, shape.tile_m()) * heads;
  if (tiles == 0) return nullptr;
  if (tiles > kMaxTiles) return "attention: more than 2^30 tiles";
  const int64_t head_bytes = inner_len * (params.q.width + params.v.width) * static_cast<int64_t>(sizeof(T));
  const int64_t heads_in_l2 = shared_l2_bytes() / std::max<int64_t>(head_bytes, 1);
  params.tiled_heads = static_cast<int>(heads);
  params.head_group = static_cast<int>(std::clamp<int64_t>(heads_in_l2, 1, heads));
  return launch(kernel, make_grid(tiles), dim3(shape.threads()), shared, stream, params);
}

struct TileCoord {
  int tile, head;
};
__device__ __forceinline__ TileCoord tile_coord(const Params& params) {
  const int tiles = gridDim.x / params.tiled_heads, block = blockIdx.x;
  const int blocks_of_group = params.head_group * tiles, first_head = block / blocks_of_group * params.head_group;
  const int within = block % blocks_of_group, heads = min(params.tiled_heads - first_head, params.head_group);
  return {within / heads, first_head + within % heads};
}

// ---------------------------------------------------------------- keys
// The loop of a query tile over its keys. The tile's rows row0 .. row0 + ROWS - 1 see keys from first() to end() - 1,
// which are loaded KEYS at a time: a tile of k and a tile of v, in two stages of shared memory. Tiles in which `tiles`
// has no key for these rows are skipped.
template <class T, int D, int ROWS, int KEYS, int THREADS, class Tiles>
struct KeyWalk {
  T* stages;  // 2 stages of a k tile and a v tile
  Visible<int> visible;
  int row0;
  Head<const T> k, v;
  Tiles tiles;

  __device__ __forceinline__ T* k_tile(int stage) const { return stages + stage * (2 * KEYS * D); }
  __device__ __forceinline__ T* v_tile(int stage) const { return k_tile(stage) + KEYS * D; }
  __device__ __forceinline__ int first() const { return skip(visible.begin(row0) & -KEYS); }
  __device__ __forceinline__ int next(int key) const { return skip(key + KEYS); }
  __device__ __forceinline__ int end() const { return visible.end(row0 + ROWS - 1); }

  __device__ __forceinline__ int skip(int key) const {
    if constexpr (Tiles::kCanSkip)
      while (key < end() && !tiles.any(row0, ROWS, key, KEYS)) key += KEYS;
    return key;
  }

  __device__ __forceinline__ void load(int key, int stage) const {
    load_tile<KEYS, D, THREADS>(k_tile(stage), k, key, visible.k_len);
    load_tile<KEYS, D, THREADS>(v_tile(stage), v, key, visible.k_len);
  }

  // Waits for the tiles that have been loaded and starts to load those at `next` into the other stage.
  __device__ __forceinline__ void wait_and_prefetch(int next, int stage) const {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage has arrived, and no warp reads the other one any more
    if (next < end()) load(next, stage);
    ptx::cp_async_commit();
  }

  // True if none of the rows row .. row + rows - 1 sees any of the tile's keys.
  __device__ __forceinline__ bool fully_masked(int key, int row, int rows) const {
    return key >= visible.end(row + rows - 1) || key + KEYS <= visible.begin(row);
  }
};

// Sets the masked elements of a warp's tile at (row, column) to `value`. `visible` says which columns a row sees.
template <int M, int N>
__device__ __forceinline__ void apply_mask(const Visible<int>& visible, float (&acc)[M][N][4], int row, int column,
                                           float value) {
  const Range<int> unmasked = visible.unmasked(row, row + 16 * M);
  if (column >= unmasked.begin && column + 8 * N <= unmasked.end) return;
  // Of row r, columns r - left .. r + right and below `past` are visible, counted within the tile.
  const int own = row + visible.diagonal - column, left = visible.left - own, right = own + visible.right;
  const int past = visible.k_len - column;
  for_each_accumulator<M, N>([&](int m, int n, int i, int r, int c) {
    if (c >= past || c - r > right || r - c > left) acc[m][n][i] = value;
  });
}

}  // namespace pygpt::cuda::attention
