// Column sums, out[c] = sum over rows r of x[r * stride + c]: the gradient of a bias, and the last step of kernels
// whose blocks leave partial sums.
//
// A block sums the columns of one tile over one slice of the rows. Its threads form teams of `width` neighbouring
// threads, and each team takes other rows. A thread has kUnroll rows in flight and adds these to each other first,
// which keeps the chain of additions short. The teams' sums are added in shared memory. If there are more than
// kSingleLaunchRows rows, each slice's sums are stored as float and a second launch adds them. The slices and the order
// of additions depend on the shape alone.
#pragma once
#include <algorithm>

#include "vector.cuh"

namespace pygpt::cuda {

// The source of column_sums: here the elements of a matrix. Other sources have the same members; load<V> returns the
// terms that V adjacent columns of a row add to their sums.
template <class T>
struct Matrix {
  static constexpr int kVectorWidth = kVector<T>;
  const T* x;
  int64_t stride;

  template <int V>
  __device__ __forceinline__ void load(int64_t row, int64_t col, float (&terms)[V]) const {
    cuda::load<V>(x + row * stride + col, terms);
  }
  bool can_vectorize() const { return cuda::can_vectorize(x, stride); }
};

// Where the sums are stored: those of columns below `split` in `first`, the others in `second`. Every slice has a line
// of its own in both.
template <class Out>
struct ColumnSums {
  Out *first, *second;
  int64_t split;
};

namespace column_sums_detail {

constexpr int kThreads = 256, kUnroll = 4;
constexpr int64_t kSingleLaunchRows = 256;
constexpr int64_t kTargetBlocks = 1024;  // approximately tiles times slices
constexpr int64_t kMinSliceRows = 64;

template <int V, class Source, class Out>
__global__ __launch_bounds__(kThreads) void column_sums_kernel(Source source, int64_t rows, int64_t cols, int width,
                                                               int64_t slice_rows, ColumnSums<Out> sums) {
  PYGPT_SHARED(float, shared, [kThreads * V]);
  const int teams = kThreads / width, team = threadIdx.x / width;
  const int64_t slice = blockIdx.y, first_col = blockIdx.x * (static_cast<int64_t>(width) * V);
  const int64_t col = first_col + threadIdx.x % width * V;
  const int64_t begin = slice * slice_rows, end = begin + slice_rows < rows ? begin + slice_rows : rows;

  float total[V] = {};
  for (int64_t row = begin + team; row < end && col < cols; row += teams * kUnroll) {
    float terms[kUnroll][V] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; u++)
      if (row + u * teams < end) source.template load<V>(row + u * teams, col, terms[u]);
#pragma unroll
    for (int v = 0; v < V; v++) total[v] += (terms[0][v] + terms[1][v]) + (terms[2][v] + terms[3][v]);
  }

#pragma unroll
  for (int v = 0; v < V; v++) shared[threadIdx.x * V + v] = total[v];
  __syncthreads();
  for (int i = threadIdx.x; i < width * V && first_col + i < cols; i += kThreads) {
    float sum = 0;
    for (int t = 0; t < teams; t++) sum += shared[t * width * V + i];
    const int64_t c = first_col + i, split = sums.split;
    if (c < split) sums.first[slice * split + c] = from_float<Out>(sum);
    else sums.second[slice * (cols - split) + c - split] = from_float<Out>(sum);
  }
}

template <int V, class Source, class Out>
Error sum_slices(const Source& source, int64_t rows, int64_t cols, int64_t slice_rows, ColumnSums<Out> sums,
                 const Stream& stream) {
  int width = 32;
  while (width > 8 && width / 2 * V >= cols) width /= 2;
  const int64_t tiles = ceil_div(cols, width * V), slices = std::max<int64_t>(ceil_div(rows, slice_rows), 1);
  return launch(column_sums_kernel<V, Source, Out>, make_grid(tiles, slices), dim3(kThreads), 0, stream, source, rows,
                cols, width, slice_rows, sums);
}

}  // namespace column_sums_detail

// Sums every column of `source` over its rows. The sums are zeros if there are no rows.
template <class Source, class Out>
Error column_sums(const Source& source, int64_t rows, int64_t cols, ColumnSums<Out> sums, const Stream& stream) {
  using namespace column_sums_detail;
  if (cols == 0) return nullptr;
  if (rows <= kSingleLaunchRows) return sum_slices<1>(source, rows, cols, kSingleLaunchRows, sums, stream);
  constexpr int V = Source::kVectorWidth;
  const bool vectorized = source.can_vectorize() && cols % V == 0;
  const int64_t tiles = ceil_div(cols, 32 * (vectorized ? V : 1));
  const int64_t slice_rows = std::max(kMinSliceRows, ceil_div(rows, std::max<int64_t>(kTargetBlocks / tiles, 1)));
  const int64_t slices = ceil_div(rows, slice_rows);
  float* partials = static_cast<float*>(stream.scratch(slices * cols * static_cast<int64_t>(sizeof(float))));
  const ColumnSums<float> parts{partials, nullptr, cols};
  const Error error = vectorized ? sum_slices<V>(source, rows, cols, slice_rows, parts, stream)
                                 : sum_slices<1>(source, rows, cols, slice_rows, parts, stream);
  if (error) return error;
  return sum_slices<1>(Matrix<float>{partials, cols}, slices, cols, slices, sums, stream);
}

// out (cols) = column sums of x (rows, cols), whose rows are `stride` elements apart.
template <class In, class Out>
Error column_sums(const In* x, int64_t rows, int64_t cols, int64_t stride, Out* out, const Stream& stream) {
  return column_sums(Matrix<In>{x, stride}, rows, cols, ColumnSums<Out>{out, nullptr, cols}, stream);
}

}  // namespace pygpt::cuda
