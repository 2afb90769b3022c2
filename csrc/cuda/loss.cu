// cross_entropy of logits x (N, V), and linear_cross_entropy, whose logits x W^T + b exist for one chunk of rows at a
// time. pygpt/ops/loss.py has the formulas.
//
// A block processes a row. Forward reads it once: every thread keeps the maximum of its logits and the sum of
// exp(x - maximum), which it rescales when the maximum rises (Milakov and Gimelshein 2018), and the block combines
// them. Smoothing reads the row again. Backward reads the row once and writes its gradient once. Both are memory-bound.
// One more block sums the losses of all rows, in an order that depends on their number alone.
//
// linear_cross_entropy is a sequence of GEMMs (gemm.cuh) and these kernels for every chunk:
//     logits = x W^T + b      dlogits      dx = dlogits W      dW += dlogits^T x      db = column sums of dlogits
// Logits and the sums of dW are float. dlogits have the operands' type; float ones overwrite the logits. Forward scales
// those of float16, and at last divides the gradients by the same power of two.
//
// A target that is no class gives its row a loss and gradients of NaN. It is never an index.
#include "gemm.cuh"
#include "norm.cuh"

#include <limits>

namespace pygpt::cuda {
namespace {

constexpr int kE = 16;  // logits per thread and pass
constexpr float kInf = std::numeric_limits<float>::infinity();

// What the kernels of a call share. `first` is the first row of the chunk that x and dx point to.
struct LossParams {
  int64_t rows, classes, first, ignore_index;
  const int64_t* target;
  const float* weight;
  Reduction reduction;
  float smoothing, z_loss;
  float *row_losses, *row_max, *row_sum, *totals, *loss;
  // backward
  const float* dloss;  // null: the gradient of the sum of the losses, or of totals[0] times their mean
  const float* of_weights;  // the sum of all weights and that of their magnitudes, or null if they are not set
  float* scale;  // a factor of dlogits and its inverse, or null if there is none

  __device__ bool is_class(int64_t t) const { return t >= 0 && t < classes; }
  __device__ float weight_of(int64_t t) const { return weight ? weight[t] : 1.f; }
  __device__ float lse(int64_t row) const { return row_max[row] + logf(row_sum[row]); }
};

__device__ __forceinline__ float exponential(float x) { return ptx::exp2_approx(x * kLog2e); }

// The same maximum for all threads of a block. NaN does not count.
__device__ __forceinline__ float block_max(float x, float* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  x = warp_max(x);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  return warp_max(lane < warps ? shared[lane] : -kInf);
}

// ---------------------------------------------------------------- forward
template <class T>
__global__ __launch_bounds__(kMaxThreads, 2) void loss_fwd_kernel(LossParams a, const T* x, int64_t stride,
                                                                  bool vectorized) {
  PYGPT_SHARED(float, shared, [3][32]);
  const int64_t row = a.first + blockIdx.x, target = a.target[row];
  if (target == a.ignore_index) {
    if (threadIdx.x == 0) a.row_losses[row] = a.row_max[row] = a.row_sum[row] = 0;
    return;
  }
  x += blockIdx.x * stride;
  Lane lane{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), 0, a.classes, vectorized};
  float value[kE], max = -kInf, sums[1] = {};
  for (; lane.start < a.classes; lane.start += blockDim.x * kE) {
    lane.load<kE, T>(x).get(value);
    const int valid = lane.valid<T, kE>();
    float pass_max = -kInf;
#pragma unroll
    for (int i = 0; i < kE; i++) {
      if (i >= valid) value[i] = -kInf;
      pass_max = fmaxf(pass_max, value[i]);
    }
    if (pass_max > max) sums[0] *= exponential(max - pass_max), max = pass_max;
    const float shift = max == -kInf ? 0.f : max;  // -inf - -inf would be NaN
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kE; i++) sum += exponential(value[i] - shift);
    sums[0] += sum;
  }
  const float row_max = block_max(max, shared[0]);
  if (row_max != -kInf) sums[0] *= exponential(max - row_max);
  team_sum<kWholeBlock>(sums, shared + 1);
  const float row_sum = sums[0], log_sum = logf(row_sum);

