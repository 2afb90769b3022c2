// Elementary functions lane by lane, and the activations made of them.
//
// float: own polynomials, fitted for least relative error. At worst, in units in the last place:
//     exp2 0.9, exp 0.9                     (1.2 without fused multiply-add)
//     cdf, gelu 2 above -1, 6 below it      (3 and 7)
// The lower tail is as exact relatively, where 0.5 (1 + erf) has lost every digit. Results below the
// smallest normal number are gradual on AVX-512; elsewhere exp2 and exp give 0 from 2^-125.5 down.
// NaN stays NaN; exp2(-inf) = 0, exp2(inf) = inf.
// double: the C library's functions, lane by lane.
//
// The normal distribution takes one exponential: with a = |x|,
//     pdf = exp(-a^2 / 2) / sqrt(2 pi),    cdf(-a) = exp(-a^2 / 2) P(a) / Q(a),    cdf(a) = 1 - cdf(-a),
// and cdf(x) = 1/2 + x N(x^2) where a < 1.
// P / Q (degrees 4 and 5, positive coefficients, so nothing cancels) is exp(a^2/2) erfc(a/sqrt 2) / 2.
// a^2 goes into the exponential in two parts; rounded to one it would cost a^2/4 ulp in the tail.
#pragma once
#include <cmath>

#include "simd.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

// NaN stays NaN.
template <class T>
PYGPT_INLINE Vec<T> clamp(Vec<T> x, T low, T high) {
  x = x < low ? set1(low) : x;
  return x > high ? set1(high) : x;
}

namespace detail {

template <class T, class F>
PYGPT_INLINE Vec<T> each(Vec<T> x, F f) {
  for (int i = 0; i < W<T>; i++) x[i] = f(x[i]);
  return x;
}

// c[0] + c[1] x + ...
template <int N>
PYGPT_INLINE Vec<float> polynomial(Vec<float> x, const float (&c)[N]) {
  Vec<float> y = set1(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; i--) y = y * x + c[i];
  return y;
}

#if !defined(__AVX512F__)
constexpr float kRound = 0x1.8p23f;  // x + kRound holds round(x) in its low bits
// y 2^n for the integer n held by t = n + kRound, -126 <= n <= 128 and y < 2; 0 if n = -126.
PYGPT_INLINE Vec<float> scale(Vec<float> y, Vec<float> t) {
  return (y + y) * bit_cast<Vec<float>>((bit_cast<IVec<float>>(t) << 23) + (126 << 23));
}
#endif

// exp(hi + lo), |lo| small, kLeast <= hi <= 89.
PYGPT_INLINE Vec<float> exp(Vec<float> hi, Vec<float> lo) {
  constexpr float kLog2e = 0x1.715476p0f, kLn2Hi = 0x1.62e4p-1f, kLn2Lo = 0x1.7f7d1cp-20f;
  constexpr float kExp[] = {1.f, 1.f, 0.49999994f, 0.16666512f, 0.0416683f, 0.008369828f, 0.0013820644f};
#if defined(__AVX512F__)
  Vec<float> n = (Vec<float>)_mm512_roundscale_ps((__m512)(hi * kLog2e), 8);
  return (Vec<float>)_mm512_scalef_ps((__m512)polynomial(hi - n * kLn2Hi - n * kLn2Lo + lo, kExp), (__m512)n);
#else
  Vec<float> t = hi * kLog2e + kRound, n = t - kRound;
  return scale(polynomial(hi - n * kLn2Hi - n * kLn2Lo + lo, kExp), t);
#endif
}
#if defined(__AVX512F__)
constexpr float kLeast = -105.5f;  // exp of this and less is 0
#else
constexpr float kLeast = -87.5f;
#endif

}  // namespace detail

template <class T>
PYGPT_INLINE Vec<T> exp2(Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    return detail::each<T>(x, [](T v) { return std::exp2(v); });
  } else {
    constexpr float kExp2[] = {1.f, 0.6931472f, 0.24022648f, 0.0555036f, 0.009618506f, 0.0013390806f, 0.00015326461f};
#if defined(__AVX512F__)
    Vec<T> f = (Vec<T>)_mm512_reduce_ps((__m512)x, 8);  // x - round(x)
    return (Vec<T>)_mm512_scalef_ps((__m512)detail::polynomial(f, kExp2), (__m512)(x - f));
#else
    x = clamp<T>(x, -126, 128);
    Vec<T> t = x + detail::kRound;
    return detail::scale(detail::polynomial(x - (t - detail::kRound), kExp2), t);
#endif
  }
}

