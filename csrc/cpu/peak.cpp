// The limit that benchmarks hold a kernel against: the GEMM microkernel on panels that stay in L1.
#include <chrono>
#include <vector>

#include "gemm.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

double fma_rate(int64_t milliseconds) {
  using Clock = std::chrono::steady_clock;
  const int64_t n = threads.count();
  struct Panels;
  double rate = 0;
  std::vector<double> rates(size_t(n), 0.0);
  parallel_for(n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      float* a = scratch<float, Panels>(64 * (MR<float> + NR<float>));
      std::fill(a, a + 64 * (MR<float> + NR<float>), 0.0f);
      int64_t calls = 0;
      const auto start = Clock::now();
      double seconds = 0;
      while (seconds * 1e3 < double(milliseconds)) {
        for (int i = 0; i < 1000; i++, calls++) {
          Tile<float> tile;
          multiply_panels(64, a, a + 64 * MR<float>, NR<float>, tile.data(), NR<float>);
          asm volatile("" : : "r"(a), "m"(tile) : "memory");  // the result is used, the input may have changed
        }
        seconds = std::chrono::duration<double>(Clock::now() - start).count();
      }
      rates[size_t(t)] = 2.0 * MR<float> * NR<float> * 64 * double(calls) / seconds / 1e9;
    }
  });
  for (double r : rates) rate += r;
  return rate;
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
