// The peak that benchmarks compare a kernel with: the GEMM's micro-kernel on panels that stay in L1.
#include <chrono>
#include <vector>

#include "arena.h"
#include "gemm/micro_kernel.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

double fma_rate(int64_t milliseconds) {
  using Clock = std::chrono::steady_clock;
  const int64_t n = threads.count();
  constexpr int MR = Tiling<float>::MR, NR = Tiling<float>::NR;
  double rate = 0;
  std::vector<double> rates(size_t(n), 0.0);
  parallel_for(n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      float* a = scratch<float>(Region::packed_a, 64 * (MR + NR));
      std::fill(a, a + 64 * (MR + NR), 0.0f);
      int64_t calls = 0;
      const auto start = Clock::now();
      double seconds = 0;
      while (seconds * 1e3 < double(milliseconds)) {
        for (int i = 0; i < 1000; i++, calls++) {
          Tile<float> tile;
          micro_kernel(64, a, a + 64 * MR, NR, tile.data(), NR);
          asm volatile("" : : "r"(a), "m"(tile) : "memory");  // uses the result, and may have changed the input
        }
        seconds = std::chrono::duration<double>(Clock::now() - start).count();
      }
      rates[size_t(t)] = 2.0 * MR * NR * 64 * double(calls) / seconds / 1e9;
    }
  });
  for (double r : rates) rate += r;
  return rate;
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
