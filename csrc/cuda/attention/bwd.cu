// softmax(scale q k^T) v, backward. q, dq (L, E), k, dk (S, E), v, dv (S, Ev), out, dout (L, Ev) per head.
//
//   p = exp(scale q k^T - lse)         delta_i = out_i . dout_i - dlse_i
//   ds = p (dout v^T - delta)          dv = p^T dout    dk = scale ds^T q    dq = scale ds k
//
// attention_delta_kernel computes delta first. attention_dkdv_kernel then owns a tile of keys and loops over the
// queries that attend to them. It computes the transposes p^T = exp(scale k q^T - lse) and ds^T, because these are the
// A operands of dv and dk. attention_dq_kernel owns a tile of queries and loops over their keys. Every sum is formed by
// one warp in one order: this takes seven products where atomics would need five, but gives the same bits in every run.
// If the accumulators of dk and dv do not fit into registers together (D = 256), dkdv runs once for dk and once for dv.
//
// A row that attends to one key must get p = 1, however large its score is. With x = q . k and c = scale log2(e), p is
//   2^(x c - lse_log2)              one fused multiply-add per score; lse_log2 = lse log2(e) is computed once per row
//   2^((x scale - lse) log2(e))     three operations; x scale is rounded, as forward rounded it when it computed lse
// In the first form the exponent of the largest score is the rounding error of lse and lse_log2, together at most
// |lse_log2| 2^-23. Below kExponentLimit (params.cuh), p is 1 +- eps/5, which rounds to 1. (c is rounded too, so
// lse_log2 is computed as lse times c / scale, which gives both the same relative error.) The second form is used in an
// iteration in which a row is beyond the limit or has an infinite or NaN lse, because a masked score must have p = 0
// even then. float always uses the second form, because its p is not rounded.
//
// Registers per thread (ptxas 13.0, sm_80 / sm_90a, no spills) and resident blocks per multiprocessor (A100 / H100):
//     D          16-bit: tile m x n   registers  shared  blocks      float: tile m x n   registers  shared  blocks
//     64  dkdv         128 x 32       245/249    48 KB   2 / 2              64 x 32      196/206    64 KB   2 / 2
//    128  dkdv          64 x 32       248/254    64 KB   2 / 2              64 x 16      254/254    96 KB   1 / 2
//    256  dk            64 x 16       223/230    96 KB   1 / 2              32 x 8       255/255    96 KB   1 / 2
//    256  dv            64 x 16       223/223    96 KB   1 / 2              32 x 8       255/255    96 KB   1 / 2
//     64  dq           128 x 32       216/216    48 KB   2 / 2              64 x 32      168/168    64 KB   2 / 3
//    128  dq            64 x 32       176/179    64 KB   2 / 2              64 x 16      168/163    96 KB   1 / 2
//    256  dq            64 x 16       231/234    96 KB   1 / 2              32 x 8       255/255    96 KB   1 / 2
#include "../vector.cuh"
#include "walk.cuh"

