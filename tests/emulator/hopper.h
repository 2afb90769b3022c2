// Hopper on a CPU: mbarriers, the tensor memory accelerator, wgmma, clusters. These are ptx.cuh's functions for sm_90.
//
//   mbarrier   counts arrivals and bytes in its 64 bits. Bytes still expected when the block ends are an error.
//   TMA        a load fills its box with NaN when it is issued and delivers as late as the schedule allows. A store
//              reads shared memory when it is waited for.
//   wgmma      fills d with NaN. The warp's product is computed when it is waited for, from the shared memory of that
//              moment. Registers that changed after the last wgmma_fence that named them are an error.
//   proxies    TMA and wgmma see dynamic shared memory as it was at the block's last fence_proxy_async(), plus TMA's
//              own writes. A missing fence is therefore found; a fence by the wrong thread or too early may not be.
//   clusters   The blocks of a cluster run together. When a block ends, its shared memory becomes NaN, and an access to
//              it by another block is an error.
//   elect_one  elects a lane that is not the first, because kernels may not rely on which it is.
//   registers  A warp that asks for more of them waits until those suffice that the block started with.
// Alignments, ranges and descriptors are checked. fence_mbarrier_init does nothing.
#pragma once
#include <algorithm>
#include <tuple>
#include <type_traits>

#include "../../csrc/ops.h"
#include "runtime.h"

#define __CUDA_ARCH_FEAT_SM90_ALL  // as nvcc says of sm_90a

namespace pygpt::cuda::ptx {

enum class Swizzle { none, bytes32, bytes64, bytes128 };

struct alignas(64) TensorMap {
  const std::byte* data;
  int64_t size[4], stride[4];  // columns first; strides in bytes
  int box_rows, box_cols, element, rank;  // element: its size in bytes
  Swizzle swizzle;
  unsigned char unused[36];
  int box_bytes() const { return box_rows * box_cols * element; }
};
static_assert(sizeof(TensorMap) == 128);

}  // namespace pygpt::cuda::ptx

namespace pygpt::emulator {

using cuda::ptx::Swizzle;
using cuda::ptx::TensorMap;

// Implemented in hopper.cpp:
void mbarrier_init(uint64_t* bar, int count, Site site);
void mbarrier_arrive(uint64_t* bar, int64_t bytes, Site site);
void mbarrier_arrive_at(uint64_t* bar, int rank, Site site);
void mbarrier_wait(uint64_t* bar, int parity, Site site);
void fence_proxy_async();
struct At {  // a box's first element
  int x, y, z = 0, w = 0;
};
void check_box(const TensorMap& map, int rank, const void* shared, Site site);
void tma_load(std::byte* shared, const TensorMap& map, uint64_t* bar, At at, int ranks, Site site);
void tma_store(const TensorMap& map, const std::byte* shared, At at, Site site);
void bulk_load(std::byte* shared, const std::byte* global, int bytes, uint64_t* bar, Site site);
bool elect_one(Site site);
void store_matrices(void* row, const uint32_t (&fragment)[4], bool transposed, Site site);
void tma_store_commit();
void tma_store_wait(int pending);
uint64_t wgmma_descriptor(const void* shared, int leading, int stride, Swizzle swizzle, Site site);
void wgmma_fence(const void* registers, int count);
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);
void cluster_arrive(Site site);
void cluster_wait(Site site);
void* map_rank(const void* shared, int rank, Site site);
const char* check_map(const TensorMap& map);  // null, or why TMA cannot use the map

// One lane's part of a product.
struct Wgmma {
  Thread* thread;
  float* d;
  const uint32_t* a_registers;  // or null
  uint64_t a, b;
  int n;
  bool is_bf16, trans_a, trans_b, accumulate;
};
void wgmma(Wgmma& lane, Site site);
void increase_registers(int count, Site site);
void decrease_registers(int count, Site site);

// The offset of an operand's element in the block's shared memory, in bytes. i counts along M or N.
size_t operand_offset(uint64_t descriptor, bool trans, int i, int k);

// Lets sanitizers see an access to the rows of the matrix that a box covers.
inline void touch_matrix(const TensorMap& map, At at) {
  const int64_t(&size)[4] = map.size, (&stride)[4] = map.stride;
  if (at.z < 0 || at.z >= size[2] || at.w < 0 || at.w >= size[3]) return;
  const std::byte* matrix = map.data + at.z * stride[2] + at.w * stride[3];
  const int64_t first = std::max(at.x, 0), last = std::min<int64_t>(size[0], int64_t(at.x) + map.box_cols);
  for (int64_t r = std::max(at.y, 0); r < std::min<int64_t>(size[1], int64_t(at.y) + map.box_rows) && first < last; r++)
    touch(matrix + r * stride[1] + first * map.element, (last - first) * map.element);
}
// Lets sanitizers see an access to an operand's elements, which the 128 threads of a warp group divide up in pairs.
// `size` is the operand's extent along M or N.
inline void touch_operand(uint64_t descriptor, bool trans, int size, Site site) {
  for (int pair = current->rank % 128; pair < size * 8; pair += 128) {
    const size_t offset = trans ? operand_offset(descriptor, true, pair % (size / 2) * 2, pair / (size / 2))
                                : operand_offset(descriptor, false, pair / 8, pair % 8 * 2);
    if (!is_shared(current->block->shared + offset, 4)) fail(site, "wgmma reads outside of shared memory");
    touch(current->block->shared + offset, 4);
  }
}

}  // namespace pygpt::emulator

