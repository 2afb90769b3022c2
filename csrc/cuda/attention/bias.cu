// The gradients of what is added to scores, a floating mask and ALiBi's slopes, and of the sinks.
//
//   ds = p (dout v^T - delta), as in bwd.cuh      dslope = -sum_ij ds_ij distance_ij
//   dmask = ds, summed over what was broadcast    dsink = -sum_i exp(sink - lse_i) delta_i
//
// A block of attention_bias_kernel owns a tile of dmask. It goes through the batch entries, their heads, and the tiles
// of rows and keys that share this tile of the mask, in this order, and adds their ds in float. For the slopes alone it
// owns the rows of a tile. It leaves a sum for each head, and attention_dslopes_kernel adds these. Every sum has one
// order.
#include "bwd.cuh"

namespace pygpt::cuda::attention {
namespace {

constexpr TileShape kBiasShapes[2][3] = {{{4, 1, 32, false}, {4, 1, 32, false}, {4, 1, 32, false}},
                                         {{4, 1, 32, false}, {4, 1, 32, false}, {2, 1, 16, false}}};
template <class T, int D>
constexpr TileShape kBiasShape = select_shape<T, D>(kBiasShapes);

// What the blocks own.
struct Bias {
  int batch, heads;  // batch entries and heads of dmask, 1 where it is broadcast
  int row_tiles, key_tiles;  // of dmask, likewise
  bool all_rows, all_keys;  // whether it is broadcast over them
  void* dmask;  // or null
  bool is_float;  // whether dmask's elements are float, not T
  int64_t stride[4];
  float* slope_sums;  // (total_heads, row_tiles, key_tiles), or null
};

// The sum over the lanes that share a column of accumulators. Every lane gets it.
__device__ __forceinline__ float sum_rows(float x) {
#pragma unroll
  for (int d = 4; d < 32; d *= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}

template <class T, int D>
__global__ void __launch_bounds__(kBiasShape<T, D>.threads(), kBiasShape<T, D>.min_blocks_per_sm())
    attention_bias_kernel(const Params params, const Bias bias) {
  constexpr TileShape shape = kBiasShape<T, D>;
  constexpr int ROWS = shape.tile_m(), KEYS = shape.tile_n, THREADS = shape.threads(), M = shape.m_tiles, N = KEYS / 8;
  PYGPT_DYNAMIC_SHARED(shared);
  PYGPT_SHARED(float, warp_sums, [shape.warps][KEYS]);
  T* const q_tile = reinterpret_cast<T*>(shared);
  T* const dout_tile = q_tile + ROWS * D;
  T* const k_tile = dout_tile + ROWS * D;
  T* const v_tile = k_tile + KEYS * D;

  const Visible<int>& visible = params.visible;
  const int heads = params.q.heads, tiles = bias.row_tiles * bias.key_tiles;
  const int tile = blockIdx.x % tiles, mask_batch = blockIdx.x / tiles / bias.heads;
  const int mask_head = blockIdx.x / tiles % bias.heads;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int first_row = tile / bias.key_tiles * ROWS, first_key = tile % bias.key_tiles * KEYS;
  const int past_row = bias.all_rows ? visible.q_len : min(first_row + ROWS, visible.q_len);
  const int past_key = bias.all_keys ? visible.k_len : min(first_key + KEYS, visible.k_len);
  const int past_batch = bias.batch == 1 ? params.total_heads / heads : mask_batch + 1;
  const int past_head = bias.heads == 1 ? heads : mask_head + 1;

  float sum[M][N][4] = {};
  for (int batch = mask_batch; batch < past_batch; batch++)
    for (int h = mask_head; h < past_head; h++) {
      const int head = batch * heads + h, key_head = head / params.group;
      const HeadScores<T> scores(params, head);
      float slope_sum = 0.0f;
      for (int row0 = first_row; row0 < past_row; row0 += ROWS) {
        const int row = row0 + warp * (16 * M);
        const int begin = max(first_key, visible.begin(row0) & -KEYS);
        const int end = min(past_key, visible.end(row0 + ROWS - 1));
        for (int key = begin; key < end; key += KEYS) {
          __syncthreads();  // no warp reads the last tiles any more
          if (key == begin) {
            load_tile<ROWS, D, THREADS>(q_tile, slice_head<const T>(params.q, head), row0, visible.q_len);
            load_dout<ROWS, D, THREADS>(params, dout_tile, slice_head<const T>(params.dout, head), row0);
          }
          load_tile<KEYS, D, THREADS>(k_tile, slice_head<const T>(params.k, key_head), key, visible.k_len);
          load_tile<KEYS, D, THREADS>(v_tile, slice_head<const T>(params.v, key_head), key, visible.k_len);
          ptx::cp_async_commit();
          ptx::cp_async_wait<0>();
          __syncthreads();

          WarpA<T, D, M, false> q(q_tile + warp * (16 * M) * D), dout(dout_tile + warp * (16 * M) * D);
          const RowStats<T, M> stats(params, head, row);
          float p[M][N][4] = {}, ds[M][N][4] = {};
          warp_gemm_nt(p, q, k_tile);
          warp_gemm_nt(ds, dout, v_tile);
          finish_ds(scores, stats, p, ds, row, key, [](int, int, int, float) {});
          const float origin = scores.distance_origin(row, key);
          for_each_accumulator<M, N>([&](int m, int n, int i, int r, int column) {
            // Outside, dout v^T may be infinite times 0.
            if (row + r >= visible.q_len || !visible.sees(row + r, key + column)) return;
            sum[m][n][i] += ds[m][n][i];
            slope_sum = fmaf(ds[m][n][i], scores.distance(origin, m, n, i), slope_sum);
          });
        }
      }
      if (bias.slope_sums) {
        slope_sum = warp_sum(slope_sum);
        __syncthreads();
        if (threadIdx.x % 32 == 0) warp_sums[warp][0] = slope_sum;
        __syncthreads();
        if (threadIdx.x == 0) {
          float total = 0.0f;
          for (int w = 0; w < shape.warps; w++) total += warp_sums[w][0];
          bias.slope_sums[int64_t(head) * tiles + tile] = total;
        }
      }
    }
  if (!bias.dmask) return;

  const int64_t of_head = mask_batch * bias.stride[0] + mask_head * bias.stride[1];
  const auto store = [&](int row, int key, float x) {
    const int64_t offset = of_head + row * bias.stride[2] + key * bias.stride[3];
    if (bias.is_float) static_cast<float*>(bias.dmask)[offset] = x;
    else static_cast<T*>(bias.dmask)[offset] = from_float<T>(x);
  };
  const int row = first_row + warp * (16 * M);
  if (!bias.all_rows && !bias.all_keys) {
    for_each_accumulator<M, N>([&](int m, int n, int i, int r, int column) {
      if (row + r < past_row && first_key + column < past_key) store(row + r, first_key + column, sum[m][n][i]);
    });
  } else if (!bias.all_rows) {
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < N; n++) total += sum[i / 2][n][i % 2 * 2] + sum[i / 2][n][i % 2 * 2 + 1];
      total = warp_sum<4>(total);
      if (t == 0 && row + 8 * i + g < past_row) store(row + 8 * i + g, 0, total);
    }
  } else {
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float total = 0.0f;
#pragma unroll
        for (int m = 0; m < M; m++) total += sum[m][n][c] + sum[m][n][c + 2];
        total = sum_rows(total);
        if (g == 0) warp_sums[warp][8 * n + 2 * t + c] = total;
      }
    __syncthreads();
    if (const int column = threadIdx.x; column < KEYS) {
      float total = 0.0f;
      for (int w = 0; w < shape.warps; w++) total += warp_sums[w][column];
      if (!bias.all_keys && first_key + column < past_key) store(0, first_key + column, total);
      warp_sums[0][column] = total;
    }
    __syncthreads();
    if (bias.all_keys && threadIdx.x == 0) {
      float total = 0.0f;
      for (int column = 0; column < KEYS; column++) total += warp_sums[0][column];
      store(0, 0, total);
    }
  }
}

