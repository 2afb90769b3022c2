// Vectors as wide as the target's registers, written with the compilers' vector extensions: the same source compiles to
// SSE2 or NEON, AVX2 and AVX-512. Vec<T> holds kVectorBytes. Arithmetic operators, comparisons and `mask ? a : b` work
// lane by lane, and a * b + c contracts to a fused multiply-add.
//
// Storage types are float, double and the 16-bit bf16 and f16. Arithmetic is done in Acc<S>: double for double, float
// for the others. load and store convert.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../ops.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

#define PYGPT_INLINE inline __attribute__((always_inline))

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T>
constexpr int W = kVectorBytes / int(sizeof(T));  // lanes of a vector
template <class T>
using Vec = typename VectorOf<T, W<T>>::type;

template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <class T>
using IVec = Vec<typename IntOf<T>::type>;  // the result of comparing two Vec<T>
template <class T>
PYGPT_INLINE IVec<T> lane_index() {
  IVec<T> v{};
  for (int i = 0; i < W<T>; i++) v[i] = i;
  return v;
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
// bf16 whose halves (load_even_odd) are in order, for rows that are read along with rows of float.
struct bf16_in_order : bf16 {};

template <class S>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class S>
using Acc = typename AccOf<S>::type;

template <class To, class From>
PYGPT_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
PYGPT_INLINE Vec<T> set1(T x) {
  return x - Vec<T>{};  // the compiler folds this to a broadcast; it could not fold x + 0, which turns -0 into 0
}
template <class T>
PYGPT_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {  // returns b where either is NaN
  return a > b ? a : b;
}

// ---------------------------------------------------------------- conversions, a vector at a time
constexpr int kF = W<float>;
using U16 = VectorOf<uint16_t, kF>::type;
using U32 = Vec<uint32_t>;

// GCC 12 compiles the built-in conversion to five instructions.
PYGPT_INLINE U32 zero_extend(U16 v) {
#if defined(__AVX512F__)
  return (U32)_mm512_maskz_cvtepu16_epi32(-1, (__m256i)v);
#elif defined(__AVX2__)
  return (U32)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, U32);
#endif
}

PYGPT_INLINE Vec<float> widen(U16 v, bf16) { return bit_cast<Vec<float>>(zero_extend(v) << 16); }

// Needs lanes below 2^16. The built-in conversion cannot assume that, and takes more instructions.
PYGPT_INLINE U16 truncate_to_u16(U32 v) {
#if defined(__AVX512F__)
  return (U16)_mm512_maskz_cvtepi32_epi16(-1, (__m512i)v);
#elif defined(__AVX2__)
  return (U16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v, (__m256i)v), 0x08));
#else
  return __builtin_convertvector(v, U16);
#endif
}

// The nearest bf16, ties to even, in the high half of each lane. NaNs survive only if their low half is 0, as in NaNs
// that the processor makes or that were bf16; NaNs from user memory pass through canonical_nan first.
PYGPT_INLINE U32 round_to_bf16(Vec<float> x) {
  const U32 u = bit_cast<U32>(x);
  return u + (0x7fff + ((u >> 16) & 1));
}
PYGPT_INLINE U16 narrow(Vec<float> x, bf16) { return truncate_to_u16(round_to_bf16(x) >> 16); }
// x, with the processor's own NaN for any NaN.
template <class T>
T canonical_nan(T x) {
  return x == x ? x : std::numeric_limits<T>::quiet_NaN();
}

