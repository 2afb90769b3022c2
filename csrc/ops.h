// The contract between the binding (which knows torch) and the kernels (which don't).
//
// Per op: one Args struct of pointers, sizes and strides, in elements, and a forward and a backward
// function. Kernels check nothing: csrc/bind has checked shapes and dtypes, allocated every output and
// filled the struct. A null output pointer means "not wanted". Statistics (mean, rstd, lse) are
// float, or double when dtype is f64. All sizes and offsets are 64-bit.
#pragma once
#include <cstdint>
#include <functional>

namespace pygpt {

enum class DType { f64, f32, bf16, f16 };
enum class Activation { gelu, gelu_tanh, relu, relu2 };
// What the derivative is found from: the activation's input, or relu's output. (relu2's would do too, had it not lost its
// digits in float16: 1e-4 squared is 0 there.)
constexpr bool saves_input(Activation a) { return a != Activation::relu; }

// Rows of a matrix: element (i, j) is data[i * stride + j].
struct Rows {
  void* data;
  int64_t stride;
};

// (batch, head, position, channel).
struct Heads {
  void* data;
  int64_t stride[4];
};

constexpr int64_t kMaxHeadDim = 256;  // of q and of v

// out = softmax(scale q k^T) v, one (L, E) x (S, E) x (S, Ev) problem per batch entry and head.
// is_causal: query i sees keys 0..i. lse[b, h, i] is the log of row i's sum of exponentials.
struct AttentionArgs {
  DType dtype;
  int64_t batch, heads, q_len, k_len, head_dim, v_dim;
  bool is_causal;
  double scale;
  Heads q, k, v, out;
  void* lse;              // (batch, heads, q_len), contiguous
  Heads dout;             // backward from here on
  const void* dlse;       // like lse, or null
  Heads dq, dk, dv;       // data null: not wanted
};

// y (rows, out) = x (rows, in) weight^T + bias, weight (out, in).
struct LinearArgs {
  DType dtype;
  int64_t rows, in, out;
  Rows x, weight;
  const void* bias;       // (out), or null
  Rows y;
  Rows dy;                // backward from here on
  void *dx, *dw, *db;     // contiguous
};

// y = act(x fc_weight^T + fc_bias) proj_weight^T + proj_bias.
struct MlpArgs {
  DType dtype;
  Activation activation;
  int64_t rows, in, hidden_dim, out;
  Rows x, fc_weight, proj_weight;
  const void *fc_bias, *proj_bias;
  void* y;
  void* hidden;           // (rows, hidden_dim), after the activation
  void* pre;              // (rows, hidden_dim), before it; null where !saves_input
  Rows dy;                // backward from here on
  void* dpre;             // (rows, hidden_dim) workspace
  void *dx, *dfc_weight, *dfc_bias, *dproj_weight, *dproj_bias;
};

// layer_norm, add_layer_norm (residual not null) and rms_norm (mean null) over rows of width cols.
struct NormArgs {
  DType dtype;
  int64_t rows, cols;
  double eps;
  Rows x, residual;
  const void *weight, *bias;  // (cols), or null
  void *y, *sum;              // contiguous; sum = x + residual
  void *mean, *rstd;          // (rows)
  Rows dy, dsum;              // backward from here on; x is what was normalised, dsum may be null
  void *dx, *dw, *db;         // contiguous
};

// Element by element over n contiguous values. dx from x; relu's from y.
struct ActivationArgs {
  DType dtype;
  Activation activation;
  int64_t n;
  const void* x;
  void* y;
  const void* dy;
  void* dx;
};

// Every kernel entry point: name, Args. Each device declares all of them in its own namespace.
#define PYGPT_KERNELS(X)                                        \
  X(attention_fwd, AttentionArgs) X(attention_bwd, AttentionArgs) \
  X(linear_fwd, LinearArgs) X(linear_bwd, LinearArgs)           \
  X(mlp_fwd, MlpArgs) X(mlp_bwd, MlpArgs)                       \
  X(norm_fwd, NormArgs) X(norm_bwd, NormArgs)                   \
  X(activation_fwd, ActivationArgs) X(activation_bwd, ActivationArgs)

namespace cpu {
#define PYGPT_DECLARE(name, Args) void name(const Args&);
PYGPT_KERNELS(PYGPT_DECLARE)
#undef PYGPT_DECLARE
}  // namespace cpu

namespace cuda {
// Where a kernel runs, and temporary device memory that lives until what is launched has ended.
struct Stream {
  int device;
  void* handle;                                // cudaStream_t
  std::function<void*(int64_t bytes)> scratch;  // 256-byte aligned
};

// Null, or what went wrong. float64 is not served.
using Error = const char*;
#define PYGPT_DECLARE(name, Args) Error name(const Args&, const Stream&);
PYGPT_KERNELS(PYGPT_DECLARE)
#undef PYGPT_DECLARE
}  // namespace cuda

}  // namespace pygpt
