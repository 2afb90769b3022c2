// One call of an op: checks the arguments, allocates the results and launches the kernel.
//
// Op bodies use only Call and View. There are two fronts, dispatcher.h and fastcall.h. Each converts its arguments to
// Views, implements allocation and computation in a class derived from Call, and converts the results from Views.
#pragma once
#include <functional>
#include <stdexcept>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../poison.h"
#include "view.h"

namespace pygpt::bind {

// Calls body with the current stream of the device. Each library with CUDA kernels defines this function.
void with_stream(Device device, const std::function<void(const cuda::Stream&)>& body);

inline const bool poison = poison_requested();

// Large results are allocated anew by the operating system each time, and their page faults cost more than computing
// them (docs/measured.md G2). Huge pages of 2 MB make page faults 512 times rarer. The system may refuse.
inline void request_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  if (bytes < 16 * kPage) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), first = (begin + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / kPage * kPage, MADV_HUGEPAGE);
#endif
}

inline std::string to_string(Shape s) {
  std::string text = "(";
  for (size_t i = 0; i < s.size(); i++) text += (i ? ", " : "") + std::to_string(s[i]);
  return text + ")";
}

inline const char* to_string(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline DType kernel_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: throw std::runtime_error("must be float64, float32, bfloat16 or float16");
  }
}

// Whether a kernel is a CPU's, which takes only its Args.
template <auto kernel, class Args>
constexpr bool kOnCpu = std::is_invocable_v<decltype(kernel), const Args&>;

// What PYGPT_POISON=1 finds. No front may catch it and try another way.
struct WroteOutside : std::runtime_error {
  using std::runtime_error::runtime_error;
  static constexpr char message[] = ": PYGPT_POISON: the kernel wrote outside of a result or of its scratch memory";
};

class Call {
 public:
  explicit Call(const char* op) : op_(op) {}
  Call(const Call&) = delete;

  // ---------------------------------------------------------------- checks
  // Sets the tensor whose dtype and device the others must share. Every op body calls this first.
  void lead(const View& t) {
    if (t.sizes.size() > kMaxDims) fail("the first argument has more than " + std::to_string(kMaxDims) + " dimensions");
    switch (t.type) {
      case ScalarType::Double:
      case ScalarType::Float:
      case ScalarType::BFloat16:
      case ScalarType::Half: dtype_ = kernel_dtype(t.type); break;
      default: fail("the first argument must be float64, float32, bfloat16 or float16");
    }
    if (!t.data && t.numel() > 0) fail("the first argument has no memory");
    type_ = t.type, device_ = t.device;
  }
  DType dtype() const { return dtype_; }
  ScalarType statistics() const { return dtype_ == DType::f64 ? ScalarType::Double : ScalarType::Float; }

  [[noreturn]] void fail(const std::string& message) const {
    throw std::runtime_error(std::string("pygpt.") + op_ + ": " + message);
  }
  [[noreturn]] void fail_index(const std::string& message) const {
    throw std::out_of_range(std::string("pygpt.") + op_ + ": " + message);
  }
  void check(const char* name, const View& t, Shape want, ScalarType type) const {
    if (t.type == type && !(t.device != device_) && t.sizes == want && (t.data || product(want) == 0)) return;
    const std::string start = name;
    if (t.type == ScalarType::Undefined) fail(start + " is undefined, or of a dtype that no op takes");
    if (t.type != type) fail(start + " must be " + to_string(type) + ", got " + to_string(t.type));
    if (t.device != device_) fail(start + " is not on the device of the first argument");
    if (t.sizes != want) fail(start + " must have shape " + to_string(want) + ", got " + to_string(t.sizes));
    fail(start + " has no memory");
  }
  void check(const char* name, const View& t, Shape want) const { check(name, t, want, type_); }
  void check(const char* name, const Maybe& t, Shape want) const { check(name, t, want, type_); }
  void check(const char* name, const Maybe& t, Shape want, ScalarType type) const {
    if (t) check(name, *t, want, type);
  }
  // The type of a tensor that may have that of the first argument or of the statistics. Another type fails.
  ScalarType type_or_statistics(const char* name, const View& t) const {
    if (t.type != type_ && t.type != statistics()) check(name, t, t.sizes);
    return t.type;
  }
  void at_least(const char* name, const View& t, int64_t dims) const {
    if (t.dim() < dims) fail(std::string(name) + " needs at least " + std::to_string(dims) + " dimensions");
  }
  void check_count(const Needs& needs, size_t n) const {
    if (needs.count != n) fail("needs must have " + std::to_string(n) + " entries, got " + std::to_string(needs.count));
  }

