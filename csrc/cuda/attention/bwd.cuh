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
// Registers per thread (ptxas 13.0, sm_80 / sm_90a, no spills within a loop) and resident blocks per multiprocessor
// (A100 / H100). "general" kernels do all of scores.cuh, the others only scale; "packed" ones serve packed sequences.
//     D                  16-bit: m x n   registers  shared  blocks      float: m x n   registers  shared  blocks
//     64  dkdv              128 x 32      255/255    48 KB   2 / 2         64 x 32      175/198    64 KB   2 / 2
//    128  dkdv               64 x 32      248/248    64 KB   2 / 2         64 x 16      248/244    96 KB   1 / 2
//    256  dk                 64 x 16      222/236    96 KB   1 / 2         32 x 8       253/254    96 KB   1 / 2
//    256  dv                 64 x 16      243/254    96 KB   1 / 2         32 x 8       255/252    96 KB   1 / 2
//     64  dq                128 x 32      212/214    48 KB   2 / 2         64 x 32      168/168    64 KB   2 / 3
//    128  dq                 64 x 32      178/178    64 KB   2 / 2         64 x 16      168/168    96 KB   1 / 2
//    256  dq                 64 x 16      233/236    96 KB   1 / 2         32 x 8       255/255    96 KB   1 / 2
//     64  dkdv, packed      128 x 32      254/255    48 KB   2 / 2         64 x 32      220/228    64 KB   2 / 2
//    128  dkdv, packed       64 x 32      255/252    64 KB   2 / 2         64 x 16      246/255    96 KB   1 / 2
//    256  dk, packed         64 x 16      230/244    96 KB   1 / 2         32 x 8       255/255    96 KB   1 / 2
//    256  dv, packed         64 x 16      243/247    96 KB   1 / 2         32 x 8       255/255    96 KB   1 / 2
//     64  dq, packed        128 x 32      224/222    48 KB   2 / 2         64 x 32      168/168    64 KB   2 / 3
//    128  dq, packed         64 x 32      188/192    64 KB   2 / 2         64 x 16      168/168    96 KB   1 / 2
//    256  dq, packed         64 x 16      235/238    96 KB   1 / 2         32 x 8       255/255    96 KB   1 / 2
//     64  dkdv, general      64 x 32      174/192    32 KB   2 / 2         64 x 32      204/212    64 KB   2 / 2
//    128  dkdv, general      64 x 16      242/249    48 KB   2 / 2         64 x 16      236/250    96 KB   1 / 2
//    256  dk, general        64 x 16      235/244    96 KB   1 / 2         32 x 8       254/254    96 KB   1 / 2
//    256  dv, general        64 x 16      243/255    96 KB   1 / 2         32 x 8       255/255    96 KB   1 / 2
//     64  dq, general        64 x 32      162/164    32 KB   3 / 3         64 x 32      168/168    64 KB   2 / 3
//    128  dq, general        64 x 16      167/174    48 KB   3 / 2         64 x 16      168/168    96 KB   1 / 2
//    256  dq, general        64 x 16      251/249    96 KB   1 / 2         32 x 8       255/255    96 KB   1 / 2
#pragma once
#include "../vector.cuh"
#include "scores.cuh"
#include "walk.cuh"

