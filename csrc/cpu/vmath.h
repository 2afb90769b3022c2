// Elementary functions lane by lane, and the activations made of them.
//
// float has own polynomials, fitted for the least relative error. The largest errors, in units in the last place:
//
//                                      x > -1   x > -4   x > -8      without fused multiply-add
//     exp2                              0.8                           1.1
//     gelu and its derivative           3        8        25          4, 13, 45
//     gelu_tanh and its derivative      3        18       113
//     silu and its derivative           2        3        3          2, 3, 3
//
// A derivative's error is relative to the larger of its two terms, as it has a zero near -0.75. bf16 has 8 bits, so its
// polynomials are shorter: before rounding, gelu and its derivative are within 2^-12.8, gelu_tanh and its derivative
// within 2^-13.3. The lower tail keeps its digits, where 0.5 (1 + erf) has none left.
//
// Below x = -13.14, where their results would become subnormal, gelu and its derivative are 0, because subnormals are
// slow here and in the product that follows (docs/measured.md C14). exp2 underflows gradually on AVX-512; elsewhere it
// is 0 from 2^-124.5 down. NaN stays NaN; exp2(-inf) = 0 and exp2(inf) = inf. At -inf gelu and its derivative are NaN,
// as PyTorch's are, and so is the derivative at inf.
//
// double calls the C library's functions lane by lane.
//
// The exact gelu and its derivative take one exponential and one division, and neither waits for the other. With a =
// |x| and the standard normal cdf and pdf,
//     cdf(-a) = exp(-a^2/2) (1/8 + (1/4 + a N(a)) / Q(a)),    cdf(-a) - a pdf(a) = exp(-a^2/2) D(a) / E(a),
// with polynomials N, Q, D, E; at 0 both are exactly 1/2. (The 1/8 takes part of the rounding off the quotient where a
// is small; a larger constant would cost digits of the tail.) Then gelu(x) = max(x, 0) - a cdf(-a), and the derivative
// at a is 1 minus the derivative at -a.
#pragma once
#include <cmath>
#include <limits>

#include "simd.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

// The minimum and the maximum of x and a bound. A NaN in x stays. (The maskz forms compile to plain instructions; for
// the others, GCC 12 warns about its own headers.)
#if defined(__AVX512F__)
PYGPT_INLINE Vec<float> min_nan(Vec<float> x, float high) {
  return (Vec<float>)_mm512_maskz_min_ps(-1, (__m512)set1(high), (__m512)x);
}
PYGPT_INLINE Vec<float> max_nan(Vec<float> x, float low) {
  return (Vec<float>)_mm512_maskz_max_ps(-1, (__m512)set1(low), (__m512)x);
}
#elif defined(__AVX2__)
PYGPT_INLINE Vec<float> min_nan(Vec<float> x, float high) {
  return (Vec<float>)_mm256_min_ps((__m256)set1(high), (__m256)x);
}
PYGPT_INLINE Vec<float> max_nan(Vec<float> x, float low) {
  return (Vec<float>)_mm256_max_ps((__m256)set1(low), (__m256)x);
}
#else
PYGPT_INLINE Vec<float> min_nan(Vec<float> x, float high) { return x > high ? set1(high) : x; }
PYGPT_INLINE Vec<float> max_nan(Vec<float> x, float low) { return x < low ? set1(low) : x; }
#endif

template <class T>
PYGPT_INLINE Vec<T> abs(Vec<T> x) {
  constexpr auto kMask = std::numeric_limits<typename IntOf<T>::type>::max();
  return bit_cast<Vec<T>>(bit_cast<IVec<T>>(x) & kMask);
}

