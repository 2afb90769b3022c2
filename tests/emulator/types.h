// CUDA's vector types, and the 16-bit floating-point types with their conversions to and from float.
#pragma once
#include <cstdint>
#include <cstring>

#define PYGPT_VECTOR_TYPES(base, T, alignment2, alignment4)          \
  struct alignas(alignment2) base##2 { T x, y; };                    \
  struct base##3 { T x, y, z; };                                     \
  struct alignas(alignment4) base##4 { T x, y, z, w; };              \
  inline base##2 make_##base##2(T x, T y) { return {x, y}; }         \
  inline base##3 make_##base##3(T x, T y, T z) { return {x, y, z}; } \
  inline base##4 make_##base##4(T x, T y, T z, T w) { return {x, y, z, w}; }
PYGPT_VECTOR_TYPES(char, signed char, 2, 4)
PYGPT_VECTOR_TYPES(uchar, unsigned char, 2, 4)
PYGPT_VECTOR_TYPES(short, short, 4, 8)
PYGPT_VECTOR_TYPES(ushort, unsigned short, 4, 8)
PYGPT_VECTOR_TYPES(int, int, 8, 16)
PYGPT_VECTOR_TYPES(uint, unsigned, 8, 16)
PYGPT_VECTOR_TYPES(float, float, 8, 16)
PYGPT_VECTOR_TYPES(double, double, 16, 16)
#undef PYGPT_VECTOR_TYPES

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

namespace pygpt::cuda {

// These types hold bits only; arithmetic is done in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7FFF) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  const float subnormal = bits_as<float>(magnitude + 0x38800000) - bits_as<float>(0x38800000u);  // 2^-14 + x - 2^-14
  const uint32_t normal = magnitude + (magnitude < 0x0F800000 ? 112u << 23 : 224u << 23);       // or Inf, NaN
  return bits_as<float>((magnitude < 0x00800000 ? bits_as<uint32_t>(subnormal) : normal) | sign);
}

// Rounds to nearest, ties to even. Every NaN becomes CUDA's canonical NaN.
template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return {0x7FFF};
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <> inline f16 from_float<f16>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x), magnitude = bits & 0x7FFFFFFF;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (x != x) return {0x7FFF};
  if (magnitude >= 0x47800000) return {uint16_t(sign | 0x7C00)};  // 65536 and more
  if (magnitude < 0x38800000) {  // below 2^-14: multiples of 2^-24, which adding 0.5 rounds to
    const float sum = bits_as<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (bits_as<uint32_t>(sum) - bits_as<uint32_t>(0.5f)))};
  }
  return {uint16_t(sign | ((magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13))};
}

// Two 16-bit values in a register, the first in the low half.
template <class T>
inline uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}
template <class T>
inline float2 unpack(uint32_t both) {
  return {to_float(T{uint16_t(both)}), to_float(T{uint16_t(both >> 16)})};
}

}  // namespace pygpt::cuda
