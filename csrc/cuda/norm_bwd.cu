// The backward of layer_norm and rms_norm, of a tensor, of a sum and of a sum with dropout (norm.cu), over rows of n
// elements.
//
//     dx = rstd (g - sum(g) / n - xhat sum(g xhat) / n) + dsum,   g = dy w,   xhat = (x - mean) rstd
//     dw = sum over rows of dy xhat,   db = sum over rows of dy
//
// Without a mean (rms_norm, add_rms_norm), x - mean becomes x and the sum(g) term is absent. For the norms of a sum, x
// is that sum, and dsum is the gradient from the sum's other consumer (the residual stream).
//
// The kernel is memory-bound: it moves three times the bytes of x, four times with dsum. Blocks are persistent: each
// processes many rows and accumulates dw and db in registers. It copies the next row to shared memory while it works on
// the current one; a lane reads only what it copied itself, so no barrier is needed. At the end each block stores one
// line of partial sums, which column_sums adds up. The number of blocks depends on the shape alone; for 16384 x 768 in
// 16 bits the partial sums are 4 % of the traffic. Rows that are too long for this scheme, or for the device's shared
// memory, are read twice for dx, and again for dw and for db.
#include "norm.cuh"
#include "reduce.cuh"

namespace pygpt::cuda {
namespace {

constexpr int kMaxE = 24;  // most elements per lane
constexpr int64_t kMaxStageBytes = 24 << 10;  // longest row that is held in shared memory

// The number of blocks of `threads` threads that must fit into a multiprocessor's registers (for __launch_bounds__).
template <class T, bool is_general, int E, int team>
constexpr int min_blocks_per_sm(int threads) {
  return team == kWholeBlock ? kMaxThreads / threads : E < 32 && sizeof(T) == 2 && !is_general ? 4 : 3;
}

// General kernels have dropout, an offset of the weights, an R (the type of x, dsum and dresidual) of another type than
// T (of dy and dx), float parameters, or a dresidual besides dx.
template <class T, class R>
struct NormBwdParams {
  int64_t rows, cols, dy_stride, x_stride, dsum_stride;
  const T* dy;
  const R *x, *dsum;
  const void* weight;
  const float *mean, *rstd;
  T* dx;
  R* dresidual;
  bool vectorized;
  General general;
  float *dw, *db;  // one line of partial sums per block of norm_bwd_kernel; null: not wanted
  int64_t partial_stride;  // floats from one block's line to the next

  __device__ __forceinline__ float mean_of(int64_t row) const { return mean ? mean[row] : 0.f; }
};

// Replaces x by xhat and dy by g. The product g must not be fused into a later addition: in a row of one column
// g - sum(g) / n must be 0.
template <int E>
__device__ __forceinline__ void to_xhat_and_g(float (&x)[E], float (&dy)[E], const float (&w)[E], float mean,
                                              float rstd) {
#pragma unroll
  for (int i = 0; i < E; i++) {
    x[i] = (x[i] - mean) * rstd;
    dy[i] = __fmul_rn(dy[i], w[i]);
  }
}

// Adds g to sums[0] and g xhat to sums[1].
template <int E>
__device__ __forceinline__ void add_terms(const float (&xhat)[E], const float (&g)[E], float (&sums)[2]) {
  float products = 0;
#pragma unroll
  for (int i = 0; i < E; i++) products += g[i] * xhat[i];
  sums[0] += sum_of(g);
  sums[1] += products;
}

// Replaces g by dx.
template <int E>
__device__ __forceinline__ void to_dx(float (&g)[E], const float (&xhat)[E], const float (&dsum)[E], float mean_g,
                                      float mean_gx, float rstd) {
#pragma unroll
  for (int i = 0; i < E; i++) g[i] = (g[i] - mean_g - xhat[i] * mean_gx) * rstd + dsum[i];
}

// A lane's E elements of a row of T in shared memory, which no other lane accesses: those that it has of a row of Lead.
// Chunk c of all threads is contiguous.
template <class T, int E, class Lead = T>
struct LaneRow {
  static constexpr int V = kVector<T>, kChunks = E / V;
  uint4* chunks;

