// One small kernel per wrapper of ptx.cuh. Run on a GPU and in the emulator, the outputs must agree in every bit.
//
// A case maps random words to output words. Where hardware may add in any order (mma, wgmma), the words become integers
// of -8 .. 7, whose sums are exact in float, so the comparison shows which elements are multiplied with which.
// exp2_approx is compared within the error that PTX allows, and any two NaNs of a conversion count as equal.
// conformance.py runs the cases and stores the GPUs' answers in golden/.
#include <string>
#include <vector>

#include "hopper.cuh"

namespace pygpt::cuda {
namespace {

constexpr int kWords = 16384;  // size of the input, and of the output
using ptx::Swizzle;

__device__ uint32_t bits(float x) { return x != x ? 0x7fffffff : __float_as_uint(x); }

// Two integers of -8 .. 7.
template <class T>
__device__ uint32_t integers(uint32_t random) {
  return pack<T>(float(random & 15) - 8, float(random >> 4 & 15) - 8);
}

// ---- Conversions and exchange

template <class T>
__global__ void convert_kernel(const uint32_t* in, uint32_t* out) {
  for (int i = threadIdx.x; i < kWords / 4; i += blockDim.x) {
    const float2 both = unpack<T>(in[i]);
    out[4 * i] = bits(both.x), out[4 * i + 1] = bits(both.y);
    out[4 * i + 2] = bits(to_float(from_float<T>(__uint_as_float(in[i]))));
    const float x = fmaf(float(in[i]), 1e-9f, -2.0f);  // -2 .. 2.3
    out[4 * i + 3] = pack<T>(x, 1e4f * x);
  }
}

__global__ void exp2_kernel(const uint32_t* in, uint32_t* out) {
  for (int i = threadIdx.x; i < 256; i += blockDim.x) {
    out[i] = bits(ptx::exp2_approx(__uint_as_float(in[i])));
    out[256 + i] = bits(ptx::exp2_approx(fmaf(float(in[i]), 0x1p-26f, -40.0f)));
  }
}

__global__ void shuffle_kernel(const uint32_t* in, uint32_t* out) {
  const uint32_t x = in[threadIdx.x], other = in[32 + threadIdx.x];
  out += 8 * threadIdx.x;
  out[0] = __shfl_sync(~0u, x, int(other % 64));
  out[1] = __shfl_sync(~0u, x, int(other % 64), 8);
  out[2] = __shfl_up_sync(~0u, x, 3);
  out[3] = __shfl_down_sync(~0u, x, 5, 16);
  out[4] = __shfl_xor_sync(~0u, x, 9);
  out[5] = __ballot_sync(~0u, x % 2);
  out[6] = (__any_sync(~0u, x == in[7]) ? 2 : 0) + (__all_sync(~0u, x % 2) ? 1 : 0);
}

// ---- sm_75, sm_80

// Two groups of copies. In the second group every third copy writes zeros.
__global__ void cp_async_kernel(const uint32_t* in, uint32_t* out) {
  PYGPT_SHARED(uint4, rows, [2][64]);
  const auto* from = reinterpret_cast<const uint4*>(in) + threadIdx.x;
  auto* to = reinterpret_cast<uint4*>(out) + threadIdx.x;
  ptx::cp_async_16(&rows[0][threadIdx.x], from, true);
  ptx::cp_async_commit();
  ptx::cp_async_16(&rows[1][threadIdx.x], threadIdx.x % 3 ? from + 64 : nullptr, threadIdx.x % 3);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  to[0] = rows[0][threadIdx.x];
  ptx::cp_async_wait<0>();
  __syncthreads();
  to[64] = rows[1][63 - threadIdx.x];
}

__global__ void ldmatrix_kernel(const uint32_t* in, uint32_t* out) {
  PYGPT_SHARED(uint4, rows, [32]);
  rows[threadIdx.x] = reinterpret_cast<const uint4*>(in)[threadIdx.x];
  __syncwarp();
  uint32_t r[4][4] = {}, half[2][2];
  const uint4* row = &rows[threadIdx.x * 5 % 32];
  ptx::ldmatrix_x4(r[0], row), ptx::ldmatrix_x4_trans(r[1], row);
  ptx::ldmatrix_x2(half[0], row), ptx::ldmatrix_x2_trans(half[1], row);
  for (int i = 0; i < 4; ++i) r[2][i] = half[i / 2][i % 2];
  for (int i = 0; i < 12; ++i) out[threadIdx.x * 12 + i] = r[i / 4][i % 4];
}

template <class T>
__global__ void mma_kernel(const uint32_t* in, uint32_t* out) {
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = integers<T>(in[32 * i + threadIdx.x]);
  for (int i = 0; i < 4; ++i) d[i] = float(in[256 + 32 * i + threadIdx.x] % 64);
  for (int i = 0; i < 2; ++i) b[i] = integers<T>(in[128 + 32 * i + threadIdx.x]);
  ptx::mma_m16n8k16<T>(d, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = bits(d[i]);
}

// ---- sm_90

// Two groups of 64 threads reverse their words, each group a different number of times.
__global__ void named_barrier_kernel(const uint32_t* in, uint32_t* out) {
  PYGPT_SHARED(uint32_t, words, [128]);
  const int group = threadIdx.x / 64;
  uint32_t x = in[threadIdx.x];
  for (int i = 0; i < 2 + group; ++i) {
    words[threadIdx.x] = x + i;
    ptx::named_barrier(1 + group, 64);
    x = words[threadIdx.x ^ 63];
    ptx::named_barrier(1 + group, 64);
  }
  out[threadIdx.x] = x;
}

// Warp 0 passes eight rows to warp 1 through one buffer. The warp that has filled or read the buffer arrives at a
// barrier without waiting.
__global__ void barrier_arrive_kernel(const uint32_t* in, uint32_t* out) {
  PYGPT_SHARED(uint32_t, row, [32]);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 8; ++i) {
    if (threadIdx.x < 32) {
      if (i > 0) ptx::named_barrier(2, 64);
      row[lane] = in[32 * i + lane];
      ptx::named_barrier_arrive(1, 64);
    } else {
      ptx::named_barrier(1, 64);
      out[32 * i + lane] = row[31 - lane];
      if (i < 7) ptx::named_barrier_arrive(2, 64);
    }
  }
}

// elect_one elects one lane, and the same lane when it is called again. The answer does not depend on which lane.
__global__ void elect_kernel(const uint32_t* in, uint32_t* out) {
#if !defined(PYGPT_ARCH) || PYGPT_ARCH >= 900
  const bool elected = ptx::elect_one(), again = ptx::elect_one();
  const uint32_t lanes = __ballot_sync(~0u, elected), lanes_again = __ballot_sync(~0u, again);
  out[threadIdx.x] = lanes && !(lanes & (lanes - 1)) && lanes == lanes_again ? in[threadIdx.x] : 0;
#endif
}

__global__ void stmatrix_kernel(const uint32_t* in, uint32_t* out) {
#if !defined(PYGPT_ARCH) || PYGPT_ARCH >= 900
  PYGPT_SHARED(uint4, rows, [2][32]);
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = in[32 * i + threadIdx.x];
  ptx::stmatrix_x4(&rows[0][threadIdx.x * 5 % 32], r);
  ptx::stmatrix_x4_trans(&rows[1][threadIdx.x * 5 % 32], r);
  __syncwarp();
  for (int i = 0; i < 2; ++i) reinterpret_cast<uint4*>(out)[32 * i + threadIdx.x] = rows[i][threadIdx.x];
#endif
}

// Warp 0 passes eight rows to warp 1 through a ring of two buffers.
__global__ void mbarrier_kernel(const uint32_t* in, uint32_t* out) {
#if !defined(PYGPT_ARCH) || PYGPT_ARCH >= 900
  PYGPT_SHARED(uint32_t, ring, [2][32]);
  PYGPT_SHARED(uint64_t, full, [2]);
  PYGPT_SHARED(uint64_t, empty, [2]);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 2) ptx::mbarrier_init(&full[threadIdx.x], 32), ptx::mbarrier_init(&empty[threadIdx.x], 32);
  __syncthreads();
  for (int i = 0; i < 8; ++i) {
    const int slot = i % 2, round = i / 2;
    if (threadIdx.x < 32) {
      ptx::mbarrier_wait(&empty[slot], (round + 1) % 2);
      ring[slot][lane] = in[32 * i + lane];
      ptx::mbarrier_arrive(&full[slot]);
    } else {
      ptx::mbarrier_wait(&full[slot], round % 2);
      out[32 * i + lane] = ring[slot][31 - lane];
      ptx::mbarrier_arrive(&empty[slot]);
    }
  }
#endif
}

// A box over each corner of the matrix and one in its middle. The boxes do not overlap.
constexpr int kRows = 40, kCols = 150, kStride = 160, kBoxRows = 16;
template <class T>
constexpr int box_cols(Swizzle s) {
  return s == Swizzle::none ? 24 : (16 << int(s)) / int(sizeof(T));
}
struct Corner {
  int x, y;
  __device__ explicit Corner(int i) : x(i % 2 ? kCols - 5 : -3), y(i / 2 ? kRows - 7 : -2) {
    if (i == 4) x = 8, y = 15;
  }
};

__global__ void tma_load_kernel(const __grid_constant__ ptx::TensorMap map, int bytes, uint32_t* out) {
#if !defined(PYGPT_ARCH) || PYGPT_ARCH >= 900
  PYGPT_DYNAMIC_SHARED(shared);
  PYGPT_SHARED(uint64_t, full, [1]);
  const Corner corner(blockIdx.x);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_expect(full, bytes);
    ptx::tma_load_2d(shared, &map, full, corner.x, corner.y);
  }
  __syncthreads();
  ptx::mbarrier_wait(full, 0);
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x)
    out[blockIdx.x * bytes / 4 + i] = reinterpret_cast<const uint32_t*>(shared)[i];
