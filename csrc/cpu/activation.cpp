// gelu, gelu_tanh, relu and relu2: y = act(x), dx = dy act'(x). The mathematics is in vmath.h.
//
// relu saves its output y, which the next op keeps anyway; the others save x.
#include <algorithm>
#include <stdexcept>

#include "nontemporal.h"
#include "parallel.h"
#include "vmath.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {
namespace {

constexpr int64_t kTaskElements = 4096;
constexpr int64_t kWork = 8 * kTaskElements;  // the cost of a task in multiply-adds

// to[i] = f(in[i] ...), a vector at a time.
template <class S, class F, class... In>
void for_each(int64_t count, void* to, const F& f, const In*... in) {
  constexpr int64_t w = W<Acc<S>>;
  S* out = static_cast<S*>(to);
  visit(exceeds_caches(count * sizeof(S) * (1 + sizeof...(In))), [&](auto nontemporal) {
    // Captures by value, as the compiler must otherwise assume that a store may change f.
    auto tasks = [=](int64_t begin, int64_t end) {
      const Writer<nontemporal> write;
      int64_t i = begin * kTaskElements;
      const int64_t last = std::min(count, end * kTaskElements);
      for (; i + 4 * w <= last; i += 4 * w)
#pragma GCC unroll 2
        for (int64_t j = i; j < i + 4 * w; j += 2 * w)
          write(out + j, f(load_even_odd(in + j, 0)...), f(load_even_odd(in + j, 1)...));
      for (; i < last; i += w) write(out + i, f(load(in + i, last - i)...), last - i);
    };
    parallel_for(ceil_div(count, kTaskElements), tasks, kWork);
  });
}

template <Activation A, class S>
void forward(const ActivationArgs& a) {
  for_each<S>(a.n, a.y, [](Vec<Acc<S>> x) { return activate<A, S>(x); }, static_cast<const S*>(a.x));
}

template <Activation A, class S>
void backward(const ActivationArgs& a) {
  const void* saved = saves_input(A) ? a.x : a.y;
  for_each<S>(a.n, a.dx, [](Vec<Acc<S>> d, Vec<Acc<S>> s) { return backpropagate<A, S>(d, s); },
              static_cast<const S*>(a.dy), static_cast<const S*>(saved));
}

}  // namespace

#define PYGPT_VISIT(pass)                                                             \
  visit(a.dtype, [&](auto s) {                                                        \
    switch (a.activation) {                                                           \
      case Activation::gelu: return pass<Activation::gelu, decltype(s)>(a);           \
      case Activation::gelu_tanh: return pass<Activation::gelu_tanh, decltype(s)>(a); \
      case Activation::relu: return pass<Activation::relu, decltype(s)>(a);           \
      case Activation::relu2: return pass<Activation::relu2, decltype(s)>(a);         \
      case Activation::silu: throw std::logic_error("only mlp has silu");             \
    }                                                                                 \
  })

void activation_fwd(const ActivationArgs& a) { PYGPT_VISIT(forward); }
void activation_bwd(const ActivationArgs& a) { PYGPT_VISIT(backward); }

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
