// softmax(scale q k^T) v without the (L, S) matrix in memory: FlashAttention-2 (Dao 2023), forward.
//
//   s_ij = scale q_i . k_j    out_i = sum_j p_ij v_j / l_i    q (L, E), k (S, E), v (S, Ev), out (L, Ev) per head
//   p_ij = exp(s_ij - m_i)    l_i = sum_j p_ij                lse_i = m_i + log l_i, kept for backward
//
// A block serves a tile of query rows of one head, a warp 16 or 32 of them. m_i is the largest score so far;
// where it grows, out_i and l_i shrink by exp(m - m'). Causal: row i sees keys 0..i; tiles of keys beyond the
// diagonal are not visited, and only those on it or across the end of the keys are masked.
//
// The exponent of 2 is computed from x = q . k, the row's largest x so far (x_max), and c = scale log2(e) > 0; the sign
// of scale is moved into q. What a row subtracts is one number, so it cancels between p and l, and it may be rounded:
//   p = 2^(x c - base), base = x_max c rounded             one fused multiply-add a score
// For the largest score the exponent is then what base lost, at most |base| 2^-24, and not 0. While |base| stays below
// kExponentLimit, eps 2^21 for a type of precision eps, this p is 1 +- eps/11, which rounds to 1. Beyond the limit p is
//   p = 2^((x - x_max) c)                                  two operations, and exactly 1 for the largest
// A warp takes the second form for a step in which any of its rows is beyond the limit, or was before the step: it
// subtracts x_max first. Rows within the limit then subtract base - x_max c as well, minus their `residual`, so that
// either form gives the same p up to a rounding. float always takes the second form: its p is not rounded, and it
// spends its time on products.
//
// Each score costs 2 (E + Ev) FLOP, k and v are read once per block. Registers as ptxas 13.0 counts them for
// sm_80 / sm_90a, nothing spilled; blocks per multiprocessor of A100 / H100:
//     D    16-bit: rows x keys  registers  shared  blocks      float: rows x keys  registers  shared  blocks
//     64         128 x 64       239/239    48 KB   2 / 2             128 x 32      226/228    64 KB   2 / 2
//    128         128 x 32       249/250    64 KB   2 / 2              64 x 16      151/159    64 KB   2 / 3
//    256          64 x 32       240/244    96 KB   1 / 2              32 x 8       255/254    64 KB   2 / 3
#include "attention.cuh"

namespace pygpt::cuda {
namespace attention {
namespace {

constexpr Shape kShapes[2][3] = {{{4, 2, 64, true}, {4, 2, 32, false}, {4, 1, 32, false}},
                                 {{4, 2, 32, false}, {4, 1, 16, false}, {2, 1, 8, false}}};
template <class T, int D>
constexpr Shape kShape = pick<T, D>(kShapes);

// Maximum, at least -FLT_MAX, and sum of p of the warp's rows so far; sum: of this lane's columns only.
template <class T, int M>
struct Softmax {
  float scale_log2, top[M][2], sum[M][2];
  bool was_within = true;  // before this step, every row of the warp was within kExponentLimit

  __device__ __forceinline__ explicit Softmax(float scale_log2) : scale_log2(scale_log2) {
#pragma unroll
    for (int i = 0; i < 2 * M; i++) top[i / 2][i % 2] = -FLT_MAX, sum[i / 2][i % 2] = 0.0f;
  }

  __device__ __forceinline__ float base(float largest) const { return __fmul_rn(largest, scale_log2); }

  // What base has lost by rounding; 0 beyond the limit.
  __device__ __forceinline__ float residual(float largest) const {
    return fabsf(base(largest)) < kExponentLimit<T> ? fmaf(largest, scale_log2, -base(largest)) : 0.0f;
  }