namespace pygpt::cuda {
namespace attention {
namespace {

// The tile shapes of dkdv and dq alike: each owns two tiles, loops over two tensors, and holds p, ds and the gradients
// in registers.
constexpr TileShape kShapes[2][3] = {{{4, 2, 32, false}, {4, 1, 32, false}, {4, 1, 16, false}},
                                     {{4, 1, 32, false}, {4, 1, 16, false}, {2, 1, 8, false}}};
template <class T, int D>
constexpr TileShape kShape = select_shape<T, D>(kShapes);

constexpr int kRowPadding = 32;  // padded_q_len is a multiple of it; itself a multiple of every tile_n
constexpr int kDeltaThreads = 256;

template <class T>
constexpr bool kCanFuse = kExponentLimit<T> > 0.0f;

// ---------------------------------------------------------------- delta
// Fills padded_lse (infinite where p must be 0: in rows past the end and in rows without keys), padded_neg_delta and,
// except for float, padded_lse_log2. kDeltaLanes lanes share a row; each reads 16 bytes at a time if out and dout are
// aligned.
template <class T, int D>
constexpr int kDeltaLanes = std::min(32, D / kVector<T>);

template <class T, int D>
__global__ void __launch_bounds__(kDeltaThreads) attention_delta_kernel(const Params params) {
  constexpr int LANES = kDeltaLanes<T, D>, ROWS = kDeltaThreads / LANES;
  const int blocks = params.padded_q_len / ROWS, head = blockIdx.x / blocks, lane = threadIdx.x % LANES;
  const int row = blockIdx.x % blocks * ROWS + threadIdx.x / LANES;
  const bool inside = row < params.visible.q_len;
  const auto out = slice_head<const T>(params.out, head), dout = slice_head<const T>(params.dout, head);
  const T *out_row = out.data + row * out.row_stride, *dout_row = dout.data + row * dout.row_stride;
  float sum = 0.0f;
  if (out.vectorized && dout.vectorized) {
#pragma unroll
    for (int c = lane * kVector<T>; c < D; c += LANES * kVector<T>)
      if (inside && c < out.width) {
        float a[kVector<T>], b[kVector<T>];
        load(out_row + c, a), load(dout_row + c, b);
#pragma unroll
        for (int i = 0; i < kVector<T>; i++) sum = fmaf(a[i], b[i], sum);
      }
  } else {
    for (int c = lane; inside && c < out.width; c += LANES)
      sum = fmaf(to_float(out_row[c * out.channel_stride]), to_float(dout_row[c * dout.channel_stride]), sum);
  }
  sum = warp_sum<LANES>(sum);
  if (lane > 0) return;
  const int64_t i = int64_t(head) * params.visible.q_len + row;
  const float lse = inside && params.lse[i] != -kInf ? params.lse[i] : kInf;
  const int64_t padded = int64_t(head) * params.padded_q_len + row;
  params.padded_lse[padded] = lse;
  params.padded_neg_delta[padded] = !inside ? 0.0f : params.dlse ? params.dlse[i] - sum : -sum;
  if constexpr (kCanFuse<T>)
    params.padded_lse_log2[padded] = lse == kInf ? lse : fmaf(lse, params.lse_to_log2[0], lse * params.lse_to_log2[1]);
}

template <class T>
__device__ __forceinline__ bool below_limit(float lse_log2) {
  return fabsf(lse_log2) < kExponentLimit<T>;
}

// The form of the exponent that a warp uses, p = 2^(factor y - offset):
//   fused, if all its rows are within the limit:   y = x,              offset = lse_log2,   factor = scale log2(e)
//   exact:                                         y = x scale - lse,  offset = 0,          factor = log2(e)
template <class T>
struct Exponent {
  bool fused;
  float factor, masked;  // masked: the value of y for which p = 0
  __device__ __forceinline__ Exponent(const Params& params, bool in_limit)
      : fused(kCanFuse<T> && __all_sync(0xffffffffu, in_limit)), factor(fused ? params.scale_log2 : kLog2e),
        masked(copysignf(kInf, fused ? -params.scale_log2 : -1.0f)) {}
};

// ---------------------------------------------------------------- dk, dv
// The floats that a stage holds for each row: lse, -delta, lse_log2, and 0, which is the offset if it is not lse_log2.
template <class T>
constexpr int kRowStats = kCanFuse<T> ? 4 : 2;

template <class T, int D, bool with_dk, bool with_dv>
__global__ void __launch_bounds__(kShape<T, D>.threads(), kShape<T, D>.min_blocks_per_sm())
    attention_dkdv_kernel(const Params params) {
  constexpr TileShape shape = kShape<T, D>;
  constexpr int KEYS = shape.tile_m(), ROWS = shape.tile_n, THREADS = shape.threads(), M = shape.m_tiles, N = ROWS / 8;
  PYGPT_DYNAMIC_SHARED(shared);
  T* const k_tile = reinterpret_cast<T*>(shared);
  T* const v_tile = k_tile + KEYS * D;
  T* const stages = v_tile + KEYS * D;
  float* const stage_stats = reinterpret_cast<float*>(stages + 4 * ROWS * D);

  const TileCoord coord = tile_coord(params);
  const auto input = [&](const Tensor& t) { return slice_head<const T>(t, coord.head); };
  const auto q = input(params.q), k = input(params.k), v = input(params.v), dout = input(params.dout);
  const int key0 = coord.tile * KEYS;  // the tiles with the most queries first
  const int warp_key = threadIdx.x / 32 * (16 * M), key = key0 + warp_key;
  const Visible<int> queries = params.visible.transposed();  // the rows that see a key
  const int begin = queries.begin(key0) & -ROWS, end = queries.end(key0 + KEYS - 1);
  auto q_tile = [&](int row) { return stages + row / ROWS % 2 * (2 * ROWS * D); };
  auto row_stats = [&](int row) { return stage_stats + row / ROWS % 2 * (kRowStats<T> * ROWS); };
  auto load = [&](int row) {
    load_tile<ROWS, D, THREADS>(q_tile(row), q, row, params.visible.q_len);
    load_tile<ROWS, D, THREADS>(q_tile(row) + ROWS * D, dout, row, params.visible.q_len);
    if (const int i = threadIdx.x; i < (kCanFuse<T> ? 3 : 2) * ROWS / 4) {
      const float* from = i < ROWS / 4   ? params.padded_lse
                          : i < ROWS / 2 ? params.padded_neg_delta
                                         : params.padded_lse_log2;
      const int64_t first = int64_t(coord.head) * params.padded_q_len + row;
      ptx::cp_async_16(row_stats(row) + 4 * i, from + first + i % (ROWS / 4) * 4, true);
    }
  };

  load_tile<KEYS, D, THREADS>(k_tile, k, key0, params.visible.k_len);
  load_tile<KEYS, D, THREADS>(v_tile, v, key0, params.visible.k_len);
  if (begin < end) load(begin);
  if (const int i = threadIdx.x; kCanFuse<T> && i < 2 * ROWS) row_stats(i / ROWS * ROWS)[3 * ROWS + i % ROWS] = 0.0f;
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  WarpA<T, D, M, shape.a_resident> k_warp(k_tile + warp_key * D), v_warp(v_tile + warp_key * D);
  float dk[M][with_dk ? D / 8 : 1][4] = {}, dv[M][with_dv ? D / 8 : 1][4] = {};

  for (int row = begin; row < end; row += ROWS) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage has arrived, and no warp reads the other one any more
    if (row + ROWS < end) load(row + ROWS);
    ptx::cp_async_commit();
    if (row + ROWS <= queries.begin(key) || row >= queries.end(key + 16 * M - 1)) continue;  // fully masked

    const float *lse = row_stats(row), *neg_delta = lse + ROWS, *lse_log2 = lse + 2 * ROWS;
    const Exponent<T> exponent(params, kCanFuse<T> && below_limit<T>(lse_log2[threadIdx.x % ROWS]));
    const float* offset = exponent.fused ? lse_log2 : lse_log2 + ROWS;
    float p[M][N][4] = {};
    warp_gemm_nt(p, k_warp, q_tile(row));
    if (!exponent.fused)
      for_each_accumulator<M, N>([&](int m, int n, int i, int, int column) {
        p[m][n][i] = __fmul_rn(p[m][n][i], params.scale) - lse[column];
      });
    const Range<int> unmasked = queries.unmasked(key, key + 16 * M);
    if (row < unmasked.begin || row + ROWS > unmasked.end)
      for_each_accumulator<M, N>([&](int m, int n, int i, int k, int column) {
        if (column < queries.begin(key + k) - row || column >= queries.end(key + k) - row) p[m][n][i] = exponent.masked;
      });
    for_each_accumulator<M, N>([&](int m, int n, int i, int, int column) {
      p[m][n][i] = ptx::exp2_approx(fmaf(p[m][n][i], exponent.factor, kCanFuse<T> ? -offset[column] : 0.0f));
    });
    if constexpr (with_dv) warp_gemm_nn(dv, p, q_tile(row) + ROWS * D);
    if constexpr (with_dk) {
      float ds[M][N][4];
      for_each_accumulator<M, N>(
          [&](int m, int n, int i, int, int column) { ds[m][n][i] = kCanFuse<T> ? neg_delta[column] : 0.0f; });
      warp_gemm_nt(ds, v_warp, q_tile(row) + ROWS * D);
      for_each_accumulator<M, N>([&](int m, int n, int i, int, int column) {
        ds[m][n][i] = p[m][n][i] * (kCanFuse<T> ? ds[m][n][i] : ds[m][n][i] + neg_delta[column]);
      });
      warp_gemm_nn(dk, ds, q_tile(row));
    }
  }

