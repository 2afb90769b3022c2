// gelu, gelu_tanh, relu and relu2 by themselves: y = act(x), dx = dy act'(x). The mathematics is in vmath.h.
//
// gelu saves x, relu its own output y, which the next op keeps anyway.
#include <algorithm>

#include "memory.h"
#include "parallel.h"
#include "vmath.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {
namespace {

constexpr int64_t kBlock = 4096, kWork = 8 * kBlock;  // elements, and what they cost in multiply-adds

// out[i] = f(i, n), a vector of n <= W elements from i on; `bytes` are read and written for each.
template <class S, class F>
void for_each(int64_t count, int64_t bytes, S* out, const F& f) {
  using T = Acc<S>;
  visit(exceeds_caches(count * bytes), [&](auto past) {
    auto blocks = [=](int64_t begin, int64_t end) {  // by value: what is written might otherwise be f
      const Writer<past> write;
      int64_t i = begin * kBlock;
      const int64_t last = std::min(count, end * kBlock);
      for (; i + 4 * W<T> <= last; i += 4 * W<T>)
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) write(out + i + u * W<T>, f(i + u * W<T>, int64_t(W<T>)), W<T>);
      for (; i < last; i += W<T>) write(out + i, f(i, last - i), last - i);
    };
    parallel_for(ceil_div(count, kBlock), blocks, kWork);
  });
}

template <Activation A, class S>
void forward(const ActivationArgs& a) {
  const S* x = static_cast<const S*>(a.x);
  for_each(a.n, 2 * sizeof(S), static_cast<S*>(a.y),
           [=](int64_t i, int64_t n) { return activate<A, S>(load(x + i, n)); });
}

template <Activation A, class S>
void backward(const ActivationArgs& a) {
  const S* saved = static_cast<const S*>(A == Activation::relu || A == Activation::relu2 ? a.y : a.x);
  const S* dy = static_cast<const S*>(a.dy);
  for_each(a.n, 3 * sizeof(S), static_cast<S*>(a.dx), [=](int64_t i, int64_t n) {
    return backpropagate<A, S>(load(dy + i, n), load(saved + i, n));
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