#if defined(__AVX512F__)
PYGPT_INLINE Vec<float> widen(U16 v, f16) { return (Vec<float>)_mm512_cvtph_ps((__m256i)v); }
PYGPT_INLINE U16 narrow(Vec<float> x, f16) { return (U16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
PYGPT_INLINE Vec<float> widen(U16 v, f16) { return (Vec<float>)_mm256_cvtph_ps((__m128i)v); }
PYGPT_INLINE U16 narrow(Vec<float> x, f16) { return (U16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
PYGPT_INLINE Vec<float> widen(U16 v, f16) {
  U32 h = zero_extend(v), sign = (h & 0x8000) << 16;
  // Shift exponent and mantissa into place and rescale by 2^112; this is exact, subnormals included.
  U32 magnitude = bit_cast<U32>(bit_cast<Vec<float>>((h & 0x7fff) << 13) * 0x1p112f);
  U32 special = ((h & 0x7fff) << 13) | 0x7f800000;  // infinity and NaN
  return bit_cast<Vec<float>>(sign | ((h & 0x7c00) == 0x7c00 ? special : magnitude));
}
PYGPT_INLINE U16 narrow(Vec<float> x, f16) {
  U32 u = bit_cast<U32>(x), sign = (u >> 16) & 0x8000, m = u & 0x7fffffff;
  U32 normal = (m - 0x38000000 + 0xfff + ((m >> 13) & 1)) >> 13;  // rebias, round to nearest even
  // Adding 0.5 leaves a subnormal half, correctly rounded, in the low mantissa bits.
  U32 small = bit_cast<U32>(bit_cast<Vec<float>>(m) + 0.5f) - 0x3f000000;
  U32 r = m < 0x38800000 ? small : m >= 0x477ff000 ? U32{} + 0x7c00 : normal;
  return __builtin_convertvector(sign | (m > 0x7f800000 ? U32{} + 0x7e00 : r), U16);
}
#endif

// ---------------------------------------------------------------- load and store
template <class S>
PYGPT_INLINE Vec<Acc<S>> load(const S* p) {
  if constexpr (sizeof(S) == 2) {
    U16 v;
    std::memcpy(&v, p, sizeof v);
    return widen(v, S{});
  } else {
    Vec<S> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
}
template <class S>
PYGPT_INLINE void store(S* p, Vec<Acc<S>> x) {
  if constexpr (sizeof(S) == 2) {
    U16 v = narrow(x, S{});
    std::memcpy(p, &v, sizeof v);
  } else {
    std::memcpy(p, &x, sizeof x);
  }
}
// One half of the 2 W values from p on. For bf16, half 0 holds the values at even places and half 1 those at odd
// places, which takes a shift or a mask each; keeping the order would take shuffles. For the other types, half 0 is the
// first W values.
template <class S>
PYGPT_INLINE Vec<Acc<S>> load_even_odd(const S* p, int half) {
  if constexpr (std::is_same_v<S, bf16>) {
    U32 both;
    std::memcpy(&both, p, sizeof both);
    return bit_cast<Vec<float>>(half ? both & 0xffff0000 : both << 16);
  } else {
    return load(p + half * W<Acc<S>>);
  }
}
// The inverse for bf16: rounds a and b, and puts them at even and odd places.
PYGPT_INLINE U32 zip_bf16(Vec<float> a, Vec<float> b) {
  return round_to_bf16(a) >> 16 | (round_to_bf16(b) & 0xffff0000);
}
template <class S>
PYGPT_INLINE void store_even_odd(S* p, Vec<Acc<S>> a, Vec<Acc<S>> b) {
  if constexpr (std::is_same_v<S, bf16>) {
    const U32 both = zip_bf16(a, b);
    std::memcpy(p, &both, sizeof both);
  } else {
    store(p, a), store(p + W<Acc<S>>, b);
  }
}
// The first n lanes. The other lanes are 0, and the memory behind the n values is not touched.
template <class S>
PYGPT_INLINE Vec<Acc<S>> load(const S* p, int64_t n) {
  if (n >= W<Acc<S>>) return load(p);
#if defined(__AVX512F__)
  const uint16_t first = uint16_t((1u << n) - 1);
  if constexpr (sizeof(S) == 2) return widen((U16)_mm256_maskz_loadu_epi16(first, p), S{});
  else if constexpr (sizeof(S) == 4) return (Vec<S>)_mm512_maskz_loadu_ps(first, p);
  else return (Vec<S>)_mm512_maskz_loadu_pd(uint8_t(first), p);
#else
  S tail[W<Acc<S>>] = {};
  std::memcpy(tail, p, size_t(n) * sizeof(S));
  return load(tail);
#endif
}
template <class S>
PYGPT_INLINE void store(S* p, Vec<Acc<S>> x, int64_t n) {
  if (n >= W<Acc<S>>) return store(p, x);
#if defined(__AVX512F__)
  const uint16_t first = uint16_t((1u << n) - 1);
  if constexpr (sizeof(S) == 2) _mm256_mask_storeu_epi16(p, first, (__m256i)narrow(x, S{}));
  else if constexpr (sizeof(S) == 4) _mm512_mask_storeu_ps(p, first, (__m512)x);
  else _mm512_mask_storeu_pd(p, uint8_t(first), (__m512d)x);
#else
  S tail[W<Acc<S>>];
  store(tail, x);
  std::memcpy(p, tail, size_t(n) * sizeof(S));
#endif
}

// W<T> bytes as the integers of T's width.
template <class T>
PYGPT_INLINE IVec<T> load_bytes(const uint8_t* p) {
  typename VectorOf<uint8_t, W<T>>::type bytes;
  std::memcpy(&bytes, p, sizeof bytes);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (IVec<T>)_mm512_maskz_cvtepu8_epi32(-1, (__m128i)bytes);
  else return (IVec<T>)_mm512_maskz_cvtepu8_epi64(-1, _mm_cvtsi64_si128(bit_cast<int64_t>(bytes)));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (IVec<T>)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bit_cast<int64_t>(bytes)));
  else return (IVec<T>)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bit_cast<int32_t>(bytes)));
#else
  return __builtin_convertvector(bytes, IVec<T>);
#endif
}

PYGPT_INLINE double to_acc(double x) { return x; }
PYGPT_INLINE float to_acc(float x) { return x; }
PYGPT_INLINE float to_acc(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
PYGPT_INLINE float to_acc(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  return widen(U16{} + x.bits, f16{})[0];
#endif
}

// ---------------------------------------------------------------- across lanes, in a fixed order
template <class T, int N, class F>
PYGPT_INLINE T reduce(typename VectorOf<T, N>::type v, F f) {
  if constexpr (N == 2) {
    return f(v[0], v[1]);
  } else {
    typename VectorOf<T, N / 2>::type half[2];
    std::memcpy(half, &v, sizeof v);
    return reduce<T, N / 2>(f(half[0], half[1]), f);
  }
}
template <class T>
PYGPT_INLINE T hsum(Vec<T> v) {
  return reduce<T, W<T>>(v, [](auto a, auto b) { return a + b; });
}
template <class T>
PYGPT_INLINE T hmax(Vec<T> v) {
  return reduce<T, W<T>>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// Lane i of the result is lane Pick(i) of a and b laid end to end.
template <class T, int... I, class Pick>
PYGPT_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>, Pick) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pick::at(I)...);
#else
  return __builtin_shuffle(a, b, IVec<T>{Pick::at(I)...});
#endif
}

