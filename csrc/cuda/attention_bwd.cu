// softmax(scale q k^T) v, backward. q, dq (L, E), k, dk (S, E), v, dv (S, Ev), out, dout (L, Ev) per head.
//
//   p = exp(scale q k^T - lse)         delta_i = out_i . dout_i - dlse_i
//   ds = p (dout v^T - delta)          dv = p^T dout    dk = scale ds^T q    dq = scale ds k
//
// attention_delta_kernel first finds delta. attention_dkdv_kernel then keeps a tile of keys and walks the queries
// that see them; it forms the transposes p^T = exp(scale k q^T - lse) and ds^T, which so come to lie as the left
// operands of dv and dk. attention_dq_kernel keeps a tile of queries and walks their keys. Every sum has one owner
// and one order: seven products where five would do with atomics, but the same bits in every run. Where registers
// cannot hold the sums of both dk and dv (D = 256), the queries are walked once for each.
//
// scale q k^T is rounded before lse is subtracted, as forward did when it formed lse: a row with one key gives
// p = 1 exactly, however large the score.
//
// Registers as ptxas 13.0 counts them for sm_80 / sm_90a, nothing spilled; blocks per multiprocessor of A100 / H100:
//     D          16-bit: rows x step  registers  shared  blocks      float: rows x step  registers  shared  blocks
//     64  dkdv         128 x 32       252/254    48 KB   2 / 2              64 x 32      196/206    64 KB   2 / 2
//    128  dkdv          64 x 32       248/255    64 KB   2 / 2              64 x 16      254/254    96 KB   1 / 2
//    256  dk            64 x 16       240/244    96 KB   1 / 2              32 x 8       255/255    96 KB   1 / 2
//    256  dv            64 x 16       223/223    96 KB   1 / 2              32 x 8       255/255    96 KB   1 / 2
//     64  dq           128 x 32       214/224    48 KB   2 / 2              64 x 32      168/168    64 KB   2 / 3
//    128  dq            64 x 32       185/186    64 KB   2 / 2              64 x 16      168/163    96 KB   1 / 2
//    256  dq            64 x 16       227/232    96 KB   1 / 2              32 x 8       255/255    96 KB   1 / 2
#include "attention.cuh"

