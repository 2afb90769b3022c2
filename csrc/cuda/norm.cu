// layer_norm and rms_norm over rows x of n elements, or of x + residual (Ba et al. 2016; Zhang and Sennrich 2019).
//
//     y = xhat w + b,   xhat = (x - mean) rstd,   mean = sum(x) / n,   rstd = 1 / sqrt(sum((x - mean)^2) / n + eps)
//
// rms_norm has no mean: x - mean becomes x. With a residual (add_layer_norm, add_rms_norm) the kernel first stores
// sum = x + residual, rounded to the dtype, and normalises that. mean and rstd, float, one each per row, are saved so
// that backward (norm_bwd.cu) forms xhat without a reduction.
//
// The mean is computed in two passes (corrected two-pass algorithm: Chan, Golub and LeVeque 1983). The second pass sums
// the variance and the mean of x - mean, which is the first mean's rounding error; it corrects mean, variance and y.
//
// The kernels are memory-bound: they move twice the bytes of x, four times with a residual. A row is read once and
// stays in registers, and enough blocks are resident to hide the latency. Rows of more than kMaxRegisterCols elements
// are read again for each pass, from the caches if they hold the row.
#include "norm.cuh"

namespace pygpt::cuda {
namespace {

constexpr int kMaxE = 32;  // most elements per lane
constexpr int64_t kMaxRegisterCols = kMaxE * kMaxThreads;  // longest row that is held in registers

// General kernels have dropout, an offset of the weights, an R (the type of residual and sum) of another type than T
// (of x and y), or float parameters.
template <class T, class R, bool is_general>
struct NormFwdParams {
  int64_t rows, cols, x_stride, residual_stride;
  float eps;
  const T* x;
  const R* residual;
  const void *weight, *bias;
  T* y;
  R* sum;
  float *mean, *rstd;
  bool vectorized;
  General general;
};

template <int E, class T, class R, bool is_general>
__device__ __forceinline__ void load_parameters(const NormFwdParams<T, R, is_general>& a, const Lane& lane,
                                                const void* p, float (&value)[E]) {
  if (is_general && a.general.float_parameters) lane.load<E, T>(static_cast<const float*>(p)).get(value);
  else lane.load<E, T>(static_cast<const T*>(p)).get(value);
}

// Loads the row to be normalised: x, or x + residual rounded to R, which is also stored in sum if `write`.
template <int E, class T, class R, bool is_general>
__device__ __forceinline__ void load_sum(const NormFwdParams<T, R, is_general>& a, const Lane& lane, int64_t row,
                                         bool write, float (&value)[E]) {
  const Row<T, E> x = lane.load<E, T>(a.x + row * a.x_stride);
  if (a.residual) {
    const Row<R, E> residual = lane.load<E, T>(a.residual + row * a.residual_stride);
    float other[E];
    Row<R, E> sum;
    x.get(value);
    if constexpr (is_general)
      if (a.general.seed) a.general.template drop<T>(lane, row, 0, value);
    residual.get(other);
#pragma unroll
    for (int i = 0; i < E; i++) value[i] += other[i];
    if (write) lane.store<T>(a.sum + row * a.cols, value);
    sum.set(value);
    sum.get(value);
  } else {
    x.get(value);
  }
}

// value -= mean. Adds the differences to sums[0] and their squares to sums[1].
template <class T, int E>
__device__ __forceinline__ void centre(const Lane& lane, float mean, float (&value)[E], float (&sums)[2]) {
  const int valid = lane.valid<T, E>();
  float squares = 0;
#pragma unroll
  for (int i = 0; i < E; i++) {
    value[i] = i < valid ? value[i] - mean : 0.f;
    squares += value[i] * value[i];
  }
  sums[0] += sum_of(value);
  sums[1] += squares;
}

// rstd from the sum of squares of x - mean, and the correction of the mean. A negative variance counts as 0; NaN stays.
__device__ __forceinline__ float rstd_of(float squares, float correction, float count, float eps) {
  const float variance = squares / count - correction * correction;
  return rsqrtf((variance < 0 ? 0.f : variance) + eps);
}

// Stores y, given value = x - mean and the correction of the mean.
template <int E, class T, class R, bool is_general>
__device__ __forceinline__ void store_y(const NormFwdParams<T, R, is_general>& a, const Lane& lane, int64_t row,
                                        float correction, float rstd, float (&value)[E]) {
  float p[E];
  const float offset = -correction * rstd;
#pragma unroll
  for (int i = 0; i < E; i++) value[i] = value[i] * rstd + offset;
  if (a.weight) {
    load_parameters(a, lane, a.weight, p);
#pragma unroll
    for (int i = 0; i < E; i++) value[i] *= is_general ? p[i] + a.general.weight_offset : p[i];
  }
  if (a.bias) {
    load_parameters(a, lane, a.bias, p);
#pragma unroll
    for (int i = 0; i < E; i++) value[i] += p[i];
  }
  lane.store<T>(a.y + row * a.cols, value);
}

template <class Params>
__device__ __forceinline__ void store_statistics(const Params& a, int64_t row, float mean, float rstd) {
  if (a.mean) a.mean[row] = mean;
  a.rstd[row] = rstd;
}

template <class T, class R, bool is_general, int E, int team>
__global__ __launch_bounds__(team == kWholeBlock ? kMaxThreads : kThreads,
                             team == kWholeBlock ? 1
                             : is_general        ? 4
                                                 : 6) void norm_fwd_kernel(NormFwdParams<T, R, is_general> a) {
  PYGPT_SHARED(float, shared, [3][32]);
  const int size = team == kWholeBlock ? blockDim.x : team;
  const int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.x / size) + threadIdx.x / size;
  const bool in_range = row < a.rows;
  const Lane lane{static_cast<int>(threadIdx.x % size), size, 0, in_range ? a.cols : 0, a.vectorized};
  const float count = static_cast<float>(a.cols);

