// AMX for machines without it. Included before everything else (CPPFLAGS="-include amx.h"), this file replaces AMX's
// intrinsics by functions and makes the kernels compiled for AVX512_BF16 use them. See tests/kernels/test_amx.py.
//
// A product is computed as Intel's manual defines it: the even and the odd elements of a row are summed separately by
// fused multiply-adds, the two sums are added, and the result is added to the tile; subnormals count as 0. The program
// aborts on what would be an error or slow on the hardware: a tile used without configuration, a row that straddles
// cache lines.
#pragma once
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __AMX_BF16__ 1
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(p) emulated_amx::configure(p)
#define _tile_release() emulated_amx::release()
#define _tile_loadd(tile, p, stride) emulated_amx::load(tile, p, stride)
#define _tile_stored(tile, p, stride) emulated_amx::store(tile, p, stride)
#define _tile_zero(tile) emulated_amx::zero(tile)
#define _tile_dpbf16ps(sum, a, b) emulated_amx::multiply(sum, a, b)

extern "C" {
inline __attribute__((visibility("default"))) long long emulated_amx_products = 0;  // the test checks that it is not 0
}

namespace emulated_amx {

inline thread_local bool configured = false;
inline thread_local uint32_t tiles[8][16][16];

inline void require(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

inline void configure(const void* p) {
  const auto* bytes = static_cast<const uint8_t*>(p);
  require(bytes[0] == 1 && bytes[1] == 0, "palette 1 from row 0 is what there is");
  for (int i = 0; i < 8; i++) {
    uint16_t width;
    std::memcpy(&width, bytes + 16 + 2 * i, 2);
    require(width == 64 && bytes[48 + i] == 16, "only whole tiles are emulated");
  }
  configured = true;
  std::memset(tiles, 0, sizeof tiles);
}
inline void release() { configured = false; }

inline const char* row(const void* p, int64_t stride, int r) {
  const char* at = static_cast<const char*>(p) + r * stride;
  require(reinterpret_cast<uintptr_t>(at) % 64 == 0, "a row straddles cache lines");
  return at;
}
inline void load(int tile, const void* p, int64_t stride) {
  require(configured, "a tile is loaded without configuration");
  for (int r = 0; r < 16; r++) std::memcpy(tiles[tile][r], row(p, stride, r), 64);
}
inline void store(int tile, void* p, int64_t stride) {
  require(configured, "a tile is stored without configuration");
  for (int r = 0; r < 16; r++) std::memcpy(const_cast<char*>(row(p, stride, r)), tiles[tile][r], 64);
}
inline void zero(int tile) { std::memset(tiles[tile], 0, sizeof tiles[tile]); }

inline float normal(uint32_t bits) {
  if (!(bits & 0x7f800000)) bits &= 0x80000000;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float normal(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return normal(bits);
}
inline void multiply(int sum, int a, int b) {
  __atomic_fetch_add(&emulated_amx_products, 1, __ATOMIC_RELAXED);
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      float even = 0, odd = 0;
      for (int k = 0; k < 16; k++) {
        const uint32_t x = tiles[a][m][k], y = tiles[b][k][n];
        even = normal(std::fma(normal(x << 16), normal(y << 16), even));
        odd = normal(std::fma(normal(x & 0xffff0000), normal(y & 0xffff0000), odd));
      }
      const float total = normal(normal(tiles[sum][m][n]) + normal(even + odd));
      std::memcpy(&tiles[sum][m][n], &total, 4);
    }
}

}  // namespace emulated_amx
#endif
