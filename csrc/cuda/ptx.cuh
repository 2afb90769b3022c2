// Functions for the PTX instructions that CUDA C++ does not offer. This is the library's only inline assembly.
//
// tests/emulator implements the same functions on a CPU, and tests/emulator/conformance.cu compares the two. A function
// exists only for architectures that have the instruction. On sm_75 the functions that kernels for all GPUs need
// (cp_async_*, mma_m16n8k16) are built from other instructions.
//
// Fragments of a 16 x 8 x 16 product in the lanes of a warp, g = lane / 4, t = lane % 4. A register of a or b holds two
// 16-bit values, the one with the lower k in its low half:
//   a[0] = A[g    ][2t, 2t+1]     a[2] = A[g    ][2t+8, 2t+9]     b0 = B[2t, 2t+1  ][g]
//   a[1] = A[g + 8][2t, 2t+1]     a[3] = A[g + 8][2t+8, 2t+9]     b1 = B[2t+8, 2t+9][g]
//   d[0], d[1] = D[g][2t, 2t+1]   d[2], d[3] = D[g + 8][2t, 2t+1]
#pragma once
#include <type_traits>

namespace pygpt::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- Asynchronous copies from global to shared memory

// Copies 16 bytes; both addresses are aligned to 16. If !valid, nothing is read and zeros are written. Other threads
// see the bytes after cp_async_wait by the thread that issued the copy and then a barrier.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
#if PYGPT_ARCH >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}

// Makes the copies issued since the last commit a group.
__device__ __forceinline__ void cp_async_commit() {
#if PYGPT_ARCH >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the newest N groups of this thread are in flight.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if PYGPT_ARCH >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---- Fragments from shared memory

// Loads 8 x 8 matrices of 16-bit elements. Lanes 8i .. 8i + 7 point to the eight 16-byte rows of matrix i. r[i]
// receives elements [g][2t, 2t+1] of matrix i; in the .trans form, elements [2t, 2t+1][g].
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same for two matrices. The pointers of lanes 16 .. 31 are ignored.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// ---- Products of a warp

// d += a b, accumulated in float, over the fragments above.
template <class T>
__device__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#if !defined(PYGPT_ARCH) || PYGPT_ARCH >= 800

template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#else

// sm_75's tensor cores do not support bfloat16, so lane (g, t) collects rows g and g + 8 of A and columns 2t and 2t + 1
// of B by shuffles. This is slow. The function is not inlined, because kernels with a hundred products would take
// minutes to compile.
template <>
__device__ __noinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int quad = threadIdx.x & 28, column = 8 * (threadIdx.x & 3);
#pragma unroll 1
  for (int k = 0; k < 16; k += 2)  // lane k % 8 / 2 of a quad holds k and k + 1
    for (int i = 0; i < 4; ++i) {
      const int lane = k % 8 / 2;
      const uint32_t of_a = __shfl_sync(0xffffffffu, a[k / 8 * 2 + i / 2], quad + lane);
      const uint32_t of_b = __shfl_sync(0xffffffffu, k < 8 ? b0 : b1, column + 4 * (i % 2) + lane);
      const float2 x = unpack<bf16>(of_a), y = unpack<bf16>(of_b);
      d[i] = fmaf(x.y, y.y, fmaf(x.x, y.x, d[i]));
    }
}

