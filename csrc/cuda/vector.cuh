// Access to tensors 16 bytes at a time: 4 floats or 8 elements of a 16-bit type, converted to float.
#pragma once
#include "platform.cuh"

namespace pygpt::cuda {

template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T>
__device__ __forceinline__ void to_floats(const uint4& bits, float (&x)[kVector<T>]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(words[i]);
    } else {
      const float2 two = unpack<T>(words[i]);
      x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
  }
}

template <class T>
__device__ __forceinline__ uint4 from_floats(const float (&x)[kVector<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) words[i] = __float_as_uint(x[i]);
    else words[i] = pack<T>(x[2 * i], x[2 * i + 1]);
  }
  return {words[0], words[1], words[2], words[3]};
}

// Loads V elements at p: one, or the 16 bytes at an aligned p.
template <int V, class T>
__device__ __forceinline__ void load(const T* p, float (&x)[V]) {
  static_assert(V == 1 || V == kVector<T>);
  if constexpr (V == 1) x[0] = to_float(*p);
  else to_floats<T>(*reinterpret_cast<const uint4*>(p), x);
}

// True if rows that start at p and are `stride` elements apart can be accessed 16 bytes at a time, or if p is null.
template <class T>
bool can_vectorize(const T* p, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % kVector<T> == 0;
}

}  // namespace pygpt::cuda