  __device__ __forceinline__ uint4& operator[](int c) const { return chunks[c * blockDim.x]; }
  __device__ __forceinline__ T& element(int i) const { return reinterpret_cast<T*>(&(*this)[i / V])[i % V]; }
  // The elements of chunk c of Lead, which are several chunks where T is wider.
  __device__ __forceinline__ void get(int c, float (&x)[kVector<Lead>]) const {
    constexpr int n = kVector<Lead> / V;
#pragma unroll
    for (int k = 0; k < n; k++) to_floats<T>((*this)[c * n + k], reinterpret_cast<float(&)[V]>(x[k * V]));
  }
  __device__ __forceinline__ void set(int c, const float (&x)[kVector<Lead>]) const {
    constexpr int n = kVector<Lead> / V;
#pragma unroll
    for (int k = 0; k < n; k++) (*this)[c * n + k] = from_floats<T>(reinterpret_cast<const float(&)[V]>(x[k * V]));
  }

  // Starts an asynchronous copy, which belongs to the next committed group; zeros beyond the row's end.
  __device__ __forceinline__ void copy_from(const T* row, const Lane& lane) const {
    if (lane.vectorized) {
#pragma unroll
      for (int c = 0; c < kChunks; c++) {
        const int64_t col = lane.column<Lead>(c * V);
        ptx::cp_async_16(&(*this)[c], row + col, col < lane.cols);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < E; i++)
        element(i) = lane.column<Lead>(i) < lane.cols ? row[lane.column<Lead>(i)] : from_float<T>(0);
    }
  }
  __device__ __forceinline__ void copy_to(T* row, const Lane& lane) const {
    if (lane.vectorized) {
#pragma unroll
      for (int c = 0; c < kChunks; c++)
        if (lane.column<Lead>(c * V) < lane.cols)
          *reinterpret_cast<uint4*>(row + lane.column<Lead>(c * V)) = (*this)[c];
    } else {
      __syncwarp();  // a compiler barrier: the elements were written as uint4 and are read as T
#pragma unroll 1
      for (int i = 0; i < E; i++)
        if (lane.column<Lead>(i) < lane.cols) row[lane.column<Lead>(i)] = element(i);
    }
  }
  __device__ __forceinline__ void fill(float value) const {
#pragma unroll 1
    for (int i = 0; i < E; i++) element(i) = from_float<T>(value);
  }
};

// The shared memory of one row: dy, x and dsum, and its statistics in registers.
template <class T, class R, int E>
struct Stage {
  LaneRow<T, E> dy;
  LaneRow<R, E, T> x, dsum;
  float mean, rstd;

