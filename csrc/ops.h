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
enum class Reduction { none, mean, sum };
enum class Activation { gelu, gelu_tanh, relu, relu2, silu };
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

// y = hidden proj_weight^T + proj_bias, where pre = x fc_weight^T + fc_bias and hidden = act(pre). If gated, fc_weight
// has 2 * hidden_dim rows, a row of pre is [gate | value], and hidden = act(gate) value.
struct MlpArgs {
  DType dtype;
  Activation activation;
  bool gated;
  int64_t rows, in, hidden_dim, out;
  Rows x, fc_weight, proj_weight;
  const void *fc_bias, *proj_bias;
  void* y;
  void* hidden;  // (rows, hidden_dim)
  void* pre;  // (rows, fc_dim()); null where !saves_input, and where there will be no backward
  // backward
  Rows dy;
  void* dpre;  // (rows, fc_dim()), workspace
  void *dx, *dfc_weight, *dfc_bias, *dproj_weight, *dproj_bias;

  int64_t fc_dim() const { return gated ? 2 * hidden_dim : hidden_dim; }  // the rows of fc_weight
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

// The loss of logits x (rows, classes), and with dloss its gradient dx. pygpt/ops/loss.py has the mathematics. A row
// whose target is ignore_index is kept out: its loss, stats and dx are 0, and x is not read there. weight and what is
// float or double in statistics have that type here.
struct CrossEntropyArgs {
  DType dtype;
  int64_t rows, classes;
  Rows x;
  const int64_t* target;
  int64_t ignore_index;
  const void* weight;  // (classes), or null
  Reduction reduction;
  double label_smoothing, z_loss;
  void* loss;  // (rows) for Reduction::none, else one
  void* stats;  // (2, rows): the row's maximum, and its sum of exp(x - maximum)
  void* totals;  // two: the sum of the kept targets' weights, and their number
  // backward
  const void* dloss;  // like loss
  Rows dx;
};

// cross_entropy of x (rows, in) linear_weight^T + linear_bias, whose logits exist for chunk rows at a time. In forward,
// dx, dw and db are those of the loss times totals[0] (mean) or of the loss (sum), and have the type of statistics. In
// backward they have the dtype. dw_sums may be dw.
struct LinearCrossEntropyArgs {
  CrossEntropyArgs loss;  // its x and dx are not set
  int64_t in;
  Rows x, linear_weight;
  const void* linear_bias;  // (classes), or null
  void *dx, *dw, *db;  // contiguous, each null where not wanted
  // a CPU's workspace, of the type of statistics: a chunk's logits and, in backward, the wanted ones of dw's and db's
  // sums
  int64_t chunk;
  void *logits, *dw_sums, *db_sums;
};

// Calls X(name, Args) for every kernel. Each device declares all of them in its own namespace.
// clang-format off
#define PYGPT_KERNELS(X)                                        \
  X(attention_fwd, AttentionArgs) X(attention_bwd, AttentionArgs) \
  X(linear_fwd, LinearArgs) X(linear_bwd, LinearArgs)           \
  X(mlp_fwd, MlpArgs) X(mlp_bwd, MlpArgs)                       \
  X(norm_fwd, NormArgs) X(norm_bwd, NormArgs)                   \
  X(rope_fwd, RopeArgs) X(rope_bwd, RopeArgs)                   \
  X(activation_fwd, ActivationArgs) X(activation_bwd, ActivationArgs) \
  X(cross_entropy_fwd, CrossEntropyArgs) X(cross_entropy_bwd, CrossEntropyArgs) \
  X(linear_cross_entropy_fwd, LinearCrossEntropyArgs)           \
  X(linear_cross_entropy_bwd, LinearCrossEntropyArgs)
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
