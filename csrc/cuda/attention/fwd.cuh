// softmax(scale q k^T) v without the (L, S) matrix in memory: FlashAttention-2 (Dao 2023), forward.
//
//   s_ij = scale q_i . k_j    out_i = sum_j p_ij v_j / l_i    q (L, E), k (S, E), v (S, Ev), out (L, Ev) per head
//   p_ij = exp(s_ij - m_i)    l_i = sum_j p_ij                lse_i = m_i + log l_i, kept for backward
//
// A block computes a tile of query rows of one head, a warp 16 or 32 of these rows. m_i is the row's largest score so
// far; when it grows from m to m', out_i and l_i are multiplied by exp(m - m'). Causal: row i attends to keys 0..i. Key
// tiles beyond the diagonal are skipped; only tiles on the diagonal or across the last key are masked.
//
// Exponents are computed in base 2 from x = q . k, the row's largest x so far (row_max) and c = scale log2(e) > 0; the
// sign of scale is moved into q. A row subtracts the same value from all its exponents, so this value cancels between p
// and l and may be rounded:
//   p = 2^(x c - scaled_max), scaled_max = row_max c rounded    one fused multiply-add per score
// The exponent of the largest score is then not 0 but the rounding error of scaled_max, at most |scaled_max| 2^-24.
// While |scaled_max| is below kExponentLimit, eps 2^21 for a type of precision eps, this p is 1 +- eps/11, which rounds
// to 1. Beyond the limit
//   p = 2^((x - row_max) c)                                     two operations, and exactly 1 for the largest score
// A warp uses the second form in an iteration in which any of its rows is beyond the limit, or was before the
// iteration. Rows within the limit then also add the rounding error of scaled_max, so that both forms give the same p
// up to a rounding. float always uses the second form: its p is not rounded, and its time goes into the products.
//
// Each score costs 2 (E + Ev) FLOP; k and v are read once per block. Registers per thread (ptxas 13.0, sm_80 / sm_90a,
// no spills) and resident blocks per multiprocessor (A100 / H100):
//     D          16-bit: rows x keys  registers  shared  blocks      float: rows x keys  registers  shared  blocks
//     64 scale         128 x 64       244/240    48 KB   2 / 2             128 x 32      226/252    64 KB   2 / 2
//    128 scale         128 x 32       252/254    64 KB   2 / 2              64 x 16      160/154    64 KB   2 / 3
//    256 scale          64 x 32       231/246    96 KB   1 / 2              32 x 8       254/254    64 KB   2 / 3
//     64 packed        128 x 64       236/248    48 KB   2 / 2             128 x 32      246/246    64 KB   2 / 2
//    128 packed        128 x 32       249/251    64 KB   2 / 2              64 x 16      167/171    64 KB   2 / 2
//    256 packed         64 x 32       246/255    96 KB   1 / 2              32 x 8       255/255    64 KB   2 / 3
//     64 general        64 x 64       188/188    40 KB   2 / 2             128 x 32      236/238    64 KB   2 / 2
//    128 general        64 x 32       186/184    48 KB   2 / 2              64 x 16      167/165    64 KB   2 / 3
//    256 general        64 x 32       246/252    96 KB   1 / 2              32 x 8       255/255    64 KB   2 / 3
// "scale" kernels scale the scores and nothing else; "packed" ones do the same for packed sequences; "general" ones do
// all of scores.cuh.
#pragma once
#include "scores.cuh"
#include "walk.cuh"

namespace pygpt::cuda::attention {

constexpr TileShape kFwdShapes[2][3] = {{{4, 2, 64, true}, {4, 2, 32, false}, {4, 1, 32, false}},
                                        {{4, 2, 32, false}, {4, 1, 16, false}, {2, 1, 8, false}}};
constexpr TileShape kGeneralFwdShapes[2][3] = {{{4, 1, 64, true}, {4, 1, 32, false}, {4, 1, 32, false}},
                                               {{4, 2, 32, false}, {4, 1, 16, false}, {2, 1, 8, false}}};
template <class T, int D, Kind kind>
constexpr TileShape kFwdShape = select_shape<T, D>(kind == Kind::general ? kGeneralFwdShapes : kFwdShapes);

// The online softmax of the warp's rows: the maximum of x so far (at least -FLT_MAX), and the sum of p over this lane's
// columns so far.
template <class T, int M>
struct Softmax {
  float scale_log2, row_max[M][2], row_sum[M][2];
  bool was_in_limit = true;  // before this iteration, every row of the warp was within kExponentLimit

