// Threads. The binding installs a loop on torch's threads here, so that torch.set_num_threads rules. A kernel's result
// never depends on how a range is split.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pygpt::cpu {

struct Threads {
  // Calls body(context, begin, end) on disjoint ranges that cover [0, n), of `grain` or more indices; the last may be
  // shorter.
  void (*parallel_for)(int64_t n, int64_t grain, void (*body)(const void*, int64_t, int64_t), const void* context);
  int64_t (*count)();
};
// Both are defined in dispatch.cpp.
extern Threads threads;
extern const bool poison;  // see poison.h

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// `work` is the cost of one item in multiply-adds. A thread is only woken for a few microseconds of work.
template <class F>
void parallel_for(int64_t n, const F& body, int64_t work = 1 << 30) {
  constexpr int64_t kWorthAThread = 1 << 17;
  if (n <= 0) return;
  threads.parallel_for(n, ceil_div(kWorthAThread, work > 0 ? work : 1), [](const void* f, int64_t begin, int64_t end) {
    (*static_cast<const F*>(f))(begin, end);
#if defined(__x86_64__)
    _mm_sfence();  // other threads see what was written past the caches
#endif
  }, &body);
}

}  // namespace pygpt::cpu
