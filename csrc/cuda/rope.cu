// rope: each head of q and k at each position, a row of D channels, after an optional RMSNorm (Su et al. 2021).
//
//     x^ = x rstd w, rstd = 1 / sqrt(sum(x^2) / D + eps), or x^ = x
//     y_a = x^_a cos - x^_b sin, y_b = x^_b cos + x^_a sin for each pair (a, b); y = x^ in the channels that remain
//     g = dy rotated by -angle;  dw = sum over rows of g xhat, xhat = x rstd
//     dx = rstd (g w - xhat sum(g w xhat) / D), or dx = g
//
// The kernels are memory-bound. A team of up to 32 lanes processes a row; both members of a pair are in one lane, which
// reads and writes 16 bytes at a time if addresses and widths allow it. A launch processes the rows of q and then those
// of k, each in the order in which they lie in memory. The second pass over a row of a norm finds it in the L1 cache.
//
// For dw, blocks are persistent. Each lane has sums of its own in shared memory, each block stores one line of partial
// sums, and column_sums adds the lines. The number of blocks depends on the shape alone.
#include <limits>

#include "reduce.cuh"
#include "vector.cuh"

namespace pygpt::cuda {
namespace {

constexpr int kThreads = 128;

struct RowStrides {
  int64_t batch, head, position;
};

// A tensor (batch, head, position, channel) with contiguous channels.
template <class T>
struct RopeHeads {
  T* data;
  RowStrides stride;

  explicit RopeHeads(const Heads& t) : data(static_cast<T*>(t.data)), stride{t.stride[0], t.stride[1], t.stride[2]} {}
  bool can_vectorize() const {
    return cuda::can_vectorize(data, stride.batch) && cuda::can_vectorize(data, stride.head) &&
           cuda::can_vectorize(data, stride.position);
  }
};

// q or k. `in` is x, or dy in backward.
template <class T>
struct RopeSideParams {
  uint32_t rows, heads;
  bool heads_inside;  // whether the heads of a position lie together
  RopeHeads<T> in, x, out;
  const float* weight;
  float *rstd, *dweight;  // dweight: this side's part of a line of partial sums
};

template <class T>
struct RopeParams {
  uint32_t length;
  int cols, half, team;
  float eps, sign;  // sign: 1, or -1 in backward
  const float *cos, *sin;
  int64_t table_rows, table_stride, positions_stride, partial_stride;
  const void* positions;
  bool short_positions;
  RopeSideParams<T> q, k;
};

struct RowCoord {
  int64_t batch, head, position;
};

template <class T>
__device__ __forceinline__ RowCoord row_coord(uint32_t row, const RopeSideParams<T>& side, uint32_t length) {
  const uint32_t inner = side.heads_inside ? side.heads : length, outer = side.heads_inside ? length : side.heads;
  const uint32_t rest = row / inner, i = row - rest * inner, batch = rest / outer, o = rest - batch * outer;
  return {batch, side.heads_inside ? i : o, side.heads_inside ? o : i};
}

template <class T>
__device__ __forceinline__ T* row_of(const RopeHeads<T>& t, const RowCoord& c) {
  return t.data + c.batch * t.stride.batch + c.head * t.stride.head + c.position * t.stride.position;
}

// The offset of the position's row in cos and sin; -1 if there is no such row.
template <class T>
__device__ __forceinline__ int64_t table_offset(const RopeParams<T>& a, const RowCoord& c) {
  int64_t row = c.position;
  if (a.positions) {
    const int64_t i = c.batch * a.positions_stride + c.position;
    row = a.short_positions ? static_cast<const int32_t*>(a.positions)[i] : static_cast<const int64_t*>(a.positions)[i];
    if (row < 0 || row >= a.table_rows) return -1;
  }
  return c.batch * a.table_stride + row * a.half;
}

template <int V, class T>
__device__ __forceinline__ void store(T* p, const float (&x)[V]) {
  if constexpr (V == 1) *p = from_float<T>(x[0]);
  else *reinterpret_cast<uint4*>(p) = from_floats<T>(x);
}

template <int N>
__device__ __forceinline__ void load_floats(const float* p, float (&x)[N]) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) load<4>(p + i, reinterpret_cast<float(&)[4]>(x[i]));
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = p[i];
  }
}

