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
// A row with one key shall give p = 1, however large its score. With x = q . k and c = scale log2(e), p is
//   2^(x c - lse2)                     one fused multiply-add a score; lse2 = lse log2(e), once a row
//   2^((x scale - lse) log2(e))        three operations; x scale is rounded, as forward did when it formed lse
// In the first form the exponent of the largest score is what lse and lse2 lost, together at most |lse2| 2^-23: below
// kExponentLimit (attention.cuh) p is 1 +- eps/5, which rounds to 1. (c is rounded, too: lse2 is lse times c / scale,
// so that both are off by the same factor.) A step with a row beyond the limit takes the second form, so does all of
// float, whose p is not rounded. So does a step with an infinite or NaN lse: what is masked has p = 0 even there.
//
// Registers as ptxas 13.0 counts them for sm_80 / sm_90a, nothing spilled; blocks per multiprocessor of A100 / H100:
//     D          16-bit: rows x step  registers  shared  blocks      float: rows x step  registers  shared  blocks
//     64  dkdv         128 x 32       245/249    48 KB   2 / 2              64 x 32      196/206    64 KB   2 / 2
//    128  dkdv          64 x 32       248/254    64 KB   2 / 2              64 x 16      254/254    96 KB   1 / 2
//    256  dk            64 x 16       223/230    96 KB   1 / 2              32 x 8       255/255    96 KB   1 / 2
//    256  dv            64 x 16       223/223    96 KB   1 / 2              32 x 8       255/255    96 KB   1 / 2
//     64  dq           128 x 32       216/216    48 KB   2 / 2              64 x 32      168/168    64 KB   2 / 3
//    128  dq            64 x 32       176/179    64 KB   2 / 2              64 x 16      168/163    96 KB   1 / 2
//    256  dq            64 x 16       231/234    96 KB   1 / 2              32 x 8       255/255    96 KB   1 / 2
#include "attention.cuh"
#include "vector.cuh"