  // Turns q . k into p, and shrinks out where a maximum grows.
  template <int N, int C>
  __device__ __forceinline__ void update(float (&s)[M][N][4], float (&out)[M][C][4]) {
    float largest[M][2], subtracted[M][2], shrink[M][2];
    bool within = kExponentLimit<T> > 0.0f;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float x_max = top[m][r];
#pragma unroll
        for (int n = 0; n < N; n++) x_max = fmaxf(x_max, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
        largest[m][r] = x_max = warp_max<4>(x_max);
        subtracted[m][r] = base(x_max), shrink[m][r] = base(top[m][r]) - base(x_max);
        within = within && fabsf(base(x_max)) < kExponentLimit<T>;
      }
    if constexpr (kExponentLimit<T> > 0.0f) within = __all_sync(0xffffffffu, within);

    if (!(within && was_within))
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const float x_max = largest[m][r], rest = residual(x_max);
#pragma unroll
          for (int n = 0; n < N; n++) s[m][n][2 * r] -= x_max, s[m][n][2 * r + 1] -= x_max;
          subtracted[m][r] = -rest;
          shrink[m][r] = fmaf(top[m][r] - x_max, scale_log2, rest - residual(top[m][r]));
        }
    was_within = within;

#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float factor = ptx::exp2_approx(shrink[m][r]);
        float here = 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int c = 0; c < 2; c++) {
            float& p = s[m][n][2 * r + c];
            p = ptx::exp2_approx(fmaf(p, scale_log2, -subtracted[m][r]));
            here += p;
          }
        top[m][r] = largest[m][r], sum[m][r] = sum[m][r] * factor + here;
#pragma unroll
        for (int n = 0; n < C; n++) out[m][n][2 * r] *= factor, out[m][n][2 * r + 1] *= factor;
      }
  }

  // log of the sum of exp(scores) of a row, whose p add up to total.
  __device__ __forceinline__ float lse(int m, int r, float scale, float total) const {
    return __fmul_rn(top[m][r], scale) + (logf(total) - residual(top[m][r]) * kLn2);
  }
};

template <class T, int ELEMENTS, int THREADS>
__device__ __forceinline__ void multiply_tile(T* tile, float factor) {
  for (int i = threadIdx.x; i < ELEMENTS; i += THREADS) tile[i] = from_float<T>(to_float(tile[i]) * factor);
}

template <class T, int D>
__global__ void __launch_bounds__(kShape<T, D>.threads(), kShape<T, D>.blocks()) attention_fwd_kernel(const Problem x) {
  constexpr Shape shape = kShape<T, D>;
  constexpr int ROWS = shape.rows(), KEYS = shape.step, THREADS = shape.threads(), M = shape.patches;
  PYGPT_DYNAMIC_SHARED(shared);
  T* const q_tile = reinterpret_cast<T*>(shared);

  const Place here = place(x);
  const int row0 = (int(ceil_div(x.q_len, ROWS)) - 1 - here.tile) * ROWS;  // the longest rows first
  const int warp_row = threadIdx.x / 32 * (16 * M), row = row0 + warp_row;
  const KeyWalk<T, D, ROWS, KEYS, THREADS> keys{q_tile + ROWS * D, x.k_len, row0, x.is_causal,
                                                head<const T>(x, x.k, here.head), head<const T>(x, x.v, here.head)};
  load_tile<ROWS, D, THREADS>(q_tile, head<const T>(x, x.q, here.head), row0, x.q_len);
  keys.load(0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  const float scale = x.scale == 0.0f ? 1.0f : fabsf(x.scale);
  if (scale != x.scale) {
    multiply_tile<T, ROWS * D, THREADS>(q_tile, x.scale == 0.0f ? 0.0f : -1.0f);
    __syncthreads();
  }

  Left<T, D, M, shape.held> rows(q_tile + warp_row * D);
  Softmax<T, M> softmax(scale * kLog2e);
  float out[M][D / 8][4] = {};
  for (int key = 0; key < keys.end(); key += KEYS) {
    keys.arrive(key);
    if (keys.unseen(key, row, 16 * M)) continue;
    float s[M][KEYS / 8][4] = {};
    multiply_rows(s, rows, keys.k_tile(key));
    keys.mask(s, key, row, -kInf);
    softmax.update(s, out);
    multiply_columns(out, s, keys.v_tile(key));
  }

  float total[M][2];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float l = total[m][r] = warp_sum<4>(softmax.sum[m][r]);
      const int i = row + 16 * m + 8 * r + threadIdx.x % 32 / 4;
      if (threadIdx.x % 4 == 0 && i < x.q_len)
        x.lse[int64_t(here.head) * x.q_len + i] = l == 0.0f ? -kInf : softmax.lse(m, r, scale, l);
    }
  store_rows(head<T>(x, x.out, here.head), out, row, x.q_len,
             [&](int m, int r) { return total[m][r] == 0.0f ? 0.0f : 1.0f / total[m][r]; });
}

}  // namespace
}  // namespace attention

Error attention_fwd(const AttentionArgs& a, const Stream& stream) {
  using namespace attention;
  return by_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    return by_width(std::max(a.head_dim, a.v_dim), [&](auto width) {
      constexpr int D = width;
      constexpr int shared = shared_bytes<T, D>(kShape<T, D>, 1);
      return launch_tiles<T>(attention_fwd_kernel<T, D>, problem<T>(a), a.q_len, a.k_len, kShape<T, D>, shared, stream);
    });
  });
}

}  // namespace pygpt::cuda