template <class T>
PYGPT_INLINE Vec<T> exp(Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    return detail::each<T>(x, [](T v) { return std::exp(v); });
  } else {
    return detail::exp(clamp<T>(x, detail::kLeast, 89), Vec<T>{});
  }
}

template <class T>
PYGPT_INLINE Vec<T> sqrt(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_sqrt_pd((__m512d)x);
  else return (Vec<T>)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_sqrt_pd((__m256d)x);
  else return (Vec<T>)_mm256_sqrt_ps((__m256)x);
#else
  return detail::each<T>(x, [](T v) { return std::sqrt(v); });
#endif
}

// ---------------------------------------------------------------- the standard normal distribution
template <class T>
struct Normal {
  Vec<T> cdf, pdf;
};

template <class T>
PYGPT_INLINE Normal<T> normal(Vec<T> x) {
  constexpr T kPdf = T(0.398942280401432677940);  // 1 / sqrt(2 pi)
  if constexpr (sizeof(T) == 8) {
    return {detail::each<T>(x, [](T v) { return 0.5 * std::erfc(v * -0.707106781186547524401); }),
            kPdf * exp<T>(x * x * T(-0.5))};
  } else {
    constexpr float kP[] = {0.5f, 0.4382947f, 0.18323494f, 0.040633168f, 0.0041162996f};
    constexpr float kQ[] = {1.f, 1.6744744f, 1.2025024f, 0.46947014f, 0.10185869f, 0.010317913f};
    constexpr float kNear[] = {0.3989423f, -0.06649054f, 0.009974163f, -0.00118802f, 0.00011501885f, -8.169578e-06f};
    constexpr float kTail = -detail::kLeast > 100 ? 14.5f : 13.2f;  // exp(-kTail^2 / 2) is 0
    Vec<T> a = x < 0 ? -x : x;
    a = a > kTail ? set1(kTail) : a;
    Vec<T> a0 = bit_cast<Vec<T>>(bit_cast<IVec<T>>(a) & -4096);  // its square is exact
    Vec<T> e = detail::exp(a0 * a0 * T(-0.5), (a - a0) * (a + a0) * T(-0.5));
    Vec<T> tail = e * detail::polynomial(a, kP) / detail::polynomial(a, kQ);
    Vec<T> near = x * detail::polynomial(x * x, kNear) + T(0.5);
    return {a < 1 ? near : x < 0 ? tail : 1 - tail, e * kPdf};
  }
}

// ---------------------------------------------------------------- activations
// gelu        x cdf(x)                                   cdf(x) + x pdf(x)
// gelu_tanh   x s, s = sigmoid(2u),                      s + x s (1 - s) 2u',
//             2u = x (kU + kU3 x^2)                      2u' = kU + 3 kU3 x^2
// relu        max(x, 0)                                  1 where y is not <= 0
// relu2       max(x, 0)^2                                2 sqrt(y)
constexpr double kLog2e = 1.44269504088896340736;
constexpr double kU = 1.59576912160573071176;  // 2 sqrt(2 / pi)
constexpr double kU3 = kU * 0.044715;

template <Activation A, class T>
PYGPT_INLINE Vec<T> activate(Vec<T> x) {
  if constexpr (A == Activation::gelu) {
    return x * normal<T>(x).cdf;
  } else if constexpr (A == Activation::gelu_tanh) {
    return x / (1 + exp2<T>(x * (T(-kU * kLog2e) + T(-kU3 * kLog2e) * (x * x))));
  } else {
    Vec<T> y = x < 0 ? Vec<T>{} : x;
    return A == Activation::relu ? y : y * y;
  }
}

// The derivative, from what is saved: x for the gelus, y for the relu family.
template <Activation A, class T>
PYGPT_INLINE Vec<T> derivative(Vec<T> saved) {
  if constexpr (A == Activation::gelu) {
    Normal<T> n = normal<T>(saved);
    return n.cdf + saved * n.pdf;
  } else if constexpr (A == Activation::gelu_tanh) {
    Vec<T> x = saved, a = x < 0 ? -x : x, xx = x * x;
    Vec<T> e = exp2<T>(a * (T(-kU * kLog2e) + T(-kU3 * kLog2e) * xx));  // exp(-|2u|): cannot overflow
    Vec<T> r = 1 / (1 + e), s = x < 0 ? e * r : r;
    return s + x * (e * r * r) * (T(kU) + T(3 * kU3) * xx);
  } else if constexpr (A == Activation::relu) {
    return saved <= 0 ? Vec<T>{} : set1(T(1));
  } else {
    return 2 * sqrt<T>(saved);
  }
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