// Two m16n8k8 products. Registers 0 and 1 of A hold the lower half of k.
template <>
__device__ __forceinline__ void mma_m16n8k16<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%8}, {%0, %1, %2, %3};\n"
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%6, %7}, {%9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

// ---- Arithmetic

// 2^x with a relative error of at most 2^-22. Subnormal inputs and results become zero; 2^0 is 1 and 2^-inf is 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- Named barriers

// A barrier (1 .. 15) for `threads` threads of the block, a multiple of 32.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives at such a barrier without waiting. Those that wait call named_barrier with the same number of threads, which
// counts both.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Tensor maps for the tensor memory accelerator, which the host encodes (hopper.cuh)

// The swizzle of a box in shared memory. With s the enumerator's value, address bits 4 .. 3 + s are XORed with bits
// 7 .. 6 + s, so that the 16-byte chunks of a column in eight rows fall into different banks. The pattern repeats after
// 256, 512 or 1024 bytes, and a box must start at a multiple of this (of 128 bytes without swizzle).
enum class Swizzle { none, bytes32, bytes64, bytes128 };

// The description of a matrix, or a batch of matrices, in global memory (CUtensorMap): base, sizes, strides, box,
// swizzle. encode_2d or encode_4d (hopper.cuh) fills it; kernels receive it as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
  unsigned char opaque[128];
};

#if !defined(PYGPT_ARCH) || PYGPT_ARCH >= 900

// ---- Parts of a warp (sm_90)

// True in one lane of the warp, always the same one, whichever it is. All lanes call it together.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\n"
               "elect.sync _|p, 0xffffffff;\n"
               "selp.u32 %0, 1, 0, p;\n}"
               : "=r"(elected)::"memory");
  return elected;
}

// The inverses of ldmatrix_x4 and ldmatrix_x4_trans: store four 8 x 8 matrices from the lanes' fragments to the rows
// that lanes 8i .. 8i + 7 point to.
__device__ __forceinline__ void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

__device__ __forceinline__ void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- Barriers in shared memory (sm_90)

// A phase ends when `count` threads have arrived and all expected bytes have arrived; then the next phase begins.
// Phases have parity 0, 1, 0, ... mbarrier_wait(bar, p) blocks while the current phase has parity p. On a fresh barrier
// a wait for parity 1 therefore returns at once, and waits for "this buffer is empty" start with parity 1.
__device__ __forceinline__ void mbarrier_init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

// Arrives at the barrier at the same place in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* bar, int rank) {
  asm volatile("{\n.reg .b32 remote;\n"
               "mapa.shared::cluster.u32 remote, %0, %1;\n"
               "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(bar)),
               "r"(rank)
               : "memory");
}

// Arrives, and adds `bytes` to the bytes of asynchronous loads that the phase waits for.
__device__ __forceinline__ void mbarrier_expect(uint64_t* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* bar, int parity) {
  uint32_t done;
  do {
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(bar)), "r"(parity)
                 : "memory");
  } while (!done);
}

// After mbarrier_init: makes the barriers visible to the cluster and to TMA. A block or cluster barrier must follow.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Orders this thread's ordinary writes to shared memory before a wgmma or TMA that reads them. If another thread issues
// the wgmma or TMA, a barrier must follow.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- The tensor memory accelerator: one thread copies a box of a matrix (sm_90)

// Loads the box whose first element is in column x, row y. Elements outside the matrix become zeros. All bytes of the
// box, including these zeros, are reported to `bar` as they arrive.
// clang-format off
__device__ __forceinline__ void tma_load_2d(void* shared, const TensorMap* map, uint64_t* bar, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
               ::"r"(shared_address(shared)), "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y)
               : "memory");
}
// clang-format on

// Loads the box into every block of the cluster whose rank is a bit of `ranks`, at the same place in its shared memory,
// and reports its bytes to the barrier at the same place there.
__device__ __forceinline__ void tma_load_2d_multicast(void* shared, const TensorMap* map, uint64_t* bar, int x, int y,
                                                      uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y), "h"(ranks)
      : "memory");
}

// Loads a box of matrix (z, w) of a batch of matrices; see encode_4d (hopper.cuh).
__device__ __forceinline__ void tma_load_4d(void* shared, const TensorMap* map, uint64_t* bar, int x, int y, int z,
                                            int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// Loads `bytes` contiguous bytes, a multiple of 16, between addresses that are aligned to 16, and reports them to `bar`
// as they arrive.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, int bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(bar))
               : "memory");
}

