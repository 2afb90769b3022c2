// The parameters of the attention kernels.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "tiles.cuh"

namespace pygpt::cuda::attention {

constexpr float kInf = HUGE_VALF;

// The fused form of the exponent, fma(x, c, -y) with y as large as x c, is accurate enough while |y| is below this
// limit (see fwd.cu): 2^21 times the type's epsilon. float never uses the fused form.
template <class T>
constexpr float kExponentLimit = std::is_same_v<T, bf16>  ? 0x1p14f
                                 : std::is_same_v<T, f16> ? 0x1p11f
                                                          : 0.0f;

constexpr int64_t kMaxPositions = 1 << 28;  // so that the sums of Visible<int> do not overflow
constexpr int64_t kMaxHeads = 1 << 30;
constexpr int kUnlimited = 1 << 29;         // a reach past every position, also past those that pad a tile
constexpr int kRowPadding = 32;             // of a sequence in backward's workspaces; a multiple of every tile_n

// What a call asks of the kernels. Dense and packed calls scale their scores and do nothing else to them; packed calls
// have sequences of different lengths. General calls are dense and do all of scores.cuh.
enum class Kind { dense, packed, general };

// Calls body(integral_constant<Kind, the kind of a call>).
template <class Body>
Error by_kind(const AttentionArgs& a, Body&& body) {
  if (a.sequences.cu_seq_q) return body(std::integral_constant<Kind, Kind::packed>{});
  if (a.scores.scale_only()) return body(std::integral_constant<Kind, Kind::dense>{});
  return body(std::integral_constant<Kind, Kind::general>{});
}

// A tensor (batch, head, position, channel) of `heads` heads and `width` channels; vectorized as in Head.
struct Tensor {
  void* data;
  int64_t stride[4];
  int heads, width;
  bool vectorized;
};

// What Scores of csrc/attention/scores.h has, in float. Kernels for scale-only calls do not read it.
struct ScoreParams {
  float softcap, scale_over_softcap;  // 0: none
  const float* slopes;                // or null
  int64_t slope_stride;
  MaskType mask_type;
  const void* mask;
  int64_t mask_stride[4];
  const uint8_t* mask_tiles;     // of a boolean mask, see MaskTiles; null otherwise
  int64_t mask_tiles_stride[4];  // 0 where the mask is broadcast
  const int64_t* seed;           // or null: no dropout
  uint32_t threshold;
  float keep;  // 1 without dropout
};

// The parameters of one attention call, common to all kernels. A head is counted through the whole batch.
struct Params {
  int total_heads;         // query heads of the whole batch
  int group;               // query heads that share a key head: query head h takes key head h / group
  int tiled_heads;         // the heads whose tiles a launch computes: query heads, or key heads
  int head_group;          // how many of them the tile scheduler takes together, see tile_coord()
  int padded_q_len;        // rows of a head in backward's workspaces
  Visible<int> visible;
  float scale, scale_log2;  // scale_log2 = scale * log2(e)
  Tensor q, k, v, out, dout, dq, dk, dv;
  float* lse;
  const float* dlse;
  int64_t lse_stride[2];  // between batch entries and between heads, for dlse too
  const float* sink;      // (heads of a batch entry), or null
  // Workspaces of backward. Dense: (total_heads, padded_q_len). Packed: (heads of a sequence, padded_q_len), in which
  // sequence b starts at row cu_seq_q[b] + b kRowPadding, rounded down to a multiple of kRowPadding. So there is room
  // for each sequence's rows, rounded up, and cp.async finds them aligned.
  float *padded_lse, *padded_neg_delta, *padded_lse_log2;
  float lse_to_log2[2];  // scale_log2 / scale as the sum of two floats; infinite if scale_log2 is not a normal float
  ScoreParams scores;
  Sequences sequences;  // of a packed call
};

// The parameters of batch entry b. Dense: those of the call. Packed: those of a dense call of sequence b alone, except
// that heads are still counted through the batch, and that a window wider than the sequence keeps its width: a
// sequence's bits must not depend on the longest one. No other code knows where a sequence lies in the packed tensors.
template <class T, Kind kind>
__device__ __forceinline__ auto of_sequence(const Params& call, int b)
    -> std::conditional_t<kind == Kind::packed, Params, const Params&> {
  if constexpr (kind != Kind::packed) {
    return call;
  } else {
    const Sequence at = call.sequences(b);
    Params params = call;
    params.visible.q_len = int(at.q_len), params.visible.k_len = int(at.k_len);
    params.visible.diagonal = params.visible.k_len - params.visible.q_len;
    const auto shift = [](Tensor& t, int64_t row) {
      t.stride[0] = 0;  // as it is already; known to the compiler, it takes no register
      if (t.data) t.data = static_cast<T*>(t.data) + row * t.stride[2];
    };
    shift(params.q, at.q_row), shift(params.out, at.q_row), shift(params.dout, at.q_row), shift(params.dq, at.q_row);
    shift(params.k, at.k_row), shift(params.v, at.k_row), shift(params.dk, at.k_row), shift(params.dv, at.k_row);
    params.lse_stride[0] = 0, params.lse += at.q_row;
    if (params.dlse) params.dlse += at.q_row;
    const int64_t first_head = int64_t(b) * call.q.heads;
    const int64_t padded_row = ((at.q_row + int64_t(b) * kRowPadding) & -kRowPadding) - first_head * call.padded_q_len;
    params.padded_lse += padded_row, params.padded_neg_delta += padded_row, params.padded_lse_log2 += padded_row;
    params.sink = nullptr;
    return params;
  }
}

// Where the rows of a head start in lse.
__device__ __forceinline__ int64_t lse_offset(const Params& params, int head) {
  return head / params.q.heads * params.lse_stride[0] + head % params.q.heads * params.lse_stride[1];
}

template <class T>
__device__ __forceinline__ Head<T> slice_head(const Tensor& t, int head) {
  const int64_t offset = head / t.heads * t.stride[0] + head % t.heads * t.stride[1];
  return {static_cast<T*>(t.data) + offset, t.stride[2], t.stride[3], t.width, t.vectorized};
}

// `elements`: the number of elements that one vectorized access takes.
template <class T>
Tensor make_tensor(const Heads& t, int64_t heads, int64_t width, int elements) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(t.data);
  bool vectorized = t.stride[3] == 1 && width % elements == 0 && address % (elements * sizeof(T)) == 0;
  for (int d = 0; d < 3; d++) vectorized = vectorized && t.stride[d] % elements == 0;
  const int64_t* s = t.stride;
  return {t.data, {s[0], s[1], s[2], s[3]}, static_cast<int>(heads), static_cast<int>(width), vectorized};
}