// Lanes for a step of a transposition: row r and row r + Distance exchange their off-diagonal blocks of Distance lanes.
template <int Lanes, int Distance, int Half>
struct Exchange {
  static constexpr int at(int i) {
    const int column = (i & ~Distance) | (Half ? Distance : 0);
    return i & Distance ? Lanes + column : column;
  }
};

// Lanes for a step of transpose_sum: lane i takes a's where i lacks Distance's bit, else b's (Keep), and adds its
// partner's, which is Distance lanes away (Partner).
template <int Lanes, int Distance>
struct Keep {
  static constexpr int at(int i) { return i & Distance ? Lanes + i : i; }
};
template <int Lanes, int Distance>
struct Partner {
  static constexpr int at(int i) { return i & Distance ? Lanes + i - Distance : i + Distance; }
};

// Lane i of the result is the sum of v[i]'s lanes, i < N <= W. The order of additions does not depend on N. Overwrites
// v.
template <class T, int N, int Distance = 1>
PYGPT_INLINE Vec<T> transpose_sum(Vec<T>* v) {
  constexpr auto lanes = std::make_integer_sequence<int, W<T>>();
  if constexpr (Distance == W<T>) return v[0];
#pragma GCC unroll 16
  for (int i = 0; i < N; i += 2) {
    const Vec<T> a = v[i], b = v[i + 1 < N ? i + 1 : i];
    v[i / 2] = shuffle<T>(a, b, lanes, Keep<W<T>, Distance>()) + shuffle<T>(a, b, lanes, Partner<W<T>, Distance>());
  }
  if constexpr (Distance < W<T>) return transpose_sum<T, (N + 1) / 2, 2 * Distance>(v);
}

// Transposes a square of N x N blocks of W / N lanes, held in N vectors.
template <class T, int N, int Distance = N / 2>
PYGPT_INLINE void transpose(Vec<T> (&rows)[N]) {
  constexpr auto lanes = std::make_integer_sequence<int, W<T>>();
  if constexpr (Distance > 0) {
    constexpr int kApart = Distance * W<T> / N;
#pragma GCC unroll 16
    for (int r = 0; r < N; r++)
      if (!(r & Distance)) {
        const Vec<T> a = rows[r], b = rows[r + Distance];
        rows[r] = shuffle<T>(a, b, lanes, Exchange<W<T>, kApart, 0>());
        rows[r + Distance] = shuffle<T>(a, b, lanes, Exchange<W<T>, kApart, 1>());
      }
    transpose<T, N, Distance / 2>(rows);
  }
}

// ---------------------------------------------------------------- dispatch and loops
// body(i, how many) for i = 0 .. n - 1, N at a time and the rest one by one; `how many` is a compile-time constant.
template <int N, class F>
PYGPT_INLINE void unroll_by(int64_t n, const F& body) {
  int64_t i = 0;
  for (; i + N <= n; i += N) body(i, std::integral_constant<int, N>());
  for (; i < n; i++) body(i, std::integral_constant<int, 1>());
}

// Calls f with the flag as a compile-time constant.
template <class F>
void visit(bool flag, const F& f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

// Calls f(S{}) with the storage type that dtype names.
template <class F>
void visit(DType dtype, F f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
