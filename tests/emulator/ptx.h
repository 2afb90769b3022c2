// The functions of csrc/cuda/ptx.cuh up to sm_80, implemented after the definitions of the PTX ISA.
#pragma once
#include <cmath>
#include <type_traits>

#include "runtime.h"

namespace pygpt::emulator {

// Implemented in ptx.cpp:

void start_copy(void* to, const void* from);  // 16 bytes; zeros from null
void commit_copies();
void wait_for_copies(int pending);

// ldmatrix of `count` 8x8 matrices. Each of the first 8 * count lanes l passes row l % 8 of matrix l / 8, which it has
// read from `address`.
struct MatrixRow {
  alignas(16) unsigned char bytes[16];
  const void* address;
};
void load_matrices(uint32_t* fragment, int count, bool transposed, MatrixRow& row, Site site);

// d += a b over the fragments of all lanes.
void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);
void multiply_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);

}  // namespace pygpt::emulator

namespace pygpt::cuda::ptx {

using emulator::Site;

// ---- Asynchronous copies from global to shared memory

inline void cp_async_16(void* shared, const void* global, bool valid, Site site = Site::here()) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (valid && reinterpret_cast<uintptr_t>(global) % 16))
    emulator::fail(site, "cp_async_16 with an address that is not a multiple of 16");
  if (!emulator::is_shared(shared, 16)) emulator::fail(site, "cp_async_16 to no variable in shared memory");
  if (valid) emulator::touch(global, 16);
  emulator::poison(shared, 16);
  emulator::start_copy(shared, valid ? global : nullptr);
}

inline void cp_async_commit() { emulator::commit_copies(); }

template <int N>
void cp_async_wait() {
  emulator::wait_for_copies(N);
}

// ---- Fragments from shared memory

// Each lane reads its row before the lanes meet, so a row that another lane writes later, without synchronisation, is
// seen as missing.
template <int count, bool transposed>
void load_matrices(uint32_t (&r)[count], const void* row, Site site) {
  emulator::MatrixRow operand{{}, row};
  if (emulator::current->lane < 8 * count) {
    if (reinterpret_cast<uintptr_t>(row) % 16)
      emulator::fail(site, "ldmatrix with an address that is not a multiple of 16");
    if (!emulator::is_shared(row, 16)) emulator::fail(site, "ldmatrix from no variable in shared memory");
    const auto* bytes = static_cast<const unsigned char*>(row);
    for (int i = 0; i < 16; i++) operand.bytes[i] = bytes[i];
  }
  emulator::load_matrices(r, count, transposed, operand, site);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  load_matrices<4, false>(r, row, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, Site site = Site::here()) {
  load_matrices<2, false>(r, row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  load_matrices<4, true>(r, row, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, Site site = Site::here()) {
  load_matrices<2, true>(r, row, site);
}

// ---- Products of a warp

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::here()) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  if constexpr (std::is_same_v<T, bf16>) emulator::multiply_bf16(d, a, b0, b1, site);
  else emulator::multiply_f16(d, a, b0, b1, site);
}

// ---- Arithmetic

// Hardware errs by up to 2 ulp in an undocumented way. The emulator errs by -1, 0 or 1 ulp, depending on the bits of x.
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  const uint32_t hash = bits_as<uint32_t>(x) * 0x9E3779B1u >> 30;
  const bool exact = !(y >= 1.17549435e-38f) || y > 1.7e38f || x == std::floor(x) || hash == 3;
  return exact ? (y < 1.17549435e-38f ? 0.0f : y) : bits_as<float>(bits_as<uint32_t>(y) + hash - 1);
}

}  // namespace pygpt::cuda::ptx