// Why the kernels do not serve a call, or null.
inline Error objection(const AttentionArgs& a) {
  if (std::max(a.head_dim, a.v_dim) > kMaxHeadDim) return "attention: head dimensions above 256 are not served";
  if (std::max(a.sequences.q_len, a.sequences.k_len) > kMaxPositions) return "attention: more than 2^28 positions";
  if (a.batch * a.heads > kMaxHeads) return "attention: more than 2^30 heads";
  if (a.sequences.cu_seq_q && (!a.scores.scale_only() || a.scores.sink || !a.reach.lower_right))
    return "attention: packed sequences have no options, and their diagonals end at the lower right";
  return nullptr;
}

template <class T>
Params make_params(const AttentionArgs& a) {
  constexpr int kChunk = 16 / sizeof(T), kPair = 2;
  Params p{};
  p.total_heads = static_cast<int>(a.batch * a.heads), p.group = static_cast<int>(a.group());
  const bool packed = a.sequences.cu_seq_q;  // of_sequence sets the lengths
  const int64_t q_len = packed ? kMaxPositions : a.sequences.q_len, k_len = packed ? kMaxPositions : a.sequences.k_len;
  p.visible = a.reach.visible<int>(q_len, k_len);
  if (p.visible.left >= q_len + k_len) p.visible.left = kUnlimited;
  if (p.visible.right >= q_len + k_len) p.visible.right = kUnlimited;
  p.scale = static_cast<float>(a.scores.scale);
  p.q = make_tensor<T>(a.q, a.heads, a.head_dim, kChunk), p.k = make_tensor<T>(a.k, a.kv_heads, a.head_dim, kChunk);
  p.v = make_tensor<T>(a.v, a.kv_heads, a.v_dim, kChunk), p.dout = make_tensor<T>(a.dout, a.heads, a.v_dim, kChunk);
  p.out = make_tensor<T>(a.out, a.heads, a.v_dim, kPair), p.dq = make_tensor<T>(a.dq, a.heads, a.head_dim, kPair);
  p.dk = make_tensor<T>(a.dk, a.kv_heads, a.head_dim, kPair), p.dv = make_tensor<T>(a.dv, a.kv_heads, a.v_dim, kPair);
  p.scale_log2 = p.scale * kLog2e;
  const bool is_normal = std::isnormal(p.scale_log2);
  const double lse_to_log2 = is_normal ? double(p.scale_log2) / p.scale : HUGE_VAL;
  p.lse_to_log2[0] = float(lse_to_log2), p.lse_to_log2[1] = is_normal ? float(lse_to_log2 - p.lse_to_log2[0]) : 0.0f;
  p.lse = static_cast<float*>(a.lse), p.dlse = static_cast<const float*>(a.dlse);
  p.lse_stride[0] = a.lse_stride[0], p.lse_stride[1] = a.lse_stride[1];
  p.sink = static_cast<const float*>(a.scores.sink);
  p.sequences = a.sequences;
  return p;
}

}  // namespace pygpt::cuda::attention
