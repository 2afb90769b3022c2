// The structs of DLPack, version 1, and torch's table of DLPack functions (dmlc.github.io/dlpack: DLPackExchangeAPI).
#pragma once
#include <cstdlib>
#include <new>

#include "check.h"

namespace pygpt::bind::fast {

struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManaged {
  struct {
    uint32_t major, minor;
  } version;
  void* context;
  void (*deleter)(DLManaged*);
  uint64_t flags;
  DLTensor tensor;
};
struct Exchange {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  int (*allocate)(DLTensor* like, DLManaged** out, void* context, void (*set_error)(void*, const char*, const char*));
  int (*export_)(void* object, DLManaged** out);
  int (*to_object)(DLManaged*, void** object);  // takes ownership of the tensor
  int (*view)(void* object, DLTensor* out);     // valid while the object is not changed
  int (*stream)(int32_t device_type, int32_t device, void** out);
};
constexpr int kCpu = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6;

// Undefined if no op takes the dtype.
inline ScalarType scalar_type(DLDataType t) {
  if (t.lanes != 1) return ScalarType::Undefined;
  switch (t.code << 8 | t.bits) {
    case kFloat << 8 | 32: return ScalarType::Float;
    case kBfloat << 8 | 16: return ScalarType::BFloat16;
    case kFloat << 8 | 16: return ScalarType::Half;
    case kFloat << 8 | 64: return ScalarType::Double;
    case kInt << 8 | 64: return ScalarType::Long;
    case kInt << 8 | 32: return ScalarType::Int;
    case kBool << 8 | 8: return ScalarType::Bool;
    default: return ScalarType::Undefined;
  }
}
inline DLDataType dtype_of(ScalarType type) {
  const bool integer = type == ScalarType::Long || type == ScalarType::Int;
  const uint8_t code = type == ScalarType::BFloat16 ? kBfloat : integer ? kInt : kFloat;
  return {code, uint8_t(8 * bytes_of(type)), 1};
}
constexpr bool is_integer(ScalarType type) { return type == ScalarType::Long || type == ScalarType::Int; }

// A new tensor in one block of memory: the struct, the sizes, the strides, and the elements, at a multiple of 64 bytes
// like torch's own. A block of malloc costs less than torch's allocation (docs/measured.md G6). With PYGPT_POISON=1
// the elements lie between guard bands.
inline DLManaged* new_tensor(Shape size, Shape stride, ScalarType type) {
  const size_t n = size.size(), bytes = bytes_of(size, type), band = poison ? kGuard : 0;
  const size_t header = sizeof(DLManaged) + 2 * n * sizeof(int64_t) + 64 + band;
  void* block = std::malloc(header + bytes + band);
  if (!block) throw std::bad_alloc();
  auto* managed = new (block) DLManaged{{1, 0}, nullptr, [](DLManaged* m) { std::free(m); }, 0, {}};
  auto* sizes = reinterpret_cast<int64_t*>(managed + 1);
  std::copy(size.begin(), size.end(), sizes), std::copy(stride.begin(), stride.end(), sizes + n);
  char* data = static_cast<char*>(block) + header;
  data -= reinterpret_cast<uintptr_t>(data) % 64;
  request_huge_pages(data, bytes);
  if (poison) guard(data - band, bytes);
  managed->tensor = {data, {kCpu, 0}, int32_t(n), dtype_of(type), sizes, sizes + n, 0};
  return managed;
}

}  // namespace pygpt::bind::fast