  // The three tensors follow each other in `shared`.
  __device__ __forceinline__ explicit Stage(uint4* shared) {
    dy.chunks = shared + threadIdx.x;
    x.chunks = dy.chunks + LaneRow<T, E>::kChunks * blockDim.x;
    dsum.chunks = x.chunks + LaneRow<R, E, T>::kChunks * blockDim.x;
  }
  // Starts to load a row. A lane whose `cols` is 0 gets zeros and reads nothing, so the row need not exist.
  __device__ __forceinline__ void start(const NormBwdParams<T, R>& a, const Lane& lane, int64_t row) {
    dy.copy_from(a.dy + row * a.dy_stride, lane);
    x.copy_from(a.x + row * a.x_stride, lane);
    if (a.dsum) dsum.copy_from(a.dsum + row * a.dsum_stride, lane);
    ptx::cp_async_commit();
    mean = lane.cols ? a.mean_of(row) : 0.f;
    rstd = lane.cols ? a.rstd[row] : 0.f;
  }
};

// Stores the column sums of the block's rows in the block's line. Several teams add their sums in shared memory first.
template <class T, int E, int team>
__device__ __forceinline__ void store_partial_sums(const float (&sums)[E], const Lane& lane, float* shared,
                                                   float* line) {
  if constexpr (team == kWholeBlock) {
#pragma unroll
    for (int i = 0; i < E; i++)
      if (lane.column<T>(i) < lane.cols) line[lane.column<T>(i)] = sums[i];
  } else {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < E; i++) shared[threadIdx.x / team * (E * team) + lane.column<T>(i)] = sums[i];
    __syncthreads();
    for (int col = threadIdx.x; col < lane.cols; col += kThreads) {
      float total = 0;
#pragma unroll
      for (int t = 0; t < kThreads / team; t++) total += shared[t * (E * team) + col];
      line[col] = total;
    }
  }
}

// The weight of general kernels lies in shared memory as float, with its offset.
template <class T, bool is_general>
using Weight = std::conditional_t<is_general, float, T>;

template <class T, class R, bool is_general, int E>
__device__ __forceinline__ void start_weight(const NormBwdParams<T, R>& a, const Lane& lane,
                                             const LaneRow<Weight<T, is_general>, E, T>& weight) {
  if (!a.weight) return weight.fill(1);
  if constexpr (is_general) {
#pragma unroll 1
    for (int i = 0; i < E; i++) {
      const int64_t col = lane.column<T>(i);
      float w = 0;
      if (col < lane.cols)
        w = a.general.float_parameters ? static_cast<const float*>(a.weight)[col]
                                       : to_float(static_cast<const T*>(a.weight)[col]);
      weight.element(i) = w + a.general.weight_offset;
    }
  } else {
    weight.copy_from(static_cast<const T*>(a.weight), lane);
  }
}

// Dynamic shared memory holds the weight, the current row and the next; at the end, store_partial_sums uses it.
template <class T, class R, bool is_general, int E, int team>
__global__ __launch_bounds__(
    team == kWholeBlock ? kMaxThreads : kThreads,
    min_blocks_per_sm<T, is_general, E, team>(kMaxThreads)) void norm_bwd_kernel(NormBwdParams<T, R> a) {
  constexpr int V = kVector<T>, kChunks = E / V;
  PYGPT_SHARED(float, shared, [2][2][32]);
  PYGPT_DYNAMIC_SHARED(bytes);
  const int size = team == kWholeBlock ? blockDim.x : team, teams = blockDim.x / size, team_index = threadIdx.x / size;
  const float count = static_cast<float>(a.cols);
  const Lane lane{static_cast<int>(threadIdx.x % size), size, 0, a.cols, a.vectorized};
  auto lane_at = [&](int64_t row) { return Lane{lane.rank, size, 0, row < a.rows ? a.cols : 0, a.vectorized}; };

  uint4* const chunks = reinterpret_cast<uint4*>(bytes);
  const LaneRow<Weight<T, is_general>, E, T> weight{chunks + threadIdx.x};
  uint4* const stages = chunks + weight.kChunks * blockDim.x;
  Stage<T, R, E> current(stages);
  Stage<T, R, E> next(stages + (kChunks + (a.dsum ? 2 : 1) * current.x.kChunks) * blockDim.x);
  start_weight<T, R, is_general, E>(a, lane, weight);

  float dw[E] = {}, db[E] = {};
  int parity = 0;  // team_sum alternates between two buffers
  int64_t first = blockIdx.x * static_cast<int64_t>(teams);
  const int64_t step = gridDim.x * static_cast<int64_t>(teams);
  for (current.start(a, lane_at(first + team_index), first + team_index); first < a.rows; first += step) {
    const int64_t row = first + team_index;
    next.start(a, lane_at(row + step), row + step);
    ptx::cp_async_wait<1>();

    float sums[2] = {};
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
      float dy[V], x[V], w[V], g[V];
      current.dy.get(c, dy), current.dy.get(c, g), current.x.get(c, x), weight.get(c, w);
      to_xhat_and_g(x, g, w, current.mean, current.rstd);
      add_terms(x, g, sums);
#pragma unroll
      for (int v = 0; v < V; v++) {
        dw[c * V + v] += dy[v] * x[v];
        db[c * V + v] += dy[v];
      }
    }
    team_sum<team>(sums, shared[parity]);
    __syncwarp();  // a compiler barrier: the loop below reads shared memory again, which saves registers
    const float mean_g = a.mean ? sums[0] / count : 0.f, mean_gx = sums[1] / count;
    if (a.dx || (is_general && a.dresidual)) {
#pragma unroll
      for (int c = 0; c < kChunks; c++) {
        float g[V], x[V], w[V], dsum[V] = {};
        current.dy.get(c, g), current.x.get(c, x), weight.get(c, w);
        if (a.dsum) current.dsum.get(c, dsum);
        to_xhat_and_g(x, g, w, current.mean, current.rstd);
        to_dx(g, x, dsum, mean_g, mean_gx, current.rstd);
        if constexpr (is_general) {
          current.x.set(c, g);
          if (a.dx && a.general.seed) a.general.template drop<T>(lane, row, c * V, g);
        }
        current.dy.set(c, g);
      }
      if constexpr (is_general)
        if (a.dresidual) current.x.copy_to(a.dresidual + row * a.cols, lane_at(row));
      if (!is_general || a.dx) current.dy.copy_to(a.dx + row * a.cols, lane_at(row));
    }
    const Stage<T, R, E> done = current;
    current = next, next = done, parity ^= 1;
  }
  ptx::cp_async_wait<0>();

