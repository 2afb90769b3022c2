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
  double (*fma_rate)(int64_t milliseconds);  // GFLOP/s of float32 multiply-adds over all threads
};

std::vector<const Kernels*> supported();  // what is compiled and this machine can run, best last
const Kernels& kernels();                 // the one in use; throws if the environment forces an unknown one

}  // namespace pygpt::cpu
