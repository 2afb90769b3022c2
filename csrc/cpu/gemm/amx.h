// The micro-kernel for AMX (Intel, from Sapphire Rapids on).
//
// There are eight tile registers of 16 rows of 64 bytes. One instruction multiplies 16 rows of A by 16 columns of B
// over 16 pairs of bf16 and adds to 16 x 16 float32 sums: 8192 multiply-adds in 16 cycles, 16 times the rate of AVX-512
// in float32. With four registers of sums there are as many loads as products, so the tile of C is 32 x 32.
//
// A row must not straddle two cache lines: such a load takes four times as long as the products it feeds
// (docs/measured.md C5). AMX rounds to nearest even and takes subnormals for 0, whatever the thread's settings.
#pragma once
#include <immintrin.h>
#include <cstdint>

namespace pygpt::cpu {
namespace PYGPT_ISA {

// Owns the thread's tile registers while it lives. (Released, the kernel need not save 8 KB of tile state at a context
// switch.)
struct TileRegisters {
  struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  TileRegisters() {
    static const Shapes shapes;
    _tile_loadconfig(&shapes);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
};

struct AmxA {
  const uint32_t* data;
  int64_t row_stride, step_stride;  // in pairs; a step is 16 pairs along k
};
struct AmxB {
  const uint32_t* data;
  int64_t stride;  // of a pair's row of 32 columns
};

// out (32 rows, ldo apart) = A B over K pairs, a multiple of 16; with `accumulate`, out += A B.
inline void amx_micro_kernel(int64_t K, AmxA a, AmxB b, float* out, int64_t ldo, bool accumulate) {
  asm volatile("" : : : "memory");  // the compilers' intrinsics do not say that they read and write memory
  if (accumulate) {
    _tile_loadd(0, out, ldo * 4);
    _tile_loadd(1, out + 16, ldo * 4);
    _tile_loadd(2, out + 16 * ldo, ldo * 4);
    _tile_loadd(3, out + 16 * ldo + 16, ldo * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < K; k += 16, a.data += a.step_stride, b.data += 16 * b.stride) {
    _tile_loadd(4, a.data, a.row_stride * 4);
    _tile_loadd(6, b.data, b.stride * 4);
    _tile_loadd(7, b.data + 16, b.stride * 4);
    _tile_loadd(5, a.data + 16 * a.row_stride, a.row_stride * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, ldo * 4);
  _tile_stored(1, out + 16, ldo * 4);
  _tile_stored(2, out + 16 * ldo, ldo * 4);
  _tile_stored(3, out + 16 * ldo + 16, ldo * 4);
  asm volatile("" : : : "memory");
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
