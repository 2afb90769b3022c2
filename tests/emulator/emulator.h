// CUDA C++ for a host compiler. platform.cuh includes this file when nvcc does not compile it.
//
// It defines the keywords of the language, the built-in functions that kernels use, and launch(). Functions that wait
// or exchange values receive the caller's line as a last parameter, which has a default value.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "runtime.h"
#include "warp.h"

#ifndef PYGPT_ARCH
#define PYGPT_ARCH 900
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

// A reference to the block's variable. Each declaration gets a type of its own, which identifies it.
#define PYGPT_SHARED(type, name, dims) \
  struct name##_in_shared_memory {     \
    type value dims;                   \
  };                                   \
  auto& name = pygpt::emulator::shared_variable<name##_in_shared_memory>(#name).value
#define PYGPT_DYNAMIC_SHARED(name) \
  unsigned char* const name = reinterpret_cast<unsigned char*>(pygpt::emulator::dynamic_shared())

constexpr int warpSize = 32;

// ---- Barriers and fences

inline void __syncthreads(pygpt::emulator::Site site = pygpt::emulator::Site::here()) {
  pygpt::emulator::barrier(0, 0, site);
}
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu, pygpt::emulator::Site site = pygpt::emulator::Site::here()) {
  pygpt::emulator::syncwarp(mask, site);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}

// ---- Exchange between the lanes of a warp

#define PYGPT_SHUFFLE(name, kind, argument)                                       \
  template <class T>                                                              \
  T name(uint32_t mask, T x, argument operand, int width = 32,                    \
         pygpt::emulator::Site site = pygpt::emulator::Site::here()) {            \
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8)); \
    uint64_t bits = 0;                                                            \
    std::memcpy(&bits, &x, sizeof x);                                             \
    constexpr auto how = pygpt::emulator::Shuffle::kind;                          \
    bits = pygpt::emulator::shuffle(how, mask, bits, int(operand), width, site);  \
    std::memcpy(&x, &bits, sizeof x);                                             \
    return x;                                                                     \
  }
PYGPT_SHUFFLE(__shfl_sync, from, int)
PYGPT_SHUFFLE(__shfl_up_sync, up, unsigned)
PYGPT_SHUFFLE(__shfl_down_sync, down, unsigned)
PYGPT_SHUFFLE(__shfl_xor_sync, exclusive_or, int)
#undef PYGPT_SHUFFLE

inline unsigned __ballot_sync(uint32_t mask, bool p, pygpt::emulator::Site site = pygpt::emulator::Site::here()) {
  return pygpt::emulator::ballot(mask, p, site);
}
inline int __any_sync(uint32_t mask, bool p, pygpt::emulator::Site site = pygpt::emulator::Site::here()) {
  return pygpt::emulator::ballot(mask, p, site) != 0;
}
inline int __all_sync(uint32_t mask, bool p, pygpt::emulator::Site site = pygpt::emulator::Site::here()) {
  return pygpt::emulator::ballot(mask, p, site) == mask;
}

// ---- Atomics. CUDA's are relaxed; these are ordered, because the race checker does not know __threadfence.

template <class T> T atomicAdd(T* p, std::common_type_t<T> x) {
  if constexpr (std::is_integral_v<T>) return __atomic_fetch_add(p, x, __ATOMIC_ACQ_REL);
  T old, sum;
  __atomic_load(p, &old, __ATOMIC_ACQUIRE);
  do sum = old + x;
  while (!__atomic_compare_exchange(p, &old, &sum, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
  return old;
}
template <class T> T atomicOr(T* p, std::common_type_t<T> x) { return __atomic_fetch_or(p, x, __ATOMIC_ACQ_REL); }
template <class T> T atomicAnd(T* p, std::common_type_t<T> x) { return __atomic_fetch_and(p, x, __ATOMIC_ACQ_REL); }
template <class T> T atomicExch(T* p, std::common_type_t<T> x) {
  T old;
  __atomic_exchange(p, &x, &old, __ATOMIC_ACQ_REL);
  return old;
}
template <class T> T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> x) {
  T old = expected;
  __atomic_compare_exchange(p, &old, &x, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return old;
}
template <class T> T atomicMax(T* p, std::common_type_t<T> x) {
  T old = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  while (old < x && !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {}
  return old;
}
template <class T> T atomicMin(T* p, std::common_type_t<T> x) {
  T old = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  while (x < old && !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {}
  return old;
}

// ---- Arithmetic. Where CUDA allows an error of some ulp, the result is one of the results allowed.

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fmul_rn(float a, float b) { return a * b; }  // -ffp-contract=off: never part of an fma
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return float(1.0 / std::sqrt(double(x))); }
inline float __saturatef(float x) { return x > 0 ? std::min(x, 1.0f) : 0.0f; }
inline float __uint_as_float(uint32_t x) { return pygpt::cuda::bits_as<float>(x); }
inline float __int_as_float(int x) { return pygpt::cuda::bits_as<float>(x); }
inline uint32_t __float_as_uint(float x) { return pygpt::cuda::bits_as<uint32_t>(x); }
inline int __float_as_int(float x) { return pygpt::cuda::bits_as<int>(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(uint32_t(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T x) { *p = x; }
template <class T> void __stcg(T* p, T x) { *p = x; }
template <class A, class B, class T = std::common_type_t<A, B>> T min(A a, B b) { return std::min(T(a), T(b)); }
template <class A, class B, class T = std::common_type_t<A, B>> T max(A a, B b) { return std::max(T(a), T(b)); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

// ---- Launching

namespace pygpt::cuda {

inline int64_t max_shared_bytes(const Stream&) { return emulator::shared_limit(); }
inline int64_t shared_l2_bytes() {  // or PYGPT_EMULATED_L2, in bytes
  const char* bytes = std::getenv("PYGPT_EMULATED_L2");
  return bytes ? std::atoll(bytes) : 16 << 20;
}

template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, const Stream&,
             Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> parameters{static_cast<Parameters>(arguments)...};
  return emulator::run(reinterpret_cast<const void*>(kernel), {grid, block, shared},
                       [&] { std::apply(kernel, parameters); });
}

}  // namespace pygpt::cuda

#include "ptx.h"
#if PYGPT_ARCH >= 900 && __has_include("hopper.h")
#include "hopper.h"
#endif
