// C = A B with Hopper's instructions: TMA loads tiles, mbarriers synchronise producer and consumers, wgmma multiplies.
//
// A (m, k) and C (m, n) are row-major bf16 or f16; B is stored as (n, k) (K-major, like a weight) or as (k, n)
// (MN-major). m, n and k are arbitrary; rows are aligned to 16 bytes. Products are accumulated in float.
//
// A block of three warp groups computes a 128 x 128 tile of C. One thread of the first group is the producer, which
// loads A and B in four stages of 64 columns. The other two groups are consumers, which compute 64 rows each. Two
// mbarriers synchronise a stage:
//     full[s]    The bytes have arrived. One arrival, by the producer, which also sets the expected bytes.
//     empty[s]   Both tiles have been read. One arrival per consumer warp.
// In its r-th use of a stage, a consumer waits for parity r % 2 of full, and the producer for the opposite parity of
// empty. A consumer has up to one group of products in flight while it waits for the next stage, so it releases a stage
// one step late.
//
// All tiles have rows of 128 bytes with the 128-byte swizzle, eight rows to an atom of 1024 bytes:
//   A, B (n, k)   row = 64 neighbours along k; the next eight rows (stride) follow; k16 step i starts at + 32 i bytes
//   B (k, n)      row = 64 neighbours along n, in two boxes (leading: 8192 bytes); the next eight k (stride) follow;
//                 k16 step i starts at + 2048 i bytes
// Elements outside the matrices are loaded as zeros and not stored.
#include "hopper.cuh"

namespace pygpt::cuda {

constexpr int kM = 128, kN = 128, kK = 64, kStages = 4, kConsumers = 2;
constexpr int kRow = 128, kTileA = kM * kRow, kTileB = kN * kRow, kTileC = kM * kN * 2;  // bytes
constexpr int kShared = kStages * (kTileA + kTileB) + kTileC;
constexpr auto kSwizzle = ptx::Swizzle::bytes128;

struct Tiles {
  unsigned char* shared;
  __device__ unsigned char* a(int stage) const { return shared + stage * (kTileA + kTileB); }
  __device__ unsigned char* b(int stage) const { return a(stage) + kTileA; }
  __device__ unsigned char* c(int consumer) const { return a(kStages) + consumer * kTileC / kConsumers; }
};

// The stage that the i-th step uses, and how often the stage has been used before.
struct Turn {
  int stage, round;
  __device__ explicit Turn(int i) : stage(i % kStages), round(i / kStages) {}
};

#if !defined(PYGPT_ARCH) || PYGPT_ARCH >= 900

template <bool b_k_major>
__device__ void produce(const Tiles& tiles, const ptx::TensorMap& a, const ptx::TensorMap& b, uint64_t* full,
                        uint64_t* empty, int steps, int row, int column) {
  for (int i = 0; i < steps; ++i) {
    const Turn turn(i);
    uint64_t* bar = &full[turn.stage];
    ptx::mbarrier_wait(&empty[turn.stage], (turn.round + 1) % 2);
    ptx::mbarrier_expect(bar, kTileA + kTileB);
    ptx::tma_load_2d(tiles.a(turn.stage), &a, bar, i * kK, row);
    if constexpr (b_k_major) {
      ptx::tma_load_2d(tiles.b(turn.stage), &b, bar, i * kK, column);
    } else {
      ptx::tma_load_2d(tiles.b(turn.stage), &b, bar, column, i * kK);
      ptx::tma_load_2d(tiles.b(turn.stage) + kTileB / 2, &b, bar, column + 64, i * kK);
    }
  }
}

#endif

#if !defined(PYGPT_ARCH) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// d += the consumer's 64 rows of the stage's tile of A, times the stage's tile of B.
template <class T, bool b_k_major>
__device__ __forceinline__ void multiply(float (&d)[kN / 2], const Tiles& tiles, int stage, int consumer) {
  const uint64_t a = ptx::wgmma_descriptor(tiles.a(stage) + consumer * 64 * kRow, 16, 8 * kRow, kSwizzle);
  const uint64_t b = ptx::wgmma_descriptor(tiles.b(stage), b_k_major ? 16 : 64 * kRow, 8 * kRow, kSwizzle);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kK / 16; ++k)  // descriptors count in units of 16 bytes
    ptx::wgmma_m64k16<T, kN, false, !b_k_major>(d, a + k * 32 / 16, b + k * (b_k_major ? 32 : 16 * kRow) / 16, true);
  ptx::wgmma_commit();
}

