// Chooses, once, the kernels of the best instruction set this machine has, like PyTorch's own.
// PYGPT_CPU_CAPABILITY=baseline|avx2|avx512|avx512_bf16 forces a lower one.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace pygpt::cpu {

Threads threads;

#define PYGPT_ISA_TABLE(isa)                               \
  namespace isa {                                          \
  PYGPT_KERNELS(PYGPT_DECLARE)                             \
  double fma_rate(int64_t);                                \
  static const Kernels table = {#isa, PYGPT_KERNELS(PYGPT_ENTRY) fma_rate}; \
  }
#define PYGPT_DECLARE(name, Args) void name(const Args&);
#define PYGPT_ENTRY(name, Args) name,
PYGPT_ISA_TABLE(baseline)
#if defined(__x86_64__)
PYGPT_ISA_TABLE(avx2)
PYGPT_ISA_TABLE(avx512)
PYGPT_ISA_TABLE(avx512_bf16)
#endif

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found = {&baseline::table};
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx2) found.push_back(&avx2::table);
  if (has_avx2 && has_avx512) found.push_back(&avx512::table);
  if (has_avx2 && has_avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::table);
#endif
  return found;
}

static const Kernels& choose() {
  const auto found = supported();
  const char* forced = std::getenv("PYGPT_CPU_CAPABILITY");
  if (!forced || !*forced) return *found.back();
  std::string names;
  for (const Kernels* k : found) {
    if (std::string(forced) == k->name) return *k;
    names += std::string(names.empty() ? "" : ", ") + k->name;
  }
  throw std::runtime_error("pygpt: PYGPT_CPU_CAPABILITY=" + std::string(forced) + " is not among what this machine has: " + names);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

#define PYGPT_FORWARD(name, Args) \
  void name(const Args& args) { kernels().name(args); }
PYGPT_KERNELS(PYGPT_FORWARD)

}  // namespace pygpt::cpu
