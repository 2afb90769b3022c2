// The backward of layer_norm, add_layer_norm and rms_norm (norm.cu) over rows of n elements.
//
//     dx = rstd (g - sum(g) / n - xhat sum(g xhat) / n) + dsum,   g = dy w,   xhat = (x - mean) rstd
//     dw = sum over rows of dy xhat,   db = sum over rows of dy
//
// For rms_norm x - mean becomes x, and sum(g) goes. dsum is the gradient that reaches add_layer_norm's sum by
// its other road; x is that sum then.
//
// Bound by memory: it moves three times the bytes of x, with dsum four times. Blocks stay for many rows: they
// keep dw and db in registers, copy the next row to shared memory while they work on this one (a lane reads back
// only what it copied itself, which takes no barrier), and leave one line of sums each for column_sums. How many
// blocks there are depends on the shape alone; at 16384 x 768 in 16 bits their lines are 4 % of those bytes, written
// and read once more. Rows too long for that, or for the device's shared memory, are read twice for dx, and once more
// for dw and for db.
#include "norm.cuh"
#include "reduce.cuh"

namespace pygpt::cuda {
namespace {

constexpr int kMostE = 24;                  // elements a lane
constexpr int64_t kStagedBytes = 24 << 10;  // the longest row held in shared memory

// Blocks of `threads` that a multiprocessor's registers hold.
template <class T, int E, int team>
constexpr int resident(int threads) {
  return team == kBlock ? kMostThreads / threads : E < 32 && sizeof(T) == 2 ? 4 : 3;
}

template <class T>
struct Backward {
  int64_t rows, cols, dy_stride, x_stride, dsum_stride;
  const T *dy, *x, *dsum, *weight;
  const float *mean, *rstd;
  T* dx;
  bool vectors;
  float *dw, *db;  // for each block of norm_bwd_kernel a line, `line` floats from the last; null: not wanted
  int64_t line;

  __device__ __forceinline__ float mean_of(int64_t row) const { return mean ? mean[row] : 0.f; }
};

// x -> xhat, dy -> g. g is rounded on its own: in a row of one column g - sum(g) / n is 0.
template <int E>
__device__ __forceinline__ void to_xhat_and_g(float (&x)[E], float (&dy)[E], const float (&w)[E], float mean,
                                              float rstd) {
#pragma unroll
  for (int i = 0; i < E; i++) {
    x[i] = (x[i] - mean) * rstd;
    dy[i] = __fmul_rn(dy[i], w[i]);
  }
}

// Adds g and g xhat to sums.
template <int E>
__device__ __forceinline__ void add_terms(const float (&xhat)[E], const float (&g)[E], float (&sums)[2]) {
  float products = 0;
#pragma unroll
  for (int i = 0; i < E; i++) products += g[i] * xhat[i];
  sums[0] += sum_of(g);
  sums[1] += products;
}

// g -> dx.
template <int E>
__device__ __forceinline__ void to_dx(float (&g)[E], const float (&xhat)[E], const float (&dsum)[E], float mean_g,
                                      float mean_gx, float rstd) {
#pragma unroll
  for (int i = 0; i < E; i++) g[i] = (g[i] - mean_g - xhat[i] * mean_gx) * rstd + dsum[i];
}

// A lane's E elements of a row in shared memory, which no other lane touches: each chunk beside those of the
// next threads.
template <class T, int E>
struct Part {
  static constexpr int V = kVector<T>, kChunks = E / V;
  uint4* chunks;

  __device__ __forceinline__ uint4& operator[](int c) const { return chunks[c * blockDim.x]; }
  __device__ __forceinline__ T& element(int i) const { return reinterpret_cast<T*>(&(*this)[i / V])[i % V]; }
  __device__ __forceinline__ void get(int c, float (&x)[V]) const { to_floats<T>((*this)[c], x); }