  // ---------------------------------------------------------------- results
  View empty(Shape size, Shape stride) { return empty(size, stride, type_); }
  View empty(Shape size, Shape stride, ScalarType type) { return allocate(size, stride, type); }
  View empty(Shape size) { return empty(size, contiguous_strides(size), type_); }

  // A result of forward that only backward reads; temporary memory if there will be no backward.
  View for_backward(Shape size, ScalarType type) {
    return has_backward() ? empty(size, contiguous_strides(size), type) : temporary(size, type);
  }
  View for_backward(Shape size) { return for_backward(size, type_); }
  virtual bool has_backward() const { return true; }

  virtual void fill(const View&, double) { fail("only results of the dispatcher are filled"); }

  // Contiguous memory that only the kernel uses.
  View scratch(Shape size) { return temporary(size, type_); }
  View scratch(Shape size, ScalarType type) { return temporary(size, type); }

  // A result that may not be needed; then it has no elements and its data is null.
  View empty_if(bool need, Shape size, Shape stride, ScalarType type) {
    if (need) return empty(size, stride, type);
    View none = empty(Shape{0}, Shape{1}, type);
    none.data = nullptr;
    return none;
  }
  View empty_if(bool need, Shape size, Shape stride) { return empty_if(need, size, stride, type_); }
  View empty_if(bool need, Shape size) { return empty_if(need, size, contiguous_strides(size)); }
  View empty_if(bool need, Shape size, ScalarType type) { return empty_if(need, size, contiguous_strides(size), type); }

  // A result at the end of the list that the caller has not asked for. The dispatcher returns it without elements.
  virtual View omitted() { return empty(Shape{0}); }

  // ---------------------------------------------------------------- arguments in the memory order that kernels require
  View with_strides(const View& t, Shape stride) { return t.has_strides(stride) ? t : copy(t, stride); }
  View contiguous(const View& t) { return t.is_contiguous() ? t : copy(t, contiguous_strides(t.sizes)); }
  Maybe contiguous(const Maybe& t) { return t ? Maybe(contiguous(*t)) : t; }
  View as_rows(const View& t) { return is_rows(t) ? t : copy(t, contiguous_strides(t.sizes)); }
  Maybe as_rows(const Maybe& t) { return t ? Maybe(as_rows(*t)) : t; }

  // ---------------------------------------------------------------- the kernel
  // A CUDA kernel also takes a stream, and returns an error message or null.
  template <auto kernel, class Args>
  void run(const Args& a) {
    if constexpr (kOnCpu<kernel, Args>) compute([](const void* args) { kernel(*static_cast<const Args*>(args)); }, &a);
    else
      with_stream(device_, [&](const cuda::Stream& stream) {
        if (cuda::Error error = kernel(a, stream)) fail(error);
      });
    if (poison && !is_intact()) throw WroteOutside(std::string("pygpt.") + op_ + WroteOutside::message);
  }

 protected:
  ~Call() = default;

  // ---------------------------------------------------------------- implemented by each front
  // Both fill their memory with NaN if `poison`.
  virtual View allocate(Shape size, Shape stride, ScalarType type) = 0;  // a result
  virtual View temporary(Shape size, ScalarType type) = 0;  // contiguous; lives until the call ends
  virtual View copy(const View& t, Shape stride) = 0;  // lives until the call ends
  virtual void compute(void (*kernel)(const void*), const void* args) { kernel(args); }
  virtual bool is_intact() const = 0;  // the guard bands of what allocate and temporary returned

  Device device() const { return device_; }

 private:
  const char* op_;
  DType dtype_{};
  ScalarType type_{};
  Device device_{};
};

}  // namespace pygpt::bind
