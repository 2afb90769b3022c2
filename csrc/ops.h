// The contract between the binding (which knows torch) and the kernels (which don't).
//
// Every op has one Args struct of pointers, sizes and strides (in elements), a forward and a backward function. Kernels
// check nothing: csrc/bind has checked shapes and dtypes, allocated every output and filled the struct. A null output
// pointer means that this output is not wanted. Statistics (mean, rstd, lse) are float, or double when dtype is f64.
// All sizes and offsets are 64-bit. Members after a "backward" comment are only set for the backward function.
#pragma once
#include <cstdint>
#include <functional>

#include "attention/scores.h"
#include "attention/sequence.h"

namespace pygpt {

enum class DType { f64, f32, bf16, f16 };
enum class Activation { gelu, gelu_tanh, relu, relu2 };
// Whether the derivative is computed from the activation's input. relu's is computed from its output. relu2 keeps its
// input: its output underflows in float16.
constexpr bool saves_input(Activation a) { return a != Activation::relu; }

// A matrix: element (i, j) is data[i * stride + j].
struct Rows {
  void* data;
  int64_t stride;
};

// A tensor (batch, head, position, channel).
struct Heads {
  void* data;
  int64_t stride[4];
};

constexpr int64_t kMaxHeadDim = 512;  // the largest head_dim and v_dim; kernels for GPUs serve less

// out = softmax(scores) v for every batch entry and head, with q (L, E), k (S, E) and v (S, Ev). csrc/attention says
// which keys a query sees, what happens to a score and where the sequences lie. lse[b, h, i] is the log of row i's sum
// of exponentials. Head h takes the key and value head h / (heads / kv_heads).
struct AttentionArgs {
  DType dtype;
  int64_t batch, heads, kv_heads, head_dim, v_dim;
  Sequences sequences;
  Reach reach;
  Scores scores;
  Heads q, k, v, out;
  void* lse;
  int64_t lse_stride[2];  // between batch entries and between heads; rows are contiguous
  // backward
  Heads dout;
  const void* dlse;  // like lse, or null
  Heads dq, dk, dv;  // with null data where not wanted
  Heads dmask;  // of the mask's dtype, (batch, heads, q_len, k_len) with stride 0 where the mask is broadcast, or null
  void *dslopes, *dsink;  // like slopes and sink, contiguous, or null

  int64_t group() const { return heads ? heads / kv_heads : 1; }  // query heads to a key head
  Visible<int64_t> visible(const Sequence& s) const { return reach.visible<int64_t>(s.q_len, s.k_len); }
};

// y (rows, out) = x (rows, in) weight^T + bias, weight (out, in).
struct LinearArgs {
  DType dtype;
  int64_t rows, in, out;
  Rows x, weight;
  const void* bias;  // (out), or null
  Rows y;
  // backward
  Rows dy;
  void *dx, *dw, *db;  // contiguous
};

// y = act(x fc_weight^T + fc_bias) proj_weight^T + proj_bias.
struct MlpArgs {
  DType dtype;
  Activation activation;
  int64_t rows, in, hidden_dim, out;
  Rows x, fc_weight, proj_weight;
  const void *fc_bias, *proj_bias;
  void* y;
  void* hidden;  // (rows, hidden_dim), the activation's output
  void* pre;  // (rows, hidden_dim), the activation's input; null where !saves_input
  // backward
  Rows dy;
  void* dpre;  // (rows, hidden_dim), workspace
  void *dx, *dfc_weight, *dfc_bias, *dproj_weight, *dproj_bias;
};

// layer_norm and rms_norm over rows of cols values. residual is set for the norms of a sum, which is x + residual, or
// with a seed dropout(x) + residual. mean is null for the rms_norms.
struct NormArgs {
  DType dtype;  // of x, y, dy and dx
  DType sum_dtype;  // of residual, sum, dsum, dresidual and, in backward, x: dtype, or f32 where dtype has 16 bits
  DType parameter_dtype;  // of weight, bias, dw and db: the same choice
  int64_t rows, cols;
  double eps;
  double weight_offset;  // added to every weight
  Rows x, residual;
  const void *weight, *bias;  // (cols), or null
  void *y, *sum;  // contiguous
  void *mean, *rstd;  // (rows)
  const int64_t* seed;  // as in Scores, and so are the next two; element (row, col) has the place of key col in head 0
  uint64_t threshold;
  double keep;
  // backward; x is the input that was normalised
  Rows dy, dsum;  // dsum's data may be null
  void *dx, *dresidual, *dw, *db;  // contiguous. Without dropout, dx is the gradient of both terms of a sum.

