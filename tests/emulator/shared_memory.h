// A block's shared memory: its variables, with guard gaps between them.
//
// A variable has no more alignment than its type requires and reads as NaN until it is written. The gaps hold a pattern
// (NaN in every format) that is checked when the block ends, so every build finds a store past the end of a variable.
// A build with the address sanitizer stops at the access itself.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "sanitizers.h"

#ifndef PYGPT_ARCH
#define PYGPT_ARCH 900
#endif

namespace pygpt::emulator {

// The most shared memory of a block in bytes, static variables included.
constexpr int64_t kSharedLimit = (PYGPT_ARCH >= 900   ? 227
                                  : PYGPT_ARCH == 860 ? 99
                                  : PYGPT_ARCH >= 800 ? 163
                                                      : 64) *
                                 1024;

struct SharedVariable {
  const void* key;
  const char* name;
  size_t offset, bytes;
};

// The offsets of a launch's shared variables, the same in all of its blocks. A static variable gets its offset when a
// thread first reaches its declaration.
class SharedLayout {
 public:
  static constexpr size_t kDynamicOffset = 1024, kGap = 256, kCapacity = 512 << 10;

  explicit SharedLayout(size_t dynamic = 0) : end_(kDynamicOffset + dynamic) {
    variables_.reserve(64);
    variables_.push_back({nullptr, "dynamic shared memory", kDynamicOffset, dynamic});
    used_ = dynamic;
  }
  const SharedVariable* find(const void* key) const {
    for (auto& v : variables_)
      if (v.key == key) return &v;
    return nullptr;
  }
  const SharedVariable* add(const void* key, const char* name, size_t bytes, size_t alignment) {
    if (int64_t(used_ += bytes) > kSharedLimit || variables_.size() == variables_.capacity()) return nullptr;
    const size_t step = 2 * alignment;  // an odd multiple of the alignment
    variables_.push_back({key, name, (end_ + kGap + step - 1) / step * step + alignment, bytes});
    end_ = variables_.back().offset + bytes;
    return &variables_.back();
  }
  bool holds(ptrdiff_t offset, size_t bytes) const {
    for (auto& v : variables_)
      if (offset >= ptrdiff_t(v.offset) && offset + bytes <= v.offset + v.bytes) return true;
    return false;
  }
  const std::vector<SharedVariable>& variables() const { return variables_; }

 private:
  std::vector<SharedVariable> variables_;
  size_t used_, end_;
};

class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  ~SharedMemory() { release(); }

  std::byte* data() const { return data_; }

  // Written as a loop over volatile bytes, so that no sanitizer intercepts it.
  void fill_nan(const SharedLayout& layout) {
    for (auto& v : layout.variables())
      for (size_t i = 0; i < v.bytes; i++) static_cast<volatile std::byte*>(data_)[v.offset + i] = std::byte(0xFF);
  }

  // Prepares the memory for a block that starts.
  void reset(const SharedLayout& layout) {
    if (!data_) data_ = static_cast<std::byte*>(std::aligned_alloc(1024, SharedLayout::kCapacity));
    unpoison(data_, SharedLayout::kCapacity);
    made_ = end_ = 0;
    make_all(layout);
  }
  void* at(const SharedLayout& layout, const SharedVariable& v) {
    if (v.offset >= end_) make_all(layout);  // the variable was added to the layout after this block started
    return data_ + v.offset;
  }
  // Builds with the race checker call this between blocks, so that two blocks' variables never share an address.
  void release() {
    if (data_) unpoison(data_, SharedLayout::kCapacity);
    std::free(data_);
    data_ = nullptr;
  }
  // Describes a write into a gap; empty if there was none.
  std::string damage(const SharedLayout& layout) const;

 private:
  void make_all(const SharedLayout& layout) {
    for (auto& all = layout.variables(); made_ < all.size(); made_++) make(all[made_]);
  }
  void make(const SharedVariable& v);
  std::byte* data_ = nullptr;
  size_t made_ = 0, end_ = 0;  // the number of variables made so far, and the end of the last one
};

}  // namespace pygpt::emulator