namespace pygpt::cuda {
namespace attention {
namespace {

// Of dkdv and dq alike: either keeps two tiles and walks two, and registers hold their sums beside p and ds.
constexpr Shape kShapes[2][3] = {{{4, 2, 32, false}, {4, 1, 32, false}, {4, 1, 16, false}},
                                 {{4, 1, 32, false}, {4, 1, 16, false}, {2, 1, 8, false}}};
template <class T, int D>
constexpr Shape kBackward = pick<T, D>(kShapes);

constexpr int kRowPadding = 32;  // a multiple of every step
constexpr int kDeltaRows = 8;    // rows, and warps, of a block of attention_delta_kernel

// ---------------------------------------------------------------- delta
// row_delta and row_lse of all rows, one warp a row; those past the end, and without keys, get p = 0.
template <class T>
__global__ void __launch_bounds__(32 * kDeltaRows) attention_delta_kernel(const Problem x) {
  const int64_t n = int64_t(blockIdx.x) * kDeltaRows + threadIdx.x / 32, owner = n / x.padded_q_len;
  const int64_t row = n % x.padded_q_len, at = owner * x.q_len + row;
  const int lane = threadIdx.x % 32;
  const bool inside = row < x.q_len;
  const auto out = head<const T>(x, x.out, owner), dout = head<const T>(x, x.dout, owner);
  float sum = 0.0f;
  for (int c = lane; inside && c < out.width; c += 32) {
    const T left = out.data[row * out.row + c * out.channel], right = dout.data[row * dout.row + c * dout.channel];
    sum = fmaf(to_float(left), to_float(right), sum);
  }
  sum = warp_sum(sum);
  if (lane > 0) return;
  const float lse = inside ? x.lse[at] : kInf;
  x.row_lse[n] = lse == -kInf ? kInf : lse;
  x.row_delta[n] = !inside ? 0.0f : x.dlse ? sum - x.dlse[at] : sum;
}

__device__ __forceinline__ float probability(float score, float scale, float lse) {
  return ptx::exp2_approx((__fmul_rn(score, scale) - lse) * kLog2e);
}

// ---------------------------------------------------------------- dk, dv
template <class T, int D, bool with_dk, bool with_dv>
__global__ void __launch_bounds__(kBackward<T, D>.threads(), kBackward<T, D>.blocks())
    attention_dkdv_kernel(const Problem x) {
  constexpr Shape shape = kBackward<T, D>;
  constexpr int KEYS = shape.rows(), ROWS = shape.step, THREADS = shape.threads(), M = shape.patches, N = ROWS / 8;
  PYGPT_DYNAMIC_SHARED(shared);
  T* const k_tile = reinterpret_cast<T*>(shared);
  T* const v_tile = k_tile + KEYS * D;
  T* const stages = v_tile + KEYS * D;
  float* const row_values = reinterpret_cast<float*>(stages + 4 * ROWS * D);

  const Place here = place(x);
  const auto q = head<const T>(x, x.q, here.head), k = head<const T>(x, x.k, here.head);
  const auto v = head<const T>(x, x.v, here.head), dout = head<const T>(x, x.dout, here.head);
  const int key0 = here.tile * KEYS;  // the longest walks first
  const int warp_key = threadIdx.x / 32 * (16 * M), key = key0 + warp_key;
  const int begin = x.is_causal ? key0 / ROWS * ROWS : 0;  // of the rows that see some of these keys
  auto q_tile = [&](int row) { return stages + row / ROWS % 2 * (2 * ROWS * D); };
  auto values = [&](int row) { return row_values + row / ROWS % 2 * (2 * ROWS); };  // lse, then delta
  auto load = [&](int row) {
    load_tile<ROWS, D, THREADS>(q_tile(row), q, row, x.q_len);
    load_tile<ROWS, D, THREADS>(q_tile(row) + ROWS * D, dout, row, x.q_len);
    if (const int i = threadIdx.x; i < ROWS / 2) {
      const int64_t at = int64_t(here.head) * x.padded_q_len + row + i % (ROWS / 4) * 4;
      ptx::cp_async_16(values(row) + 4 * i, (i < ROWS / 4 ? x.row_lse : x.row_delta) + at, true);
    }
  };

  load_tile<KEYS, D, THREADS>(k_tile, k, key0, x.k_len);
  load_tile<KEYS, D, THREADS>(v_tile, v, key0, x.k_len);
  if (begin < x.q_len) load(begin);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  Left<T, D, M, shape.held> k_rows(k_tile + warp_key * D), v_rows(v_tile + warp_key * D);
  float dk[M][with_dk ? D / 8 : 1][4] = {}, dv[M][with_dv ? D / 8 : 1][4] = {};

  for (int row = begin; row < x.q_len; row += ROWS) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is there, and everyone has left the other
    if (row + ROWS < x.q_len) load(row + ROWS);
    ptx::cp_async_commit();
    if (x.is_causal && row + ROWS <= key) continue;  // none of these rows sees the warp's keys

    const float *lse = values(row), *delta = lse + ROWS;
    float p[M][N][4] = {};
    multiply_rows(p, k_rows, q_tile(row));
    for_each<M, N>([&](int m, int n, int i, int, int column) {
      p[m][n][i] = probability(p[m][n][i], x.scale, lse[column]);
    });
    if (row + ROWS > x.q_len || (x.is_causal && row < key + 16 * M - 1)) {
      const int rows = x.q_len - row, diagonal = x.is_causal ? row - key : KEYS;
      for_each<M, N>([&](int m, int n, int i, int k, int column) {
        if (column >= rows || k > column + diagonal) p[m][n][i] = 0.0f;
      });
    }
    if constexpr (with_dv) multiply_columns(dv, p, q_tile(row) + ROWS * D);
    if constexpr (with_dk) {
      float ds[M][N][4] = {};
      multiply_rows(ds, v_rows, q_tile(row) + ROWS * D);
      for_each<M, N>([&](int m, int n, int i, int, int column) {
        ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - delta[column]);
      });
      multiply_columns(dk, ds, q_tile(row));
    }
  }