#endif
}

__global__ void tma_store_kernel(const __grid_constant__ ptx::TensorMap map, int bytes, const uint32_t* in) {
#if !defined(PYGPT_ARCH) || PYGPT_ARCH >= 900
  PYGPT_DYNAMIC_SHARED(shared);
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x)
    reinterpret_cast<uint32_t*>(shared)[i] = in[blockIdx.x * bytes / 4 + i];
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    const Corner corner(blockIdx.x);
    ptx::tma_store_2d(&map, shared, corner.x, corner.y);
    ptx::tma_store_commit();
    ptx::tma_store_wait<0>();
  }
#endif
}

// Loads two pieces of different lengths.
__global__ void bulk_load_kernel(const uint32_t* in, uint32_t* out) {
#if !defined(PYGPT_ARCH) || PYGPT_ARCH >= 900
  PYGPT_DYNAMIC_SHARED(shared);
  PYGPT_SHARED(uint64_t, full, [1]);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_expect(full, 1024 + 16);
    ptx::bulk_load(shared, in, 1024, full);
    ptx::bulk_load(shared + 1024, in + 404, 16, full);
  }
  __syncthreads();
  ptx::mbarrier_wait(full, 0);
  for (int i = threadIdx.x; i < 260; i += blockDim.x) out[i] = reinterpret_cast<const uint32_t*>(shared)[i];
