// Dropout's factors, a vector of Philox counters at a time. csrc/attention/scores.h has the generator.
#pragma once
#include "simd.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

// The 64-bit products of a constant with 32-bit lanes, as their high and low halves.
PYGPT_INLINE void multiply_wide(uint32_t a, U32 x, U32& high, U32& low) {
  using U64 = Vec<uint64_t>;
  const U64 both = bit_cast<U64>(x);
#if defined(__AVX512F__)
  const __m512i by = _mm512_set1_epi64(a);
  const U64 even = (U64)_mm512_maskz_mul_epu32(-1, (__m512i)both, by);
  const U64 odd = (U64)_mm512_maskz_mul_epu32(-1, (__m512i)(both >> 32), by);
#elif defined(__AVX2__)
  const __m256i by = _mm256_set1_epi64x(a);
  const U64 even = (U64)_mm256_mul_epu32((__m256i)both, by), odd = (U64)_mm256_mul_epu32((__m256i)(both >> 32), by);
#elif defined(__SSE2__)
  const __m128i by = _mm_set1_epi64x(a);
  const U64 even = (U64)_mm_mul_epu32((__m128i)both, by), odd = (U64)_mm_mul_epu32((__m128i)(both >> 32), by);
#else
  const U64 even = (both & 0xffffffffu) * a, odd = (both >> 32) * a;
#endif
  constexpr uint64_t kHigh = 0xffffffff00000000u;
  high = bit_cast<U32>((even >> 32) | (odd & kHigh)), low = bit_cast<U32>((even & ~kHigh) | (odd << 32));
}

// to[r * ld + c] = the factor of column column0 + c in row row0 + r: `keep`, or 0 where dropout drops it. column0 is a
// multiple of 4; columns are rounded up to one.
template <class T>
void dropout_factors(const Scores& s, int64_t head, int64_t row0, int64_t rows, int64_t column0, int64_t columns, T* to,
                     int64_t ld) {
  constexpr int kLanes = W<float>;
  const int64_t groups = (columns + 3) / 4, counters = rows * groups;
  const uint32_t key0 = uint32_t(uint64_t(*s.seed)), key1 = uint32_t(uint64_t(*s.seed) >> 32);
  const uint32_t threshold = uint32_t(std::min<uint64_t>(s.threshold, 0xffffffff));  // beyond it, keep is 0
  const T keep = T(s.keep);
  int64_t r = 0, g = 0;
  for (int64_t first = 0; first < counters; first += kLanes) {
    alignas(64) uint32_t group[kLanes] = {}, row[kLanes] = {};
    T* at[kLanes];
    const int64_t n = std::min<int64_t>(kLanes, counters - first);
    for (int64_t lane = 0; lane < n; lane++) {
      group[lane] = uint32_t(column0 / 4 + g), row[lane] = uint32_t(row0 + r), at[lane] = to + r * ld + 4 * g;
      if (++g == groups) g = 0, r++;
    }
    U32 c[4] = {bit_cast<U32>(group), bit_cast<U32>(row), U32{} + uint32_t(head), U32{}};
    philox(c, key0, key1, multiply_wide);
    for (int64_t lane = 0; lane < n; lane++)
      for (int word = 0; word < 4; word++) at[lane][word] = c[word][lane] < threshold ? T(0) : keep;
  }
}

// Lane i of the result is lane i / 2 of a or b in turn, in the first or the second half of both.
template <int Lanes, int Half>
struct Interleave {
  static constexpr int at(int i) { return Half * Lanes / 2 + i / 2 + i % 2 * Lanes; }
};

// to[c] = the factor of column c in this row of head 0, for c < columns rounded up to 4 vectors of float.
template <class T>
void dropout_row(const int64_t* seed, uint64_t threshold, double keep, int64_t row, int64_t columns, T* to) {
  constexpr int kLanes = W<float>;
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  using Vector = Vec<float>;
  const uint32_t key0 = uint32_t(uint64_t(*seed)), key1 = uint32_t(uint64_t(*seed) >> 32);
  const uint32_t first_kept = uint32_t(std::min<uint64_t>(threshold, 0xffffffff));  // beyond it, keep is 0
  U32 group = bit_cast<U32>(lane_index<float>());
  for (int64_t c = 0; c < columns; c += 4 * kLanes, group += kLanes) {
    U32 word[4] = {group, U32{} + uint32_t(row), U32{}, U32{}};
    philox(word, key0, key1, multiply_wide);
    Vector kept[4], pair[4];
    for (int w = 0; w < 4; w++) kept[w] = word[w] < first_kept ? Vector{} : set1<float>(1);
    for (int w = 0; w < 2; w++) {
      pair[w] = shuffle<float>(kept[w], kept[w + 2], lanes, Interleave<kLanes, 0>());
      pair[w + 2] = shuffle<float>(kept[w], kept[w + 2], lanes, Interleave<kLanes, 1>());
    }
    for (int half = 0; half < 2; half++) {
      kept[2 * half] = shuffle<float>(pair[2 * half], pair[2 * half + 1], lanes, Interleave<kLanes, 0>());
      kept[2 * half + 1] = shuffle<float>(pair[2 * half], pair[2 * half + 1], lanes, Interleave<kLanes, 1>());
    }
    for (int v = 0; v < 4; v++)
      if constexpr (sizeof(T) == 4) store(to + c + v * kLanes, kept[v] * T(keep));
      else
        for (int i = 0; i < kLanes; i++) to[c + v * kLanes + i] = T(kept[v][i]) * keep;
  }
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
