// The backward pass of dense calls that scale their scores and do nothing else to them, and the entry point of all.
#include "bwd.cuh"

namespace pygpt::cuda {
namespace attention {
namespace {

constexpr int kDeltaThreads = 256;

// kDeltaLanes lanes share a row; each reads 16 bytes at a time if out and dout are aligned.
template <class T, int D>
constexpr int kDeltaLanes = std::min(32, D / kVector<T>);

template <class T, int D, Kind kind>
__global__ void __launch_bounds__(kDeltaThreads) attention_delta_kernel(const Params call) {
  constexpr int LANES = kDeltaLanes<T, D>, ROWS = kDeltaThreads / LANES;
  const int blocks = kind == Kind::packed ? gridDim.x / call.total_heads : call.padded_q_len / ROWS;
  const int head = blockIdx.x / blocks, lane = threadIdx.x % LANES;
  const Params& params = of_sequence<T, kind>(call, head / call.q.heads);
  const int row = blockIdx.x % blocks * ROWS + threadIdx.x / LANES;
  if (kind == Kind::packed && (row & -kRowPadding) >= params.visible.q_len) return;
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

template <class T, int D, Kind kind>
Error launch_delta(Params& params, const AttentionArgs& a, const Stream& stream) {
  constexpr bool packed = kind == Kind::packed;
  const int64_t longest = ceil_div(a.sequences.q_len, kRowPadding) * kRowPadding;
  const int64_t padded_q_len = packed ? (ceil_div(a.sequences.total_q, kRowPadding) + a.batch) * kRowPadding : longest;
  if (padded_q_len > INT32_MAX) return "attention: the sequences have more than 2^31 rows";
  params.padded_q_len = static_cast<int>(padded_q_len);
  const int64_t rows = (packed ? a.heads : params.total_heads) * padded_q_len;
  const int64_t tiles = params.total_heads * longest / (kDeltaThreads / kDeltaLanes<T, D>);
  if (tiles == 0) return nullptr;
  if (tiles > kMaxTiles) return "attention: more than 2^30 tiles";
  params.padded_lse = static_cast<float*>(stream.scratch((kCanFuse<T> ? 3 : 2) * rows * sizeof(float)));
  params.padded_neg_delta = params.padded_lse + rows, params.padded_lse_log2 = params.padded_neg_delta + rows;
  return launch(attention_delta_kernel<T, D, kind>, make_grid(tiles), dim3(kDeltaThreads), 0, stream, params);
}

}  // namespace

extern template Error launch_bwd<Kind::packed>(const Params&, const AttentionArgs&, const Stream&);  // bwd_packed.cu
extern template Error launch_bwd<Kind::general>(const Params&, const AttentionArgs&, const Stream&);  // bwd_general.cu
Error launch_bias(const Params& params, const AttentionArgs& a, const Stream& stream);  // bias.cu
}  // namespace attention

Error attention_bwd(const AttentionArgs& a, const Stream& stream) {
  using namespace attention;
  if (const Error e = objection(a)) return e;
  return by_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    Params params = make_params<T>(a);
    params.out = make_tensor<T>(a.out, a.heads, a.v_dim, 16 / sizeof(T));  // backward reads out, 16 bytes at a time
    Error e = a.scores.scale_only() ? nullptr : prepare_scores(params, a, stream);
    if (!e)
      e = by_head_dim(std::max(a.head_dim, a.v_dim), [&](auto width) {
        return a.sequences.cu_seq_q ? launch_delta<T, width, Kind::packed>(params, a, stream)
                                    : launch_delta<T, width, Kind::dense>(params, a, stream);
      });
    if (!e) e = by_kind(a, [&](auto kind) { return launch_bwd<kind>(params, a, stream); });
    return e ? e : launch_bias(params, a, stream);
  });
}

}  // namespace pygpt::cuda