// v, which the compiler may not fuse into the operation that uses it.
template <class V>
PYGPT_INLINE V no_fma(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
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

constexpr float kRound = 0x1.8p23f + 125;  // the low bits of x + kRound are the exponent of 2^(round(x) - 2)
template <int Factor>
constexpr float kExp2[] = {Factor,
                           Factor * 0.6931472f,
                           Factor * 0.24022648f,
                           Factor * 0.0555036f,
                           Factor * 0.009618506f,
                           Factor * 0.0013390806f,
                           Factor * 0.00015326461f};
template <int Factor>  // for bf16: within 2^-13.4
constexpr float kShortExp2[] = {Factor * 0.9999281f, Factor * 0.693261f, Factor * 0.2426112f, Factor * 0.0551717f};

// 2^(n + f) from n + kRound and f, for integers n, -125 <= n <= 129, and |f| <= 1/2. Gives 0 if n = -125.
template <int N>
PYGPT_INLINE Vec<float> power(Vec<float> shifted, Vec<float> f, const float (&four_exp2)[N]) {
  return polynomial(f, four_exp2) * bit_cast<Vec<float>>(bit_cast<IVec<float>>(shifted) << 23);
}

// exp(-a^2 / 2). The polynomials of gelu below absorb the rounding error of kMinusHalfLog2e.
template <int N>
PYGPT_INLINE Vec<float> gauss(Vec<float> a, const float (&four_exp2)[N]) {
  constexpr float kMinusHalfLog2e = -0x1.715476p-1f;
  Vec<float> aa = a * a, shifted = aa * kMinusHalfLog2e + kRound;
  return power(shifted, aa * kMinusHalfLog2e - (shifted - kRound), four_exp2);
}
PYGPT_INLINE Vec<float> gauss(Vec<float> a) { return gauss(a, kExp2<4>); }

}  // namespace detail

// 2^x, for a result that is stored as S.
template <class S, class T = Acc<S>>
PYGPT_INLINE Vec<T> exp2(Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    return detail::each<T>(x, [](T v) { return std::exp2(v); });
  } else {
    constexpr bool kShort = std::is_same_v<S, bf16>;
#if defined(__AVX512F__)
    Vec<T> f = (Vec<T>)_mm512_maskz_reduce_ps(-1, (__m512)x, 8);  // x - round(x), and 0 for an infinite x
    const Vec<T> y = kShort ? detail::polynomial(f, detail::kShortExp2<1>) : detail::polynomial(f, detail::kExp2<1>);
    return (Vec<T>)_mm512_maskz_scalef_ps(-1, (__m512)y, (__m512)(x - f));
#else
    x = max_nan(min_nan(x, 129), -125);
    const Vec<T> shifted = x + detail::kRound, f = x - (shifted - detail::kRound);
    return kShort ? detail::power(shifted, f, detail::kShortExp2<4>) : detail::power(shifted, f, detail::kExp2<4>);
#endif
  }
}

template <class T>
constexpr T kLog2e = T(1.4426950408889634074);

// exp(x) for finite x below 88, and 0 for -inf.
template <class T>
PYGPT_INLINE Vec<T> exp(Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    return detail::each<T>(x, [](T v) { return std::exp(v); });
  } else {
#if defined(__AVX512F__)
    return exp2<T>(x * kLog2e<T>);
#else
    x = max_nan(x, -86.5f);  // one bound suffices, and the product x * log2(e) is part of fused operations
    const Vec<T> shifted = x * kLog2e<T> + detail::kRound, f = x * kLog2e<T> - (shifted - detail::kRound);
    return detail::power(shifted, f, detail::kExp2<4>);
#endif
  }
}

// exp(-a) for a >= 0, for a result that is stored as S. float's relative error does not grow with a, because a multiple
// of ln 2 is subtracted in two parts, the first of few bits.
template <class S, class T = Acc<S>>
PYGPT_INLINE Vec<T> exp_minus(Vec<T> a) {
  if constexpr (sizeof(T) == 8) {
    return detail::each<T>(a, [](T v) { return std::exp(-v); });
  } else if constexpr (sizeof(S) == 2) {
    return exp2<S>(a * -kLog2e<T>);
  } else {
    constexpr float kLn2 = 0.693359375f, kLn2Rest = -0.000212194440f;
#if defined(__AVX512F__)
    a = min_nan(a, 104);
    const Vec<T> n = (Vec<T>)_mm512_maskz_roundscale_ps(-1, (__m512)(a * -kLog2e<T>), 8);
    const Vec<T> f = (a + n * kLn2 + n * kLn2Rest) * -kLog2e<T>;
    return (Vec<T>)_mm512_maskz_scalef_ps(-1, (__m512)detail::polynomial(f, detail::kExp2<1>), (__m512)n);
#else
    a = min_nan(a, 86.5f);
    const Vec<T> shifted = a * -kLog2e<T> + detail::kRound, n = shifted - detail::kRound;
    return detail::power(shifted, (a + n * kLn2 + n * kLn2Rest) * -kLog2e<T>, detail::kExp2<4>);
#endif
  }
}

