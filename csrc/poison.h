// With PYGPT_POISON=1, results and temporary memory are filled with NaN before a kernel runs. Elements that the kernel
// does not write, or reads before it has written them, then show up as NaN in its results. They also lie between guard
// bands, which hold NaN before and after the kernel unless it writes outside of its memory. Off by default.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace pygpt {

inline bool poison_requested() {
  const char* value = std::getenv("PYGPT_POISON");
  return value && std::strcmp(value, "1") == 0;
}

// All bits set is NaN in every floating-point type.
inline void fill_with_nan(void* data, size_t bytes) { std::memset(data, 0xFF, bytes); }
inline bool is_nan(const void* data, size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(data);
  return std::all_of(p, p + bytes, [](unsigned char byte) { return byte == 0xFF; });
}

// The bytes of a guard band. They keep the alignment that allocators give.
constexpr size_t kGuard = 256;

// Memory that starts at `memory` and has room for two guard bands: fills it, and returns where the data starts.
inline void* guard(void* memory, size_t bytes) {
  fill_with_nan(memory, bytes + 2 * kGuard);
  return static_cast<char*>(memory) + kGuard;
}
// Whether nothing has written to the bands around the data.
inline bool is_intact(const void* data, size_t bytes) {
  const char* p = static_cast<const char*>(data);
  return is_nan(p - kGuard, kGuard) && is_nan(p + bytes, kGuard);
}

}  // namespace pygpt
