// layer_norm, add_layer_norm and rms_norm over rows x of n elements (Ba et al. 2016; Zhang and Sennrich 2019).
//
//     y = xhat w + b,   xhat = (x - mean) rstd,   mean = sum(x) / n,   rstd = 1 / sqrt(sum((x - mean)^2) / n + eps)
//
// rms_norm has no mean: x - mean becomes x. add_layer_norm first stores sum = x + residual, rounded to the dtype,
// and normalises that. mean and rstd, float, one each per row, are saved so that backward (norm_bwd.cu) forms
// xhat without a reduction.
//
// The mean is found twice: once plainly, then, with the variance, as the mean of what centring left over
// (corrected two-pass scheme: Chan, Golub and LeVeque 1983). It takes the first mean's rounding error out
// of the variance and of y.
//
// Bound by memory: it moves twice the bytes of x, with a residual four times. A row stays in registers from its only
// reading on, with enough blocks resident to hide the latency; beyond kLongest elements it is read again for each
// pass, from the caches if they hold it.
#include "norm.cuh"

namespace pygpt::cuda {
namespace {

constexpr int kMostE = 32;                           // elements a lane
constexpr int64_t kLongest = kMostE * kMostThreads;  // the longest row that stays in registers

template <class T>
struct Forward {
  int64_t rows, cols, x_stride, residual_stride;
  float eps;
  const T *x, *residual, *weight, *bias;
  T *y, *sum;
  float *mean, *rstd;
  bool vectors;
};

// What is normalised: x, or x + residual, which is rounded, and written to sum.
template <int E, class T>
__device__ __forceinline__ void load_sum(const Forward<T>& a, const Lane& lane, int64_t row, bool write,
                                         float (&value)[E]) {
  const Row<T, E> x = lane.load<E>(a.x + row * a.x_stride);
  if (a.residual) {
    const Row<T, E> residual = lane.load<E>(a.residual + row * a.residual_stride);
    float other[E];
    Row<T, E> sum;
    x.get(value);
    residual.get(other);
#pragma unroll
    for (int i = 0; i < E; i++) value[i] += other[i];
    if (write) lane.store(a.sum + row * a.cols, value);
    sum.set(value);
    sum.get(value);
  } else {
    x.get(value);
  }
}

// value -= mean; adds what that leaves, and its square, to sums.
template <class T, int E>
__device__ __forceinline__ void centre(const Lane& lane, float mean, float (&value)[E], float (&sums)[2]) {
  const int held = lane.held<T, E>();
  float squares = 0;
#pragma unroll
  for (int i = 0; i < E; i++) {
    value[i] = i < held ? value[i] - mean : 0.f;
    squares += value[i] * value[i];
  }
  sums[0] += sum_of(value);
  sums[1] += squares;
}

// From the sum of squares of what centring left, and the mean of what it left. NaN stays.
__device__ __forceinline__ float rstd_of(float squares, float left, float count, float eps) {
  const float variance = squares / count - left * left;
  return rsqrtf((variance < 0 ? 0.f : variance) + eps);
}

// y from what centring left.
template <int E, class T>
__device__ __forceinline__ void store_y(const Forward<T>& a, const Lane& lane, int64_t row, float left, float rstd,
                                        float (&value)[E]) {
  float p[E];
  const float offset = -left * rstd;
#pragma unroll
  for (int i = 0; i < E; i++) value[i] = value[i] * rstd + offset;
  if (a.weight) {
    lane.load<E>(a.weight).get(p);
#pragma unroll
    for (int i = 0; i < E; i++) value[i] *= p[i];
  }
  if (a.bias) {
    lane.load<E>(a.bias).get(p);
#pragma unroll
    for (int i = 0; i < E; i++) value[i] += p[i];
  }
  lane.store(a.y + row * a.cols, value);
}

template <class T>
__device__ __forceinline__ void store_statistics(const Forward<T>& a, int64_t row, float mean, float rstd) {
  if (a.mean) a.mean[row] = mean;
  a.rstd[row] = rstd;
}

template <class T, int E, int team>
__global__ __launch_bounds__(team == kBlock ? kMostThreads : kThreads, team == kBlock ? 1 : 6) void norm_fwd_kernel(
    Forward<T> a) {
  PYGPT_SHARED(float, shared, [3][32]);
  const int size = team == kBlock ? blockDim.x : team;
  const int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.x / size) + threadIdx.x / size;
  const bool known = row < a.rows;
  const Lane lane{static_cast<int>(threadIdx.x % size), size, 0, known ? a.cols : 0, a.vectors};
  const float count = static_cast<float>(a.cols);

