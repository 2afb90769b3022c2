// gelu, gelu_tanh, relu and relu2 by themselves: y = act(x), dx = dy act'(x). The mathematics is in vmath.h.
//
// gelu saves x, relu its own output y, which the next op keeps anyway.
#include <algorithm>

#include "parallel.h"
#include "vmath.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {
namespace {

constexpr int64_t kBlock = 4096, kWork = 8 * kBlock;  // elements, and what they cost in multiply-adds

// f(i, n) for vectors of n <= W elements from i on.
template <class T, class F>
void for_each(int64_t count, const F& f) {
  auto blocks = [&](int64_t begin, int64_t end) {
    int64_t i = begin * kBlock;
    const int64_t last = std::min(count, end * kBlock);
    for (; i + 4 * W<T> <= last; i += 4 * W<T>)
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) f(i + u * W<T>, int64_t(W<T>));
    for (; i < last; i += W<T>) f(i, last - i);
  };
  parallel_for(ceil_div(count, kBlock), blocks, kWork);
}

template <Activation A, class S>
void forward(const ActivationArgs& a) {
  using T = Acc<S>;
  const S* x = static_cast<const S*>(a.x);
  S* y = static_cast<S*>(a.y);
  for_each<T>(a.n, [=](int64_t i, int64_t n) { store(y + i, activate<A, T>(load(x + i, n)), n); });
}

template <Activation A, class S>
void backward(const ActivationArgs& a) {
  using T = Acc<S>;
  const S* saved = static_cast<const S*>(A == Activation::relu || A == Activation::relu2 ? a.y : a.x);
  const S* dy = static_cast<const S*>(a.dy);
  S* dx = static_cast<S*>(a.dx);
  for_each<T>(a.n, [=](int64_t i, int64_t n) {
    store(dx + i, backpropagate<A, T>(load(dy + i, n), load(saved + i, n)), n);
  });
}

}  // namespace

#define PYGPT_VISIT(pass)                                                                 \
  visit(a.dtype, [&](auto s) {                                                            \
    switch (a.activation) {                                                               \
      case Activation::gelu: return pass<Activation::gelu, decltype(s)>(a);               \
      case Activation::gelu_tanh: return pass<Activation::gelu_tanh, decltype(s)>(a);     \
      case Activation::relu: return pass<Activation::relu, decltype(s)>(a);               \
      case Activation::relu2: return pass<Activation::relu2, decltype(s)>(a);             \
    }                                                                                     \
  })

void activation_fwd(const ActivationArgs& a) { PYGPT_VISIT(forward); }
void activation_bwd(const ActivationArgs& a) { PYGPT_VISIT(backward); }

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