namespace pygpt::cuda::ptx {

using emulator::Site;

inline void named_barrier(int id, int threads, Site site = Site::here()) {
  if (id < 1) emulator::fail(site, "named barriers are 1 .. 15");
  emulator::barrier(id, threads, site);
}
inline void named_barrier_arrive(int id, int threads, Site site = Site::here()) {
  if (id < 1) emulator::fail(site, "named barriers are 1 .. 15");
  emulator::barrier_arrive(id, threads, site);
}

// ---- Parts of a warp

inline bool elect_one(Site site = Site::here()) { return emulator::elect_one(site); }

template <bool transposed>
void store_matrices(void* row, const uint32_t (&r)[4], Site site) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    emulator::fail(site, "stmatrix with an address that is not a multiple of 16");
  if (!emulator::is_shared(row, 16)) emulator::fail(site, "stmatrix to no variable in shared memory");
  emulator::poison(row, 16);
  emulator::store_matrices(row, r, transposed, site);
}
inline void stmatrix_x4(void* row, const uint32_t (&r)[4], Site site = Site::here()) {
  store_matrices<false>(row, r, site);
}
inline void stmatrix_x4_trans(void* row, const uint32_t (&r)[4], Site site = Site::here()) {
  store_matrices<true>(row, r, site);
}

// ---- mbarriers

inline void mbarrier_init(uint64_t* bar, int count, Site site = Site::here()) {
  emulator::mbarrier_init(bar, count, site);
}
inline void mbarrier_arrive(uint64_t* bar, Site site = Site::here()) {
  emulator::touch(bar, 8);
  emulator::mbarrier_arrive(bar, 0, site);
}
inline void mbarrier_arrive_at(uint64_t* bar, int rank, Site site = Site::here()) {
  emulator::mbarrier_arrive_at(bar, rank, site);
}
inline void mbarrier_expect(uint64_t* bar, int bytes, Site site = Site::here()) {
  emulator::touch(bar, 8);
  emulator::mbarrier_arrive(bar, bytes, site);
}
inline void mbarrier_wait(uint64_t* bar, int parity, Site site = Site::here()) {
  emulator::touch(bar, 8);
  emulator::mbarrier_wait(bar, parity, site);
}
inline void fence_mbarrier_init() {}
inline void fence_proxy_async() { emulator::fence_proxy_async(); }

// ---- The tensor memory accelerator

// ranks: the blocks of the cluster, one bit each; 0 is the own block alone.
inline void tma_load(void* shared, const TensorMap& map, int rank, uint64_t* bar, emulator::At at, int ranks,
                     Site site) {
  emulator::check_box(map, rank, shared, site);
  emulator::touch_matrix(map, at);
  emulator::touch(bar, 8);
  if (!ranks || ranks >> emulator::current->block->cluster_rank & 1) emulator::poison(shared, map.box_bytes());
  emulator::tma_load(static_cast<std::byte*>(shared), map, bar, at, ranks, site);
}
inline void tma_store(const TensorMap& map, int rank, const void* shared, emulator::At at, Site site) {
  emulator::check_box(map, rank, shared, site);
  emulator::touch(shared, map.box_bytes());
  emulator::touch_matrix(map, at);
  emulator::tma_store(map, static_cast<const std::byte*>(shared), at, site);
}
inline void tma_load_2d(void* shared, const TensorMap* map, uint64_t* bar, int x, int y, Site site = Site::here()) {
  tma_load(shared, *map, 2, bar, {x, y}, 0, site);
}
inline void tma_load_2d_multicast(void* shared, const TensorMap* map, uint64_t* bar, int x, int y, uint16_t ranks,
                                  Site site = Site::here()) {
  if (!ranks || ranks >> emulator::current->block->cluster_size)
    emulator::fail(site, "a multicast to no block, or to one that the cluster does not have");
  tma_load(shared, *map, 2, bar, {x, y}, ranks, site);
}
inline void tma_load_4d(void* shared, const TensorMap* map, uint64_t* bar, int x, int y, int z, int w,
                        Site site = Site::here()) {
  tma_load(shared, *map, 4, bar, {x, y, z, w}, 0, site);
}
inline void bulk_load(void* shared, const void* global, int bytes, uint64_t* bar, Site site = Site::here()) {
  emulator::touch(global, bytes);
  emulator::touch(bar, 8);
  emulator::poison(shared, bytes);
  emulator::bulk_load(static_cast<std::byte*>(shared), static_cast<const std::byte*>(global), bytes, bar, site);
}
inline void tma_store_2d(const TensorMap* map, const void* shared, int x, int y, Site site = Site::here()) {
  tma_store(*map, 2, shared, {x, y}, site);
}
inline void tma_store_4d(const TensorMap* map, const void* shared, int x, int y, int z, int w,
                         Site site = Site::here()) {
  tma_store(*map, 4, shared, {x, y, z, w}, site);
}
inline void tma_store_commit() { emulator::tma_store_commit(); }
template <int N>
inline void tma_store_wait() {
  emulator::tma_store_wait(N);
}