  __device__ __forceinline__ explicit Softmax(float scale_log2) : scale_log2(scale_log2) {
#pragma unroll
    for (int i = 0; i < 2 * M; i++) row_max[i / 2][i % 2] = -FLT_MAX, row_sum[i / 2][i % 2] = 0.0f;
  }

  __device__ __forceinline__ float scaled_max(float max) const { return __fmul_rn(max, scale_log2); }

  // The rounding error of scaled_max; 0 beyond the limit.
  __device__ __forceinline__ float scaled_max_error(float max) const {
    return fabsf(scaled_max(max)) < kExponentLimit<T> ? fmaf(max, scale_log2, -scaled_max(max)) : 0.0f;
  }

  // Turns q . k into p, and rescales out and row_sum where a maximum grows.
  template <int N, int C>
  __device__ __forceinline__ void update(float (&s)[M][N][4], float (&out)[M][C][4]) {
    float new_max[M][2], offset[M][2], log2_rescale[M][2];
    bool in_limit = kExponentLimit<T> > 0.0f;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float max = row_max[m][r];
#pragma unroll
        for (int n = 0; n < N; n++) max = fmaxf(max, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
        new_max[m][r] = max = warp_max<4>(max);
        offset[m][r] = scaled_max(max), log2_rescale[m][r] = scaled_max(row_max[m][r]) - scaled_max(max);
        in_limit = in_limit && fabsf(scaled_max(max)) < kExponentLimit<T>;
      }
    if constexpr (kExponentLimit<T> > 0.0f) in_limit = __all_sync(0xffffffffu, in_limit);

    if (!(in_limit && was_in_limit))
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const float max = new_max[m][r], error = scaled_max_error(max);
#pragma unroll
          for (int n = 0; n < N; n++) s[m][n][2 * r] -= max, s[m][n][2 * r + 1] -= max;
          offset[m][r] = -error;
          log2_rescale[m][r] = fmaf(row_max[m][r] - max, scale_log2, error - scaled_max_error(row_max[m][r]));
        }
    was_in_limit = in_limit;

#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float rescale = ptx::exp2_approx(log2_rescale[m][r]);
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int c = 0; c < 2; c++) {
            float& p = s[m][n][2 * r + c];
            p = ptx::exp2_approx(fmaf(p, scale_log2, -offset[m][r]));
            sum += p;
          }
        row_max[m][r] = new_max[m][r], row_sum[m][r] = row_sum[m][r] * rescale + sum;
#pragma unroll
        for (int n = 0; n < C; n++) out[m][n][2 * r] *= rescale, out[m][n][2 * r + 1] *= rescale;
      }
  }

  // What is left of a row whose p add up to `total`: its lse, and the factor of its sums of p v.
  struct Row {
    float lse, factor;
  };
  __device__ __forceinline__ Row finish(int m, int r, float scale, float total, float sink) const {
    const float max = __fmul_rn(row_max[m][r], scale), error = scaled_max_error(row_max[m][r]);
    if (sink == -kInf) return total == 0.0f ? Row{-kInf, 0.0f} : Row{max + (logf(total) - error * kLn2), 1.0f / total};
    // How far the sink is above the score for which p would be 1.
    const float above = total == 0.0f ? kInf : sink - max + error * kLn2;
    if (above > 0.0f) {
      const float weight = expf(-above), sum = fmaf(total, weight, 1.0f);
      return {sink + logf(sum), weight / sum};
    }
    const float sum = total + expf(above);
    return {max + (logf(sum) - error * kLn2), 1.0f / sum};
  }
};

template <class T, int ELEMENTS, int THREADS>
__device__ __forceinline__ void scale_tile(T* tile, float factor) {
  for (int i = threadIdx.x; i < ELEMENTS; i += THREADS) tile[i] = from_float<T>(to_float(tile[i]) * factor);
}