namespace pygpt::cuda::attention {

// The tile shapes of dkdv and dq alike: each owns two tiles, loops over two tensors, and holds p, ds and the gradients
// in registers.
constexpr TileShape kBwdShapes[2][3] = {{{4, 2, 32, false}, {4, 1, 32, false}, {4, 1, 16, false}},
                                        {{4, 1, 32, false}, {4, 1, 16, false}, {2, 1, 8, false}}};
constexpr TileShape kGeneralBwdShapes[2][3] = {{{4, 1, 32, false}, {4, 1, 16, false}, {4, 1, 16, false}},
                                               {{4, 1, 32, false}, {4, 1, 16, false}, {2, 1, 8, false}}};
template <class T, int D, Kind kind>
constexpr TileShape kBwdShape = select_shape<T, D>(kind == Kind::general ? kGeneralBwdShapes : kBwdShapes);

template <class T>
constexpr bool kCanFuse = kExponentLimit<T> > 0.0f;

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

// ---------------------------------------------------------------- rows that see one key
// If a row sees one key and there is no sink, its p is 1 whatever its score is. Its ds must then be dlse, not what the
// roundings of dout v^T and delta leave. So its delta is -dlse, and the tiles of dout have zeros in its place.
// attention_dkdv_kernel adds its dout to dv in the end.
__device__ __forceinline__ bool sees_one_key(const Params& params, int row) {
  return !params.sink && params.visible.sees_one_key(row);
}

// False if none of the rows row0 .. row1 - 1 sees one key. (The number of keys is a concave function of the row, so it
// is least at one end.)
__device__ __forceinline__ bool may_see_one_key(const Params& params, int row0, int row1) {
  const Visible<int>& visible = params.visible;
  const int last = min(row1, visible.q_len) - 1;
  const int keys = min(visible.end(row0) - visible.begin(row0), visible.end(last) - visible.begin(last));
  return !params.sink && keys <= 1;
}

template <int ROWS, int D, int THREADS, class T>
__device__ __forceinline__ void load_dout(const Params& params, T* tile, const Head<const T>& dout, int row) {
  if (may_see_one_key(params, row, row + ROWS))
    load_tile<ROWS, D, THREADS>(tile, dout, row, params.visible.q_len, [&](int r) { return sees_one_key(params, r); });
  else load_tile<ROWS, D, THREADS>(tile, dout, row, params.visible.q_len);
}

// The rows that see key j and no other one.
__device__ __forceinline__ Range<int> rows_with_one_key(const Params& params, int j) {
  const Visible<int>& v = params.visible;
  const int leftmost = j - v.diagonal - v.right, rightmost = j - v.diagonal + v.left;  // rows that just see key j
  const int begin = j == 0 ? leftmost : max(leftmost, rightmost),
            end = j == v.k_len - 1 ? rightmost : min(leftmost, rightmost);
  return {max(begin, 0), params.sink || j >= v.k_len ? 0 : min(end + 1, v.q_len)};
}

// Adds p dout of these rows to a warp's dv, whose first key is `key`.
template <class T, bool general, int M, int N>
__device__ __forceinline__ void add_rows_with_one_key(const Params& params, float (&dv)[M][N][4], int head, int key) {
  const auto dout = slice_head<const T>(params.dout, head);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int j = key + 16 * m + 8 * r + g;
      const Range<int> rows = rows_with_one_key(params, j);
#pragma unroll 1
      for (int i = rows.begin; i < rows.end; i++) {
        const float lse = params.padded_lse[int64_t(head) * params.padded_q_len + i];
        float p = lse == kInf ? 0.0f : lse - lse + 1.0f;  // NaN if lse is
        if constexpr (general)
          if (params.scores.seed && !HeadScores<T>(params, head).is_kept(i, j)) p = 0.0f;
        const T* from = dout.data + i * dout.row_stride + 2 * t * dout.channel_stride;
#pragma unroll
        for (int n = 0; n < N; n++, from += 8 * dout.channel_stride) {
          const int left = dout.width - (8 * n + 2 * t);
          if (left > 0) dv[m][n][2 * r] = fmaf(p, to_float(from[0]), dv[m][n][2 * r]);
          if (left > 1) dv[m][n][2 * r + 1] = fmaf(p, to_float(from[dout.channel_stride]), dv[m][n][2 * r + 1]);
        }
      }
    }
}

// Turns p = q k^T and ds = dout v^T, tiles of a warp at (row, key), into p, before dropout, and ds. derivative(m, n, i,
// d) is called with softcap's derivatives, before ds is multiplied by p.
template <class T, int M, int N, class Stats, class F>
__device__ __forceinline__ void finish_ds(const HeadScores<T>& scores, const Stats& stats, float (&p)[M][N][4],
                                          float (&ds)[M][N][4], int row, int key, F derivative) {
  if (scores.params.scores.seed)
    scores.dropout(p, row, key, [&](int m, int n, int i, bool kept) {
      ds[m][n][i] = kept ? ds[m][n][i] * scores.params.scores.keep : 0.0f;
    });
  for_each_accumulator<M, N>([&](int m, int n, int i, int, int) { ds[m][n][i] += stats.neg_delta[m][i / 2]; });
  scores.apply(p, row, key, derivative);
  for_each_accumulator<M, N>([&](int m, int n, int i, int, int) { p[m][n][i] -= stats.lse[m][i / 2]; });
  apply_mask(scores.params.visible, p, row, key, -kInf);
  for_each_accumulator<M, N>([&](int m, int n, int i, int, int) {
    p[m][n][i] = ptx::exp2_approx(p[m][n][i] * kLog2e);
    ds[m][n][i] *= p[m][n][i];
  });
}