#endif
}

// A batch of 2 x 3 matrices of 11 x 20, which lie as the heads of a (batch, rows, heads, columns) tensor do. Boxes of 8
// x 16 lie over corners, in the middle, and in matrices that do not exist. They do not overlap.
constexpr int64_t kBatchSizes[4] = {20, 11, 3, 2}, kBatchStrides[3] = {72, 24, 11 * 72};
constexpr int kBatchBox = 8 * 16 * 2;  // bytes
struct BatchCorner {
  int x, y, z, w;
  __device__ explicit BatchCorner(int i) : x(i % 2 ? 12 : -4), y(i % 4 / 2 ? 6 : -2), z(i % 4), w(i / 4) {}
};

__global__ void tma_load_4d_kernel(const __grid_constant__ ptx::TensorMap map, uint32_t* out) {
#if !defined(PYGPT_ARCH) || PYGPT_ARCH >= 900
  PYGPT_DYNAMIC_SHARED(shared);
  PYGPT_SHARED(uint64_t, full, [1]);
  const BatchCorner corner(blockIdx.x);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_expect(full, kBatchBox);
    ptx::tma_load_4d(shared, &map, full, corner.x, corner.y, corner.z, corner.w);
  }
  __syncthreads();
  ptx::mbarrier_wait(full, 0);
  out[blockIdx.x * kBatchBox / 4 + threadIdx.x] = reinterpret_cast<const uint32_t*>(shared)[threadIdx.x];
#endif
}