template <class T, int D, Kind kind>
__global__ void __launch_bounds__(kFwdShape<T, D, kind>.threads(), kFwdShape<T, D, kind>.min_blocks_per_sm())
    attention_fwd_kernel(const Params call) {
  constexpr bool general = kind == Kind::general;
  constexpr TileShape shape = kFwdShape<T, D, kind>;
  constexpr int ROWS = shape.tile_m(), KEYS = shape.tile_n, THREADS = shape.threads(), M = shape.m_tiles;
  PYGPT_DYNAMIC_SHARED(shared);
  T* const q_tile = reinterpret_cast<T*>(shared);

  const TileCoord coord = tile_coord(call);
  const Params& params = of_sequence<T, kind>(call, coord.head / call.q.heads);
  const int q_len = params.visible.q_len, key_head = coord.head / params.group;
  const int row0 = (int(ceil_div(q_len, ROWS)) - 1 - coord.tile) * ROWS;  // the tiles with the most keys first
  if (kind == Kind::packed && row0 < 0) return;
  const int warp_row = threadIdx.x / 32 * (16 * M), row = row0 + warp_row;
  const auto k = slice_head<const T>(params.k, key_head), v = slice_head<const T>(params.v, key_head);
  using Keys = KeyWalk<T, D, ROWS, KEYS, THREADS, Tiles<kind>>;
  const Keys keys{q_tile + ROWS * D, params.visible, row0, k, v, Tiles<kind>(params, coord.head)};
  load_tile<ROWS, D, THREADS>(q_tile, slice_head<const T>(params.q, coord.head), row0, q_len);
  int key = keys.first();
  keys.load(key, 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  float scale = 1.0f;  // of what `softmax` gets
  if constexpr (!general) {
    scale = params.scale == 0.0f ? 1.0f : fabsf(params.scale);
    if (scale != params.scale) {
      scale_tile<T, ROWS * D, THREADS>(q_tile, params.scale == 0.0f ? 0.0f : -1.0f);
      __syncthreads();
    }
  }

  WarpA<T, D, M, shape.a_resident> q(q_tile + warp_row * D);
  const HeadScores<T> scores(params, coord.head);
  Softmax<T, M> softmax(scale * kLog2e);
  float out[M][D / 8][4] = {};
  for (int stage = 0, next; key < keys.end(); key = next, stage ^= 1) {
    next = keys.next(key);
    keys.wait_and_prefetch(next, stage ^ 1);
    if (keys.fully_masked(key, row, 16 * M)) continue;
    float s[M][KEYS / 8][4] = {};
    warp_gemm_nt(s, q, keys.k_tile(stage));
    if constexpr (general) scores.apply(s, row, key, [](int, int, int, float) {});
    apply_mask(params.visible, s, row, key, -kInf);
    softmax.update(s, out);
    if constexpr (general)
      if (params.scores.seed)
        scores.dropout(s, row, key, [&](int m, int n, int i, bool kept) {
          if (!kept) s[m][n][i] = 0.0f;
        });
    warp_gemm_nn(out, s, keys.v_tile(stage));
  }

  const float sink = params.sink ? params.sink[coord.head % params.q.heads] : -kInf;
  float* const lse = params.lse + lse_offset(params, coord.head);
  float factor[M][2];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const auto result = softmax.finish(m, r, scale, warp_sum<4>(softmax.row_sum[m][r]), sink);
      const int i = row + 16 * m + 8 * r + threadIdx.x % 32 / 4;
      if (threadIdx.x % 4 == 0 && i < q_len) lse[i] = result.lse;
      factor[m][r] = general ? result.factor * params.scores.keep : result.factor;
    }
  store_rows(slice_head<T>(params.out, coord.head), out, row, q_len, [&](int m, int r) { return factor[m][r]; });
}

template <Kind kind>
Error launch_fwd(const AttentionArgs& a, const Stream& stream) {
  return by_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    Params params = make_params<T>(a);
    if constexpr (kind == Kind::general)
      if (const Error e = prepare_scores(params, a, stream)) return e;
    return by_head_dim(std::max(a.head_dim, a.v_dim), [&](auto width) {
      constexpr int D = width;
      constexpr TileShape shape = kFwdShape<T, D, kind>;
      return launch_tiles<T>(attention_fwd_kernel<T, D, kind>, params, params.total_heads, a.sequences.q_len,
                             a.sequences.k_len, shape, shared_bytes<T, D>(shape, 1), stream);
    });
  });
}

}  // namespace pygpt::cuda::attention
