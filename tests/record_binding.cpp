// csrc/bind/bind_cuda.cpp with stubs for CUDA and for torch's CUDA part, which record how they are called.
#define PYGPT_CUDA_CODE "none"
#include "../csrc/bind/bind_cuda.cpp"

#include <dlfcn.h>

namespace {

std::string calls;
int cuda_error = 0;
void* const kStream = reinterpret_cast<void*>(0x5EA);

void record(const std::string& call) { calls += call + "\n"; }

}  // namespace

extern "C" {

AOTITorchError aoti_torch_create_device_guard(int32_t device, DeviceGuardHandle* guard) {
  record("guard " + std::to_string(device));
  *guard = reinterpret_cast<DeviceGuardHandle>(&calls);
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  record("end of guard");
  return 0;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  record("stream of " + std::to_string(device));
  *stream = kStream;
  return 0;
}
// In the memory of the CPU, whatever the device.
AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t, int32_t device, AtenTensorHandle* tensor) {
  record("empty " + std::to_string(dims ? sizes[0] : 1) + " on " + std::to_string(device));
  static const auto real = reinterpret_cast<decltype(&aoti_torch_empty_strided)>(dlsym(RTLD_NEXT, __func__));
  return real(dims, sizes, strides, dtype, pygpt::bind::cpu_device, 0, tensor);
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  record("free");
  static const auto real = reinterpret_cast<decltype(&aoti_torch_delete_tensor_object)>(dlsym(RTLD_NEXT, __func__));
  return real(tensor);
}
int cudaSetDevice(int device) {
  record("cudaSetDevice " + std::to_string(device));
  return cuda_error;
}
const char* cudaGetErrorString(int) { return "a planted error"; }
int cudaDriverGetVersion(int*) { return 0; }
int cudaRuntimeGetVersion(int*) { return 0; }

// What with_stream calls for a device, in order. The body asks for scratch memory twice. cuda: what cudaSetDevice
// returns. body_throws: whether the body ends with an exception.
__attribute__((visibility("default"))) const char* record_with_stream(int device, int cuda, bool body_throws) {
  calls.clear(), cuda_error = cuda;
  try {
    pygpt::bind::with_stream({pygpt::bind::cpu_device, device}, [&](const pygpt::cuda::Stream& stream) {
      record("body on " + std::to_string(stream.device) +
             (stream.handle == kStream ? ", its stream" : ", another stream"));
      void *first = stream.scratch(100), *second = stream.scratch(7);
      record(first != second ? "two memories" : "one memory");
      if (body_throws) throw std::runtime_error("the body's error");
    });
  } catch (const std::exception& e) { record(std::string("error: ") + e.what()); }
  return calls.c_str();
}
}

namespace pygpt::cuda {
#define PYGPT_STUB(name, Args) \
  Error name(const Args&, const Stream&) { return nullptr; }
PYGPT_KERNELS(PYGPT_STUB)
#undef PYGPT_STUB
}  // namespace pygpt::cuda