  float smooth[1] = {};
  if (a.smoothing != 0) {
    for (lane.start = 0; lane.start < a.classes; lane.start += blockDim.x * kE) {
      lane.load<kE, T>(x).get(value);
      const int valid = lane.valid<T, kE>();
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kE; i++)
        if (i < valid) sum += a.weight_of(lane.column<T>(i)) * (log_sum - (value[i] - row_max));
      smooth[0] += sum;
    }
    team_sum<kWholeBlock>(smooth, shared + 2);
  }
  if (threadIdx.x > 0) return;
  const bool known = a.is_class(target);
  float loss = known ? (1 - a.smoothing) * a.weight_of(target) * (log_sum - (to_float(x[target]) - row_max)) : NAN;
  if (a.smoothing != 0) loss += a.smoothing / static_cast<float>(a.classes) * smooth[0];
  a.row_max[row] = row_max, a.row_sum[row] = row_sum;
  if (a.reduction == Reduction::none && a.z_loss != 0) loss += a.z_loss * a.lse(row) * a.lse(row);
  a.row_losses[row] = loss;
}

// The factor of float16's dlogits in forward (pygpt/ops/loss.py). largest: the largest |weight| of a kept target.
__device__ __forceinline__ float scale_of_float16(const LossParams& a, float largest, float of_squares) {
  const float classes = static_cast<float>(a.classes);
  float bound = (1 - a.smoothing) * largest;
  if (a.smoothing != 0) bound += a.smoothing / classes * (a.of_weights ? a.of_weights[1] : classes);
  if (a.z_loss != 0) bound += 16384.f * fabsf(a.z_loss * of_squares);
  const int exponent = static_cast<int>(__float_as_uint(bound) >> 23 & 255);  // with its bias of 127, as in the result
  return __uint_as_float(static_cast<unsigned>(267 - min(max(exponent, 27), 254)) << 23);
}

// One block: the totals, the scale and, with `reduce`, the loss of all rows.
__global__ __launch_bounds__(kMaxThreads, 1) void loss_reduce_kernel(LossParams a, bool reduce) {
  PYGPT_SHARED(float, shared, [5][32]);
  float sums[4] = {};  // of the kept targets' weights, of their number, of the losses, of the squared lse
  float largest = 0;
  for (int64_t i = threadIdx.x; i < a.rows; i += blockDim.x) {
    const int64_t target = a.target[i];
    if (target == a.ignore_index) continue;
    const float weight = a.is_class(target) ? a.weight_of(target) : 0.f;
    sums[0] += weight, sums[1] += 1;
    if (fabsf(weight) < kInf) largest = fmaxf(largest, fabsf(weight));
    if (!reduce) continue;
    sums[2] += a.row_losses[i];
    if (a.z_loss != 0) sums[3] += a.z_loss * a.lse(i) * a.lse(i);
  }
  team_sum<kWholeBlock>(sums, shared);
  largest = a.scale ? block_max(largest, shared[4]) : 0.f;
  if (threadIdx.x > 0) return;
  a.totals[0] = sums[0], a.totals[1] = sums[1];
  const bool mean = a.reduction == Reduction::mean;
  if (a.scale) a.scale[0] = scale_of_float16(a, largest, mean ? sums[0] / sums[1] : 1.f), a.scale[1] = 1 / a.scale[0];
  if (!reduce) return;
  float loss = mean ? sums[2] / sums[0] : sums[2];
  if (a.z_loss != 0) loss += mean ? sums[3] / sums[1] : sums[3];
  *a.loss = loss;
}

