// AMX (Intel, from Sapphire Rapids): eight tile registers of 16 rows of 64 bytes. One instruction adds, to 16 x 16 sums in
// float32, 16 rows of 16 pairs of bf16 times 16 steps of 16 pairs: 8192 multiply-adds in 16 cycles, 16 times as many as
// AVX-512 does in float32. Four registers of sums then need as many loads as products, so a register tile is 32 x 32.
//
// Rows must not straddle cache lines: such a load takes four times as long as the products it feeds (measured). Numbers are
// rounded to nearest even, subnormal ones count as 0, whatever the thread's settings.
#pragma once
#include <cstdint>
#include <immintrin.h>

namespace pygpt::cpu {
namespace PYGPT_ISA {

// While one exists, this thread has the tile registers. (Released, they burden no switch of threads.)
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

// 32 rows of out, ldo apart, = A B over K steps (pairs; K a multiple of 16) of 32 columns, or += if onto. Rows of A are `row`
// apart, their groups of 16 steps `group`, steps of B ldb.
inline void multiply_tiles(int64_t K, const uint32_t* a, int64_t row, int64_t group, const uint32_t* b, int64_t ldb, float* out,
                           int64_t ldo, bool onto) {
  asm volatile("" : : : "memory");  // the compilers' intrinsics do not say that they read and write memory
  if (onto) {
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
  for (int64_t k = 0; k < K; k += 16, a += group, b += 16 * ldb) {
    _tile_loadd(4, a, row * 4);
    _tile_loadd(6, b, ldb * 4);
    _tile_loadd(7, b + 16, ldb * 4);
    _tile_loadd(5, a + 16 * row, row * 4);
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