// Stores the box; elements outside the matrix are not written. Each thread that has written to the box must first call
// fence_proxy_async, and a barrier must follow.
// clang-format off
__device__ __forceinline__ void tma_store_2d(const TensorMap* map, const void* shared, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
               ::"l"(map), "r"(shared_address(shared)), "r"(x), "r"(y)
               : "memory");
}
// clang-format on

__device__ __forceinline__ void tma_store_4d(const TensorMap* map, const void* shared, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}

// Makes this thread's stores since the last commit a group.
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most the newest N groups still read shared memory. Needed before that memory is reused and before the
// block ends.
template <int N>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// ---- Clusters: blocks that can access each other's shared memory (sm_90)

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier of the cluster in two halves. Every thread of the cluster must arrive, and wait before it arrives again. A
// block must not end while another block may still access its shared memory.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// The address, in the shared memory of block `rank` of the cluster, that corresponds to p in this block's.
template <class T>
__device__ __forceinline__ T* map_rank(T* p, int rank) {
  uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(mapped);
}

#endif

#if !defined(PYGPT_ARCH) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- Products of a warp group: 128 threads, operands in shared memory (sm_90a)
//
// d (64 x N) = a (64 x 16) b (16 x N) + d. Warp w of the group holds rows 16w .. 16w + 15. Counted from row 16w,
//   d[4j], d[4j + 1] = D[g    ][8j + 2t, 8j + 2t + 1]      g = lane / 4, t = lane % 4, j < N / 8
//   d[4j + 2], d[4j + 3] = D[g + 8][8j + 2t, 8j + 2t + 1]
// If a is in registers, its layout is that of mma_m16n8k16, with rows counted from 16w.
//
// An operand in shared memory consists of atoms of 8 lines. A line is W = 16, 32, 64 or 128 contiguous bytes (Swizzle
// none, bytes32, bytes64, bytes128). Line l starts at byte W l of its atom. The swizzle permutes 16-byte chunks as TMA
// does, so TMA writes the layout that wgmma reads.
//   K-major (a line lies along k: part of a row of A or of a column of B):
//     stride  = bytes from 8 lines to the next 8, along M or N
//     leading = bytes from k = 0 .. 7 to k = 8 .. 15 without swizzle; ignored with swizzle, where a line holds both
//     the i-th k16 step within a line starts at the start address + 32 i
//   MN-major (a line is W / 2 neighbours along M or N, for one k; trans = true):
//     with swizzle:    leading = bytes from W / 2 columns to the next W / 2; stride = bytes from 8 k to the next 8
//     without swizzle: stride = bytes from 8 columns to the next 8; leading = bytes from 8 k to the next 8
// Atoms start at multiples of 8 W bytes.

// leading and stride are multiples of 16 below 2^18.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* shared, int leading, int stride, Swizzle swizzle) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  const uint64_t mode = (4 - static_cast<int>(swizzle)) % 4;  // 1: 128 bytes, 2: 64 bytes, 3: 32 bytes
  return field(shared_address(shared)) | field(leading) << 16 | field(stride) << 32 | mode << 62;
}