// ---------------------------------------------------------------- dk, dv
// The floats that a stage holds for each row: lse, -delta, lse_log2, and 0, which is the offset if it is not lse_log2.
template <class T>
constexpr int kRowStats = kCanFuse<T> ? 4 : 2;

template <class T, int D, Kind kind, bool with_dk, bool with_dv>
__global__ void __launch_bounds__(kBwdShape<T, D, kind>.threads(), kBwdShape<T, D, kind>.min_blocks_per_sm())
    attention_dkdv_kernel(const Params call) {
  constexpr bool general = kind == Kind::general;
  constexpr TileShape shape = kBwdShape<T, D, kind>;
  constexpr int KEYS = shape.tile_m(), ROWS = shape.tile_n, THREADS = shape.threads(), M = shape.m_tiles, N = ROWS / 8;
  PYGPT_DYNAMIC_SHARED(shared);
  T* const k_tile = reinterpret_cast<T*>(shared);
  T* const v_tile = k_tile + KEYS * D;
  T* const stages = v_tile + KEYS * D;
  float* const stage_stats = reinterpret_cast<float*>(stages + 4 * ROWS * D);

  const TileCoord coord = tile_coord(call);
  const Params& params = of_sequence<T, kind>(call, coord.head / call.k.heads);
  const int key0 = coord.tile * KEYS;  // the tiles with the most queries first
  if (kind == Kind::packed && key0 >= params.visible.k_len) return;
  const int warp_key = threadIdx.x / 32 * (16 * M), key = key0 + warp_key;
  const Visible<int> queries = params.visible.transposed();  // the rows that see a key
  const int begin = queries.begin(key0) & -ROWS, end = queries.end(key0 + KEYS - 1);
  const int first_head = coord.head * params.group;
  auto q_tile = [&](int stage) { return stages + stage * (2 * ROWS * D); };
  auto row_stats = [&](int stage) { return stage_stats + stage * (kRowStats<T> * ROWS); };
  auto load = [&](int member, int row, int stage) {
    auto q = slice_head<const T>(params.q, first_head), dout = slice_head<const T>(params.dout, first_head);
    q.data += member * params.q.stride[1], dout.data += member * params.dout.stride[1];
    load_tile<ROWS, D, THREADS>(q_tile(stage), q, row, params.visible.q_len);
    load_dout<ROWS, D, THREADS>(params, q_tile(stage) + ROWS * D, dout, row);
    if (const int i = threadIdx.x; i < (kCanFuse<T> ? 3 : 2) * ROWS / 4) {
      const float* from = i < ROWS / 4   ? params.padded_lse
                          : i < ROWS / 2 ? params.padded_neg_delta
                                         : params.padded_lse_log2;
      const int64_t first = int64_t(first_head + member) * params.padded_q_len + row;
      ptx::cp_async_16(row_stats(stage) + 4 * i, from + first + i % (ROWS / 4) * 4, true);
    }
  };
  // The tile of queries after the one at `row` of the group's head `member`, or the first: one that sees a key.
  auto advance = [&](int& member, int& row, int step) {
    row += step;
    if (row >= end) row = begin, member++;
    if constexpr (general) {
      while (member < params.group && !MaskTiles(params, first_head + member).any(row, ROWS, key0, KEYS)) {
        row += ROWS;
        if (row >= end) row = begin, member++;
      }
    }
  };

  load_tile<KEYS, D, THREADS>(k_tile, slice_head<const T>(params.k, coord.head), key0, params.visible.k_len);
  load_tile<KEYS, D, THREADS>(v_tile, slice_head<const T>(params.v, coord.head), key0, params.visible.k_len);
  int member = begin < end ? 0 : params.group, row = begin;
  if (begin < end) advance(member, row, 0);
  if (member < params.group) load(member, row, 0);
  if (const int i = threadIdx.x; kCanFuse<T> && i < 2 * ROWS) row_stats(i / ROWS)[3 * ROWS + i % ROWS] = 0.0f;
  ptx::cp_async_commit();
  static_assert(!shape.a_resident);
  WarpA<T, D, M, false> k_warp(k_tile + warp_key * D), v_warp(v_tile + warp_key * D);
  float dk[M][with_dk ? D / 8 : 1][4] = {}, dv[M][with_dv ? D / 8 : 1][4] = {};

  for (int stage = 0; member < params.group; advance(member, row, ROWS), stage ^= 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage has arrived, and no warp reads the other one any more
    int next_member = member, next_row = row;
    advance(next_member, next_row, ROWS);
    if (next_member < params.group) load(next_member, next_row, stage ^ 1);
    ptx::cp_async_commit();
    // No row of the tile sees a key of the warp. Both forms say so. Packed kernels spill registers with the second one.
    const bool fully_masked =
        kind == Kind::packed ? key + 16 * M <= params.visible.begin(row) || key >= params.visible.end(row + ROWS - 1)
                             : row + ROWS <= queries.begin(key) || row >= queries.end(key + 16 * M - 1);
    if (fully_masked) continue;

    const T* const dout_tile = q_tile(stage) + ROWS * D;
    const float *lse = row_stats(stage), *neg_delta = lse + ROWS, *lse_log2 = lse + 2 * ROWS;
    float p[M][N][4] = {}, ds[M][with_dk ? N : 1][4];
    if constexpr (general) {
      const HeadScores<T, true> scores(params, first_head + member);
      const bool drops = params.scores.seed;
      Kept<M, N> kept;
      if (drops) scores.dropout(p, key, row, [&](int m, int n, int i, bool keep) { kept.set(m, n, i, keep); });
      warp_gemm_nt(p, k_warp, q_tile(stage));
      if constexpr (with_dk) {
        for_each_accumulator<M, N>([&](int m, int n, int i, int, int) { ds[m][n][i] = 0.0f; });
        warp_gemm_nt(ds, v_warp, dout_tile);
        if (drops)
          for_each_accumulator<M, N>([&](int m, int n, int i, int, int) {
            ds[m][n][i] = kept(m, n, i) ? ds[m][n][i] * params.scores.keep : 0.0f;
          });
        for_each_accumulator<M, N>([&](int m, int n, int i, int, int column) { ds[m][n][i] += neg_delta[column]; });
      }
      scores.apply(p, key, row, [&](int m, int n, int i, float derivative) {
        if constexpr (with_dk) ds[m][n][i] *= derivative;
      });
      for_each_accumulator<M, N>([&](int m, int n, int i, int, int column) { p[m][n][i] -= lse[column]; });
      apply_mask(queries, p, key, row, -kInf);
      for_each_accumulator<M, N>([&](int m, int n, int i, int, int) {
        p[m][n][i] = ptx::exp2_approx(p[m][n][i] * kLog2e);
        if constexpr (with_dk) ds[m][n][i] *= p[m][n][i];
      });
      if (drops && with_dv)
        for_each_accumulator<M, N>([&](int m, int n, int i, int, int) {
          if (!kept(m, n, i)) p[m][n][i] = 0.0f;
        });
      if constexpr (with_dv) warp_gemm_nn(dv, p, dout_tile);
    } else {
      const Exponent<T> exponent(params, kCanFuse<T> && below_limit<T>(lse_log2[threadIdx.x % ROWS]));
      const float* offset = exponent.fused ? lse_log2 : lse_log2 + ROWS;
      warp_gemm_nt(p, k_warp, q_tile(stage));
      if (!exponent.fused)
        for_each_accumulator<M, N>([&](int m, int n, int i, int, int column) {
          p[m][n][i] = __fmul_rn(p[m][n][i], params.scale) - lse[column];
        });
      apply_mask(queries, p, key, row, exponent.masked);
      for_each_accumulator<M, N>([&](int m, int n, int i, int, int column) {
        p[m][n][i] = ptx::exp2_approx(fmaf(p[m][n][i], exponent.factor, kCanFuse<T> ? -offset[column] : 0.0f));
      });
      if constexpr (with_dv) warp_gemm_nn(dv, p, dout_tile);
      if constexpr (with_dk) {
        for_each_accumulator<M, N>(
            [&](int m, int n, int i, int, int column) { ds[m][n][i] = kCanFuse<T> ? neg_delta[column] : 0.0f; });
        warp_gemm_nt(ds, v_warp, dout_tile);
        for_each_accumulator<M, N>([&](int m, int n, int i, int, int column) {
          ds[m][n][i] = p[m][n][i] * (kCanFuse<T> ? ds[m][n][i] : ds[m][n][i] + neg_delta[column]);
        });
      }
    }
    if constexpr (with_dk) warp_gemm_nn(dk, ds, q_tile(stage));
  }

  if constexpr (with_dv)
    if (begin < end && may_see_one_key(params, begin, end))
      for (int i = 0; i < params.group; i++) add_rows_with_one_key<T, general>(params, dv, first_head + i, key);
  if constexpr (with_dk)
    if (params.dk.data)
      store_rows(slice_head<T>(params.dk, coord.head), dk, key, params.visible.k_len,
                 [&](int, int) { return params.scale; });
  if constexpr (with_dv)
    if (params.dv.data)
      store_rows(slice_head<T>(params.dv, coord.head), dv, key, params.visible.k_len,
                 [&](int, int) { return general ? params.scores.keep : 1.0f; });
}