  // Complete when the copies committed next are; zeros beyond the row's end.
  __device__ __forceinline__ void copy_from(const T* row, const Lane& lane) const {
    if (lane.vectors) {
#pragma unroll
      for (int c = 0; c < kChunks; c++) {
        const int64_t col = lane.column<T>(c * V);
        ptx::cp_async_16(&(*this)[c], row + col, col < lane.cols);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < E; i++)
        element(i) = lane.column<T>(i) < lane.cols ? row[lane.column<T>(i)] : from_float<T>(0);
    }
  }
  __device__ __forceinline__ void copy_to(T* row, const Lane& lane) const {
    if (lane.vectors) {
#pragma unroll
      for (int c = 0; c < kChunks; c++)
        if (lane.column<T>(c * V) < lane.cols) *reinterpret_cast<uint4*>(row + lane.column<T>(c * V)) = (*this)[c];
    } else {
      __syncwarp();  // what was written as uint4 is read as T
#pragma unroll 1
      for (int i = 0; i < E; i++)
        if (lane.column<T>(i) < lane.cols) row[lane.column<T>(i)] = element(i);
    }
  }
  __device__ __forceinline__ void fill(float value) const {
#pragma unroll 1
    for (int i = 0; i < E; i++) element(i) = from_float<T>(value);
  }
};

// A row on its way.
template <class T, int E>
struct Staged {
  Part<T, E> dy, x, dsum;
  float mean, rstd;