// A warp computes a slope's gradient from the `tiles` sums of each of its heads. They belong to one batch entry, or
// all.
__global__ void __launch_bounds__(32)
    attention_dslopes_kernel(const float* sums, int64_t tiles, int heads, int batch, bool is_shared, float* dslopes) {
  const int own = blockIdx.x / heads, head = blockIdx.x % heads;
  float total = 0.0f;
  for (int b = is_shared ? 0 : own; b < (is_shared ? batch : own + 1); b++)
    for (int64_t i = threadIdx.x; i < tiles; i += 32) total += sums[(int64_t(b) * heads + head) * tiles + i];
  total = warp_sum(total);
  if (threadIdx.x == 0) dslopes[blockIdx.x] = -total;
}

constexpr int kSinkThreads = 256;

// A block computes the gradient of a head's sink.
__global__ void __launch_bounds__(kSinkThreads) attention_dsink_kernel(const Params params, float* dsink) {
  PYGPT_SHARED(float, warp_sums, [kSinkThreads / 32]);
  const float sink = params.sink[blockIdx.x];
  float total = 0.0f;
  for (int head = blockIdx.x; head < params.total_heads; head += params.q.heads) {
    const int64_t first = int64_t(head) * params.padded_q_len;
    for (int i = threadIdx.x; i < params.visible.q_len; i += kSinkThreads)
      total = fmaf(expf(sink - params.padded_lse[first + i]), params.padded_neg_delta[first + i], total);
  }
  total = warp_sum(total);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  total = 0.0f;
  for (const float of_warp : warp_sums) total += of_warp;
  dsink[blockIdx.x] = total;
}

