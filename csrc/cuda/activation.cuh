// The activations and their derivatives, element by element in float.
//
//     gelu        x cdf(x)                                   cdf(x) + x pdf(x)
//     gelu_tanh   x s, s = sigmoid(2u), 2u = x (U + U3 x^2)  s + x s (1 - s) (U + 3 U3 x^2)
//     relu        max(x, 0)                                  1 where not y <= 0
//     relu2       max(x, 0)^2                                2 x where not x <= 0
//     silu        x s, s = sigmoid(x)                        s + x s (1 - s)
//
// cdf and pdf are those of the standard normal distribution; U = 2 sqrt(2 / pi), U3 = 0.044715 U.
//
// The exact gelu does not use erf, because 0.5 (1 + erf) loses all digits in the lower tail. It takes one exponential
// and one division, which are independent of each other. With a = |x| and polynomials N, Q, D, E,
//
//     cdf(-a) = exp(-a^2/2) (1/8 + (1/4 + a N(a)) / Q(a)),    cdf(-a) - a pdf(a) = exp(-a^2/2) D(a) / E(a),
//
// and the value at a is 1 minus the value at -a. Exponentials and divisions are approximate, with errors of 2 units in
// the last place each. NaN stays NaN. At infinity all functions agree with PyTorch's (the derivative of a gelu is NaN).
#pragma once
#include "platform.cuh"

namespace pygpt::cuda {
namespace activation {

constexpr float kU = 1.59576912f, kU3 = 0.0713548163f;
constexpr float kTailEnd = 14.5f;  // exp(-a^2 / 2) is 0 in float from here on

__device__ __forceinline__ float gauss(float a) { return ptx::exp2_approx(a * a * (-0.5f * kLog2e)); }

// The polynomial first x^n + ... + last, by Horner's rule.
template <class... Rest>
__device__ __forceinline__ float horner(float x, float first, Rest... rest) {
  ((first = first * x + rest), ...);
  return first;
}

__device__ __forceinline__ float normal_cdf(float x) {
  const float a = fminf(fabsf(x), kTailEnd);
  const float n = horner(a, -0.000760470633f, -0.00539803645f, -0.0120918658f, 0.0189300459f, 0.146412551f, 0.25f);
  const float q = horner(a, 0.00608375808f, 0.0626012236f, 0.296509206f, 0.775907934f, 1.09966445f, 0.666666687f);
  const float tail = gauss(a) * (0.12500002f + __fdividef(n, q));
  return x < 0 ? tail : 1 - tail;
}

__device__ __forceinline__ float gelu_derivative(float x) {
  const float a = fminf(fabsf(x), kTailEnd);
  const float d = horner(a, -0.011654989f, -0.09460677f, -0.31971186f, -0.47531727f, -0.08311839f, 0.5f);
  const float e = horner(a, 0.029214934f, 0.23714224f, 0.8305759f, 1.4295318f, 1.f);
  const float tail = gauss(a) * __fdividef(d, e);
  return (x < 0 ? tail : 1 - tail) + x * 0;
}

__device__ __forceinline__ float gelu_tanh(float x) {
  return __fdividef(x, 1 + ptx::exp2_approx(x * (-kU * kLog2e - kU3 * kLog2e * (x * x))));
}

// s + x s (1 - s) slope with s = sigmoid(t), where e = exp(-|t|), which cannot overflow, and t has the sign of x.
__device__ __forceinline__ float sigmoid_derivative(float x, float e, float slope) {
  const float r = __fdividef(1.f, 1 + e), s = x < 0 ? e * r : r;
  return s + x * (e * r * r) * slope;
}

__device__ __forceinline__ float gelu_tanh_derivative(float x) {
  const float xx = x * x, e = ptx::exp2_approx(fabsf(x) * (-kU * kLog2e - kU3 * kLog2e * xx));
  return sigmoid_derivative(x, e, kU + 3 * kU3 * xx);
}

// exp(-a) for a >= 0. The relative error does not grow with a, because a multiple of ln 2 is subtracted in two parts,
// the first of few bits.
__device__ __forceinline__ float exp_minus(float a) {
  a = fminf(a, 110.f);
  const float n = rintf(a * -kLog2e), rest = a + n * 0.693359375f + n * -0.000212194440f;
  return ptx::exp2_approx(rest * -kLog2e) * ptx::exp2_approx(n);
}

__device__ __forceinline__ float silu(float x) {
  const float e = exp_minus(fabsf(x));
  return __fdividef(x < 0 ? x * e : x, 1 + e);
}

}  // namespace activation

// act(x). The activation is uniform over a launch.
__device__ __forceinline__ float activate(Activation act, float x) {
  switch (act) {
    case Activation::gelu: return x * activation::normal_cdf(x);
    case Activation::gelu_tanh: return activation::gelu_tanh(x);
    case Activation::silu: return activation::silu(x);
    default: break;
  }
  const float y = x < 0 ? 0.f : x;
  return act == Activation::relu ? y : y * y;
}

// The gradient of an activation's input, given the gradient dy of its output. saved is y for relu and x for the others.
// relu and relu2 select instead of multiplying by 0, so that a NaN or infinity in dy does not pass an inactive unit.
__device__ __forceinline__ float activation_gradient(Activation act, float dy, float saved) {
  switch (act) {
    case Activation::gelu: return dy * activation::gelu_derivative(saved);
    case Activation::gelu_tanh: return dy * activation::gelu_tanh_derivative(saved);
    case Activation::silu: return dy * activation::sigmoid_derivative(saved, activation::exp_minus(fabsf(saved)), 1.f);
    default: break;
  }
  const float d = act == Activation::relu ? dy : dy * (2 * saved);
  return saved <= 0 ? 0.f : d;
}

// Calls body(std::integral_constant<Activation, act>), which makes the activation a compile-time constant of a kernel.
template <class Body>
Error by_activation(Activation act, Body&& body) {
  switch (act) {
    case Activation::gelu: return body(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh: return body(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::relu: return body(std::integral_constant<Activation, Activation::relu>{});
    case Activation::relu2: return body(std::integral_constant<Activation, Activation::relu2>{});
    case Activation::silu: break;  // only mlp has it
  }
  return "unknown activation";
}

}  // namespace pygpt::cuda
