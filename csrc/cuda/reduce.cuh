// out[c] = sum over rows r of x[r * stride + c]: the gradient of a bias, and the last step of every sum
// that a persistent kernel leaves in parts.
//
// A block sums the columns of one tile over one slice of the rows. Its threads are teams of `width`
// threads side by side; a thread keeps kUnroll rows in flight and adds those to each other first, which
// keeps its chain of additions short, and the teams' sums meet in shared memory. Of more than kFewRows
// rows the slices' sums are written as float and summed in turn by a second launch. Slices and order
// depend on the shape alone.
#pragma once
#include <algorithm>

#include "vector.cuh"

namespace pygpt::cuda {

// What is summed: the elements of a matrix. Another source has the same members; load<V> gives what V
// adjacent columns of a row add to their sums.
template <class T>
struct Matrix {
  static constexpr int kWidest = kVector<T>;
  const T* x;
  int64_t stride;

  template <int V>
  __device__ __forceinline__ void load(int64_t row, int64_t col, float (&terms)[V]) const {
    cuda::load<V>(x + row * stride + col, terms);
  }
  bool takes_vectors() const { return cuda::takes_vectors(x, stride); }
};

// The columns from `split` on go to `second`, the others to `out`; each is a line of its own per slice.
template <class Out>
struct Sums {
  Out *out, *second;
  int64_t split;
};

namespace column_sums_detail {

constexpr int kThreads = 256, kUnroll = 4;
constexpr int64_t kFewRows = 256;   // summed by one launch
constexpr int64_t kBlocks = 1024;   // tiles times slices, about
constexpr int64_t kSliceRows = 64;  // at least in a slice

template <int V, class Source, class Out>
__global__ __launch_bounds__(kThreads) void column_sums_kernel(Source source, int64_t rows, int64_t cols, int width,
                                                               int64_t slice_rows, Sums<Out> sums) {
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
    if (c < split) sums.out[slice * split + c] = from_float<Out>(sum);
    else sums.second[slice * (cols - split) + c - split] = from_float<Out>(sum);
  }
}

template <int V, class Source, class Out>
Error sum_slices(const Source& source, int64_t rows, int64_t cols, int64_t slice_rows, Sums<Out> sums,
                 const Stream& stream) {
  int width = 32;
  while (width > 8 && width / 2 * V >= cols) width /= 2;
  const int64_t tiles = ceil_div(cols, width * V), slices = std::max<int64_t>(ceil_div(rows, slice_rows), 1);
  return launch(column_sums_kernel<V, Source, Out>, blocks(tiles, slices), dim3(kThreads), 0, stream, source, rows,
                cols, width, slice_rows, sums);
}

}  // namespace column_sums_detail

// The sums over rows of every column of source; zeros if there are no rows.
template <class Source, class Out>
Error column_sums(const Source& source, int64_t rows, int64_t cols, Sums<Out> sums, const Stream& stream) {
  using namespace column_sums_detail;
  if (cols == 0) return nullptr;
  if (rows <= kFewRows) return sum_slices<1>(source, rows, cols, kFewRows, sums, stream);
  constexpr int V = Source::kWidest;
  const bool vectors = source.takes_vectors() && cols % V == 0;
  const int64_t tiles = ceil_div(cols, 32 * (vectors ? V : 1));
  const int64_t slice_rows = std::max(kSliceRows, ceil_div(rows, std::max<int64_t>(kBlocks / tiles, 1)));
  const int64_t slices = ceil_div(rows, slice_rows);
  float* partials = static_cast<float*>(stream.scratch(slices * cols * static_cast<int64_t>(sizeof(float))));
  const Sums<float> parts{partials, nullptr, cols};
  const Error error = vectors ? sum_slices<V>(source, rows, cols, slice_rows, parts, stream)
                              : sum_slices<1>(source, rows, cols, slice_rows, parts, stream);
  if (error) return error;
  return sum_slices<1>(Matrix<float>{partials, cols}, slices, cols, slices, sums, stream);
}

// out (cols) = the sums of x (rows, cols), whose rows are `stride` elements apart.
template <class In, class Out>
Error column_sums(const In* x, int64_t rows, int64_t cols, int64_t stride, Out* out, const Stream& stream) {
  return column_sums(Matrix<In>{x, stride}, rows, cols, Sums<Out>{out, nullptr, cols}, stream);
}

}  // namespace pygpt::cuda
