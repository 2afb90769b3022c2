// For a program that links the CPU kernels without torch: declares the kernels of PYGPT_ISA, runs them on one thread
// and leaves poisoning off. It defines variables, so one source file of the program includes it.
#pragma once
#include "../ops.h"
#include "parallel.h"

namespace pygpt::cpu {

const bool poison = false;
Threads threads = {
    [](int64_t n, int64_t, void (*body)(const void*, int64_t, int64_t), const void* context) { body(context, 0, n); },
    []() -> int64_t { return 1; },
};

namespace PYGPT_ISA {
#define PYGPT_DECLARE(name, Args) void name(const Args&);
PYGPT_KERNELS(PYGPT_DECLARE)
#undef PYGPT_DECLARE
}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
