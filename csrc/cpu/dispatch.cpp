// Chooses the kernels of the best instruction set that this machine has, once, when the library is loaded.
// PYGPT_CPU_CAPABILITY=baseline|avx2|avx512|avx512_bf16|amx forces a lower one.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../poison.h"
#include "parallel.h"

namespace pygpt::cpu {

Threads threads;
const bool poison = poison_requested();

#define PYGPT_ISA_TABLE(isa)                                                \
  namespace isa {                                                           \
  PYGPT_KERNELS(PYGPT_DECLARE)                                              \
  double fma_rate(int64_t);                                                 \
  static const Kernels table = {#isa, PYGPT_KERNELS(PYGPT_ENTRY) fma_rate}; \
  }
#define PYGPT_DECLARE(name, Args) void name(const Args&);
#define PYGPT_ENTRY(name, Args) name,
PYGPT_ISA_TABLE(baseline)
#if defined(__x86_64__)
PYGPT_ISA_TABLE(avx2)
PYGPT_ISA_TABLE(avx512)
PYGPT_ISA_TABLE(avx512_bf16)
PYGPT_ISA_TABLE(amx)
#endif

#if defined(__x86_64__)
// Whether the processor has AMX for bf16 and Linux lets this process use it, which a process must request once.
static bool may_use_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  const bool has_amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
  return has_amx && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found = {&baseline::table};
#if defined(__x86_64__)
  unsigned a, b, c = 0, d;
  // clang before 18 does not know the name "f16c".
  const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
  const bool has_avx2 =
      has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx2) found.push_back(&avx2::table);
  if (has_avx2 && has_avx512) found.push_back(&avx512::table);
  const bool has_avx512_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (has_avx2 && has_avx512_bf16) found.push_back(&avx512_bf16::table);
  if (has_avx2 && has_avx512_bf16 && may_use_amx()) found.push_back(&amx::table);
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
  throw std::runtime_error("pygpt: PYGPT_CPU_CAPABILITY=" + std::string(forced) +
                           " is not among what this machine has: " + names);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

#define PYGPT_FORWARD(name, Args) \
  void name(const Args& args) { kernels().name(args); }
PYGPT_KERNELS(PYGPT_FORWARD)

}  // namespace pygpt::cpu
