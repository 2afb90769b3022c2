// The backward pass of calls that scale their scores and do nothing else to them, and the entry point of all.
#include "bwd.cuh"

namespace pygpt::cuda {
namespace attention {
namespace {

constexpr int kDeltaThreads = 256;

// kDeltaLanes lanes share a row; each reads 16 bytes at a time if out and dout are aligned.
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
  if (sees_one_key(params, row)) sum = 0.0f;  // as is its dout v^T
  const int64_t i = lse_offset(params, head) + row;
  const float lse = inside && params.lse[i] != -kInf ? params.lse[i] : kInf;
  const int64_t padded = int64_t(head) * params.padded_q_len + row;
  params.padded_lse[padded] = lse;
  params.padded_neg_delta[padded] = !inside ? 0.0f : params.dlse ? params.dlse[i] - sum : -sum;
  if constexpr (kCanFuse<T>)
    params.padded_lse_log2[padded] = lse == kInf ? lse : fmaf(lse, params.lse_to_log2[0], lse * params.lse_to_log2[1]);
}

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

}  // namespace

extern template Error launch_bwd<true>(const Params&, const AttentionArgs&, const Stream&);  // bwd_general.cu
Error launch_bias(const Params& params, const AttentionArgs& a, const Stream& stream);       // bias.cu
}  // namespace attention

Error attention_bwd(const AttentionArgs& a, const Stream& stream) {
  using namespace attention;
  if (const Error e = objection(a)) return e;
  return by_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    Params params = make_params<T>(a);
    params.out = make_tensor<T>(a.out, a.heads, a.v_dim, 16 / sizeof(T));  // backward reads out, 16 bytes at a time
    const bool general = !a.scores.scale_only();
    Error e = general ? prepare_scores(params, a, stream) : nullptr;
    if (!e)
      e = by_head_dim(std::max(a.head_dim, a.v_dim),
                      [&](auto width) { return launch_delta<T, width>(params, stream); });
    if (!e) e = general ? launch_bwd<true>(params, a, stream) : launch_bwd<false>(params, a, stream);
    return e ? e : launch_bias(params, a, stream);
  });
}

}  // namespace pygpt::cuda