// N pairs of a row. V is the number of elements of an access, 1 or kVector<T>.
template <class T, int V, bool interleaved>
struct PairVector {
  static constexpr int N = interleaved && V > 1 ? V / 2 : V;
  float a[N], b[N];

  __device__ __forceinline__ void get(const T* row, int pair, int half) {
    if constexpr (!interleaved) {
      load<V>(row + pair, a), load<V>(row + half + pair, b);
    } else if constexpr (V == 1) {
      a[0] = to_float(row[2 * pair]), b[0] = to_float(row[2 * pair + 1]);
    } else {
      float x[V];
      load<V>(row + 2 * pair, x);
#pragma unroll
      for (int i = 0; i < N; i++) a[i] = x[2 * i], b[i] = x[2 * i + 1];
    }
  }
  __device__ __forceinline__ void put(T* row, int pair, int half) const {
    if constexpr (!interleaved) {
      store<V>(row + pair, a), store<V>(row + half + pair, b);
    } else if constexpr (V == 1) {
      row[2 * pair] = from_float<T>(a[0]), row[2 * pair + 1] = from_float<T>(b[0]);
    } else {
      float x[V];
#pragma unroll
      for (int i = 0; i < N; i++) x[2 * i] = a[i], x[2 * i + 1] = b[i];
      store<V>(row + 2 * pair, x);
    }
  }
  // The same pairs of a row of weights.
  __device__ __forceinline__ void get_weights(const float* w, int pair, int half) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      a[i] = w[interleaved ? 2 * (pair + i) : pair + i];
      b[i] = w[interleaved ? 2 * (pair + i) + 1 : half + pair + i];
    }
  }
  __device__ __forceinline__ void rotate(const float* cos, const float* sin, int64_t offset, int pair, float sign) {
    float c[N], s[N];
    if (offset >= 0) {
      load_floats(cos + offset + pair, c), load_floats(sin + offset + pair, s);
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) c[i] = s[i] = __int_as_float(0x7fc00000);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float x = a[i], y = b[i], z = sign * s[i];
      a[i] = x * c[i] - y * z, b[i] = y * c[i] + x * z;
    }
  }
};

// A lane of a team. It walks its vectors of pairs, then its vectors of the remaining channels.
template <class T, int V, bool interleaved>
struct RopeLane {
  static constexpr int N = PairVector<T, V, interleaved>::N;
  int rank, team, cols, half;

  __device__ __forceinline__ RopeLane(const RopeParams<T>& a)
      : rank(threadIdx.x % a.team), team(a.team), cols(a.cols), half(a.half) {}

  // pair(first pair, number of the lane's elements before them), rest(first channel, likewise).
  template <class Pair, class Rest>
  __device__ __forceinline__ void walk(Pair&& pair, Rest&& rest) const {
    int element = 0;
    for (int i = rank * N; i < half; i += team * N, element += 2 * N) pair(i, element);
    for (int j = 2 * half + rank * V; j < cols; j += team * V, element += V) rest(j, element);
  }
};

