// PYGPT_POISON=1 fills results and temporary memory with NaN before a kernel gets them: an element that it leaves out, or
// reads before it has written it, then shows in what it returns. Off by default.
#pragma once
#include <cstdlib>
#include <cstring>

namespace pygpt {

inline bool poison_requested() {
  const char* value = std::getenv("PYGPT_POISON");
  return value && std::strcmp(value, "1") == 0;
}

// All bits set are a NaN in every floating type.
inline void fill_with_nan(void* data, size_t bytes) { std::memset(data, 0xFF, bytes); }

}  // namespace pygpt