// ---------------------------------------------------------------- backward
template <class In, class Out>
__global__ __launch_bounds__(kMaxThreads, 2) void loss_bwd_kernel(LossParams a, const In* x, int64_t stride, Out* dx,
                                                                  int64_t dx_stride, bool vectorized) {
  const int64_t row = a.first + blockIdx.x, target = a.target[row];
  x += blockIdx.x * stride, dx += blockIdx.x * dx_stride;
  const bool kept = target != a.ignore_index, known = a.is_class(target);
  const bool mean = a.reduction == Reduction::mean;
  float of_loss = 1, of_squares = 1;
  if (a.dloss) of_loss = of_squares = a.dloss[a.reduction == Reduction::none ? row : 0];
  if (a.dloss && mean) of_loss /= a.totals[0], of_squares /= a.totals[1];
  if (!a.dloss && mean) of_squares = a.totals[0] / a.totals[1];
  if (a.scale) of_loss *= a.scale[0], of_squares *= a.scale[0];
  const float one = known ? (1 - a.smoothing) * of_loss * a.weight_of(target) : NAN;
  const float others = of_loss * a.smoothing / static_cast<float>(a.classes), row_max = a.row_max[row];
  float factor = one;
  if (a.smoothing != 0) factor += others * (a.of_weights ? *a.of_weights : static_cast<float>(a.classes));
  if (a.z_loss != 0) factor += 2 * a.z_loss * of_squares * a.lse(row);
  const float softmax = factor / a.row_sum[row];

  Lane lane{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), 0, a.classes, vectorized};
  for (; lane.start < a.classes; lane.start += blockDim.x * kE) {
    float value[kE];
    if (kept) lane.load<kE, In>(x).get(value);
#pragma unroll
    for (int i = 0; i < kE; i++) {
      const int64_t column = lane.column<In>(i);
      float d = softmax * exponential(kept ? value[i] - row_max : 0.f);
      if (a.smoothing != 0 && column < a.classes) d -= others * a.weight_of(column);
      value[i] = kept ? (column == target ? d - one : d) : 0.f;
    }
    if constexpr (sizeof(In) == sizeof(Out)) {
      lane.store<In>(dx, value);
    } else {
#pragma unroll
      for (int i = 0; i < kE; i++)
        if (lane.column<In>(i) < a.classes) dx[lane.column<In>(i)] = from_float<Out>(value[i]);
    }
  }
}

// The sum of all weights and that of their magnitudes, by one block.
__global__ __launch_bounds__(kMaxThreads, 1) void weight_sum_kernel(const float* weight, int64_t classes, float* out) {
  PYGPT_SHARED(float, shared, [2][32]);
  float sums[2] = {};
  for (int64_t i = threadIdx.x; i < classes; i += blockDim.x) sums[0] += weight[i], sums[1] += fabsf(weight[i]);
  team_sum<kWholeBlock>(sums, shared);
  if (threadIdx.x == 0) out[0] = sums[0], out[1] = sums[1];
}

__global__ __launch_bounds__(kMaxThreads) void multiply_kernel(float* x, int64_t n, const float* factor) {
  const int64_t i = blockIdx.x * int64_t{kMaxThreads} + threadIdx.x;
  if (i < n) x[i] *= *factor;
}

// ---------------------------------------------------------------- launching
dim3 threads_for(int64_t classes) {
  return dim3(static_cast<unsigned>(std::min<int64_t>(kMaxThreads, ceil_div(classes, 32 * kE) * 32)));
}

template <class T>
T* scratch(const Stream& stream, int64_t n) {
  return static_cast<T*>(stream.scratch(std::max<int64_t>(n, 1) * static_cast<int64_t>(sizeof(T))));
}

LossParams forward_params(const CrossEntropyArgs& a, const Stream& stream) {
  LossParams p{};
  p.rows = a.rows, p.classes = a.classes, p.ignore_index = a.ignore_index, p.target = a.target;
  p.weight = static_cast<const float*>(a.weight), p.reduction = a.reduction;
  p.smoothing = static_cast<float>(a.label_smoothing), p.z_loss = static_cast<float>(a.z_loss);
  p.row_max = static_cast<float*>(a.stats), p.row_sum = p.row_max + a.rows, p.totals = static_cast<float*>(a.totals);
  p.loss = static_cast<float*>(a.loss), p.dloss = static_cast<const float*>(a.dloss);
  if (!a.dloss) p.row_losses = a.reduction == Reduction::none ? p.loss : scratch<float>(stream, a.rows);
  return p;
}

// Sets of_weights, which loss_bwd_kernel reads.
Error sum_weights(LossParams& p, const Stream& stream) {
  if (!p.weight || p.smoothing == 0) return nullptr;
  float* sum = scratch<float>(stream, 2);
  p.of_weights = sum;
  return launch(weight_sum_kernel, make_grid(1), dim3(kMaxThreads), 0, stream, p.weight, p.classes, sum);
}

