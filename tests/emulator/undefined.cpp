// The handlers that code compiled with -fsanitize=bounds,alignment calls. They end the launch with an error that names
// the line; the handlers of the compiler's own library would print a message and continue.
#include <cstdint>

#include "runtime.h"

namespace {

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
pygpt::emulator::Site site(const void* data) {  // every kind of data starts with its location
  const auto* where = static_cast<const SourceLocation*>(data);
  return {where->file, int(where->line)};
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void __ubsan_handle_out_of_bounds(void* data, uintptr_t index) {
  pygpt::emulator::fail(site(data), "index " + std::to_string(intptr_t(index)) + " is out of the array's bounds");
}

__attribute__((visibility("default"))) void __ubsan_handle_type_mismatch_v1(void* data, uintptr_t address) {
  struct Mismatch {
    SourceLocation location;
    const void* type;
    unsigned char log2_alignment;
  };
  const auto* m = static_cast<const Mismatch*>(data);
  if (!address) pygpt::emulator::fail(site(data), "a null pointer is used");
  pygpt::emulator::fail(site(data), "an access at " + std::to_string(address % (1u << m->log2_alignment)) + " modulo " +
                                        std::to_string(1u << m->log2_alignment) + " that needs a multiple of it");
}

}  // extern "C"
