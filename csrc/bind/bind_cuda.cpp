// The Python module pygpt._cuda: importing it registers torch.ops.pygpt.* for CUDA tensors.
//
// Compiled by the host compiler against any torch, the CPU-only one included; what it needs of torch's CUDA part is
// found when it is loaded. The kernels come with their own CUDA runtime, linked statically.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>

#include "dispatcher.h"

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);  // of torch's C interface
extern "C" int cudaDriverGetVersion(int*), cudaRuntimeGetVersion(int*), cudaSetDevice(int);
extern "C" const char* cudaGetErrorString(int);

namespace pygpt::bind {

// torch's current stream. Its allocator reuses freed memory in the stream's order, so scratch may be freed on return.
void with_stream(Device device, const std::function<void(const cuda::Stream&)>& body) {
  torch::stable::accelerator::DeviceGuard guard(device.index);
  const int error = cudaSetDevice(device.index);  // torch has told its own runtime; ours is another one
  STD_TORCH_CHECK(error == 0, "pygpt: ", cudaGetErrorString(error));
  void* handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &handle));
  std::vector<Handle> scratch;
  body({device.index, handle, [&](int64_t bytes) {
          scratch.push_back(new_tensor(Shape{bytes}, Shape{1}, ScalarType::Byte, device));
          if (poison) fill_tensor_with_nan(scratch.back().get(), true);
          void* data;
          STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(scratch.back().get(), &data));
          return data;
        }});
}

}  // namespace pygpt::bind

namespace {

PyObject* code(PyObject*, PyObject*) { return PyUnicode_FromString(PYGPT_CUDA_CODE); }

PyObject* versions(PyObject*, PyObject*) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver), cudaRuntimeGetVersion(&runtime);
  return Py_BuildValue("ii", driver, runtime);
}

PyMethodDef methods[] = {
    {"code", code, METH_NOARGS, "What was built, such as 'sm_80 sm_90 sm_90a compute_90': machine code, and PTX if any."},
    {"versions", versions, METH_NOARGS, "CUDA's versions, 1000 major + 10 minor: the driver's, and the runtime's compiled with."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "pygpt._cuda", "pygpt's CUDA kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, CUDA, m) { PYGPT_IMPL(m, pygpt::cuda); }

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
