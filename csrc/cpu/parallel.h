// Threads, without knowing whose: the binding installs torch's parallel_for here, so that
// torch.set_num_threads rules. A kernel's result never depends on how a range is split.
#pragma once
#include <cstdint>

namespace pygpt::cpu {

struct Threads {
  // Calls body(context, begin, end) on disjoint ranges covering [0, n).
  void (*parallel_for)(int64_t n, void (*body)(const void*, int64_t, int64_t), const void* context);
  int64_t (*count)();
};
extern Threads threads;  // defined in dispatch.cpp

template <class F>
void parallel_for(int64_t n, const F& body) {
  threads.parallel_for(
      n, [](const void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); }, &body);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace pygpt::cpu