template <class T, int D>
Error launch_tiles_of(const Params& params, Bias bias, const AttentionArgs& a, const Stream& stream) {
  constexpr TileShape shape = kBiasShape<T, D>;
  constexpr int shared = 2 * (shape.tile_m() + shape.tile_n) * D * int(sizeof(T));
  bias.row_tiles = bias.all_rows ? 1 : static_cast<int>(ceil_div(a.sequences.q_len, shape.tile_m()));
  bias.key_tiles = bias.all_keys ? 1 : static_cast<int>(ceil_div(a.sequences.k_len, shape.tile_n));
  const int64_t tiles = int64_t(bias.row_tiles) * bias.key_tiles, blocks = tiles * bias.batch * bias.heads;
  if (blocks > kMaxTiles) return "attention: more than 2^30 tiles of the mask";
  if (a.dslopes) bias.slope_sums = static_cast<float*>(stream.scratch(params.total_heads * tiles * sizeof(float)));
  if (blocks > 0)
    if (const Error e =
            launch(attention_bias_kernel<T, D>, make_grid(blocks), dim3(shape.threads()), shared, stream, params, bias))
      return e;
  const bool is_shared = a.scores.slope_stride == 0;
  const int64_t slopes = a.heads * (is_shared ? 1 : a.batch);
  if (!a.dslopes || slopes == 0) return nullptr;
  return launch(attention_dslopes_kernel, make_grid(slopes), dim3(32), 0, stream, bias.slope_sums, tiles,
                static_cast<int>(a.heads), static_cast<int>(a.batch), is_shared, static_cast<float*>(a.dslopes));
}

}  // namespace

Error launch_bias(const Params& params, const AttentionArgs& a, const Stream& stream) {
  if (a.dsink && a.heads > 0)
    if (const Error e = launch(attention_dsink_kernel, make_grid(a.heads), dim3(kSinkThreads), 0, stream, params,
                               static_cast<float*>(a.dsink)))
      return e;
  if (!a.dmask.data && !a.dslopes) return nullptr;

  Bias bias{};
  bias.dmask = a.dmask.data, bias.is_float = a.scores.mask_type == MaskType::statistics;
  std::copy_n(a.dmask.stride, 4, bias.stride);
  const bool of_mask = bias.dmask;
  bias.batch = static_cast<int>(of_mask && !bias.stride[0] ? 1 : a.batch);
  bias.heads = static_cast<int>(of_mask && !bias.stride[1] ? 1 : a.heads);
  bias.all_rows = of_mask && !bias.stride[2], bias.all_keys = !of_mask || !bias.stride[3];
  return by_dtype(a.dtype, [&](auto zero) {
    return by_head_dim(std::max(a.head_dim, a.v_dim),
                       [&](auto width) { return launch_tiles_of<decltype(zero), width>(params, bias, a, stream); });
  });
}

}  // namespace pygpt::cuda::attention