__global__ void tma_store_4d_kernel(const __grid_constant__ ptx::TensorMap map, const uint32_t* in) {
#if !defined(PYGPT_ARCH) || PYGPT_ARCH >= 900
  PYGPT_DYNAMIC_SHARED(shared);
  reinterpret_cast<uint32_t*>(shared)[threadIdx.x] = in[blockIdx.x * kBatchBox / 4 + threadIdx.x];
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    const BatchCorner corner(blockIdx.x);
    ptx::tma_store_4d(&map, shared, corner.x, corner.y, corner.z, corner.w);
    ptx::tma_store_commit();
    ptx::tma_store_wait<0>();
  }
#endif
}

// Each block of a cluster of four loads a box for itself and the next block. It ends when the block before it has
// arrived at its second barrier.
constexpr int kSlot = 8 * 128;  // bytes of a box
__global__ void multicast_kernel(const __grid_constant__ ptx::TensorMap map, uint32_t* out) {
#if !defined(PYGPT_ARCH) || PYGPT_ARCH >= 900
  PYGPT_DYNAMIC_SHARED(shared);
  PYGPT_SHARED(uint64_t, full, [1]);
  PYGPT_SHARED(uint64_t, done, [1]);
  const int rank = ptx::cluster_rank(), next = (rank + 1) % 4, previous = (rank + 3) % 4;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1), ptx::mbarrier_init(done, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_expect(full, 2 * kSlot);
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (threadIdx.x == 0)
    ptx::tma_load_2d_multicast(shared + rank * kSlot, &map, full, 0, 8 * blockIdx.x, uint16_t(1 << rank | 1 << next));
  ptx::mbarrier_wait(full, 0);
  for (int i = threadIdx.x; i < kSlot / 4; i += 32) {
    const auto* words = reinterpret_cast<const uint32_t*>(shared);
    out[blockIdx.x * kSlot / 2 + i] = words[rank * kSlot / 4 + i];
    out[blockIdx.x * kSlot / 2 + kSlot / 4 + i] = words[previous * kSlot / 4 + i];
  }
  __syncwarp();
  if (threadIdx.x == 0) ptx::mbarrier_arrive_at(done, next);
  ptx::mbarrier_wait(done, 0);
#endif
}

// Each block of a cluster of four reads the next block's shared memory.
__global__ void cluster_kernel(const uint32_t* in, uint32_t* out) {
#if !defined(PYGPT_ARCH) || PYGPT_ARCH >= 900
  PYGPT_DYNAMIC_SHARED(shared);
  auto* words = reinterpret_cast<uint32_t*>(shared);
  const int rank = ptx::cluster_rank(), i = blockIdx.x * 32 + threadIdx.x;
  words[threadIdx.x] = in[i];
  ptx::cluster_arrive();
  ptx::cluster_wait();
  out[2 * i] = ptx::map_rank(words, (rank + 1) % 4)[threadIdx.x], out[2 * i + 1] = rank;
  ptx::cluster_arrive();
  ptx::cluster_wait();
#endif
}

// Two k-steps of 16. Operands given by descriptor are packed as densely as their layout allows.
template <Swizzle swizzle, bool trans>
struct Operand {
  static constexpr int line = 16 << int(swizzle);
  static constexpr int leading = !trans ? 128 : swizzle == Swizzle::none ? 128 : 16 * line;
  static constexpr int stride = swizzle == Swizzle::none ? 256 : 8 * line;
  static constexpr int step = !trans && line >= 64 ? 32 : 0;  // 0 where a line has no second k16: reads the first again
};

constexpr int kWgmmaShared = (8 + 32) << 10;  // the largest a and b