  float value[E], mean = 0, correction = 0, sums[2] = {};
  load_sum(a, lane, row, true, value);
  if (a.mean) {
    float total[1] = {sum_of(value)};
    team_sum<team>(total, shared);
    mean = total[0] / count;
  }
  centre<T>(lane, mean, value, sums);
  team_sum<team>(sums, shared + 1);
  if (a.mean) correction = sums[0] / count;
  const float rstd = rstd_of(sums[1], correction, count, a.eps);
  store_y(a, lane, row, correction, rstd, value);
  if (in_range && lane.rank == 0) store_statistics(a, row, mean + correction, rstd);
}

// A block processes one row of any length.
template <class T, class R, bool is_general>
__global__ __launch_bounds__(kMaxThreads, 1) void long_row_norm_fwd_kernel(NormFwdParams<T, R, is_general> a) {
  PYGPT_SHARED(float, shared, [3][32]);
  const int64_t row = blockIdx.x;
  Lane lane{static_cast<int>(threadIdx.x), kMaxThreads, 0, a.cols, a.vectorized};
  const float count = static_cast<float>(a.cols);

  float value[kLongRowE], mean = 0, correction = 0, sums[2] = {};
  if (a.mean) {
    float total[1] = {};
    for (lane.start = 0; lane.start < a.cols; lane.start += kMaxThreads * kLongRowE) {
      load_sum(a, lane, row, false, value);
      total[0] += sum_of(value);
    }
    team_sum<kWholeBlock>(total, shared);
    mean = total[0] / count;
  }
  for (lane.start = 0; lane.start < a.cols; lane.start += kMaxThreads * kLongRowE) {
    load_sum(a, lane, row, false, value);
    centre<T>(lane, mean, value, sums);
  }
  team_sum<kWholeBlock>(sums, shared + 1);
  if (a.mean) correction = sums[0] / count;
  const float rstd = rstd_of(sums[1], correction, count, a.eps);
  for (lane.start = 0; lane.start < a.cols; lane.start += kMaxThreads * kLongRowE) {
    load_sum(a, lane, row, true, value);
#pragma unroll
    for (int i = 0; i < kLongRowE; i++) value[i] -= mean;
    store_y(a, lane, row, correction, rstd, value);
  }
  if (threadIdx.x == 0) store_statistics(a, row, mean + correction, rstd);
}

template <class T, class R, bool is_general>
Error norm_fwd(const NormArgs& n, const Stream& stream) {
  NormFwdParams<T, R, is_general> a{};
  a.general = General(n);
  a.rows = n.rows, a.cols = n.cols, a.eps = static_cast<float>(n.eps);
  a.x = static_cast<const T*>(n.x.data), a.x_stride = n.x.stride;
  a.residual = static_cast<const R*>(n.residual.data), a.residual_stride = n.residual.stride;
  a.weight = n.weight, a.bias = n.bias;
  a.y = static_cast<T*>(n.y), a.sum = static_cast<R*>(n.sum);
  a.mean = static_cast<float*>(n.mean), a.rstd = static_cast<float*>(n.rstd);
  a.vectorized = a.cols % kVector<T> == 0 && can_vectorize(a.x, a.x_stride) && can_vectorize(a.y) &&
                 can_vectorize(a.residual, a.residual_stride) && can_vectorize(a.sum) &&
                 can_vectorize(static_cast<const T*>(a.weight)) && can_vectorize(static_cast<const T*>(a.bias));
  if (a.cols > kMaxRegisterCols)
    return launch(long_row_norm_fwd_kernel<T, R, is_general>, make_grid(a.rows), dim3(kMaxThreads), 0, stream, a);
  return by_cols<kMaxE>(a.cols, [&](auto shape) {
    using S = decltype(shape);
    const dim3 grid = make_grid(ceil_div(a.rows, S::teams));
    const dim3 threads(S::threads(a.cols));
    return launch(norm_fwd_kernel<T, R, is_general, S::E, S::team>, grid, threads, 0, stream, a);
  });
}

}  // namespace

Error norm_fwd(const NormArgs& a, const Stream& stream) {
  if (a.rows == 0) return nullptr;
  return by_types(
      a, [&](auto t, auto r, auto is_general) { return norm_fwd<decltype(t), decltype(r), is_general>(a, stream); });
}

}  // namespace pygpt::cuda
