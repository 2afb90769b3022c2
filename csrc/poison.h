// PYGPT_POISON=1 fills results and temporary memory with NaN before a kernel gets them, so that an element which the
// kernel does not write, or reads before writing, shows in its result. The default is off.
#pragma once
#include <cstdlib>
#include <cstring>

namespace pygpt {

inline bool poison_requested() {
  const char* value = std::getenv("PYGPT_POISON");
  return value && std::strcmp(value, "1") == 0;
}

// All bits set is a NaN in every floating type.
inline void fill_with_nan(void* data, size_t bytes) { std::memset(data, 0xFF, bytes); }

}  // namespace pygpt
