// An allocator for torch's CPU tensors that ends every allocation at a page that may not be touched.
//
// A read or write past a tensor's end is a crash. Where a tensor is to start at a multiple of 64 bytes, up to 63 bytes
// may lie between its end and that page. They hold NaN, and a write to them is reported when the tensor is freed, as is
// a write to the bytes before the tensor. Fresh memory is NaN.
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <unordered_map>

namespace {

constexpr size_t kPage = 4096, kAlignment = 64;
constexpr unsigned char kNan = 0xFF;
bool aligned = false;
int damaged = 0;

struct Block {
  unsigned char *pages, *data;
  size_t size, used;  // of the pages that may be touched, and of the tensor

  unsigned char* end() const { return pages + size; }
  bool intact() const {
    for (const unsigned char* p = pages; p < end(); p++)
      if ((p < data || p >= data + used) && *p != kNan) return false;
    return true;
  }
};

std::mutex mutex;
std::unordered_map<void*, Block> blocks;  // by their data

void release(void* data) {
  if (!data) return;
  std::lock_guard<std::mutex> lock(mutex);
  const Block block = blocks.at(data);
  blocks.erase(data);
  if (!block.intact()) damaged++;
  munmap(block.pages - kPage, block.size + 2 * kPage);
}

struct Guarded final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(c10::DeviceType::CPU);
    if (!bytes) return {nullptr, nullptr, release, device};
    const size_t size = (bytes + kAlignment + kPage - 1) / kPage * kPage;
    void* mapped = mmap(nullptr, size + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    auto* pages = static_cast<unsigned char*>(mapped) + kPage;
    if (mprotect(pages, size, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
    std::memset(pages, kNan, size);
    unsigned char* data = pages + size - bytes;
    if (aligned) data -= reinterpret_cast<uintptr_t>(data) % kAlignment;
    std::lock_guard<std::mutex> lock(mutex);
    blocks[data] = {pages, data, size, bytes};
    return {data, data, release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

c10::Allocator* usual = nullptr;

}  // namespace

extern "C" {

// From now on new tensors end at a protected page, and start at a multiple of 64 bytes if `align`.
void guard(bool align) {
  static Guarded guarded;
  usual = c10::GetCPUAllocator();
  aligned = align;
  c10::SetCPUAllocator(&guarded);
}

// New tensors come from torch's own allocator again. Returns how many of the tensors freed so far had been overrun.
int unguard() {
  c10::SetCPUAllocator(usual);
  const int found = damaged;
  damaged = 0;
  return found;
}
}