  if constexpr (with_dk)
    if (x.dk.data)
      store_rows(head<T>(x, x.dk, here.head), dk, key, x.k_len, [&](int, int) { return x.scale; });
  if constexpr (with_dv)
    if (x.dv.data)
      store_rows(head<T>(x, x.dv, here.head), dv, key, x.k_len, [](int, int) { return 1.0f; });
}

// ---------------------------------------------------------------- dq
template <class T, int D>
__global__ void __launch_bounds__(kBackward<T, D>.threads(), kBackward<T, D>.blocks())
    attention_dq_kernel(const Problem x) {
  constexpr Shape shape = kBackward<T, D>;
  constexpr int ROWS = shape.rows(), KEYS = shape.step, THREADS = shape.threads(), M = shape.patches, N = KEYS / 8;
  PYGPT_DYNAMIC_SHARED(shared);
  T* const q_tile = reinterpret_cast<T*>(shared);
  T* const dout_tile = q_tile + ROWS * D;

  const Place here = place(x);
  const int row0 = (int(ceil_div(x.q_len, ROWS)) - 1 - here.tile) * ROWS;  // the longest rows first
  const int warp_row = threadIdx.x / 32 * (16 * M), row = row0 + warp_row;
  const KeyWalk<T, D, ROWS, KEYS, THREADS> keys{dout_tile + ROWS * D, x.k_len, row0, x.is_causal,
                                                head<const T>(x, x.k, here.head), head<const T>(x, x.v, here.head)};
  load_tile<ROWS, D, THREADS>(q_tile, head<const T>(x, x.q, here.head), row0, x.q_len);
  load_tile<ROWS, D, THREADS>(dout_tile, head<const T>(x, x.dout, here.head), row0, x.q_len);
  keys.load(0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();

  Left<T, D, M, shape.held> q_rows(q_tile + warp_row * D), dout_rows(dout_tile + warp_row * D);
  float lse[M][2], delta[M][2];
#pragma unroll
  for (int i = 0; i < 2 * M; i++) {
    const int at = row + 8 * i + threadIdx.x % 32 / 4;
    const int64_t n = int64_t(here.head) * x.padded_q_len + at;
    lse[i / 2][i % 2] = at < x.q_len ? x.row_lse[n] : kInf, delta[i / 2][i % 2] = at < x.q_len ? x.row_delta[n] : 0.0f;
  }
  float dq[M][D / 8][4] = {};
  for (int key = 0; key < keys.end(); key += KEYS) {
    keys.arrive(key);
    if (keys.unseen(key, row, 16 * M)) continue;
    float p[M][N][4] = {}, ds[M][N][4] = {};
    multiply_rows(p, q_rows, keys.k_tile(key));
    for_each<M, N>([&](int m, int n, int i, int, int) {
      p[m][n][i] = probability(p[m][n][i], x.scale, lse[m][i / 2]);
    });
    keys.mask(p, key, row, 0.0f);
    multiply_rows(ds, dout_rows, keys.v_tile(key));
    for_each<M, N>([&](int m, int n, int i, int, int) { ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - delta[m][i / 2]); });
    multiply_columns(dq, ds, keys.k_tile(key));
  }
  store_rows(head<T>(x, x.dq, here.head), dq, row, x.q_len, [&](int, int) { return x.scale; });
}

// ---------------------------------------------------------------- launchers
template <class T>
Error launch_delta(Problem& x, const Stream& stream) {
  x.padded_q_len = static_cast<int>(ceil_div(x.q_len, kRowPadding) * kRowPadding);
  const int64_t rows = int64_t(x.heads) * x.padded_q_len;
  if (rows == 0) return nullptr;
  x.row_lse = static_cast<float*>(stream.scratch(2 * rows * sizeof(float)));
  x.row_delta = x.row_lse + rows;
  return launch(attention_delta_kernel<T>, blocks(rows / kDeltaRows), dim3(32 * kDeltaRows), 0, stream, x);
}

template <class T, int D, bool with_dk, bool with_dv>
Error launch_dkdv(const Problem& x, const Stream& stream) {
  if (!(with_dk && x.dk.data) && !(with_dv && x.dv.data)) return nullptr;
  constexpr int shared = shared_bytes<T, D>(kBackward<T, D>, 2, 2);
  const auto kernel = attention_dkdv_kernel<T, D, with_dk, with_dv>;
  return launch_tiles<T>(kernel, x, x.k_len, x.q_len, kBackward<T, D>, shared, stream);
}

template <class T, int D>
Error launch_dq(const Problem& x, const Stream& stream) {
  if (!x.dq.data) return nullptr;
  constexpr int shared = shared_bytes<T, D>(kBackward<T, D>, 2);
  return launch_tiles<T>(attention_dq_kernel<T, D>, x, x.q_len, x.k_len, kBackward<T, D>, shared, stream);
}

}  // namespace
}  // namespace attention

Error attention_bwd(const AttentionArgs& a, const Stream& stream) {
  using namespace attention;
  return by_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    Problem x = problem<T>(a);
    if (Error e = launch_delta<T>(x, stream)) return e;
    return by_width(std::max(a.head_dim, a.v_dim), [&](auto width) {
      constexpr int D = width;
      Error e = nullptr;
      if constexpr (D < 256) {
        e = launch_dkdv<T, D, true, true>(x, stream);
      } else {
        e = launch_dkdv<T, D, true, false>(x, stream);
        if (!e) e = launch_dkdv<T, D, false, true>(x, stream);
      }
      return e ? e : launch_dq<T, D>(x, stream);
    });
  });
}

}  // namespace pygpt::cuda
