// With PYGPT_POISON=1, results and temporary memory are filled with NaN before a kernel runs. Elements that the kernel
// does not write, or reads before it has written them, then show up as NaN in its results. Off by default.
#pragma once
#include <cstdlib>
#include <cstring>

namespace pygpt {

inline bool poison_requested() {
  const char* value = std::getenv("PYGPT_POISON");
  return value && std::strcmp(value, "1") == 0;
}

// All bits set is NaN in every floating-point type.
inline void fill_with_nan(void* data, size_t bytes) { std::memset(data, 0xFF, bytes); }

}  // namespace pygpt