Error reduce(const LossParams& p, bool losses, const Stream& stream) {
  return launch(loss_reduce_kernel, make_grid(1), dim3(kMaxThreads), 0, stream, p, losses);
}

// Divides n floats, unless x is null, by the scale.
Error unscale(const LossParams& p, void* x, int64_t n, const Stream& stream) {
  if (!p.scale || !x || n == 0) return nullptr;
  return launch(multiply_kernel, make_grid(ceil_div(n, kMaxThreads)), dim3(kMaxThreads), 0, stream,
                static_cast<float*>(x), n, p.scale + 1);
}

template <class T>
Error row_losses(const LossParams& p, int64_t rows, const T* x, int64_t stride, const Stream& stream) {
  if (rows == 0) return nullptr;
  const bool vectorized = p.classes % kVector<T> == 0 && can_vectorize(x, stride);
  return launch(loss_fwd_kernel<T>, make_grid(rows), threads_for(p.classes), 0, stream, p, x, stride, vectorized);
}

template <class In, class Out>
Error row_gradients(const LossParams& p, int64_t rows, const In* x, int64_t stride, Out* dx, int64_t dx_stride,
                    const Stream& stream) {
  if (rows == 0) return nullptr;
  const bool vectorized = p.classes % kVector<In> == 0 && can_vectorize(x, stride) && can_vectorize(dx, dx_stride);
  return launch(loss_bwd_kernel<In, Out>, make_grid(rows), threads_for(p.classes), 0, stream, p, x, stride, dx,
                dx_stride, vectorized);
}

// ---------------------------------------------------------------- linear_cross_entropy
// The rows of a chunk: so many that updating dW costs little beside its product, and more while their logits stay in
// L2.
int64_t chunk_rows(int64_t rows, int64_t classes) {
  constexpr int64_t kLeastRows = 1024, kL2Bytes = 32 << 20;
  const int64_t most = std::max(kLeastRows, kL2Bytes / (classes * 4));
  const int64_t chunks = std::max<int64_t>(1, ceil_div(rows, most));
  return ceil_div(rows, chunks);
}

template <class T>
struct LinearLoss {
  const LinearCrossEntropyArgs& a;
  LossParams p;
  const Stream& stream;
  int64_t N = a.loss.rows, V = a.loss.classes, K = a.in, chunk = chunk_rows(N, V);
  float* logits = scratch<float>(stream, chunk* V);
  T* dlogits =
      std::is_same_v<T, float> || !(a.dx || a.dw || a.db) ? reinterpret_cast<T*>(logits) : scratch<T>(stream, chunk* V);
  // The sums of dw, and of every chunk's db.
  float *dw_sums = nullptr, *db_sums = nullptr;
  bool rounded = false;  // whether the gradients are of type T, not float

  Operand<T> x(int64_t first) const {
    return operand<T>(static_cast<const T*>(a.x.data) + first * a.x.stride, a.x.stride, K);
  }
  Operand<T> linear_weight() const { return operand<T>(a.linear_weight.data, a.linear_weight.stride, K); }

  Error set_logits(int64_t first, int64_t rows) const {
    Epilogue<T> e{nullptr, V};
    e.wide = logits, e.bias = static_cast<const T*>(a.linear_bias);
    return gemm<Layout::NT>(rows, V, K, x(first), linear_weight(), e, static_cast<T*>(nullptr), stream);
  }

  // The gradients of a chunk, from its logits.
  Error add_gradients(int64_t first, int64_t rows) {
    Error error = row_gradients(p, rows, logits, V, dlogits, V, stream);
    const Operand<T> d = operand<T>(dlogits, V, V);
    if (!error && a.dx) {
      Epilogue<T> e{rounded ? static_cast<T*>(a.dx) + first * K : nullptr, K};
      e.wide = rounded ? nullptr : static_cast<float*>(a.dx) + first * K;
      error = gemm<Layout::NN>(rows, K, V, d, linear_weight(), e, static_cast<T*>(nullptr), stream);
    }
    if (!error && a.dw) {
      const bool last = rounded && first + rows == N;
      Epilogue<T> e{last ? static_cast<T*>(a.dw) : nullptr, K};
      e.wide = last ? nullptr : dw_sums, e.addend = first > 0 ? dw_sums : nullptr;
      error = gemm<Layout::TN>(V, K, rows, d, x(first), e, static_cast<T*>(nullptr), stream);
    }
    if (!error && a.db) error = column_sums(dlogits, rows, V, V, db_sums + (chunk ? first / chunk : 0) * V, stream);
    return error;
  }