// ---------------------------------------------------------------- dq
// The statistics of the rows of a lane: those of the upper and the lower half of each mma tile of its warp.
template <class T, int M>
struct RowStats {
  float lse[M][2], neg_delta[M][2];
  __device__ __forceinline__ RowStats(const Params& params, int head, int row) {
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
      const int r = row + 8 * i + threadIdx.x % 32 / 4;
      const int64_t padded = int64_t(head) * params.padded_q_len + r;
      lse[i / 2][i % 2] = r < params.visible.q_len ? params.padded_lse[padded] : kInf;
      neg_delta[i / 2][i % 2] = r < params.visible.q_len ? params.padded_neg_delta[padded] : 0.0f;
    }
  }
};

template <class T, int D, Kind kind>
__global__ void __launch_bounds__(kBwdShape<T, D, kind>.threads(), kBwdShape<T, D, kind>.min_blocks_per_sm())
    attention_dq_kernel(const Params call) {
  constexpr bool general = kind == Kind::general;
  constexpr TileShape shape = kBwdShape<T, D, kind>;
  constexpr int ROWS = shape.tile_m(), KEYS = shape.tile_n, THREADS = shape.threads(), M = shape.m_tiles, N = KEYS / 8;
  PYGPT_DYNAMIC_SHARED(shared);
  T* const q_tile = reinterpret_cast<T*>(shared);
  T* const dout_tile = q_tile + ROWS * D;

  const TileCoord coord = tile_coord(call);
  const Params& params = of_sequence<T, kind>(call, coord.head / call.q.heads);
  const int q_len = params.visible.q_len, key_head = coord.head / params.group;
  const int row0 = (int(ceil_div(q_len, ROWS)) - 1 - coord.tile) * ROWS;  // the tiles with the most keys first
  if (kind == Kind::packed && row0 < 0) return;
  const int warp_row = threadIdx.x / 32 * (16 * M), row = row0 + warp_row;
  const auto k = slice_head<const T>(params.k, key_head), v = slice_head<const T>(params.v, key_head);
  using Keys = KeyWalk<T, D, ROWS, KEYS, THREADS, Tiles<kind>>;
  const Keys keys{dout_tile + ROWS * D, params.visible, row0, k, v, Tiles<kind>(params, coord.head)};
  load_tile<ROWS, D, THREADS>(q_tile, slice_head<const T>(params.q, coord.head), row0, q_len);
  load_dout<ROWS, D, THREADS>(params, dout_tile, slice_head<const T>(params.dout, coord.head), row0);
  int key = keys.first();
  keys.load(key, 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();

  WarpA<T, D, M, shape.a_resident> q_warp(q_tile + warp_row * D), dout_warp(dout_tile + warp_row * D);
  const HeadScores<T> scores(params, coord.head);
  const RowStats<T, M> stats(params, coord.head, row);
  float lse_log2[M][2];
  bool in_limit = true;
#pragma unroll
  for (int i = 0; i < 2 * M; i++) {
    const int r = row + 8 * i + threadIdx.x % 32 / 4;
    const int64_t padded = int64_t(coord.head) * params.padded_q_len + r;
    lse_log2[i / 2][i % 2] = kCanFuse<T> && r < q_len ? params.padded_lse_log2[padded] : 0.0f;
    in_limit = in_limit && below_limit<T>(lse_log2[i / 2][i % 2]);
  }
  const Exponent<T> exponent(params, in_limit);
#pragma unroll
  for (int i = 0; i < 2 * M; i++) lse_log2[i / 2][i % 2] = exponent.fused ? lse_log2[i / 2][i % 2] : 0.0f;
  float dq[M][D / 8][4] = {};
  for (int stage = 0, next; key < keys.end(); key = next, stage ^= 1) {
    next = keys.next(key);
    keys.wait_and_prefetch(next, stage ^ 1);
    if (keys.fully_masked(key, row, 16 * M)) continue;
    float p[M][N][4] = {}, ds[M][N][4];
    warp_gemm_nt(p, q_warp, keys.k_tile(stage));
    if constexpr (general) {
      for_each_accumulator<M, N>([&](int m, int n, int i, int, int) { ds[m][n][i] = 0.0f; });
      warp_gemm_nt(ds, dout_warp, keys.v_tile(stage));
      finish_ds(scores, stats, p, ds, row, key,
                [&](int m, int n, int i, float derivative) { ds[m][n][i] *= derivative; });
    } else {
      if (!exponent.fused)
        for_each_accumulator<M, N>([&](int m, int n, int i, int, int) {
          p[m][n][i] = __fmul_rn(p[m][n][i], params.scale) - stats.lse[m][i / 2];
        });
      apply_mask(params.visible, p, row, key, exponent.masked);
      for_each_accumulator<M, N>([&](int m, int n, int i, int, int) {
        p[m][n][i] = ptx::exp2_approx(fmaf(p[m][n][i], exponent.factor, -lse_log2[m][i / 2]));
        ds[m][n][i] = kCanFuse<T> ? stats.neg_delta[m][i / 2] : 0.0f;
      });
      warp_gemm_nt(ds, dout_warp, keys.v_tile(stage));
      for_each_accumulator<M, N>([&](int m, int n, int i, int, int) {
        ds[m][n][i] = p[m][n][i] * (kCanFuse<T> ? ds[m][n][i] : ds[m][n][i] + stats.neg_delta[m][i / 2]);
      });
    }
    warp_gemm_nn(dq, ds, keys.k_tile(stage));
  }
  store_rows(slice_head<T>(params.dq, coord.head), dq, row, q_len, [&](int, int) { return params.scale; });
}

// ---------------------------------------------------------------- launchers
template <class T, int D, Kind kind, bool with_dk, bool with_dv>
Error launch_dkdv(const Params& params, const AttentionArgs& a, const Stream& stream) {
  if (!(with_dk && params.dk.data) && !(with_dv && params.dv.data)) return nullptr;
  constexpr TileShape shape = kBwdShape<T, D, kind>;
  return launch_tiles<T>(attention_dkdv_kernel<T, D, kind, with_dk, with_dv>, params, a.batch * a.kv_heads,
                         a.sequences.k_len, a.sequences.q_len * a.group(), shape,
                         shared_bytes<T, D>(shape, 2, kRowStats<T>), stream);
}

template <class T, int D, Kind kind>
Error launch_dq(const Params& params, const AttentionArgs& a, const Stream& stream) {
  if (!params.dq.data) return nullptr;
  constexpr TileShape shape = kBwdShape<T, D, kind>;
  return launch_tiles<T>(attention_dq_kernel<T, D, kind>, params, params.total_heads, a.sequences.q_len,
                         a.sequences.k_len, shape, shared_bytes<T, D>(shape, 2), stream);
}

// dq, dk and dv, after launch_delta.
template <Kind kind>
Error launch_bwd(const Params& params, const AttentionArgs& a, const Stream& stream) {
  return by_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    return by_head_dim(std::max(a.head_dim, a.v_dim), [&](auto width) {
      constexpr int D = width;
      Error e;
      if constexpr (D < 256) {
        e = launch_dkdv<T, D, kind, true, true>(params, a, stream);
      } else {
        e = launch_dkdv<T, D, kind, true, false>(params, a, stream);
        if (!e) e = launch_dkdv<T, D, kind, false, true>(params, a, stream);
      }
      return e ? e : launch_dq<T, D, kind>(params, a, stream);
    });
  });
}

}  // namespace pygpt::cuda::attention