// The hyperbolic tangent, float within 2 units in the last place.
template <class T>
PYGPT_INLINE Vec<T> tanh(Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    return detail::each<T>(x, [](T v) { return std::tanh(v); });
  } else {
    constexpr float kOdd[] = {-0.33333334f, 0.13333297f, -0.053957775f, 0.02175692f, -0.0083050877f, 0.0022493051f};
    const Vec<T> a = abs<T>(x), e = exp2<T>(a * (-2 * kLog2e<T>)), xx = x * x;
    const Vec<T> small = x + x * xx * detail::polynomial(xx, kOdd), large = (1 - e) / (1 + e);
    return a < 0.64f ? small : (x < 0 ? -large : large);
  }
}

PYGPT_INLINE Vec<float> approximate_reciprocal(Vec<float> x) {  // within 2^-14
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_rcp14_ps(-1, (__m512)x);
#else
  return 1 / x;
#endif
}

// ---------------------------------------------------------------- the standard normal distribution
constexpr float kTailEnd = 13.16f;  // gauss() is 0 from here on, just before gelu would become subnormal

inline double cdf(double x) { return 0.5 * std::erfc(x * -0.707106781186547524401); }

// x cdf(x) = max(x, 0) - |x| cdf(-|x|), for a result that is stored as S. For the 8 bits of bf16,
// cdf(-a) = exp(-a^2/2) N(a) / Q(a).
template <class S, class T = Acc<S>>
PYGPT_INLINE Vec<T> gelu(Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    return x * detail::each<T>(x, cdf);
  } else if constexpr (std::is_same_v<S, bf16>) {
    constexpr float kN[] = {1.f, 0.5506923f, 0.1222476f}, kQ[] = {2.f, 2.6981483f, 1.3913276f, 0.3060348f};
    const Vec<T> m = abs<T>(min_nan(x, kTailEnd)), a = min_nan(m, kTailEnd);
    const Vec<T> tail = m * (detail::polynomial(a, kN) * approximate_reciprocal(detail::polynomial(a, kQ)));
    return max_nan(x, 0) - detail::gauss(a, detail::kShortExp2<4>) * tail;
  } else {
    constexpr float kN[] = {0.146412551f, 0.0189300459f, -0.0120918658f, -0.00539803645f, -0.000760470633f};
    constexpr float kQ[] = {0.666666687f, 1.09966445f, 0.775907934f, 0.296509206f, 0.0626012236f, 0.00608375808f};
    constexpr float kEighth = 0.12500002f;  // compensates the rounding of Q(0) = 2/3
    const Vec<T> m = abs<T>(min_nan(x, kTailEnd));  // infinite only at -inf, where the result is NaN
    const Vec<T> a = min_nan(m, kTailEnd);
    const Vec<T> quotient = (a * a * detail::polynomial(a, kN) + m * T(0.25)) / detail::polynomial(a, kQ);
    return max_nan(x, 0) - detail::gauss(a) * (m * kEighth + quotient);
  }
}

