// Every kernel here exists twice: with a planted bug, which the emulator must find, and without, which must pass.
//
// For the input in[i] = i % 128 each kernel without its bug writes out[i] = i, i < 128. A launch has one block of 128
// threads unless the table of cases says otherwise. t is the index of the thread.
#include "platform.cuh"

#include <cstring>

namespace pygpt::cuda {
namespace {

__device__ int thread() { return static_cast<int>(threadIdx.x); }

// ---- Synchronisation

template <bool bug>
__global__ void no_syncthreads(const float*, float* out) {
  PYGPT_SHARED(float, s, [128]);
  const int t = thread();
  s[127 - t] = 127 - t;
  if (!bug) __syncthreads();
  out[t] = s[t];
}

template <bool bug>
__global__ void no_syncwarp(const float*, float* out) {
  PYGPT_SHARED(float, s, [128]);
  const int t = thread();
  s[t ^ 31] = t ^ 31;
  if (!bug) __syncwarp();
  out[t] = s[t];
}

// CUDA does not promise that a shuffle orders memory. Only the race checker sees the difference.
template <bool bug>
__global__ void shuffle_for_syncwarp(const float*, float* out) {
  PYGPT_SHARED(float, s, [128]);
  const int t = thread();
  s[t ^ 31] = t ^ 31;
  const int same = __shfl_xor_sync(0xffffffffu, t, 0);
  if (!bug) __syncwarp();
  out[same] = s[t];
}

// The buffer is used twice: the second store may precede a slower thread's first read.
template <bool bug>
__global__ void overwrite_before_read(const float*, float* out) {
  PYGPT_SHARED(float, s, [128]);
  const int t = thread();
  s[127 - t] = 127 - t;
  __syncthreads();
  out[t] = s[t];
  if (!bug) __syncthreads();
  s[127 - t] = -1;
}

// Two rounds need two buffers: a warp that is a round ahead of the others overwrites the sums that they are to read. No
// warp gets that far where the scheduler gives every thread its turn.
template <bool bug>
__global__ void one_buffer_for_two_rounds(const float*, float* out) {
  PYGPT_SHARED(float, s, [2][4]);
  const int t = thread();
  float sum = 0;
  for (int round = 0; round < 2; round++) {
    float* buffer = s[bug ? 0 : round];
    if (t % 32 == 0) buffer[t / 32] = t / 32 + round;
    __syncthreads();
    for (int warp = 0; warp < 4; warp++) sum += buffer[warp] - warp;
    for (int i = 0; i < 16; i++) __syncwarp();
  }
  out[t] = t + sum - 4;
}

template <bool bug>
__global__ void uninitialised(const float*, float* out) {
  PYGPT_SHARED(float, s, [128]);
  const int t = thread();
  if (!bug) s[t] = 0;
  s[t] += t;
  out[t] = s[t];
}

template <bool bug>
__global__ void barrier_in_branch(const float*, float* out) {
  const int t = thread();
  if (bug && t < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[t] = t;
}

template <bool bug>
__global__ void lane_skips_syncwarp(const float*, float* out) {
  const int t = thread();
  if (!bug || t != 5) __syncwarp();
  __syncthreads();
  out[t] = t;
}

// Each block reads what the block before it wrote. 4 blocks of 32 threads.
template <bool bug>
__global__ void blocks_in_order(const float*, float* out) {
  const int t = thread(), b = blockIdx.x;
  out[32 * b + t] = bug && b ? out[32 * (b - 1) + t] + 32 : 32 * b + t;
}

// ---- Asynchronous copies

template <bool bug>
__global__ void no_wait(const float* in, float* out) {
  PYGPT_SHARED(uint4, s, [32]);
  const int t = thread();
  if (t < 32) ptx::cp_async_16(&s[t], in + 4 * t, true);
  ptx::cp_async_commit();
  if (!bug) ptx::cp_async_wait<0>();
  __syncthreads();
  out[t] = reinterpret_cast<const float*>(s)[t];
}

template <bool bug>
__global__ void wait_for_too_few(const float* in, float* out) {
  PYGPT_SHARED(uint4, s, [32]);
  const int t = thread();
  if (t < 16) ptx::cp_async_16(&s[t], in + 4 * t, true);
  ptx::cp_async_commit();
  if (t < 16) ptx::cp_async_16(&s[16 + t], in + 64 + 4 * t, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<bug ? 1 : 0>();
  __syncthreads();
  out[t] = reinterpret_cast<const float*>(s)[t];
}

template <bool bug>
__global__ void no_commit(const float* in, float* out) {
  PYGPT_SHARED(uint4, s, [32]);
  const int t = thread();
  if (t < 32) ptx::cp_async_16(&s[t], in + 4 * t, true);
  if (!bug) ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  out[t] = reinterpret_cast<const float*>(s)[t];
}

template <bool bug>
__global__ void no_barrier_after_wait(const float* in, float* out) {
  PYGPT_SHARED(uint4, s, [32]);
  const int t = thread();
  if (t >= 96) ptx::cp_async_16(&s[t - 96], in + 4 * (t - 96), true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  if (!bug) __syncthreads();
  out[t] = reinterpret_cast<const float*>(s)[t];
}

// Double buffering: the copy into the buffer that was read in the last iteration must follow this iteration's barrier.
template <bool bug>
__global__ void copy_before_barrier(const float* in, float* out) {
  PYGPT_SHARED(uint4, s, [2][32]);
  const int t = thread(), column = 127 - t;
  const auto copy = [&](int step) {
    if (t < 32 && step < 4) ptx::cp_async_16(&s[step % 2][t], in + 128 * step + 4 * t, true);
    ptx::cp_async_commit();
  };
  copy(0);
  float sum = 0;
  for (int step = 0; step < 4; step++) {
    ptx::cp_async_wait<0>();
    if (bug) copy(step + 1);
    __syncthreads();
    if (!bug) copy(step + 1);
    sum += reinterpret_cast<const float*>(s[step % 2])[column];
  }
  out[column] = sum / 4;
}

// ---- Fragments: out = I B for a 16 x 8 matrix B with B[i][j] = 8 i + j. One warp.

template <bool bug>
__global__ void swapped_registers(const float* in, float* out) {
  PYGPT_SHARED(uint4, identity, [16][2]);
  PYGPT_SHARED(uint4, matrix, [16]);
  const int t = thread(), row = t % 16, half = t / 16;
  auto* a = reinterpret_cast<bf16*>(identity);
  auto* b = reinterpret_cast<bf16*>(matrix);
  for (int j = 0; j < 8; j++) a[16 * row + 8 * half + j] = from_float<bf16>(8 * half + j == row);
  for (int j = 0; j < 4; j++) b[8 * row + 4 * half + j] = from_float<bf16>(in[8 * row + 4 * half + j]);
  __syncwarp();
  uint32_t x[4], y[2];
  float d[4] = {};
  ptx::ldmatrix_x4(x, a + 16 * row + 8 * half);
  ptx::ldmatrix_x2_trans(y, b + 8 * row);
  ptx::mma_m16n8k16<bf16>(d, x, y[0], y[1]);
  for (int i = 0; i < 4; i++) {
    const int upper = bug ? i % 2 : i / 2, right = bug ? i / 2 : i % 2;
    out[8 * (t / 4 + 8 * upper) + t % 4 * 2 + right] = d[i];
  }
}

template <bool bug>
__global__ void ldmatrix_past_end(const float*, float* out) {
  PYGPT_SHARED(uint4, s, [8]);
  const int t = thread();
  if (t < 32) {
    reinterpret_cast<uint32_t*>(s)[t] = pack<bf16>(2 * t, 2 * t + 1);
    __syncwarp();
    uint32_t r[2];
    ptx::ldmatrix_x2(r, &s[t % 8] + (bug ? t / 8 : 0));
    const float2 x = unpack<bf16>(r[0]), y = unpack<bf16>(r[1]);
    out[2 * t] = x.x, out[2 * t + 1] = x.y, out[64 + 2 * t] = 64 + y.x, out[64 + 2 * t + 1] = 64 + y.y;
  }
}

// ---- Addresses

template <bool bug>
__global__ void store_past_end(const float*, float* out) {
  PYGPT_SHARED(float, s, [128]);
  const int t = thread();
  float* p = s;
  p[t + bug] = t + bug;
  if (!bug || t == 0) p[bug ? 0 : t] = bug ? 0 : t;
  __syncthreads();
  out[t] = p[t];
}

template <bool bug>
__global__ void index_past_end(const float*, float* out) {
  PYGPT_SHARED(float, s, [4][32]);
  const int t = thread();
  s[t / 32][t % 32] = t;
  __syncthreads();
  out[t] = bug ? s[0][t] : s[t / 32][t % 32];  // the same address, but s[0] has only 32 elements
}

template <bool bug>
__global__ void global_past_end(const float*, float* out) {
  const int t = thread();
  out[t] = t;
  if (bug && t == 127) out[t + 1] = 128;
}

template <bool bug>
__global__ void global_read_past_end(const float* in, float* out) {
  const int t = thread();
  out[t] = t + 0 * in[bug ? 512 : t];
}

template <bool bug>
__global__ void misaligned(const float*, float* out) {
  PYGPT_SHARED(uint4, s, [33]);
  const int t = thread();
  float* p = reinterpret_cast<float*>(s) + (bug ? 1 : 4);
  p[t] = t;
  __syncthreads();
  if (t < 32) {
    const uint4 four = *reinterpret_cast<const uint4*>(p + 4 * t);
    for (int i = 0; i < 4; i++) out[4 * t + i] = __uint_as_float((&four.x)[i]);
  }
}

// ---- Warps

template <bool bug>
__global__ void caller_not_in_mask(const float*, float* out) {
  const int t = thread();
  out[__shfl_xor_sync(bug ? 0xffffu : 0xffffffffu, t, 0)] = t;
}

template <bool bug>
__global__ void lanes_have_ended(const float*, float* out) {
  const int t = thread();
  out[t] = t;
  if (t % 32 >= 16) return;
  out[t] = __shfl_xor_sync(bug ? 0xffffffffu : 0xffffu, t ^ 1, 1);
}

template <bool bug>
__global__ void source_not_in_mask(const float*, float* out) {
  const int t = thread();
  out[t] = t;
  if (t % 32 < 16) out[t] = __shfl_sync(0xffffu, static_cast<float>(t), bug ? t ^ 16 : t);
}

template <bool bug>
__global__ void different_instructions(const float*, float* out) {
  const int t = thread();
  int x;
  if (bug && t % 32 < 16) x = __shfl_xor_sync(0xffffffffu, t, 0);
  else x = __shfl_down_sync(0xffffffffu, t, 0);
  out[x] = t;
}

template <bool bug>
__global__ void different_masks(const float*, float* out) {
  const int t = thread();
  const uint32_t half = t % 32 < 16 ? 0xffffu : 0xffff0000u;
  out[__shfl_xor_sync(bug && t % 2 ? 0xffffffffu : half, t, 0)] = t;
}

struct Case {
  const char* name;
  void (*right)(const float*, float*);
  void (*wrong)(const float*, float*);
  int blocks = 1, threads = 128;
};
#define PYGPT_CASE(name, ...) {#name, name<false>, name<true>, ##__VA_ARGS__}
const Case cases[] = {PYGPT_CASE(no_syncthreads),
                      PYGPT_CASE(no_syncwarp),
                      PYGPT_CASE(shuffle_for_syncwarp),
                      PYGPT_CASE(overwrite_before_read),
                      PYGPT_CASE(one_buffer_for_two_rounds),
                      PYGPT_CASE(uninitialised),
                      PYGPT_CASE(barrier_in_branch),
                      PYGPT_CASE(lane_skips_syncwarp),
                      PYGPT_CASE(blocks_in_order, 4, 32),
                      PYGPT_CASE(no_wait),
                      PYGPT_CASE(wait_for_too_few),
                      PYGPT_CASE(no_commit),
                      PYGPT_CASE(no_barrier_after_wait),
                      PYGPT_CASE(copy_before_barrier),
                      PYGPT_CASE(swapped_registers, 1, 32),
                      PYGPT_CASE(ldmatrix_past_end),
                      PYGPT_CASE(store_past_end),
                      PYGPT_CASE(index_past_end),
                      PYGPT_CASE(global_past_end),
                      PYGPT_CASE(global_read_past_end),
                      PYGPT_CASE(misaligned),
                      PYGPT_CASE(caller_not_in_mask),
                      PYGPT_CASE(lanes_have_ended),
                      PYGPT_CASE(source_not_in_mask),
                      PYGPT_CASE(different_instructions),
                      PYGPT_CASE(different_masks)};
#undef PYGPT_CASE

}  // namespace
}  // namespace pygpt::cuda

// Runs a case on in (512 floats) and out (128 floats).
extern "C" __attribute__((visibility("default"))) const char* planted_bug(const char* name, bool bug, const float* in,
                                                                          float* out) {
  using namespace pygpt::cuda;
  for (const Case& c : cases)
    if (!std::strcmp(c.name, name)) return launch(bug ? c.wrong : c.right, c.blocks, c.threads, 0, Stream{}, in, out);
  return "no such case";
}
