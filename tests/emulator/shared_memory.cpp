#include "shared_memory.h"

#include <algorithm>

namespace pygpt::emulator {
namespace {

constexpr uint32_t kGapWord = 0xFFC5FFC5;  // NaN as float, bf16 and f16

std::byte gap_byte(const std::byte* p) { return std::byte(kGapWord >> reinterpret_cast<uintptr_t>(p) % 4 * 8); }

void fill_gap(std::byte* begin, std::byte* end) {
  for (; begin < end && reinterpret_cast<uintptr_t>(begin) % 4; begin++) *begin = gap_byte(begin);
  for (; begin + 4 <= end; begin += 4) *reinterpret_cast<uint32_t*>(begin) = kGapWord;
  for (; begin < end; begin++) *begin = gap_byte(begin);
}

}  // namespace

void SharedMemory::make(const SharedVariable& v) {
  std::byte *gap = data_ + end_, *begin = data_ + v.offset, *end = begin + v.bytes;
  unpoison(gap, size_t(end - gap) + SharedLayout::kGap);
  fill_gap(gap, begin);
  for (std::byte* p = begin; p < end; p++) *p = std::byte{0xFF};
  fill_gap(end, end + SharedLayout::kGap);
  forbid(gap, size_t(begin - gap));
  forbid(end, SharedLayout::kGap);
  end_ = v.offset + v.bytes;
}

std::string SharedMemory::damage(const SharedLayout& layout) const {
  if (checks_addresses) return "";
  size_t gap = 0;
  for (size_t i = 0; i <= made_; i++) {
    const SharedVariable* next = i < made_ ? &layout.variables()[i] : nullptr;
    const size_t end = next ? next->offset : gap + SharedLayout::kGap;
    for (size_t at = gap; at < end; at++) {
      if (data_[at] == gap_byte(data_ + at)) continue;
      std::string text = "a store to shared memory went ";
      if (i) text += std::to_string(at - gap + 1) + " bytes past the end of " + layout.variables()[i - 1].name;
      if (next) text += (i ? ", " : "") + std::to_string(end - at) + " bytes before " + next->name;
      return text;
    }
    if (next) gap = next->offset + next->bytes;
  }
  return "";
}

}  // namespace pygpt::emulator