// cdf(x) + x pdf(x), for a result that is stored as S.
template <class S, class T = Acc<S>>
PYGPT_INLINE Vec<T> gelu_derivative(Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    return detail::each<T>(x, [](T v) { return cdf(v) + v * std::exp(v * v * -0.5) * 0.398942280401432677940; });
  } else if constexpr (std::is_same_v<S, bf16>) {
    constexpr float kD[] = {0.5f, -0.300899f, -0.393626f, -0.120756f}, kE[] = {1.f, 0.99299f, 0.302433f};
    const Vec<T> a = min_nan(abs<T>(x), kTailEnd);
    const Vec<T> quotient = detail::polynomial(a, kD) * approximate_reciprocal(detail::polynomial(a, kE));
    const Vec<T> tail = detail::gauss(a, detail::kShortExp2<4>) * quotient;
    return (x < 0 ? tail : 1 - tail) + x * 0;  // NaN at infinity
  } else {
    constexpr float kD[] = {0.5f, -0.08311839f, -0.47531727f, -0.31971186f, -0.09460677f, -0.011654989f};
    constexpr float kE[] = {1.f, 1.4295318f, 0.8305759f, 0.23714224f, 0.029214934f};
    const Vec<T> a = min_nan(abs<T>(x), kTailEnd);
    const Vec<T> tail = detail::gauss(a) * (detail::polynomial(a, kD) / detail::polynomial(a, kE));
    return (x < 0 ? tail : 1 - tail) + x * 0;  // NaN at infinity
  }
}

// ---------------------------------------------------------------- activations
// gelu        x cdf(x)                                   cdf(x) + x pdf(x)
// gelu_tanh   x s, s = sigmoid(2u),                      s + x s (1 - s) 2u',
//             2u = x (kU + kU3 x^2)                      2u' = kU + 3 kU3 x^2
// silu        x s, s = sigmoid(x)                        s + x s (1 - s)
// relu        max(x, 0)                                  1 where y is not <= 0
// relu2       max(x, 0)^2                                2 x where x is not <= 0
constexpr double kU = 1.59576912160573071176;  // 2 sqrt(2 / pi)
constexpr double kU3 = kU * 0.044715;

// s + x s (1 - s) slope with s = sigmoid(t), where e = exp(-|t|), which cannot overflow, and t has the sign of x.
template <class T>
PYGPT_INLINE Vec<T> sigmoid_derivative(Vec<T> x, Vec<T> e, Vec<T> slope) {
  const Vec<T> r = 1 / (1 + e), s = x < 0 ? e * r : r;
  return s + x * (e * r * r) * slope;
}

template <Activation A, class S, class T = Acc<S>>
PYGPT_INLINE Vec<T> activate(Vec<T> x) {
  if constexpr (A == Activation::gelu) {
    return gelu<S>(x);
  } else if constexpr (A == Activation::gelu_tanh) {
    return x / (1 + exp2<S>(x * (T(-kU * kLog2e<double>) + T(-kU3 * kLog2e<double>) * (x * x))));
  } else if constexpr (A == Activation::silu) {
    const Vec<T> e = exp_minus<S>(abs<T>(x));
    return (x < 0 ? x * e : x) / (1 + e);
  } else {
    Vec<T> y = x < 0 ? Vec<T>{} : x;
    return A == Activation::relu ? y : y * y;
  }
}

// The derivative from the saved value, which is y for relu and x for the others.
template <Activation A, class S, class T = Acc<S>>
PYGPT_INLINE Vec<T> derivative(Vec<T> saved) {
  if constexpr (A == Activation::gelu) {
    return gelu_derivative<S>(saved);
  } else if constexpr (A == Activation::gelu_tanh) {
    const Vec<T> x = saved, a = abs<T>(x), xx = x * x;
    const Vec<T> e = exp2<S>(a * (T(-kU * kLog2e<double>) + T(-kU3 * kLog2e<double>) * xx));
    return sigmoid_derivative<T>(x, e, T(kU) + T(3 * kU3) * xx);
  } else if constexpr (A == Activation::silu) {
    return sigmoid_derivative<T>(saved, exp_minus<S>(abs<T>(saved)), set1(T(1)));
  } else {
    return 2 * saved;
  }
}

// The gradient of the activation's input from d, the gradient of its output. The relu family selects instead of
// multiplying, so that a NaN or infinity in d does not pass a unit that is off.
template <Activation A, class S, class T = Acc<S>>
PYGPT_INLINE Vec<T> backpropagate(Vec<T> d, Vec<T> saved) {
  if constexpr (A == Activation::relu) return saved <= 0 ? Vec<T>{} : d;
  else if constexpr (A == Activation::relu2) return saved <= 0 ? Vec<T>{} : d * derivative<A, S>(saved);
  else return d * derivative<A, S>(saved);
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