namespace pygpt::cuda {
namespace attention {
namespace {

// Of dkdv and dq alike: either keeps two tiles and walks two, and registers hold their sums beside p and ds.
constexpr Shape kShapes[2][3] = {{{4, 2, 32, false}, {4, 1, 32, false}, {4, 1, 16, false}},
                                 {{4, 1, 32, false}, {4, 1, 16, false}, {2, 1, 8, false}}};
template <class T, int D>
constexpr Shape kBackward = pick<T, D>(kShapes);

constexpr int kRowPadding = 32;  // a multiple of every step
constexpr int kDeltaThreads = 256;

template <class T>
constexpr bool kCanFuse = kExponentLimit<T> > 0.0f;

// ---------------------------------------------------------------- delta
// row_lse, infinite where p shall be 0: in rows past the end and without keys; row_minus_delta; row_lse2, not of float.
// LANES lanes share a row, of which each reads 16 bytes at a time where out and dout are aligned.
template <class T, int D>
constexpr int kDeltaLanes = std::min(32, D / kVector<T>);

template <class T, int D>
__global__ void __launch_bounds__(kDeltaThreads) attention_delta_kernel(const Problem x) {
  constexpr int LANES = kDeltaLanes<T, D>, ROWS = kDeltaThreads / LANES;
  const int blocks = x.padded_q_len / ROWS, owner = blockIdx.x / blocks, lane = threadIdx.x % LANES;
  const int row = blockIdx.x % blocks * ROWS + threadIdx.x / LANES;
  const bool inside = row < x.q_len;
  const auto out = head<const T>(x, x.out, owner), dout = head<const T>(x, x.dout, owner);
  const T *left = out.data + row * out.row, *right = dout.data + row * dout.row;
  float sum = 0.0f;
  if (out.wide && dout.wide) {
#pragma unroll
    for (int c = lane * kVector<T>; c < D; c += LANES * kVector<T>)
      if (inside && c < out.width) {
        float a[kVector<T>], b[kVector<T>];
        load(left + c, a), load(right + c, b);
#pragma unroll
        for (int i = 0; i < kVector<T>; i++) sum = fmaf(a[i], b[i], sum);
      }
  } else {
    for (int c = lane; inside && c < out.width; c += LANES)
      sum = fmaf(to_float(left[c * out.channel]), to_float(right[c * dout.channel]), sum);
  }
  sum = warp_sum<LANES>(sum);
  if (lane > 0) return;
  const int64_t at = int64_t(owner) * x.q_len + row;
  const float lse = inside && x.lse[at] != -kInf ? x.lse[at] : kInf;
  const int64_t n = int64_t(owner) * x.padded_q_len + row;
  x.row_lse[n] = lse;
  x.row_minus_delta[n] = !inside ? 0.0f : x.dlse ? x.dlse[at] - sum : -sum;
  if constexpr (kCanFuse<T>)
    x.row_lse2[n] = lse == kInf ? lse : fmaf(lse, x.lse_to_log2[0], lse * x.lse_to_log2[1]);
}

template <class T>
__device__ __forceinline__ bool within_limit(float lse2) {
  return fabsf(lse2) < kExponentLimit<T>;
}

// The form that a warp's p takes, one multiply-add if all rows are within the limit, and what differs with it.
template <class T>
struct Exponent {
  bool fused;
  float factor, masked;  // p = 2^(factor x' - (fused ? lse2 : 0)); x' of what is masked
  __device__ __forceinline__ Exponent(const Problem& x, bool within)
      : fused(kCanFuse<T> && __all_sync(0xffffffffu, within)),
        factor(fused ? x.scale_log2 : kLog2e),
        masked(copysignf(kInf, fused ? -x.scale_log2 : -1.0f)) {}
};

// ---------------------------------------------------------------- dk, dv
// Of a row in shared memory: lse, -delta, lse2, and 0 for steps that don't subtract lse2.
template <class T>
constexpr int kStageValues = kCanFuse<T> ? 4 : 2;

template <class T, int D, bool with_dk, bool with_dv>
__global__ void __launch_bounds__(kBackward<T, D>.threads(), kBackward<T, D>.blocks())
    attention_dkdv_kernel(const Problem x) {
  constexpr Shape shape = kBackward<T, D>;
  constexpr int KEYS = shape.rows(), ROWS = shape.step, THREADS = shape.threads(), M = shape.patches, N = ROWS / 8;
  PYGPT_DYNAMIC_SHARED(shared);
  T* const k_tile = reinterpret_cast<T*>(shared);
  T* const v_tile = k_tile + KEYS * D;
  T* const stages = v_tile + KEYS * D;
  float* const stage_values = reinterpret_cast<float*>(stages + 4 * ROWS * D);

  const Place here = place(x);
  const auto q = head<const T>(x, x.q, here.head), k = head<const T>(x, x.k, here.head);
  const auto v = head<const T>(x, x.v, here.head), dout = head<const T>(x, x.dout, here.head);
  const int key0 = here.tile * KEYS;  // the longest walks first
  const int warp_key = threadIdx.x / 32 * (16 * M), key = key0 + warp_key;
  const int begin = x.is_causal ? key0 / ROWS * ROWS : 0;  // of the rows that see some of these keys
  auto q_tile = [&](int row) { return stages + row / ROWS % 2 * (2 * ROWS * D); };
  auto values = [&](int row) { return stage_values + row / ROWS % 2 * (kStageValues<T> * ROWS); };
  auto load = [&](int row) {
    load_tile<ROWS, D, THREADS>(q_tile(row), q, row, x.q_len);
    load_tile<ROWS, D, THREADS>(q_tile(row) + ROWS * D, dout, row, x.q_len);
    if (const int i = threadIdx.x; i < (kCanFuse<T> ? 3 : 2) * ROWS / 4) {
      const float* from = i < ROWS / 4 ? x.row_lse : i < ROWS / 2 ? x.row_minus_delta : x.row_lse2;
      const int64_t at = int64_t(here.head) * x.padded_q_len + row + i % (ROWS / 4) * 4;
      ptx::cp_async_16(values(row) + 4 * i, from + at, true);
    }
  };

  load_tile<KEYS, D, THREADS>(k_tile, k, key0, x.k_len);
  load_tile<KEYS, D, THREADS>(v_tile, v, key0, x.k_len);
  if (begin < x.q_len) load(begin);
  if (const int i = threadIdx.x; kCanFuse<T> && i < 2 * ROWS) values(i / ROWS * ROWS)[3 * ROWS + i % ROWS] = 0.0f;
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

    const float *lse = values(row), *minus_delta = lse + ROWS, *lse2 = lse + 2 * ROWS;
    const Exponent<T> exponent(x, kCanFuse<T> && within_limit<T>(lse2[threadIdx.x % ROWS]));
    const float* subtracted = exponent.fused ? lse2 : lse2 + ROWS;
    float p[M][N][4] = {};
    multiply_rows(p, k_rows, q_tile(row));
    if (!exponent.fused)
      for_each<M, N>([&](int m, int n, int i, int, int column) {
        p[m][n][i] = __fmul_rn(p[m][n][i], x.scale) - lse[column];
      });
    if (row + ROWS > x.q_len || (x.is_causal && row < key + 16 * M - 1)) {
      const int rows = x.q_len - row, diagonal = x.is_causal ? row - key : KEYS;
      for_each<M, N>([&](int m, int n, int i, int k, int column) {
        if (column >= rows || k > column + diagonal) p[m][n][i] = exponent.masked;
      });
    }
    for_each<M, N>([&](int m, int n, int i, int, int column) {
      p[m][n][i] = ptx::exp2_approx(fmaf(p[m][n][i], exponent.factor, kCanFuse<T> ? -subtracted[column] : 0.0f));
    });
    if constexpr (with_dv) multiply_columns(dv, p, q_tile(row) + ROWS * D);
    if constexpr (with_dk) {
      float ds[M][N][4];
      for_each<M, N>([&](int m, int n, int i, int, int column) {
        ds[m][n][i] = kCanFuse<T> ? minus_delta[column] : 0.0f;
      });
      multiply_rows(ds, v_rows, q_tile(row) + ROWS * D);
      for_each<M, N>([&](int m, int n, int i, int, int column) {
        ds[m][n][i] = p[m][n][i] * (kCanFuse<T> ? ds[m][n][i] : ds[m][n][i] + minus_delta[column]);
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
  float lse[M][2], minus_delta[M][2], lse2[M][2];
  bool within = true;
#pragma unroll
  for (int i = 0; i < 2 * M; i++) {
    const int at = row + 8 * i + threadIdx.x % 32 / 4;
    const int64_t n = int64_t(here.head) * x.padded_q_len + at;
    lse[i / 2][i % 2] = at < x.q_len ? x.row_lse[n] : kInf;
    minus_delta[i / 2][i % 2] = at < x.q_len ? x.row_minus_delta[n] : 0.0f;
    lse2[i / 2][i % 2] = kCanFuse<T> && at < x.q_len ? x.row_lse2[n] : 0.0f;
    within = within && within_limit<T>(lse2[i / 2][i % 2]);
  }
  const Exponent<T> exponent(x, within);
#pragma unroll
  for (int i = 0; i < 2 * M; i++) lse2[i / 2][i % 2] = exponent.fused ? lse2[i / 2][i % 2] : 0.0f;
  float dq[M][D / 8][4] = {};
  for (int key = 0; key < keys.end(); key += KEYS) {
    keys.arrive(key);
    if (keys.unseen(key, row, 16 * M)) continue;
    float p[M][N][4] = {}, ds[M][N][4];
    multiply_rows(p, q_rows, keys.k_tile(key));
    if (!exponent.fused)
      for_each<M, N>([&](int m, int n, int i, int, int) {
        p[m][n][i] = __fmul_rn(p[m][n][i], x.scale) - lse[m][i / 2];
      });
    keys.mask(p, key, row, exponent.masked);
    for_each<M, N>([&](int m, int n, int i, int, int) {
      p[m][n][i] = ptx::exp2_approx(fmaf(p[m][n][i], exponent.factor, -lse2[m][i / 2]));
      ds[m][n][i] = kCanFuse<T> ? minus_delta[m][i / 2] : 0.0f;
    });
    multiply_rows(ds, dout_rows, keys.v_tile(key));
    for_each<M, N>([&](int m, int n, int i, int, int) {
      ds[m][n][i] = p[m][n][i] * (kCanFuse<T> ? ds[m][n][i] : ds[m][n][i] + minus_delta[m][i / 2]);
    });
    multiply_columns(dq, ds, keys.k_tile(key));
  }
  store_rows(head<T>(x, x.dq, here.head), dq, row, x.q_len, [&](int, int) { return x.scale; });
}

// ---------------------------------------------------------------- launchers
template <class T, int D>
Error launch_delta(Problem& x, const Stream& stream) {
  x.padded_q_len = static_cast<int>(ceil_div(x.q_len, kRowPadding) * kRowPadding);
  const int64_t rows = int64_t(x.heads) * x.padded_q_len;
  if (rows == 0) return nullptr;
  x.row_lse = static_cast<float*>(stream.scratch((kCanFuse<T> ? 3 : 2) * rows * sizeof(float)));
  x.row_minus_delta = x.row_lse + rows, x.row_lse2 = x.row_minus_delta + rows;
  const int64_t tiles = rows / (kDeltaThreads / kDeltaLanes<T, D>);
  return launch(attention_delta_kernel<T, D>, blocks(tiles), dim3(kDeltaThreads), 0, stream, x);
}

template <class T, int D, bool with_dk, bool with_dv>
Error launch_dkdv(const Problem& x, const Stream& stream) {
  if (!(with_dk && x.dk.data) && !(with_dv && x.dv.data)) return nullptr;
  constexpr int shared = shared_bytes<T, D>(kBackward<T, D>, 2, kStageValues<T>);
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
    x.out = operand<T>(a.out, a.v_dim, 16 / sizeof(T));  // here it is read
    return by_width(std::max(a.head_dim, a.v_dim), [&](auto width) {
      constexpr int D = width;
      Error e = launch_delta<T, D>(x, stream);
      if (e) return e;
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