  float* const team_sums = reinterpret_cast<float*>(bytes);
  if (a.dw) store_partial_sums<T, E, team>(dw, lane, team_sums, a.dw + blockIdx.x * a.partial_stride);
  if (a.db) store_partial_sums<T, E, team>(db, lane, team_sums, a.db + blockIdx.x * a.partial_stride);
}

// dx of rows of any length; a block processes one row.
template <class T, class R, bool is_general>
__global__ __launch_bounds__(kMaxThreads, 1) void long_row_norm_bwd_kernel(NormBwdParams<T, R> a) {
  constexpr int E = kLongRowE;
  PYGPT_SHARED(float, shared, [2][32]);
  const int64_t row = blockIdx.x;
  Lane lane{static_cast<int>(threadIdx.x), kMaxThreads, 0, a.cols, a.vectorized};
  const float count = static_cast<float>(a.cols), mean = a.mean_of(row), rstd = a.rstd[row];
  float x[E], g[E], sums[2] = {};
  auto load_xhat_and_g = [&] {
    const Row<T, E> dy_row = lane.load<E, T>(a.dy + row * a.dy_stride);
    const Row<R, E> x_row = lane.load<E, T>(a.x + row * a.x_stride);
    float w[E];
#pragma unroll
    for (int i = 0; i < E; i++) w[i] = 1;
    if (is_general && a.weight && a.general.float_parameters)
      lane.load<E, T>(static_cast<const float*>(a.weight)).get(w);
    else if (a.weight) lane.load<E, T>(static_cast<const T*>(a.weight)).get(w);
    if (is_general && a.weight)
#pragma unroll
      for (int i = 0; i < E; i++) w[i] += a.general.weight_offset;
    x_row.get(x), dy_row.get(g);
    to_xhat_and_g(x, g, w, mean, rstd);
  };

  for (lane.start = 0; lane.start < a.cols; lane.start += kMaxThreads * E) {
    load_xhat_and_g();
    add_terms(x, g, sums);
  }
  team_sum<kWholeBlock>(sums, shared);
  const float mean_g = a.mean ? sums[0] / count : 0.f, mean_gx = sums[1] / count;
  for (lane.start = 0; lane.start < a.cols; lane.start += kMaxThreads * E) {
    float dsum[E] = {};
    load_xhat_and_g();
    if (a.dsum) lane.load<E, T>(a.dsum + row * a.dsum_stride).get(dsum);
    to_dx(g, x, dsum, mean_g, mean_gx, rstd);
    if constexpr (is_general) {
      if (a.dresidual) lane.store<T>(a.dresidual + row * a.cols, g);
      if (a.dx && a.general.seed) a.general.template drop<T>(lane, row, 0, g);
    }
    if (!is_general || a.dx) lane.store<T>(a.dx + row * a.cols, g);
  }
}

// The terms of dw = sum over rows of dy xhat, as a source for column_sums.
template <class T, class R>
struct WeightTerms {
  static constexpr int kVectorWidth = kVector<T>;
  Matrix<T> dy;
  Matrix<R> x;
  const float *mean, *rstd;

  template <int V>
  __device__ __forceinline__ void load(int64_t row, int64_t col, float (&terms)[V]) const {
    const float shift = mean ? mean[row] : 0.f, scale = rstd[row];
    float d[V];
    dy.template load<V>(row, col, d);
    if constexpr (V == 1 || V == kVector<R>) {
      x.template load<V>(row, col, terms);
    } else {
#pragma unroll
      for (int v = 0; v < V; v += kVector<R>)
        x.template load<kVector<R>>(row, col + v, reinterpret_cast<float(&)[kVector<R>]>(terms[v]));
    }
#pragma unroll
    for (int v = 0; v < V; v++) terms[v] = d[v] * ((terms[v] - shift) * scale);
  }
  bool can_vectorize() const { return dy.can_vectorize() && x.can_vectorize(); }
};

// The number of persistent blocks: as many as fit on an H100's 132 multiprocessors, by registers and by 208 KiB of
// shared memory, but so few that each loops over its rows at least four times. `loops` is the number of loops of one
// block alone.
int64_t num_blocks(int64_t loops, int blocks_per_sm, int64_t shared) {
  return std::min(132 * std::clamp<int64_t>((208 << 10) / shared, 1, blocks_per_sm), ceil_div(loops, 4));
}

