// The peak that benchmarks compare a kernel with: the GEMM's micro-kernel on panels that stay in L1.
#include <atomic>
#include <chrono>

#include "arena.h"
#include "gemm/micro_kernel.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

double fma_rate(int64_t milliseconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int MR = Tiling<float>::MR, NR = Tiling<float>::NR;
  std::atomic<int64_t> calls{0};
  const auto start = Clock::now(), end = start + std::chrono::milliseconds(milliseconds);
  auto multiply = [&](int64_t begin, int64_t end_of_range) {
    float* a = scratch<float>(Region::packed_a, 64 * (MR + NR));
    std::fill(a, a + 64 * (MR + NR), 0.0f);
    for (int64_t t = begin; t < end_of_range; t++) do {
        for (int i = 0; i < 1000; i++) {
          Tile<float> tile;
          micro_kernel(64, a, a + 64 * MR, NR, tile.data(), NR);
          asm volatile("" : : "r"(a), "m"(tile) : "memory");  // uses the result, and may have changed the input
        }
        calls += 1000;
      } while (Clock::now() < end);
  };
  parallel_for(threads.count(), multiply);
  return 2.0 * MR * NR * 64 * double(calls) / std::chrono::duration<double>(Clock::now() - start).count() / 1e9;
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