__device__ __forceinline__ float team_sum(float x, int team) {
  for (int d = team / 2; d; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}

// out = the row `in`, normalised if there is a weight, rotated. `row` may be past the last one. With `norm` every
// thread of a warp must call this.
template <class T, int V, bool interleaved, bool norm>
__device__ __forceinline__ void rotate_row(const RopeParams<T>& a, const RopeSideParams<T>& side, uint32_t row) {
  const RopeLane<T, V, interleaved> lane(a);
  const bool in_range = row < side.rows;
  const RowCoord c = row_coord(in_range ? row : 0, side, a.length);
  const T* in = row_of(side.in, c);
  PairVector<T, V, interleaved> x, w;
  float rest[V], rstd = 1;
  const bool normalised = norm && side.weight;
  if constexpr (norm) {
    float sum = 0;
    if (in_range && normalised)
      lane.walk([&](int pair, int) {
        x.get(in, pair, a.half);
#pragma unroll
        for (int i = 0; i < x.N; i++) sum += x.a[i] * x.a[i] + x.b[i] * x.b[i];
      }, [&](int j, int) {
        load<V>(in + j, rest);
#pragma unroll
        for (int i = 0; i < V; i++) sum += rest[i] * rest[i];
      });
    sum = team_sum(sum, a.team);
    if (normalised) rstd = rsqrtf(sum / static_cast<float>(a.cols) + a.eps);
  }
  if (!in_range) return;
  T* out = row_of(side.out, c);
  const int64_t offset = table_offset(a, c);
  lane.walk([&](int pair, int) {
    x.get(in, pair, a.half);
    if (normalised) {
      w.get_weights(side.weight, pair, a.half);
#pragma unroll
      for (int i = 0; i < x.N; i++) x.a[i] *= rstd * w.a[i], x.b[i] *= rstd * w.b[i];
    }
    x.rotate(a.cos, a.sin, offset, pair, a.sign);
    x.put(out, pair, a.half);
  }, [&](int j, int) {
    load<V>(in + j, rest);
    if (normalised) {
#pragma unroll
      for (int i = 0; i < V; i++) rest[i] *= rstd * side.weight[j + i];
    }
    store<V>(out + j, rest);
  });
  if (normalised && lane.rank == 0) side.rstd[(c.batch * side.heads + c.head) * a.length + c.position] = rstd;
}

template <class T, int V, bool interleaved, bool norm>
__global__ __launch_bounds__(kThreads) void rope_rotate_kernel(RopeParams<T> a, uint32_t q_blocks) {
  const int teams = kThreads / a.team;
  const bool of_q = blockIdx.x < q_blocks;
  const uint32_t row = (of_q ? blockIdx.x : blockIdx.x - q_blocks) * teams + threadIdx.x / a.team;
  if (of_q) rotate_row<T, V, interleaved, norm>(a, a.q, row);
  else rotate_row<T, V, interleaved, norm>(a, a.k, row);
}

// dx of a row with a norm. Adds to the lane's sums of dw, which are kThreads floats apart. Every thread of a warp must
// call this.
template <class T, int V, bool interleaved>
__device__ __forceinline__ void differentiate_row(const RopeParams<T>& a, const RopeSideParams<T>& side, uint32_t row,
                                                  float* sums) {
  const RopeLane<T, V, interleaved> lane(a);
  const bool in_range = row < side.rows;
  const RowCoord c = row_coord(in_range ? row : 0, side, a.length);
  const T *dy = row_of(side.in, c), *x = row_of(side.x, c);
  const int64_t offset = in_range ? table_offset(a, c) : 0;
  const float rstd = in_range ? side.rstd[(c.batch * side.heads + c.head) * a.length + c.position] : 0.f;
  PairVector<T, V, interleaved> g, xhat, w;
  float rest_g[V], rest_x[V], sum = 0;
  if (in_range)
    lane.walk([&](int pair, int element) {
      g.get(dy, pair, a.half), xhat.get(x, pair, a.half), w.get_weights(side.weight, pair, a.half);
      g.rotate(a.cos, a.sin, offset, pair, a.sign);
#pragma unroll
      for (int i = 0; i < g.N; i++) {
        const float dwa = g.a[i] * (xhat.a[i] * rstd), dwb = g.b[i] * (xhat.b[i] * rstd);
        sum += dwa * w.a[i] + dwb * w.b[i];
        if (side.dweight) sums[(element + 2 * i) * kThreads] += dwa, sums[(element + 2 * i + 1) * kThreads] += dwb;
      }
    }, [&](int j, int element) {
      load<V>(dy + j, rest_g), load<V>(x + j, rest_x);
#pragma unroll
      for (int i = 0; i < V; i++) {
        const float dw = rest_g[i] * (rest_x[i] * rstd);
        sum += dw * side.weight[j + i];
        if (side.dweight) sums[(element + i) * kThreads] += dw;
      }
    });
  const float mean = team_sum(sum, a.team) / static_cast<float>(a.cols);
  if (!in_range || !side.out.data) return;
  T* out = row_of(side.out, c);
  lane.walk([&](int pair, int) {
    g.get(dy, pair, a.half), xhat.get(x, pair, a.half), w.get_weights(side.weight, pair, a.half);
    g.rotate(a.cos, a.sin, offset, pair, a.sign);
#pragma unroll
    for (int i = 0; i < g.N; i++) {
      g.a[i] = (g.a[i] * w.a[i] - xhat.a[i] * rstd * mean) * rstd;
      g.b[i] = (g.b[i] * w.b[i] - xhat.b[i] * rstd * mean) * rstd;
    }
    g.put(out, pair, a.half);
  }, [&](int j, int) {
    load<V>(dy + j, rest_g), load<V>(x + j, rest_x);
#pragma unroll
    for (int i = 0; i < V; i++) rest_g[i] = (rest_g[i] * side.weight[j + i] - rest_x[i] * rstd * mean) * rstd;
    store<V>(out + j, rest_g);
  });
}

// All rows of a side, and this block's line of partial sums of dw. Shared memory: `elements` floats for each thread.
template <class T, int V, bool interleaved>
__device__ __forceinline__ void differentiate_side(const RopeParams<T>& a, const RopeSideParams<T>& side, int elements,
                                                   float* shared) {
  const int teams = kThreads / a.team, team_index = threadIdx.x / a.team;
  float* sums = shared + threadIdx.x;
  for (int e = 0; e < elements; e++) sums[e * kThreads] = 0;
  for (int64_t first = blockIdx.x * static_cast<int64_t>(teams); first < side.rows;
       first += gridDim.x * static_cast<int64_t>(teams)) {
    const uint32_t row = static_cast<uint32_t>(first) + team_index;
    if (side.weight) differentiate_row<T, V, interleaved>(a, side, row, sums);
    else rotate_row<T, V, interleaved, false>(a, side, row);
  }
  if (!side.dweight) return;
  __syncthreads();
  for (int t = 1; t < teams && team_index == 0; t++)
    for (int e = 0; e < elements; e++) sums[e * kThreads] += sums[e * kThreads + t * a.team];
  if (team_index != 0) return;
  float* line = side.dweight + blockIdx.x * a.partial_stride;
  const RopeLane<T, V, interleaved> lane(a);
  lane.walk([&](int pair, int element) {
#pragma unroll
    for (int i = 0; i < lane.N; i++) {
      line[interleaved ? 2 * (pair + i) : pair + i] = sums[(element + 2 * i) * kThreads];
      line[interleaved ? 2 * (pair + i) + 1 : a.half + pair + i] = sums[(element + 2 * i + 1) * kThreads];
    }
  }, [&](int j, int element) {
#pragma unroll
    for (int i = 0; i < V; i++) line[j + i] = sums[(element + i) * kThreads];
  });
}

template <class T, int V, bool interleaved>
__global__ __launch_bounds__(kThreads, 6) void rope_bwd_kernel(RopeParams<T> a, int elements) {
  PYGPT_DYNAMIC_SHARED(bytes);
  float* const shared = reinterpret_cast<float*>(bytes);
  differentiate_side<T, V, interleaved>(a, a.q, elements, shared);
  __syncthreads();
  differentiate_side<T, V, interleaved>(a, a.k, elements, shared);
}

template <class T>
RopeSideParams<T> side_params(const RopeArgs& a, const RopeSide& s, bool back) {
  const Heads& in = back ? s.dy : s.x;
  return {static_cast<uint32_t>(a.batch * s.heads * a.length),
          static_cast<uint32_t>(s.heads),
          in.stride[1] <= in.stride[2],
          RopeHeads<T>(in),
          RopeHeads<T>(s.x),
          RopeHeads<T>(back ? s.dx : s.y),
          static_cast<const float*>(s.weight),
          static_cast<float*>(s.rstd),
          nullptr};
}

template <class T>
RopeParams<T> rope_params(const RopeArgs& a, bool back) {
  return {static_cast<uint32_t>(a.length),
          static_cast<int>(a.head_dim),
          static_cast<int>(a.half),
          32,
          static_cast<float>(a.eps),
          back ? -1.f : 1.f,
          static_cast<const float*>(a.cos),
          static_cast<const float*>(a.sin),
          a.table_rows,
          a.table_stride,
          a.positions_stride,
          0,
          a.positions,
          a.short_positions,
          side_params<T>(a, a.sides[0], back),
          side_params<T>(a, a.sides[1], back)};
}

template <class T>
bool can_vectorize(const RopeParams<T>& a, bool interleaved) {
  bool fits = a.cols % kVector<T> == 0 && (interleaved ? 2 * a.half : a.half) % kVector<T> == 0 &&
              cuda::can_vectorize(a.cos) && cuda::can_vectorize(a.sin);
  for (const RopeSideParams<T>* s : {&a.q, &a.k})
    if (s->rows) fits = fits && s->in.can_vectorize() && s->out.can_vectorize() && s->x.can_vectorize();
  return fits;
}

// The lanes that hold a row, each with one vector of pairs if there are enough.
template <int V>
int team_size(int64_t cols) {
  int team = 4;
  while (team < 32 && team * 2 * V < cols) team *= 2;
  return team;
}

// Calls body(the elements of an access, interleaved) as constants, after it has set the team.
template <class T, class Body>
Error by_access(RopeParams<T>& a, bool interleaved, Body&& body) {
  const auto with = [&](auto width) {
    a.team = team_size<decltype(width)::value>(a.cols);
    return interleaved ? body(width, std::true_type{}) : body(width, std::false_type{});
  };
  return can_vectorize(a, interleaved) ? with(std::integral_constant<int, kVector<T>>{})
                                       : with(std::integral_constant<int, 1>{});
}

// An error if indices of rows, or of the channels in them, do not fit into 32 bits.
Error check_size(const RopeArgs& a) {
  const int64_t rows = a.batch * a.length * std::max(a.sides[0].heads, a.sides[1].heads);
  const bool fits = rows <= std::numeric_limits<int32_t>::max() && a.head_dim < (1 << 24);
  return fits ? nullptr : "more than 2^31 rows, or head dimensions from 2^24 on, are not served";
}

template <class T>
Error rotate(const RopeArgs& args, bool back, const Stream& stream) {
  RopeParams<T> a = rope_params<T>(args, back);
  return by_access(a, args.interleaved, [&](auto width, auto interleaved) {
    const int64_t teams = kThreads / a.team, q_blocks = ceil_div(a.q.rows, teams);
    const int64_t blocks = q_blocks + ceil_div(a.k.rows, teams);
    if (blocks == 0) return Error(nullptr);
    const auto run = [&](auto norm) {
      return launch(rope_rotate_kernel<T, width.value, interleaved.value, norm.value>, make_grid(blocks),
                    dim3(kThreads), 0, stream, a, q_blocks);
    };
    return a.q.weight || a.k.weight ? run(std::true_type{}) : run(std::false_type{});
  });
}

template <class T>
Error differentiate(const RopeArgs& args, const Stream& stream) {
  RopeParams<T> a = rope_params<T>(args, true);
  float *const dq_weight = static_cast<float*>(args.sides[0].dweight), *const dk_weight =
                                                                           static_cast<float*>(args.sides[1].dweight);
  return by_access(a, args.interleaved, [&](auto width, auto interleaved) {
    constexpr int V = width.value, N = PairVector<T, V, interleaved.value>::N;
    const int64_t teams = kThreads / a.team, loops = ceil_div(std::max(a.q.rows, a.k.rows), teams);
    const int64_t blocks = std::min<int64_t>(132 * 8, ceil_div(loops, 4));
    const int elements = 2 * N * static_cast<int>(ceil_div(a.half, a.team * N)) +
                         V * static_cast<int>(ceil_div(a.cols - 2 * a.half, a.team * V));
    const int64_t shared = elements * kThreads * static_cast<int64_t>(sizeof(float));
    if (shared + 1024 > max_shared_bytes(stream)) return Error("head_dim is too large for a norm's backward");
    a.partial_stride = (dq_weight ? a.cols : 0) + (dk_weight ? a.cols : 0);
    float* partials =
        static_cast<float*>(stream.scratch(blocks * a.partial_stride * static_cast<int64_t>(sizeof(float))));
    if (dq_weight) a.q.dweight = partials;
    if (dk_weight) a.k.dweight = partials + a.partial_stride - a.cols;
    Error error = nullptr;
    if (blocks)
      error = launch(rope_bwd_kernel<T, V, interleaved.value>, make_grid(blocks), dim3(kThreads), shared, stream, a,
                     elements);
    if (error) return error;
    return column_sums(Matrix<float>{partials, a.partial_stride}, blocks, a.partial_stride,
                       ColumnSums<float>{dq_weight ? dq_weight : dk_weight, dk_weight, a.cols}, stream);
  });
}

}  // namespace

Error rope_fwd(const RopeArgs& a, const Stream& stream) {
  if (Error error = check_size(a)) return error;
  return by_dtype(a.dtype, [&](auto zero) { return rotate<decltype(zero)>(a, false, stream); });
}

Error rope_bwd(const RopeArgs& a, const Stream& stream) {
  if (Error error = check_size(a)) return error;
  const bool with_norm = a.sides[0].weight || a.sides[1].weight;
  return by_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_norm ? differentiate<T>(a, stream) : rotate<T>(a, true, stream);
  });
}

}  // namespace pygpt::cuda