  // Whether all tensors have one dtype and there is no dropout.
  bool plain() const { return sum_dtype == dtype && parameter_dtype == dtype && !seed && !dresidual; }
};

// y = act(x) for n contiguous values. dx is computed from x, and relu's from y.
struct ActivationArgs {
  DType dtype;
  Activation activation;
  int64_t n;
  const void* x;
  void* y;
  const void* dy;
  void* dx;
};

// The queries or the keys of a call of rope. heads is 0 where there are none.
struct RopeSide {
  int64_t heads;
  Heads x;  // channels are contiguous
  const void* weight;  // (head_dim) in the dtype of statistics, or null: then there is no norm, and no rstd
  void* rstd;  // (batch, heads, length)
  Heads y;
  // backward; x is set only with a weight
  Heads dy, dx;  // dx's data may be null
  void* dweight;
};

// Each head (head_dim) of q and k at each position, normalised if there is a weight, then rotated: pair i < half of its
// channels, which is (i, i + half) or (2i, 2i + 1), by the angle whose cosine and sine are in the position's row of cos
// and sin. The other channels keep their values.
struct RopeArgs {
  DType dtype;
  int64_t batch, length, head_dim, half;
  bool interleaved;
  double eps;
  const void *cos, *sin;  // (table_rows, half) in the dtype of statistics, for each batch entry or for all
  int64_t table_rows, table_stride;  // table_stride is between batch entries, or 0
  const void* positions;  // the row of each position: int64, or int32 if short_positions; null: row t at position t
  bool short_positions;
  int64_t positions_stride;  // between batch entries, or 0
  RopeSide sides[2];  // q and k
};

// Calls X(name, Args) for every kernel. Each device declares all of them in its own namespace.
// clang-format off
#define PYGPT_KERNELS(X)                                        \
  X(attention_fwd, AttentionArgs) X(attention_bwd, AttentionArgs) \
  X(linear_fwd, LinearArgs) X(linear_bwd, LinearArgs)           \
  X(mlp_fwd, MlpArgs) X(mlp_bwd, MlpArgs)                       \
  X(norm_fwd, NormArgs) X(norm_bwd, NormArgs)                   \
  X(rope_fwd, RopeArgs) X(rope_bwd, RopeArgs)                   \
  X(activation_fwd, ActivationArgs) X(activation_bwd, ActivationArgs)
// clang-format on

namespace cpu {
#define PYGPT_DECLARE(name, Args) void name(const Args&);
PYGPT_KERNELS(PYGPT_DECLARE)
#undef PYGPT_DECLARE
}  // namespace cpu

namespace cuda {
// Where a kernel runs, and a source of temporary device memory, which lives until the launched kernels have ended.
struct Stream {
  int device;
  void* handle;  // cudaStream_t
  std::function<void*(int64_t bytes)> scratch;  // 256-byte aligned
};

constexpr int64_t kMaxHeadDim = 256;  // the largest head_dim and v_dim

// An error message, or null. Kernels do not serve float64.
using Error = const char*;
#define PYGPT_DECLARE(name, Args) Error name(const Args&, const Stream&);
PYGPT_KERNELS(PYGPT_DECLARE)
#undef PYGPT_DECLARE
}  // namespace cuda

}  // namespace pygpt
