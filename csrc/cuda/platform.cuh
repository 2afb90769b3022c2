// Every kernel file includes this file first. It provides CUDA from nvcc, or its emulation on a CPU (tests/emulator).
//
// The same .cu files compile with nvcc and with g++. They therefore follow these rules:
//   - asm only in ptx.cuh; launch() instead of <<<>>>; PYGPT_ARCH instead of __CUDA_ARCH__;
//   - shared memory is declared by PYGPT_SHARED and PYGPT_DYNAMIC_SHARED;
//   - 16-bit types are stored and moved as bf16 and f16; arithmetic is done in float.
#pragma once
#include "../ops.h"

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>

#ifdef __CUDA_ARCH__
#define PYGPT_ARCH __CUDA_ARCH__
#endif
#define PYGPT_SHARED(type, name, dims) __shared__ type name dims        // PYGPT_SHARED(float, sums, [4][32]);
#define PYGPT_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace pygpt::cuda {
using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <class T> __device__ T from_float(float x);  // rounds to nearest, ties to even
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

// Two 16-bit values in a register, the first in the low half.
template <class T> __device__ uint32_t pack(float low, float high);
template <> __device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
template <> __device__ __forceinline__ uint32_t pack<f16>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
template <class T> __device__ float2 unpack(uint32_t both);
template <> __device__ __forceinline__ float2 unpack<bf16>(uint32_t both) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(both));
}
template <> __device__ __forceinline__ float2 unpack<f16>(uint32_t both) {
  return __half22float2(reinterpret_cast<const __half2&>(both));
}

// The most shared memory that a block can have on this device, in bytes, static variables included.
inline int64_t max_shared_bytes(const Stream& stream) {
  int bytes = 48 << 10;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, stream.device);
  return bytes;
}

// Bytes of the L2 cache that blocks running at the same time may fill with what they share.
inline int64_t shared_l2_bytes() { return 16 << 20; }

// Opts a kernel in to more dynamic shared memory than the default, once per kernel and device. The default limit is
// 48 KB, of which 1 KB is reserved for static variables. Thread-safe.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, size_t shared, const Stream& stream) {
  if (shared <= (47 << 10)) return cudaSuccess;
  static std::mutex mutex;
  static std::map<std::pair<Kernel, int>, size_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& bytes = allowed[{kernel, stream.device}];
  if (shared <= bytes) return cudaSuccess;
  const cudaError_t e =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (e == cudaSuccess) bytes = shared;
  return e;
}

// The error that a launch returned or left behind. cudaGetLastError also clears it, or the next launch would report it.
inline Error launch_error(cudaError_t e) {
  const cudaError_t last = cudaGetLastError();
  return e == cudaSuccess && last == cudaSuccess ? nullptr : cudaGetErrorString(e == cudaSuccess ? last : e);
}

// Launches a kernel on the stream. The stream's device must be the current device.
template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, const Stream& stream,
             Arguments&&... arguments) {
  const cudaError_t e = allow_shared(kernel, shared, stream);
  if (e == cudaSuccess)
    kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream.handle)>>>(static_cast<Parameters>(arguments)...);
  return launch_error(e);
}
}  // namespace pygpt::cuda

#include "ptx.cuh"

#else
#include "emulator.h"
#endif

namespace pygpt::cuda {

// Calls body(T{}), where T is the element type of dtype.
template <class Body>
Error by_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(f16{});
    default: return "the CUDA kernels do not serve float64";
  }
}

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

constexpr __host__ __device__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline dim3 make_grid(int64_t x, int64_t y = 1) { return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)); }

// Reductions over the 32 lanes of a warp, or over aligned groups of `width` lanes. Every lane gets the result.
template <int width = 32>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int d = width / 2; d; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}
template <int width = 32>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int d = width / 2; d; d /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
  return x;
}

}  // namespace pygpt::cuda