template <class T, bool b_k_major>
__device__ __forceinline__ void consume(float (&d)[kN / 2], const Tiles& tiles, uint64_t* full, uint64_t* empty,
                                        int steps, int consumer) {
  ptx::wgmma_fence(d);
  for (int i = 0; i < steps; ++i) {
    const Turn turn(i);
    ptx::mbarrier_wait(&full[turn.stage], turn.round % 2);
    multiply<T, b_k_major>(d, tiles, turn.stage, consumer);
    ptx::wgmma_wait<1>();
    if (i > 0 && threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&empty[Turn(i - 1).stage]);
  }
  ptx::wgmma_wait<0>(d);
}

// Writes two boxes of 64 x 64 to shared memory with the swizzle of the tensor map; then one thread stores them.
template <class T>
__device__ __forceinline__ void store(const float (&d)[kN / 2], unsigned char* tile, const ptx::TensorMap& c, int row,
                                      int column, int consumer) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = first + 8 * half, piece = j % 8 ^ r % 8;
      unsigned char* box = tile + j / 8 * 64 * kRow;
      *reinterpret_cast<uint32_t*>(box + r * kRow + piece * 16 + lane % 4 * 4) =
          pack<T>(d[4 * j + 2 * half], d[4 * j + 2 * half + 1]);
    }
  ptx::fence_proxy_async();
  ptx::named_barrier(1 + consumer, 128);
  if (threadIdx.x % 128 == 0) {
    ptx::tma_store_2d(&c, tile, column, row);
    ptx::tma_store_2d(&c, tile + 64 * kRow, column + 64, row);
    ptx::tma_store_commit();
    ptx::tma_store_wait<0>();
  }
}

#endif

template <class T, bool b_k_major>
__global__ void __launch_bounds__((1 + kConsumers) * 128, 1)
    hopper_gemm_kernel(const __grid_constant__ ptx::TensorMap a, const __grid_constant__ ptx::TensorMap b,
                       const __grid_constant__ ptx::TensorMap c, int row_tiles, int steps) {
#if !defined(PYGPT_ARCH) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PYGPT_DYNAMIC_SHARED(shared);
  PYGPT_SHARED(uint64_t, full, [kStages]);
  PYGPT_SHARED(uint64_t, empty, [kStages]);
  const Tiles tiles{shared};
  const int row = blockIdx.x % row_tiles * kM, column = blockIdx.x / row_tiles * kN;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) ptx::mbarrier_init(&full[s], 1), ptx::mbarrier_init(&empty[s], 4 * kConsumers);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    ptx::decrease_registers<40>();
    if (threadIdx.x == 0) produce<b_k_major>(tiles, a, b, full, empty, steps, row, column);
  } else {
    ptx::increase_registers<232>();
    const int consumer = threadIdx.x / 128 - 1;
    float d[kN / 2] = {};
    consume<T, b_k_major>(d, tiles, full, empty, steps, consumer);
    store<T>(d, tiles.c(consumer), c, row + consumer * 64, column, consumer);
  }
#endif
}

// All sizes are at least 1; row strides in elements.
struct GemmSizes {
  int64_t m, n, k, a_stride, b_stride, c_stride;
};

template <class T, bool b_k_major>
Error hopper_gemm(const T* a, const T* b, T* c, const GemmSizes& s, const Stream& stream) {
  ptx::TensorMap map_a, map_b, map_c;
  if (Error e = encode_2d(map_a, a, s.m, s.k, s.a_stride, kM, kK, kSwizzle)) return e;
  if (Error e = b_k_major ? encode_2d(map_b, b, s.n, s.k, s.b_stride, kN, kK, kSwizzle)
                          : encode_2d(map_b, b, s.k, s.n, s.b_stride, kK, 64, kSwizzle))
    return e;
  if (Error e = encode_2d(map_c, c, s.m, s.n, s.c_stride, 64, 64, kSwizzle)) return e;
  const int row_tiles = int(ceil_div(s.m, kM));
  return launch(hopper_gemm_kernel<T, b_k_major>, dim3(row_tiles * ceil_div(s.n, kN)), dim3((1 + kConsumers) * 128),
                kShared, stream, map_a, map_b, map_c, row_tiles, int(ceil_div(s.k, kK)));
}

}  // namespace pygpt::cuda

// c (m, n) = a b, with contiguous rows; b is (n, k) if b_k_major, else (k, n).
extern "C" __attribute__((visibility("default"))) const char* hopper_gemm(const void* a, const void* b, void* c,
                                                                          const pygpt::cuda::GemmSizes& sizes,
                                                                          bool is_bf16, bool b_k_major) {
  using namespace pygpt::cuda;
  const auto gemm = [&](auto type) {
    using T = decltype(type);
    const auto run = b_k_major ? hopper_gemm<T, true> : hopper_gemm<T, false>;
    return run(static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(c), sizes, Stream{});
  };
  return is_bf16 ? gemm(bf16{}) : gemm(f16{});
}
