// The Python module pygpt._cuda. Importing it registers the CUDA kernels of torch.ops.pygpt.*.
//
// The host compiler compiles this file against any torch, even a CPU-only one. Symbols of torch's CUDA part are
// resolved when the module is loaded. The CUDA runtime of the kernels is linked statically.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>

#include "dispatcher.h"

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);  // from torch's C interface
extern "C" int cudaDriverGetVersion(int*), cudaRuntimeGetVersion(int*), cudaSetDevice(int);
extern "C" const char* cudaGetErrorString(int);

namespace pygpt::bind {

// Passes torch's current stream. Scratch memory may be freed on return, although kernels are still running, because
// torch's allocator reuses freed memory in stream order.
void with_stream(Device device, const std::function<void(const cuda::Stream&)>& body) {
  torch::stable::accelerator::DeviceGuard guard(device.index);
  const int error = cudaSetDevice(device.index);  // DeviceGuard sets the device of torch's CUDA runtime, not of ours
  STD_TORCH_CHECK(error == 0, "pygpt: ", cudaGetErrorString(error));
  void* handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &handle));
  std::vector<Handle> scratch;
  std::vector<GuardedTensor> guarded;
  body({device.index, handle, [&](int64_t bytes) {
    if (poison) guarded.emplace_back(Shape{bytes}, ScalarType::Byte, device);
    scratch.push_back(poison ? guarded.back().tensor(Shape{bytes}, Shape{1})
                             : new_tensor(Shape{bytes}, Shape{1}, ScalarType::Byte, device));
    void* data;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(scratch.back().get(), &data));
    return data;
  }});
  STD_TORCH_CHECK(are_intact(guarded), "pygpt: PYGPT_POISON: a kernel wrote outside of its scratch memory");
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
    {"code", code, METH_NOARGS, "The targets built for, such as 'sm_80 sm_90 compute_90' (machine code, then PTX)."},
    {"versions", versions, METH_NOARGS, "The CUDA versions of driver and runtime, as 1000 major + 10 minor."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "pygpt._cuda", "pygpt's CUDA kernels.", -1, methods};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, CUDA, m) { PYGPT_IMPL(m, pygpt::cuda); }

PyMODINIT_FUNC PyInit__cuda() {
  PyObject* object = PyModule_Create(&module);
  if (object && PyModule_AddIntConstant(object, "max_head_dim", pygpt::cuda::kMaxHeadDim)) Py_CLEAR(object);
  return object;
}