  // The parts follow each other from `shared` on.
  __device__ __forceinline__ explicit Staged(uint4* shared) {
    const int part = Part<T, E>::kChunks * blockDim.x;
    dy.chunks = shared + threadIdx.x, x.chunks = dy.chunks + part, dsum.chunks = x.chunks + part;
  }
  // A lane without columns takes zeros from a row that need not be there.
  __device__ __forceinline__ void start(const Backward<T>& a, const Lane& lane, int64_t row) {
    dy.copy_from(a.dy + row * a.dy_stride, lane);
    x.copy_from(a.x + row * a.x_stride, lane);
    if (a.dsum) dsum.copy_from(a.dsum + row * a.dsum_stride, lane);
    ptx::cp_async_commit();
    mean = lane.cols ? a.mean_of(row) : 0.f;
    rstd = lane.cols ? a.rstd[row] : 0.f;
  }
};

// A lane's sums over the block's rows -> the block's line. A block's teams add theirs up in shared first.
template <class T, int E, int team>
__device__ __forceinline__ void store_line(const float (&sums)[E], const Lane& lane, float* shared, float* line) {
  if constexpr (team == kBlock) {
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

// Dynamic shared memory: the weight, this row and the next; at the end store_line's.
template <class T, int E, int team>
__global__ __launch_bounds__(team == kBlock ? kMostThreads : kThreads,
                             resident<T, E, team>(kMostThreads)) void norm_bwd_kernel(Backward<T> a) {
  constexpr int V = kVector<T>, kChunks = E / V;
  PYGPT_SHARED(float, shared, [2][2][32]);
  PYGPT_DYNAMIC_SHARED(bytes);
  const int size = team == kBlock ? blockDim.x : team, teams = blockDim.x / size, member = threadIdx.x / size;
  const float count = static_cast<float>(a.cols);
  const Lane lane{static_cast<int>(threadIdx.x % size), size, 0, a.cols, a.vectors};
  auto lane_at = [&](int64_t row) { return Lane{lane.rank, size, 0, row < a.rows ? a.cols : 0, a.vectors}; };

  uint4* const parts = reinterpret_cast<uint4*>(bytes);
  const int part = kChunks * blockDim.x;
  const Part<T, E> weight{parts + threadIdx.x};
  Staged<T, E> now(parts + part), next(parts + part * (a.dsum ? 4 : 3));
  if (a.weight) weight.copy_from(a.weight, lane);
  else weight.fill(1);

  float dw[E] = {}, db[E] = {};
  int parity = 0;  // team_sum's memory alternates
  int64_t first = blockIdx.x * static_cast<int64_t>(teams);
  const int64_t step = gridDim.x * static_cast<int64_t>(teams);
  for (now.start(a, lane_at(first + member), first + member); first < a.rows; first += step) {
    const int64_t row = first + member;
    next.start(a, lane_at(row + step), row + step);
    ptx::cp_async_wait<1>();

    float sums[2] = {};
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
      float dy[V], x[V], w[V], g[V];
      now.dy.get(c, dy), now.dy.get(c, g), now.x.get(c, x), weight.get(c, w);
      to_xhat_and_g(x, g, w, now.mean, now.rstd);
      add_terms(x, g, sums);
#pragma unroll
      for (int v = 0; v < V; v++) {
        dw[c * V + v] += dy[v] * x[v];
        db[c * V + v] += dy[v];
      }
    }
    team_sum<team>(sums, shared[parity]);
    __syncwarp();  // what follows is read from shared memory again, not kept in registers
    const float mean_g = a.mean ? sums[0] / count : 0.f, mean_gx = sums[1] / count;
    if (a.dx) {
#pragma unroll
      for (int c = 0; c < kChunks; c++) {
        float g[V], x[V], w[V], dsum[V] = {};
        now.dy.get(c, g), now.x.get(c, x), weight.get(c, w);
        if (a.dsum) now.dsum.get(c, dsum);
        to_xhat_and_g(x, g, w, now.mean, now.rstd);
        to_dx(g, x, dsum, mean_g, mean_gx, now.rstd);
        now.dy[c] = from_floats<T>(g);
      }
      now.dy.copy_to(a.dx + row * a.cols, lane_at(row));
    }
    const Staged<T, E> done = now;
    now = next, next = done, parity ^= 1;
  }
  ptx::cp_async_wait<0>();

  float* const lines = reinterpret_cast<float*>(bytes);
  if (a.dw) store_line<T, E, team>(dw, lane, lines, a.dw + blockIdx.x * a.line);
  if (a.db) store_line<T, E, team>(db, lane, lines, a.db + blockIdx.x * a.line);
}

// dx of a row of any length, by a block.
template <class T>
__global__ __launch_bounds__(kMostThreads, 1) void wide_norm_bwd_kernel(Backward<T> a) {
  constexpr int E = kWideE;
  PYGPT_SHARED(float, shared, [2][32]);
  const int64_t row = blockIdx.x;
  Lane lane{static_cast<int>(threadIdx.x), kMostThreads, 0, a.cols, a.vectors};
  const float count = static_cast<float>(a.cols), mean = a.mean_of(row), rstd = a.rstd[row];
  float x[E], g[E], sums[2] = {};
  auto load_xhat_and_g = [&] {
    const Row<T, E> dy_row = lane.load<E>(a.dy + row * a.dy_stride), x_row = lane.load<E>(a.x + row * a.x_stride);
    float w[E];
#pragma unroll
    for (int i = 0; i < E; i++) w[i] = 1;
    if (a.weight) lane.load<E>(a.weight).get(w);
    x_row.get(x), dy_row.get(g);
    to_xhat_and_g(x, g, w, mean, rstd);
  };

  for (lane.start = 0; lane.start < a.cols; lane.start += kMostThreads * E) {
    load_xhat_and_g();
    add_terms(x, g, sums);
  }
  team_sum<kBlock>(sums, shared);
  const float mean_g = a.mean ? sums[0] / count : 0.f, mean_gx = sums[1] / count;
  for (lane.start = 0; lane.start < a.cols; lane.start += kMostThreads * E) {
    float dsum[E] = {};
    load_xhat_and_g();
    if (a.dsum) lane.load<E>(a.dsum + row * a.dsum_stride).get(dsum);
    to_dx(g, x, dsum, mean_g, mean_gx, rstd);
    lane.store(a.dx + row * a.cols, g);
  }
}

// The terms of dw, for column_sums.
template <class T>
struct WeightTerms {
  static constexpr int kWidest = kVector<T>;
  Matrix<T> dy, x;
  const float *mean, *rstd;

  template <int V>
  __device__ __forceinline__ void load(int64_t row, int64_t col, float (&terms)[V]) const {
    const float shift = mean ? mean[row] : 0.f, scale = rstd[row];
    float d[V];
    dy.template load<V>(row, col, d);
    x.template load<V>(row, col, terms);
#pragma unroll
    for (int v = 0; v < V; v++) terms[v] = d[v] * ((terms[v] - shift) * scale);
  }
  bool takes_vectors() const { return dy.takes_vectors() && x.takes_vectors(); }
};

// Blocks that walk the rows: as many as an H100's 132 multiprocessors hold, by registers and by 208 KiB of shared
// memory, but at least four rounds of rows for each.
int64_t lines_for(int64_t rounds, int resident, int64_t shared) {
  return std::min(132 * std::clamp<int64_t>((208 << 10) / shared, 1, resident), ceil_div(rounds, 4));
}

template <class T>
Error wide_norm_bwd(const Backward<T>& a, T* dw, T* db, const Stream& stream) {
  const WeightTerms<T> terms{{a.dy, a.dy_stride}, {a.x, a.x_stride}, a.mean, a.rstd};
  Error error = nullptr;
  if (a.dx && a.rows) error = launch(wide_norm_bwd_kernel<T>, blocks(a.rows), dim3(kMostThreads), 0, stream, a);
  if (dw && !error) error = column_sums(terms, a.rows, a.cols, Sums<T>{dw, nullptr, a.cols}, stream);
  if (db && !error) error = column_sums(a.dy, a.rows, a.cols, a.dy_stride, db, stream);
  return error;
}

template <class T>
Error norm_bwd(const NormArgs& n, const Stream& stream) {
  Backward<T> a{n.rows, n.cols, n.dy.stride, n.x.stride, n.dsum.stride, static_cast<const T*>(n.dy.data),
                static_cast<const T*>(n.x.data), static_cast<const T*>(n.dsum.data), static_cast<const T*>(n.weight),
                static_cast<const float*>(n.mean), static_cast<const float*>(n.rstd), static_cast<T*>(n.dx)};
  T *const dw = static_cast<T*>(n.dw), *const db = static_cast<T*>(n.db);
  a.vectors = a.cols % kVector<T> == 0 && takes_vectors(a.dy, a.dy_stride) && takes_vectors(a.x, a.x_stride) &&
              takes_vectors(a.dsum, a.dsum_stride) && takes_vectors(a.weight) && takes_vectors(a.dx);
  if (a.cols * static_cast<int64_t>(sizeof(T)) > kStagedBytes) return wide_norm_bwd(a, dw, db, stream);
  return by_width<kMostE>(a.cols, [&](auto shape) {
    using S = decltype(shape);
    const int threads = S::threads(a.cols);
    const int64_t shared = (a.dsum ? 7 : 5) * S::E * static_cast<int64_t>(sizeof(T)) * threads;
    if (shared + 1024 > most_shared(stream)) return wide_norm_bwd(a, dw, db, stream);
    const int64_t lines = lines_for(ceil_div(a.rows, S::teams), resident<T, S::E, S::team>(threads), shared);
    a.line = (dw ? a.cols : 0) + (db ? a.cols : 0);
    float* partials = static_cast<float*>(stream.scratch(lines * a.line * static_cast<int64_t>(sizeof(float))));
    if (dw) a.dw = partials;
    if (db) a.db = partials + a.line - a.cols;
    Error error = nullptr;
    if (lines) error = launch(norm_bwd_kernel<T, S::E, S::team>, blocks(lines), dim3(threads), shared, stream, a);
    if (error) return error;
    return column_sums(Matrix<float>{partials, a.line}, lines, a.line, Sums<T>{dw ? dw : db, db, a.cols}, stream);
  });
}

}  // namespace

Error norm_bwd(const NormArgs& a, const Stream& stream) {
  if (a.cols == 0) return nullptr;
  return by_dtype(a.dtype, [&](auto zero) { return norm_bwd<decltype(zero)>(a, stream); });
}

}  // namespace pygpt::cuda