template <class T, int N, bool trans_a, bool trans_b, Swizzle swizzle, bool in_registers>
__global__ void __launch_bounds__(128) wgmma_kernel(const uint32_t* in, uint32_t* out) {
#if !defined(PYGPT_ARCH) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using A = Operand<swizzle, trans_a>;
  using B = Operand<swizzle, trans_b>;
  PYGPT_DYNAMIC_SHARED(shared);
  for (int i = threadIdx.x; i < kWgmmaShared / 4; i += 128) reinterpret_cast<uint32_t*>(shared)[i] = integers<T>(in[i]);
  ptx::fence_proxy_async();
  __syncthreads();
  const uint64_t a = ptx::wgmma_descriptor(shared, A::leading, A::stride, swizzle);
  const uint64_t b = ptx::wgmma_descriptor(shared + (8 << 10), B::leading, B::stride, swizzle);
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = float(i);
  if constexpr (in_registers) {
    uint32_t fragment[4];
    for (int i = 0; i < 4; ++i) fragment[i] = integers<T>(in[128 * i + threadIdx.x]);
    ptx::wgmma_fence(d, fragment);
    ptx::wgmma_m64k16<T, N, trans_b>(d, fragment, b, true);
    ptx::wgmma_m64k16<T, N, trans_b>(d, fragment, b + B::step / 16, true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(d, fragment);
  } else {
    ptx::wgmma_fence(d);
    ptx::wgmma_m64k16<T, N, trans_a, trans_b>(d, a, b, false);
    ptx::wgmma_m64k16<T, N, trans_a, trans_b>(d, a + A::step / 16, b + B::step / 16, true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(d);
  }
  for (int i = 0; i < N / 2; ++i) out[threadIdx.x * (N / 2) + i] = bits(d[i]);
#endif
}

// ---- The table

struct Case {
  std::string name;
  int arch;  // the first architecture that has the instruction; wgmma exists on sm_90 alone
  std::function<Error(const uint32_t* in, uint32_t* out)> run;
};

std::string name_of(Swizzle s) { return s == Swizzle::none ? "plain" : "swizzle" + std::to_string(16 << int(s)); }

using Kernel = void (*)(const uint32_t*, uint32_t*);
Case one_block(std::string name, int arch, int threads, Kernel kernel, int shared = 0) {
  return {std::move(name), arch, [=](const uint32_t* in, uint32_t* out) {
    return launch(kernel, dim3(1), dim3(threads), shared, Stream{}, in, out);
  }};
}

template <class T>
void add_tma(std::vector<Case>& cases, const char* type, Swizzle swizzle) {
  const int bytes = kBoxRows * box_cols<T>(swizzle) * int(sizeof(T));
  const auto encode = [=](ptx::TensorMap& map, const void* data) {
    return encode_2d(map, static_cast<const T*>(data), kRows, kCols, kStride, kBoxRows, box_cols<T>(swizzle), swizzle);
  };
  const std::string suffix = std::string(" ") + type + " " + name_of(swizzle);
  cases.push_back({"tma_load" + suffix, 900, [=](const uint32_t* in, uint32_t* out) {
    ptx::TensorMap map;
    if (Error e = encode(map, in)) return e;
    return launch(tma_load_kernel, dim3(5), dim3(64), bytes, Stream{}, map, bytes, out);
  }});
  cases.push_back({"tma_store" + suffix, 900, [=](const uint32_t* in, uint32_t* out) {
    ptx::TensorMap map;
    if (Error e = encode(map, out)) return e;
    return launch(tma_store_kernel, dim3(5), dim3(64), bytes, Stream{}, map, bytes, in);
  }});
}

template <class T, int N, bool trans_a, bool trans_b, Swizzle swizzle, bool in_registers = false>
void add_wgmma(std::vector<Case>& cases) {
  const char *type = std::is_same_v<T, bf16> ? " bf16" : " f16", *major[] = {"k", "mn"};
  const std::string a = in_registers ? "registers" : major[trans_a], b = major[trans_b];
  cases.push_back(
      one_block("wgmma" + std::string(type) + " n" + std::to_string(N) + " a " + a + " b " + b + " " + name_of(swizzle),
                900, 128, wgmma_kernel<T, N, trans_a, trans_b, swizzle, in_registers>, kWgmmaShared));
}
template <Swizzle swizzle>
void add_wgmma_majors(std::vector<Case>& cases) {
  add_wgmma<bf16, 64, false, false, swizzle>(cases), add_wgmma<bf16, 64, false, true, swizzle>(cases);
  add_wgmma<bf16, 64, true, false, swizzle>(cases), add_wgmma<bf16, 64, true, true, swizzle>(cases);
}
template <int N>
void add_wgmma_width(std::vector<Case>& cases) {
  constexpr auto swizzle = Swizzle::bytes128;
  if constexpr (N > 64) add_wgmma<bf16, N, true, true, swizzle>(cases);  // 64: among the majors
  add_wgmma<f16, N, false, false, swizzle>(cases);
  add_wgmma<bf16, N, false, false, swizzle, true>(cases), add_wgmma<f16, N, false, true, swizzle, true>(cases);
}

std::vector<Case> all_cases() {
  std::vector<Case> cases = {one_block("convert bf16", 750, 128, convert_kernel<bf16>),
                             one_block("convert f16", 750, 128, convert_kernel<f16>),
                             one_block("exp2_approx", 750, 128, exp2_kernel),
                             one_block("shuffle", 750, 32, shuffle_kernel),
                             one_block("cp_async", 750, 64, cp_async_kernel),
                             one_block("ldmatrix", 750, 32, ldmatrix_kernel),
                             one_block("mma bf16", 750, 32, mma_kernel<bf16>),
                             one_block("mma f16", 750, 32, mma_kernel<f16>),
                             one_block("named_barrier", 750, 128, named_barrier_kernel),
                             one_block("named_barrier_arrive", 750, 64, barrier_arrive_kernel),
                             one_block("elect_one", 900, 64, elect_kernel),
                             one_block("stmatrix", 900, 32, stmatrix_kernel),
                             one_block("mbarrier", 900, 64, mbarrier_kernel),
                             one_block("bulk_load", 900, 64, bulk_load_kernel, 1040)};
  cases.push_back({"cluster", 900, [](const uint32_t* in, uint32_t* out) {
    return launch_cluster(cluster_kernel, dim3(8), dim3(32), dim3(4), 128, Stream{}, in, out);
  }});
  const auto encode_batch = [](ptx::TensorMap& map, const void* data) {
    return encode_4d(map, static_cast<const bf16*>(data), kBatchSizes, kBatchStrides, 8, 16, Swizzle::bytes32);
  };
  cases.push_back({"tma_load_4d", 900, [=](const uint32_t* in, uint32_t* out) {
    ptx::TensorMap map;
    if (Error e = encode_batch(map, in)) return e;
    return launch(tma_load_4d_kernel, dim3(8), dim3(kBatchBox / 4), kBatchBox, Stream{}, map, out);
  }});
  cases.push_back({"tma_store_4d", 900, [=](const uint32_t* in, uint32_t* out) {
    ptx::TensorMap map;
    if (Error e = encode_batch(map, out)) return e;
    return launch(tma_store_4d_kernel, dim3(8), dim3(kBatchBox / 4), kBatchBox, Stream{}, map, in);
  }});
  cases.push_back({"multicast", 900, [](const uint32_t* in, uint32_t* out) {
    ptx::TensorMap map;
    if (Error e = encode_2d(map, reinterpret_cast<const bf16*>(in), 64, 64, 64, 8, 64, Swizzle::bytes128)) return e;
    return launch_cluster(multicast_kernel, dim3(8), dim3(32), dim3(4), 4 * kSlot, Stream{}, map, out);
  }});
  for (int s = 0; s < 4; ++s) add_tma<bf16>(cases, "bf16", Swizzle(s)), add_tma<f16>(cases, "f16", Swizzle(s));
  add_tma<float>(cases, "float", Swizzle::bytes128);
  add_wgmma_majors<Swizzle::none>(cases), add_wgmma_majors<Swizzle::bytes32>(cases);
  add_wgmma_majors<Swizzle::bytes64>(cases), add_wgmma_majors<Swizzle::bytes128>(cases);
  add_wgmma_width<64>(cases), add_wgmma_width<128>(cases), add_wgmma_width<192>(cases), add_wgmma_width<256>(cases);
  return cases;
}

const std::vector<Case>& cases() {
  static const std::vector<Case> all = all_cases();
  return all;
}

}  // namespace
}  // namespace pygpt::cuda

#pragma GCC visibility push(default)
extern "C" {
int conformance_count() { return int(pygpt::cuda::cases().size()); }
int conformance_arch(int i) { return pygpt::cuda::cases()[i].arch; }
const char* conformance_name(int i) { return pygpt::cuda::cases()[i].name.c_str(); }
int conformance_words() { return pygpt::cuda::kWords; }

// in, out: conformance_words() words each, where the kernels can reach them.
const char* conformance_run(int i, const uint32_t* in, uint32_t* out) { return pygpt::cuda::cases()[i].run(in, out); }
}
#pragma GCC visibility pop