// A compiler barrier for these registers: their values are final here, and later accesses are not moved up.
template <int n>
__device__ __forceinline__ void pin(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int n>
__device__ __forceinline__ void pin(uint32_t (&a)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// Needed before each group of products. Pass the fragments d and a that anything but wgmma has written since the last
// group, but no fragment that is in flight.
template <class... Fragments>
__device__ __forceinline__ void wgmma_fence(Fragments&... written) {
  (pin(written), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Makes the products issued since the last commit a group.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the newest N groups are in flight. Pass the fragments that are complete after the wait and used
// next. While a product is in flight, its d and a must not be accessed and its shared memory must not be written.
template <int N, class... Fragments>
__device__ __forceinline__ void wgmma_wait(Fragments&... complete) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
  (pin(complete), ...);
}

// The instruction names every register of d, so each width is spelled out. PYGPT_D<n> are the n operands d[0], d[1],
// ..., and PYGPT_R<n> are their names "%0, %1, ..."; later operands are numbered by hand.
#define PYGPT_D8(i)                                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define PYGPT_D32_AT(i) PYGPT_D8(i), PYGPT_D8(i + 8), PYGPT_D8(i + 16), PYGPT_D8(i + 24)
#define PYGPT_D32 PYGPT_D32_AT(0)
#define PYGPT_D64 PYGPT_D32, PYGPT_D32_AT(32)
#define PYGPT_D96 PYGPT_D64, PYGPT_D32_AT(64)
#define PYGPT_D128 PYGPT_D96, PYGPT_D32_AT(96)
#define PYGPT_R32                                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PYGPT_R64                                                                                               \
  PYGPT_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
            "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PYGPT_R96                                                                                               \
  PYGPT_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, " \
            "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PYGPT_R128                                                                                           \
  PYGPT_R96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
            "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PYGPT_WGMMA_OF(type, n, regs, scale, inputs, ...)                                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " scale ", 0;\n"                                                     \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" PYGPT_R##regs "}, " inputs ";\n}" \
               : PYGPT_D##regs                                                                                        \
               : __VA_ARGS__                                                                                          \
               : "memory")
#define PYGPT_WGMMA(n, regs, ...)                                                                \
  if constexpr (N == n && std::is_same_v<T, bf16>) PYGPT_WGMMA_OF("bf16", n, regs, __VA_ARGS__); \
  if constexpr (N == n && std::is_same_v<T, f16>) PYGPT_WGMMA_OF("f16", n, regs, __VA_ARGS__)
#define PYGPT_INPUTS "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(transA)), "n"(int(transB))

constexpr bool has_wgmma(int n) { return n == 64 || n == 128 || n == 192 || n == 256; }

// d += a b, or d = a b if !accumulate, asynchronously. a and b are descriptors; transA and transB mean MN-major.
template <class T, int N, bool transA = false, bool transB = false>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(has_wgmma(N));
  PYGPT_WGMMA(64, 32, "%34", "%32, %33, p, 1, 1, %35, %36", PYGPT_INPUTS);
  PYGPT_WGMMA(128, 64, "%66", "%64, %65, p, 1, 1, %67, %68", PYGPT_INPUTS);
  PYGPT_WGMMA(192, 96, "%98", "%96, %97, p, 1, 1, %99, %100", PYGPT_INPUTS);
  PYGPT_WGMMA(256, 128, "%130", "%128, %129, p, 1, 1, %131, %132", PYGPT_INPUTS);
}
#undef PYGPT_INPUTS
#define PYGPT_INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(transB))

// The same with a in registers.
template <class T, int N, bool transB = false>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(has_wgmma(N));
  PYGPT_WGMMA(64, 32, "%37", "{%32, %33, %34, %35}, %36, p, 1, 1, %38", PYGPT_INPUTS);
  PYGPT_WGMMA(128, 64, "%69", "{%64, %65, %66, %67}, %68, p, 1, 1, %70", PYGPT_INPUTS);
  PYGPT_WGMMA(192, 96, "%101", "{%96, %97, %98, %99}, %100, p, 1, 1, %102", PYGPT_INPUTS);
  PYGPT_WGMMA(256, 128, "%133", "{%128, %129, %130, %131}, %132, p, 1, 1, %134", PYGPT_INPUTS);
}
#undef PYGPT_INPUTS
#undef PYGPT_WGMMA
#undef PYGPT_WGMMA_OF
#undef PYGPT_R128
#undef PYGPT_R96
#undef PYGPT_R64
#undef PYGPT_R32
#undef PYGPT_D128
#undef PYGPT_D96
#undef PYGPT_D64
#undef PYGPT_D32
#undef PYGPT_D32_AT
#undef PYGPT_D8

// Changes the number of registers per thread of this warp group to a multiple of 8 in 24 .. 256. A producer group gives
// up registers that consumer groups then take. A kernel starts with the number that __launch_bounds__ implies.
template <int registers>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

#endif

}  // namespace pygpt::cuda::ptx
