// One table of entry points per instruction set.
#pragma once
#include <vector>

#include "../ops.h"

namespace pygpt::cpu {

struct Kernels {
  const char* name;
#define PYGPT_POINTER(name, Args) void (*name)(const Args&);
  PYGPT_KERNELS(PYGPT_POINTER)
#undef PYGPT_POINTER
  double (*fma_rate)(int64_t milliseconds);  // float32 multiply-adds of all threads in GFLOP/s
};

std::vector<const Kernels*> supported();  // the compiled ones that this machine can run, the best last
const Kernels& kernels();                 // the one in use; throws if the environment forces an unknown one

}  // namespace pygpt::cpu