  if constexpr (with_dk)
    if (params.dk.data)
      store_rows(slice_head<T>(params.dk, coord.head), dk, key, params.visible.k_len,
                 [&](int, int) { return params.scale; });
  if constexpr (with_dv)
    if (params.dv.data)
      store_rows(slice_head<T>(params.dv, coord.head), dv, key, params.visible.k_len, [](int, int) { return 1.0f; });
}

// ---------------------------------------------------------------- dq
template <class T, int D>
__global__ void __launch_bounds__(kShape<T, D>.threads(), kShape<T, D>.min_blocks_per_sm())
    attention_dq_kernel(const Params params) {
  constexpr TileShape shape = kShape<T, D>;
  constexpr int ROWS = shape.tile_m(), KEYS = shape.tile_n, THREADS = shape.threads(), M = shape.m_tiles, N = KEYS / 8;
  PYGPT_DYNAMIC_SHARED(shared);
  T* const q_tile = reinterpret_cast<T*>(shared);
  T* const dout_tile = q_tile + ROWS * D;

  const TileCoord coord = tile_coord(params);
  const int row0 =
      (int(ceil_div(params.visible.q_len, ROWS)) - 1 - coord.tile) * ROWS;  // the tiles with the most keys first
  const int warp_row = threadIdx.x / 32 * (16 * M), row = row0 + warp_row;
  const auto input = [&](const Tensor& t) { return slice_head<const T>(t, coord.head); };
  using Keys = KeyWalk<T, D, ROWS, KEYS, THREADS>;
  const Keys keys{dout_tile + ROWS * D, params.visible, row0, input(params.k), input(params.v)};
  load_tile<ROWS, D, THREADS>(q_tile, input(params.q), row0, params.visible.q_len);
  load_tile<ROWS, D, THREADS>(dout_tile, input(params.dout), row0, params.visible.q_len);
  keys.load(keys.first());
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();

  WarpA<T, D, M, shape.a_resident> q_warp(q_tile + warp_row * D), dout_warp(dout_tile + warp_row * D);
  float lse[M][2], neg_delta[M][2], lse_log2[M][2];
  bool in_limit = true;
#pragma unroll
  for (int i = 0; i < 2 * M; i++) {
    const int r = row + 8 * i + threadIdx.x % 32 / 4;
    const int64_t padded = int64_t(coord.head) * params.padded_q_len + r;
    lse[i / 2][i % 2] = r < params.visible.q_len ? params.padded_lse[padded] : kInf;
    neg_delta[i / 2][i % 2] = r < params.visible.q_len ? params.padded_neg_delta[padded] : 0.0f;
    lse_log2[i / 2][i % 2] = kCanFuse<T> && r < params.visible.q_len ? params.padded_lse_log2[padded] : 0.0f;
    in_limit = in_limit && below_limit<T>(lse_log2[i / 2][i % 2]);
  }
  const Exponent<T> exponent(params, in_limit);
#pragma unroll
  for (int i = 0; i < 2 * M; i++) lse_log2[i / 2][i % 2] = exponent.fused ? lse_log2[i / 2][i % 2] : 0.0f;
  float dq[M][D / 8][4] = {};
  for (int key = keys.first(); key < keys.end(); key += KEYS) {
    keys.wait_and_prefetch(key);
    if (keys.fully_masked(key, row, 16 * M)) continue;
    float p[M][N][4] = {}, ds[M][N][4];
    warp_gemm_nt(p, q_warp, keys.k_tile(key));
    if (!exponent.fused)
      for_each_accumulator<M, N>(
          [&](int m, int n, int i, int, int) { p[m][n][i] = __fmul_rn(p[m][n][i], params.scale) - lse[m][i / 2]; });
    keys.apply_mask(p, key, row, exponent.masked);
    for_each_accumulator<M, N>([&](int m, int n, int i, int, int) {
      p[m][n][i] = ptx::exp2_approx(fmaf(p[m][n][i], exponent.factor, -lse_log2[m][i / 2]));
      ds[m][n][i] = kCanFuse<T> ? neg_delta[m][i / 2] : 0.0f;
    });
    warp_gemm_nt(ds, dout_warp, keys.v_tile(key));
    for_each_accumulator<M, N>([&](int m, int n, int i, int, int) {
      ds[m][n][i] = p[m][n][i] * (kCanFuse<T> ? ds[m][n][i] : ds[m][n][i] + neg_delta[m][i / 2]);
    });
    warp_gemm_nn(dq, ds, keys.k_tile(key));
  }
  store_rows(slice_head<T>(params.dq, coord.head), dq, row, params.visible.q_len,
             [&](int, int) { return params.scale; });
}

// ---------------------------------------------------------------- launchers
template <class T, int D>
Error launch_delta(Params& params, const Stream& stream) {
  params.padded_q_len = static_cast<int>(ceil_div(params.visible.q_len, kRowPadding) * kRowPadding);
  const int64_t rows = int64_t(params.total_heads) * params.padded_q_len;
  if (rows == 0) return nullptr;
  params.padded_lse = static_cast<float*>(stream.scratch((kCanFuse<T> ? 3 : 2) * rows * sizeof(float)));
  params.padded_neg_delta = params.padded_lse + rows, params.padded_lse_log2 = params.padded_neg_delta + rows;
  const int64_t tiles = rows / (kDeltaThreads / kDeltaLanes<T, D>);
  return launch(attention_delta_kernel<T, D>, make_grid(tiles), dim3(kDeltaThreads), 0, stream, params);
}

template <class T, int D, bool with_dk, bool with_dv>
Error launch_dkdv(const Params& params, const Stream& stream) {
  if (!(with_dk && params.dk.data) && !(with_dv && params.dv.data)) return nullptr;
  constexpr int shared = shared_bytes<T, D>(kShape<T, D>, 2, kRowStats<T>);
  const auto kernel = attention_dkdv_kernel<T, D, with_dk, with_dv>;
  return launch_tiles<T>(kernel, params, params.total_heads, params.visible.k_len, params.visible.q_len, kShape<T, D>,
                         shared, stream);
}

template <class T, int D>
Error launch_dq(const Params& params, const Stream& stream) {
  if (!params.dq.data) return nullptr;
  constexpr int shared = shared_bytes<T, D>(kShape<T, D>, 2);
  return launch_tiles<T>(attention_dq_kernel<T, D>, params, params.total_heads, params.visible.q_len,
                         params.visible.k_len, kShape<T, D>, shared, stream);
}

}  // namespace
}  // namespace attention

Error attention_bwd(const AttentionArgs& a, const Stream& stream) {
  using namespace attention;
  if (const Error e = objection(a)) return e;
  return by_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    Params params = make_params<T>(a);
    params.out = make_tensor<T>(a.out, a.heads, a.v_dim, 16 / sizeof(T));  // backward reads out, 16 bytes at a time
    return by_head_dim(std::max(a.head_dim, a.v_dim), [&](auto width) {
      constexpr int D = width;
      Error e = launch_delta<T, D>(params, stream);
      if (e) return e;
      if constexpr (D < 256) {
        e = launch_dkdv<T, D, true, true>(params, stream);
      } else {
        e = launch_dkdv<T, D, true, false>(params, stream);
        if (!e) e = launch_dkdv<T, D, false, true>(params, stream);
      }
      return e ? e : launch_dq<T, D>(params, stream);
    });
  });
}

}  // namespace pygpt::cuda
