// Registers torch.ops.pygpt_emulator.*, whose schemas build.py defines: the op bodies of csrc/bind run the emulated
// CUDA kernels on CPU tensors.
#include "../../csrc/bind/dispatcher.h"

#include <cstdlib>
#include <cstring>

namespace pygpt::bind {

namespace {
// Scratch memory between two fences, which show a store past either end.
struct Scratch {
  static constexpr size_t kFence = 256;
  explicit Scratch(size_t bytes) : bytes(bytes) {
    base = static_cast<unsigned char*>(std::aligned_alloc(256, (bytes + 2 * kFence + 255) / 256 * 256));
    std::memset(base, kPattern, kFence);
    std::memset(data(), 0xFF, bytes);  // NaN
    std::memset(data() + bytes, kPattern, kFence);
  }
  Scratch(Scratch&& other) noexcept : bytes(other.bytes), base(std::exchange(other.base, nullptr)) {}
  ~Scratch() { std::free(base); }
  unsigned char* data() const { return base + kFence; }
  bool intact() const {
    for (size_t i = 0; i < kFence; i++)
      if (base[i] != kPattern || data()[bytes + i] != kPattern) return false;
    return true;
  }
  static constexpr unsigned char kPattern = 0xC5;
  size_t bytes;
  unsigned char* base;
};
}  // namespace

void with_stream(Device, const std::function<void(const cuda::Stream&)>& body) {
  std::vector<Scratch> scratch;
  body({0, nullptr, [&](int64_t bytes) { return static_cast<void*>(scratch.emplace_back(size_t(bytes)).data()); }});
  for (const Scratch& s : scratch)
    STD_TORCH_CHECK(s.intact(), "a kernel wrote past an end of its ", s.bytes, " bytes of scratch memory");
}

}  // namespace pygpt::bind

// Weak definitions for a build that contains only some of the kernels.
namespace pygpt::cuda {
#define PYGPT_MISSING(name, Args) \
  __attribute__((weak)) Error name(const Args&, const Stream&) { return #name " is not part of this build"; }
PYGPT_KERNELS(PYGPT_MISSING)
#undef PYGPT_MISSING
}  // namespace pygpt::cuda

STABLE_TORCH_LIBRARY_IMPL(pygpt_emulator, CPU, m) { PYGPT_IMPL(m, pygpt::cuda); }