// ---- Clusters

inline int cluster_rank() { return emulator::current->block->cluster_rank; }
inline void cluster_arrive(Site site = Site::here()) { emulator::cluster_arrive(site); }
inline void cluster_wait(Site site = Site::here()) { emulator::cluster_wait(site); }
template <class T>
inline T* map_rank(T* p, int rank, Site site = Site::here()) {
  return static_cast<T*>(emulator::map_rank(p, rank, site));
}

// ---- wgmma

inline uint64_t wgmma_descriptor(const void* shared, int leading, int stride, Swizzle swizzle,
                                 Site site = Site::here()) {
  return emulator::wgmma_descriptor(shared, leading, stride, swizzle, site);
}

inline void wgmma_fence() {}
template <class T, int n, class... More>
inline void wgmma_fence(T (&written)[n], More&... more) {
  emulator::wgmma_fence(written, n);
  wgmma_fence(more...);
}
inline void wgmma_commit(Site site = Site::here()) { emulator::wgmma_commit(site); }
template <int N>
inline void wgmma_wait(Site site = Site::here()) {
  emulator::wgmma_wait(N, site);
}
template <int N, class T, int n>
inline void wgmma_wait(T (&)[n], Site site = Site::here()) {
  emulator::wgmma_wait(N, site);
}
template <int N, class T, int n, class U, int m>
inline void wgmma_wait(T (&)[n], U (&)[m], Site site = Site::here()) {
  emulator::wgmma_wait(N, site);
}

constexpr bool has_wgmma(int n) { return n == 64 || n == 128 || n == 192 || n == 256; }

template <class T, int N, bool transA = false, bool transB = false>
inline void wgmma_m64k16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, Site site = Site::here()) {
  static_assert(has_wgmma(N));
  emulator::touch_operand(a, transA, 64, site);
  emulator::touch_operand(b, transB, N, site);
  emulator::Wgmma lane{emulator::current, d, nullptr, a, b, N, std::is_same_v<T, bf16>, transA, transB, accumulate};
  emulator::wgmma(lane, site);
}
template <class T, int N, bool transB = false>
inline void wgmma_m64k16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                         Site site = Site::here()) {
  static_assert(has_wgmma(N));
  emulator::touch_operand(b, transB, N, site);
  emulator::Wgmma lane{emulator::current, d, a, 0, b, N, std::is_same_v<T, bf16>, false, transB, accumulate};
  emulator::wgmma(lane, site);
}

template <int registers>
inline void increase_registers(Site site = Site::here()) {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
  emulator::increase_registers(registers, site);
}
template <int registers>
inline void decrease_registers(Site site = Site::here()) {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
  emulator::decrease_registers(registers, site);
}

}  // namespace pygpt::cuda::ptx

// ---- The host's side (csrc/cuda/hopper.cuh)

namespace pygpt::cuda {

template <class T, int rank>
Error encode(ptx::TensorMap& map, const T* data, const int64_t (&sizes)[rank], const int64_t (&strides)[rank - 1],
             int box_rows, int box_cols, ptx::Swizzle swizzle) {
  const int element = sizeof(T);
  map = ptx::TensorMap{reinterpret_cast<const std::byte*>(data),
                       {1, 1, 1, 1},
                       {element},
                       box_rows,
                       box_cols,
                       element,
                       rank,
                       swizzle,
                       {}};
  std::copy_n(sizes, rank, map.size);
  for (int i = 1; i < rank; i++) map.stride[i] = strides[i - 1] * element;
  return emulator::check_map(map);
}

template <class... Parameters, class... Arguments>
Error launch_cluster(void (*kernel)(Parameters...), dim3 grid, dim3 block, dim3 cluster, size_t shared, const Stream&,
                     Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> parameters{static_cast<Parameters>(arguments)...};
  return emulator::run(reinterpret_cast<const void*>(kernel), {grid, block, shared, cluster},
                       [&] { std::apply(kernel, parameters); });
}

}  // namespace pygpt::cuda
