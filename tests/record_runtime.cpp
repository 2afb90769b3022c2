// Stubs for what of the CUDA runtime a launch calls. They record the calls, and nothing runs.
#include <cstdint>
#include <map>
#include <string>

namespace {

struct dim3 {
  unsigned x, y, z;
};
struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;

std::string calls;
int launch_error = 0, attribute_error = 0;

// The name of a kernel. (Kernels are registered before the variables of this file exist.)
std::string& name(const void* kernel) {
  static std::map<const void*, std::string> names;
  return names[kernel];
}
void record(const std::string& call) { calls += call + "\n"; }
int launch(const void* kernel, dim3 grid, dim3 block, size_t shared, void* stream) {
  record(name(kernel) + ": grid " + std::to_string(grid.x) + ", block " + std::to_string(block.x) + ", shared " +
         std::to_string(shared) + ", stream " + std::to_string(reinterpret_cast<uintptr_t>(stream)));
  return launch_error;
}

}  // namespace

extern "C" {

int cudaFuncSetAttribute(const void* kernel, int attribute, int value) {
  constexpr int kMaxDynamicSharedMemorySize = 8;
  record(name(kernel) + (attribute == kMaxDynamicSharedMemorySize ? ": may have " : ": another attribute ") +
         std::to_string(value));
  return attribute_error;
}
int cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared, void* stream) {
  return launch(kernel, grid, block, shared, stream);
}
int cudaGetLastError() {
  record("last error");
  return launch_error;
}
const char* cudaGetErrorString(int) { return "a planted error"; }
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  constexpr int kMaxSharedMemoryPerBlockOptin = 97;
  *value = attribute == kMaxSharedMemoryPerBlockOptin ? 1000 + device : 0;
  return 0;
}

// What nvcc writes into the code of the host.
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared, void* stream) {
  return launch(kernel, grid, block, shared, stream);
}
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const void* function, char*, const char* mangled, int, void*, void*, void*, void*,
                            int*) {
  name(function) = std::string(mangled).find("first") != std::string::npos ? "first" : "second";
}

// What the stubs return from now on.
void record_errors(int of_launch, int of_attribute) { launch_error = of_launch, attribute_error = of_attribute; }
// The calls since this was asked last.
const char* recorded() {
  static std::string last;
  last.swap(calls);
  calls.clear();
  return last.c_str();
}
}
