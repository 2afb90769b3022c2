// Correct kernels that exercise the emulator's parts one by one. test_emulator.py compares their results with the
// definitions.
#include "platform.cuh"

#include <cstring>

namespace pygpt::cuda {
namespace {

// out[i] = in[i], converted.
template <class T>
__global__ void widen(const uint16_t* in, float* out, int n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = to_float(reinterpret_cast<const T*>(in)[i]);
}
template <class T>
__global__ void narrow(const float* in, uint16_t* out, int n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) reinterpret_cast<T*>(out)[i] = from_float<T>(in[i]);
}

// Counts how often each thread of each block runs: out[block][thread]++.
__global__ void visit(const int*, int* out, int) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread]++;
}

// The order in which threads arrive: out[n] is the n-th thread.
__global__ void arrive(const int*, int* out, int) {
  PYGPT_SHARED(int, next, );
  if (threadIdx.x == 0) next = 0;
  __syncthreads();
  out[atomicAdd(&next, 1)] = threadIdx.x;
}

// out = every kind of exchange of in, 32 values each.
__global__ void exchange(const int* in, int* out, int) {
  const int t = threadIdx.x, x = in[t];
  constexpr unsigned all = 0xffffffffu;
  out[t] = __shfl_sync(all, x, 5);
  out[32 + t] = __shfl_sync(all, x, t + 3, 8);
  out[64 + t] = __shfl_up_sync(all, x, 3);
  out[96 + t] = __shfl_down_sync(all, x, 3, 16);
  out[128 + t] = __shfl_xor_sync(all, x, 9);
  out[160 + t] = __ballot_sync(all, x % 3 == 0);
  out[192 + t] = __any_sync(all, x == in[7]) + 2 * __all_sync(all, x == in[7]);
  out[224 + t] = t < 10 ? __shfl_xor_sync(0x3ffu, x, 1) : __shfl_sync(0xfffffc00u, x, 31);
}

// out[0..5] = the results after every thread has done each atomic operation once.
__global__ void atomics(const int* in, int* out, int) {
  const int x = in[threadIdx.x];
  atomicAdd(&out[0], x);
  atomicMax(&out[1], x);
  atomicMin(&out[2], x);
  atomicOr(&out[3], x);
  atomicAdd(reinterpret_cast<float*>(&out[4]), 1.0f);
  for (int old = out[5], seen; (seen = atomicCAS(&out[5], old, old + 1)) != old;) old = seen;
}

// out (16 x 8) = A (16 x 16) B (16 x 8) + D. `in` holds A and B (16-bit) and D (float), one after the other.
template <class T>
__global__ void product(const uint32_t* in, float* out, int) {
  const int t = threadIdx.x, g = t / 4, c = t % 4;
  const uint32_t* a = in;  // rows of 8 words
  const auto* b = reinterpret_cast<const uint16_t*>(in + 128);  // rows of 8 elements
  const auto* d0 = reinterpret_cast<const float*>(in + 128 + 64);
  const auto pair = [&](int k) { return b[8 * k + g] | static_cast<uint32_t>(b[8 * (k + 1) + g]) << 16; };
  const uint32_t x[4] = {a[8 * g + c], a[8 * (g + 8) + c], a[8 * g + c + 4], a[8 * (g + 8) + c + 4]};
  float d[4];
  for (int i = 0; i < 4; i++) d[i] = d0[8 * (g + i / 2 * 8) + 2 * c + i % 2];
  ptx::mma_m16n8k16<T>(d, x, pair(2 * c), pair(2 * c + 8));
  for (int i = 0; i < 4; i++) out[8 * (g + i / 2 * 8) + 2 * c + i % 2] = d[i];
}

// Four 8x8 matrices whose rows are `stride` bytes apart. out[0] = ldmatrix, out[1] = its .trans form, [matrix][lane].
template <int stride>
__global__ void fragments(const uint4* in, uint32_t* out, int) {
  PYGPT_DYNAMIC_SHARED(shared);
  const int t = threadIdx.x;
  unsigned char* row = shared + t * stride;
  *reinterpret_cast<uint4*>(row) = in[t];
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, row);
  for (int m = 0; m < 4; m++) out[32 * m + t] = r[m];
  ptx::ldmatrix_x4_trans(r, row);
  for (int m = 0; m < 4; m++) out[128 + 32 * m + t] = r[m];
}

// The initial contents of shared memory: out[0..31] static, out[32..63] dynamic.
__global__ void fresh(const float*, float* out, int) {
  PYGPT_SHARED(float, s, [32]);
  PYGPT_DYNAMIC_SHARED(shared);
  out[threadIdx.x] = s[threadIdx.x];
  out[32 + threadIdx.x] = reinterpret_cast<const float*>(shared)[threadIdx.x];
  s[threadIdx.x] = 1;
  reinterpret_cast<float*>(shared)[threadIdx.x] = 1;
}

__global__ void crash(const int*, int* out, int) { *reinterpret_cast<volatile int*>(out + (int64_t{1} << 60)) = 0; }

__global__ void overflow(const int* in, int* out, int n) {
  volatile char frame[64 << 10];
  frame[0] = static_cast<char>(n);
  if (in[0] == 0) overflow(in, out, n + frame[0]);
  out[0] = frame[0];
}

template <class In, class Out>
Error run(void (*kernel)(const In*, Out*, int), dim3 grid, dim3 block, int shared, const void* in, void* out, int n) {
  return launch(kernel, grid, block, shared, Stream{}, static_cast<const In*>(in), static_cast<Out*>(out), n);
}

Error run_named(const char* name, const void* in, void* out, int n, dim3 grid, dim3 block, int shared) {
  const auto is = [&](const char* other) { return !std::strcmp(name, other); };
  if (is("widen bf16")) return run(widen<bf16>, grid, block, shared, in, out, n);
  if (is("widen f16")) return run(widen<f16>, grid, block, shared, in, out, n);
  if (is("narrow bf16")) return run(narrow<bf16>, grid, block, shared, in, out, n);
  if (is("narrow f16")) return run(narrow<f16>, grid, block, shared, in, out, n);
  if (is("visit")) return run(visit, grid, block, shared, in, out, n);
  if (is("arrive")) return run(arrive, grid, block, shared, in, out, n);
  if (is("exchange")) return run(exchange, grid, block, shared, in, out, n);
  if (is("atomics")) return run(atomics, grid, block, shared, in, out, n);
  if (is("product bf16")) return run(product<bf16>, grid, block, shared, in, out, n);
  if (is("product f16")) return run(product<f16>, grid, block, shared, in, out, n);
  if (is("fragments 16")) return run(fragments<16>, grid, block, shared, in, out, n);
  if (is("fragments 128")) return run(fragments<128>, grid, block, shared, in, out, n);
  if (is("fresh")) return run(fresh, grid, block, shared, in, out, n);
  if (is("crash")) return run(crash, grid, block, shared, in, out, n);
  if (is("overflow")) return run(overflow, grid, block, shared, in, out, n);
  return "no such kernel";
}

}  // namespace
}  // namespace pygpt::cuda

// Runs the named kernel on host memory; n is passed to kernels that take a number of elements.
extern "C" __attribute__((visibility("default"))) const char* basics(const char* name, const void* in, void* out, int n,
                                                                     const int (&grid)[3], const int (&block)[3],
                                                                     int shared) {
  const auto size = [](const int(&d)[3]) { return dim3(unsigned(d[0]), unsigned(d[1]), unsigned(d[2])); };
  return pygpt::cuda::run_named(name, in, out, n, size(grid), size(block), shared);
}