template <class T, class R, bool is_general, class P>
Error long_row_norm_bwd(const NormBwdParams<T, R>& a, P* dw, P* db, const Stream& stream) {
  const WeightTerms<T, R> terms{{a.dy, a.dy_stride}, {a.x, a.x_stride}, a.mean, a.rstd};
  Error error = nullptr;
  if ((a.dx || a.dresidual) && a.rows)
    error = launch(long_row_norm_bwd_kernel<T, R, is_general>, make_grid(a.rows), dim3(kMaxThreads), 0, stream, a);
  if (dw && !error) error = column_sums(terms, a.rows, a.cols, ColumnSums<P>{dw, nullptr, a.cols}, stream);
  if (db && !error) error = column_sums(a.dy, a.rows, a.cols, a.dy_stride, db, stream);
  return error;
}

// P is the type of the parameters.
template <class T, class R, bool is_general, class P>
Error norm_bwd(const NormArgs& n, const Stream& stream) {
  NormBwdParams<T, R> a{};
  a.general = General(n);
  a.rows = n.rows, a.cols = n.cols;
  a.dy = static_cast<const T*>(n.dy.data), a.dy_stride = n.dy.stride;
  a.x = static_cast<const R*>(n.x.data), a.x_stride = n.x.stride;
  a.dsum = static_cast<const R*>(n.dsum.data), a.dsum_stride = n.dsum.stride;
  a.weight = n.weight, a.dx = static_cast<T*>(n.dx), a.dresidual = static_cast<R*>(n.dresidual);
  a.mean = static_cast<const float*>(n.mean), a.rstd = static_cast<const float*>(n.rstd);
  P *const dw = static_cast<P*>(n.dw), *const db = static_cast<P*>(n.db);
  a.vectorized = a.cols % kVector<T> == 0 && can_vectorize(a.dy, a.dy_stride) && can_vectorize(a.x, a.x_stride) &&
                 can_vectorize(a.dsum, a.dsum_stride) && can_vectorize(static_cast<const T*>(a.weight)) &&
                 can_vectorize(a.dx) && can_vectorize(a.dresidual);
  auto long_row = [&] { return long_row_norm_bwd<T, R, is_general, P>(a, dw, db, stream); };
  if (a.cols * static_cast<int64_t>(sizeof(T)) > kMaxStageBytes) return long_row();
  return by_cols<kMaxE>(a.cols, [&](auto shape) {
    using S = decltype(shape);
    // With dropout, a whole block's lanes would spill.
    if constexpr (is_general && S::team == kWholeBlock) {
      return long_row();
    } else {
      const int threads = S::threads(a.cols);
      const int64_t stage = sizeof(T) + (a.dsum ? 2 : 1) * sizeof(R);  // bytes per element
      const int64_t shared = (sizeof(Weight<T, is_general>) + 2 * stage) * S::E * threads;
      if (shared + 1024 > max_shared_bytes(stream)) return long_row();
      const int64_t blocks =
          num_blocks(ceil_div(a.rows, S::teams), min_blocks_per_sm<T, is_general, S::E, S::team>(threads), shared);
      a.partial_stride = (dw ? a.cols : 0) + (db ? a.cols : 0);
      const int64_t bytes = blocks * a.partial_stride * static_cast<int64_t>(sizeof(float));
      float* partials = static_cast<float*>(stream.scratch(bytes));
      if (dw) a.dw = partials;
      if (db) a.db = partials + a.partial_stride - a.cols;
      Error error = nullptr;
      auto kernel = norm_bwd_kernel<T, R, is_general, S::E, S::team>;
      if (blocks) error = launch(kernel, make_grid(blocks), dim3(threads), shared, stream, a);
      if (error) return error;
      return column_sums(Matrix<float>{partials, a.partial_stride}, blocks, a.partial_stride,
                         ColumnSums<P>{dw ? dw : db, db, a.cols}, stream);
    }
  });
}

}  // namespace

Error norm_bwd(const NormArgs& a, const Stream& stream) {
  if (a.cols == 0) return nullptr;
  return by_types(a, [&](auto t, auto r, auto is_general) {
    using T = decltype(t);
    using R = decltype(r);
    if constexpr (is_general && sizeof(T) == 2)
      if (a.parameter_dtype == DType::f32) return norm_bwd<T, R, true, float>(a, stream);
    return norm_bwd<T, R, is_general, T>(a, stream);
  });
}

}  // namespace pygpt::cuda