  // f(first row, rows) for every chunk, and once where there are no rows.
  template <class F>
  Error for_chunks(const F& f) const {
    int64_t first = 0;
    do {
      const int64_t rows = std::min(chunk, N - first);
      if (const Error error = f(first, rows)) return error;
      first += rows;
    } while (first < N);
    return nullptr;
  }
  int64_t chunks() const { return std::max<int64_t>(1, chunk ? ceil_div(N, chunk) : 1); }
};

}  // namespace

Error cross_entropy_fwd(const CrossEntropyArgs& a, const Stream& stream) {
  return by_dtype(a.dtype, [&](auto zero) -> Error {
    const LossParams p = forward_params(a, stream);
    const auto* x = static_cast<const decltype(zero)*>(a.x.data);
    if (const Error error = row_losses(p, a.rows, x, a.x.stride, stream)) return error;
    return reduce(p, a.reduction != Reduction::none, stream);
  });
}

Error cross_entropy_bwd(const CrossEntropyArgs& a, const Stream& stream) {
  return by_dtype(a.dtype, [&](auto zero) -> Error {
    using T = decltype(zero);
    LossParams p = forward_params(a, stream);
    if (const Error error = sum_weights(p, stream)) return error;
    return row_gradients(p, a.rows, static_cast<const T*>(a.x.data), a.x.stride, static_cast<T*>(a.dx.data),
                         a.dx.stride, stream);
  });
}

Error linear_cross_entropy_fwd(const LinearCrossEntropyArgs& a, const Stream& stream) {
  return by_dtype(a.loss.dtype, [&](auto zero) -> Error {
    using T = decltype(zero);
    LinearLoss<T> l{a, forward_params(a.loss, stream), stream};
    l.dw_sums = static_cast<float*>(a.dw), l.db_sums = a.db ? scratch<float>(stream, l.chunks() * l.V) : nullptr;
    if (std::is_same_v<T, f16> && (a.dx || a.dw || a.db)) l.p.scale = scratch<float>(stream, 2);
    Error error = sum_weights(l.p, stream);
    if (!error) error = reduce(l.p, false, stream);
    if (!error)
      error = l.for_chunks([&](int64_t first, int64_t rows) -> Error {
        l.p.first = first;
        Error failed = l.set_logits(first, rows);
        if (!failed) failed = row_losses(l.p, rows, l.logits, l.V, stream);
        return failed || !(a.dx || a.dw || a.db) ? failed : l.add_gradients(first, rows);
      });
    if (!error && a.db) error = column_sums(l.db_sums, l.chunks(), l.V, l.V, static_cast<float*>(a.db), stream);
    if (!error) error = unscale(l.p, a.dx, l.N * l.K, stream);
    if (!error) error = unscale(l.p, a.dw, l.V * l.K, stream);
    if (!error) error = unscale(l.p, a.db, l.V, stream);
    return error || a.loss.reduction == Reduction::none ? error : reduce(l.p, true, stream);
  });
}

Error linear_cross_entropy_bwd(const LinearCrossEntropyArgs& a, const Stream& stream) {
  return by_dtype(a.loss.dtype, [&](auto zero) -> Error {
    using T = decltype(zero);
    LinearLoss<T> l{a, forward_params(a.loss, stream), stream};
    l.rounded = true;
    l.dw_sums = a.dw ? scratch<float>(stream, l.V * l.K) : nullptr;
    l.db_sums = a.db ? scratch<float>(stream, l.chunks() * l.V) : nullptr;
    Error error = sum_weights(l.p, stream);
    if (!error)
      error = l.for_chunks([&](int64_t first, int64_t rows) -> Error {
        l.p.first = first;
        const Error failed = l.set_logits(first, rows);
        return failed ? failed : l.add_gradients(first, rows);
      });
    return error || !a.db ? error : column_sums(l.db_sums, l.chunks(), l.V, l.V, static_cast<T*>(a.db), stream);
  });
}

}  // namespace pygpt::cuda
