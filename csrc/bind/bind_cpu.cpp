// The Python module pygpt._C. Importing it registers the CPU kernels of torch.ops.pygpt.*, whose schemas Python has
// defined before.
#include "fastcall.h"

#include <exception>

#include "../cpu/dispatch.h"
#include "../cpu/parallel.h"
#include "dispatcher.h"
#include "work_stealing.h"

namespace {

namespace fast = pygpt::bind::fast;

int64_t thread_count() { return torch::stable::get_num_threads(); }

// A loop on torch's threads, which are woken only for more than one piece of work.
void parallel_for(int64_t n, int64_t grain, void (*body)(const void*, int64_t, int64_t), const void* context) {
  static thread_local pygpt::bind::Patience patience;
  const int64_t count = n > grain ? std::min({thread_count(), (n + grain - 1) / grain, pygpt::bind::kMostThreads}) : 1;
  if (count <= 1) return body(context, 0, n);
  const auto fork = [count](const auto& work) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) work(i);
    });
  };
  pygpt::bind::share(n, grain, count, patience, fork, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

PyObject* cpu_capability(PyObject*, PyObject*) { return PyUnicode_FromString(pygpt::cpu::kernels().name); }

PyObject* cpu_capabilities(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (const auto* k : pygpt::cpu::supported()) {
    PyObject* name = PyUnicode_FromString(k->name);
    PyList_Append(list, name);
    Py_DECREF(name);
  }
  return list;
}

PyObject* fma_rate(PyObject*, PyObject* milliseconds) {
  const long ms = PyLong_AsLong(milliseconds);
  if (PyErr_Occurred()) return nullptr;
  return PyFloat_FromDouble(pygpt::cpu::kernels().fma_rate(ms));
}

PyMethodDef methods[] = {
    {"cpu_capability", cpu_capability, METH_NOARGS, "The instruction set in use, one of cpu_capabilities()."},
    {"cpu_capabilities", cpu_capabilities, METH_NOARGS, "The instruction sets compiled that this machine can run."},
    {"connect", fast::connect, METH_VARARGS, "See fastcall.h."},
    {"call_key", fast::as_fastcall(fast::call_key), METH_FASTCALL, "See fastcall.h."},
    {"fma_rate", fma_rate, METH_O, "fma_rate(milliseconds): measured float32 multiply-add peak, GFLOP/s, all threads."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "pygpt._C", "pygpt's compiled kernels.", -1, methods};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, CPU, m) { PYGPT_IMPL(m, pygpt::cpu); }

PyMODINIT_FUNC PyInit__C() {
  pygpt::cpu::threads = {parallel_for, thread_count};
  try {
    pygpt::cpu::kernels();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
    return nullptr;
  }
  PyObject* object = PyModule_Create(&module);
  if (object && PyModule_AddIntConstant(object, "max_head_dim", pygpt::kMaxHeadDim)) Py_CLEAR(object);
  return object;
}