  float value[E], first = 0, left = 0, sums[2] = {};
  load_sum(a, lane, row, true, value);
  if (a.mean) {
    float total[1] = {sum_of(value)};
    team_sum<team>(total, shared);
    first = total[0] / count;
  }
  centre<T>(lane, first, value, sums);
  team_sum<team>(sums, shared + 1);
  if (a.mean) left = sums[0] / count;
  const float rstd = rstd_of(sums[1], left, count, a.eps);
  store_y(a, lane, row, left, rstd, value);
  if (known && lane.rank == 0) store_statistics(a, row, first + left, rstd);
}

// A row of any length, by a block.
template <class T>
__global__ __launch_bounds__(kMostThreads, 1) void wide_norm_fwd_kernel(Forward<T> a) {
  PYGPT_SHARED(float, shared, [3][32]);
  const int64_t row = blockIdx.x;
  Lane lane{static_cast<int>(threadIdx.x), kMostThreads, 0, a.cols, a.vectors};
  const float count = static_cast<float>(a.cols);

  float value[kWideE], first = 0, left = 0, sums[2] = {};
  if (a.mean) {
    float total[1] = {};
    for (lane.start = 0; lane.start < a.cols; lane.start += kMostThreads * kWideE) {
      load_sum(a, lane, row, false, value);
      total[0] += sum_of(value);
    }
    team_sum<kBlock>(total, shared);
    first = total[0] / count;
  }
  for (lane.start = 0; lane.start < a.cols; lane.start += kMostThreads * kWideE) {
    load_sum(a, lane, row, false, value);
    centre<T>(lane, first, value, sums);
  }
  team_sum<kBlock>(sums, shared + 1);
  if (a.mean) left = sums[0] / count;
  const float rstd = rstd_of(sums[1], left, count, a.eps);
  for (lane.start = 0; lane.start < a.cols; lane.start += kMostThreads * kWideE) {
    load_sum(a, lane, row, true, value);
#pragma unroll
    for (int i = 0; i < kWideE; i++) value[i] -= first;
    store_y(a, lane, row, left, rstd, value);
  }
  if (threadIdx.x == 0) store_statistics(a, row, first + left, rstd);
}

template <class T>
Error norm_fwd(const NormArgs& n, const Stream& stream) {
  Forward<T> a{n.rows, n.cols, n.x.stride, n.residual.stride, static_cast<float>(n.eps),
               static_cast<const T*>(n.x.data), static_cast<const T*>(n.residual.data), static_cast<const T*>(n.weight),
               static_cast<const T*>(n.bias), static_cast<T*>(n.y), static_cast<T*>(n.sum), static_cast<float*>(n.mean),
               static_cast<float*>(n.rstd)};
  a.vectors = a.cols % kVector<T> == 0 && takes_vectors(a.x, a.x_stride) && takes_vectors(a.weight) &&
              takes_vectors(a.residual, a.residual_stride) && takes_vectors(a.bias) && takes_vectors(a.y) &&
              takes_vectors(a.sum);
  if (a.cols > kLongest)
    return launch(wide_norm_fwd_kernel<T>, blocks(a.rows), dim3(kMostThreads), 0, stream, a);
  return by_width<kMostE>(a.cols, [&](auto shape) {
    using S = decltype(shape);
    const dim3 grid = blocks(ceil_div(a.rows, S::teams));
    return launch(norm_fwd_kernel<T, S::E, S::team>, grid, dim3(S::threads(a.cols)), 0, stream, a);
  });
}

}  // namespace

Error norm_fwd(const NormArgs& a, const Stream& stream) {
  if (a.rows == 0) return nullptr;
  return by_dtype(a.dtype, [&](auto zero) { return norm_fwd<decltype(zero)>(a, stream); });
}

}  // namespace pygpt::cuda
