// <op>_fwd and <op>_bwd as built-in Python functions that bypass torch's dispatcher.
//
// A plain tensor is a strided CPU tensor whose class is exactly torch's Tensor or Parameter. If all tensors of a call
// are plain and no mode is on, the dispatcher has nothing to decide, and bypassing it saves most of the call's cost
// (docs/measured.md G4). Pointers, sizes and strides then come from torch's DLPack exchange table
// (dmlc.github.io/dlpack: DLPackExchangeAPI), which also makes the results Python objects.
//
// Every other call is passed to the dispatcher unchanged. So is a call that fails, so that the dispatcher raises the
// error. The functions are therefore correct for all arguments. They differ from the dispatcher's in one point: the
// storage of their results cannot be resized, as with torch.from_dlpack.
//
// For each op_fwd there is also op_fwd_results, which does not return what only backward reads.
#pragma once
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "table.h"

namespace pygpt::bind::fast {

// ---------------------------------------------------------------- torch's state
// True if the result of a Python call is true. A failed call counts as true. Takes ownership of the result.
inline bool is_true(PyObject* result) {
  if (result == Py_False || result == Py_None) return Py_DECREF(result), false;
  const int value = result ? PyObject_IsTrue(result) : 1;
  Py_XDECREF(result);
  if (value < 0 || !result) PyErr_Clear();
  return value != 0;
}

// A built-in function of torch that takes no arguments. Its C function is called directly if possible, which saves
// Python's overhead (docs/measured.md G5).
class Function {
 public:
  explicit Function(PyObject* object) : object_(object) {
    if (!PyObject_TypeCheck(object, &PyCFunction_Type)) return;
    self_ = PyCFunction_GetSelf(object);
    if (PyCFunction_GetFlags(object) == METH_NOARGS) noargs_ = PyCFunction_GetFunction(object);
    if (PyCFunction_GetFlags(object) == (METH_FASTCALL | METH_KEYWORDS))  // pybind11's functions
      fastcall_ = reinterpret_cast<FastCallFunction>(reinterpret_cast<void*>(PyCFunction_GetFunction(object)));
  }
  PyObject* operator()() const {
    if (noargs_) return noargs_(self_, nullptr);
    return fastcall_ ? fastcall_(self_, nullptr, 0, nullptr) : PyObject_CallObject(object_, nullptr);
  }
  PyCFunction method() const { return noargs_; }  // can be called with another self; null if there is none

 private:
  using FastCallFunction = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);
  PyObject *object_, *self_ = nullptr;
  PyCFunction noargs_ = nullptr;
  FastCallFunction fastcall_ = nullptr;
};

// The C function of a class's property, or null.
inline getter property(PyObject* type, const char* name) {
  void* slot = PyType_Check(type) ? PyType_GetSlot(reinterpret_cast<PyTypeObject*>(type), Py_tp_getset) : nullptr;
  for (auto* entry = static_cast<PyGetSetDef*>(slot); entry && entry->name; entry++)
    if (std::strcmp(entry->name, name) == 0) return entry->get;
  return nullptr;
}

// A mode (autocast, functorch, a profiler, a dispatch mode) that forces the slow path. It is given as a predicate, or
// as a module attribute and its default (module, name, value while the mode is off).
class Mode {
 public:
  explicit Mode(PyObject* entry) : predicate_(entry) {
    PyObject* module;
    if (PyTuple_Check(entry) && PyArg_ParseTuple(entry, "OUO", &module, &name_, &off_))
      attributes_ = PyModule_GetDict(module);
  }
  bool on() const {
    if (!attributes_) return is_true(predicate_());
    PyObject* value = PyDict_GetItemWithError(attributes_, name_);
    const bool off = value && PyObject_RichCompareBool(value, off_, Py_EQ) == 1;
    PyErr_Clear();
    return !off;
  }

 private:
  Function predicate_;
  PyObject *attributes_ = nullptr, *name_ = nullptr, *off_ = nullptr;
};
using Modes = std::vector<Mode>;
inline bool any_on(const Modes& modes) {
  for (const Mode& mode : modes)
    if (mode.on()) return true;
  return false;
}

// torch's functions, classes and modes, set by connect().
inline const Exchange* exchange = nullptr;
inline PyObject *tensor_class, *parameter_class;
inline getter requires_grad;
inline PyCFunction is_negative;
inline Modes* key_modes = new Modes();   // modes that change which kernel a call gets, or how it is differentiated
inline Modes* call_modes = new Modes();  // modes that intercept or observe calls of the dispatcher
inline Mode* grad_mode;

// Fills `out` if the class of `object` is exactly Tensor or Parameter, and it is strided and of a dtype that an op
// takes.
inline bool view_exact_tensor(PyObject* object, DLTensor& out) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != tensor_class && type != parameter_class) return false;
  if (exchange->view(object, &out) == 0) return scalar_type(out.dtype) != ScalarType::Undefined;
  PyErr_Clear();
  return false;
}

// ---------------------------------------------------------------- arguments
// read() converts a Python object, or returns false if the call needs the dispatcher. A tensor needs the dispatcher if
// it is not plain, if it has elements but no data (ZeroTensor, functional tensors), or if its negative bit is set,
// because its elements are then the negatives of those in memory.
inline bool read(PyObject* object, View& value) {
  DLTensor t;
  if (!view_exact_tensor(object, t) || t.device.type != kCpu) return false;
  value.sizes = {t.shape, size_t(t.ndim)}, value.strides = {t.strides, size_t(t.ndim)};
  value.data = static_cast<char*>(t.data) + t.byte_offset;
  value.type = scalar_type(t.dtype), value.owner = object;
  if (!t.data && value.numel() > 0) return false;
  return !is_true(is_negative(object, nullptr));
}
inline bool read(PyObject* object, Maybe& value) { return object == Py_None || read(object, value.emplace()); }
inline bool read(PyObject* object, bool& value) {
  value = object == Py_True;
  return value || object == Py_False;
}
inline bool read(PyObject* object, double& value) {
  value = PyFloat_AsDouble(object);
  return !PyErr_Occurred();
}
inline bool read(PyObject* object, int64_t& value) {
  value = PyLong_AsLongLong(object);
  return !PyErr_Occurred();
}
inline bool read(PyObject* object, std::string_view& value) {
  // Holds the letters of the thread's last few names, such as "mean". The function that returns a str's own UTF-8 is
  // not in the stable ABI of Python 3.9, which kernel-builder requires. The dispatcher refuses all other strings.
  constexpr Py_ssize_t kLetters = 16, kNames = 8;
  static thread_local std::array<std::array<char, kLetters>, kNames> names;
  static thread_local size_t last = 0;
  const Py_ssize_t length = PyUnicode_Check(object) ? PyUnicode_GetLength(object) : -1;
  Py_UCS4 letters[kLetters];
  if (length < 0 || length > kLetters || !PyUnicode_AsUCS4(object, letters, kLetters, 0)) return false;
  char* const name = names[++last % kNames].data();
  for (Py_ssize_t i = 0; i < length; i++) {
    if (letters[i] > 127) return false;
    name[i] = char(letters[i]);
  }
  value = {name, size_t(length)};
  return true;
}
inline bool read(PyObject* object, Needs& value) {
  if (!PyTuple_Check(object) || PyTuple_Size(object) > 32) return false;
  value.count = PyTuple_Size(object);
  for (size_t i = 0; i < value.count; i++) {
    bool need;
    if (!read(PyTuple_GetItem(object, i), need)) return false;
    value.bits |= uint32_t(need) << i;
  }
  return true;
}

// Reads the argument at args[0]; a struct of options reads all its fields, or none if the caller has left them out.
template <class T>
bool read_argument(PyObject* const* args, Py_ssize_t count, T& value) {
  if constexpr (kFields<T> == 1) {
    return read(args[0], value);
  } else {
    if (count == 0) return true;
    return std::apply([&](auto&... field) { return (read(*args++, field) && ...); }, value.fields());
  }
}

// ---------------------------------------------------------------- one call
class FastCall final : public Call {
 public:
  // without_backward: results that only backward reads are temporary memory.
  FastCall(const char* op, bool without_backward) : Call(op), without_backward_(without_backward) {}
  ~FastCall() {
    for (DLManaged* m : results_)
      if (m) m->deleter(m);
    for (PyObject* copy : copies_) Py_DECREF(copy);
  }
  bool has_backward() const override { return !without_backward_; }
  View omitted() override { return {}; }

  // Converts a result to a Python tensor. Null if that fails.
  PyObject* take(const View& result) {
    DLManaged*& managed = *std::find(results_.begin(), results_.end(), static_cast<DLManaged*>(result.owner));
    void* object = nullptr;
    return exchange->to_object(std::exchange(managed, nullptr), &object) ? nullptr : static_cast<PyObject*>(object);
  }

 private:
  View allocate(Shape size, Shape stride, ScalarType type) override {
    DLManaged** managed = std::find(results_.begin(), results_.end(), nullptr);  // a free slot
    if (managed == results_.end()) throw std::runtime_error("more results than any op has");
    *managed = new_tensor(size, stride, type);
    const DLTensor& t = (*managed)->tensor;
    if (poison) guarded_.push_back({t.data, bytes_of(size, type)});
    return {t.data, {t.shape, size.size()}, {t.strides, size.size()}, type, device(), *managed};
  }
  View temporary(Shape size, ScalarType type) override {
    const size_t bytes = bytes_of(size, type), whole = (bytes + 63) / 64 * 64;
    View t;
    t.data = poison ? guard(reserve(whole + 2 * kGuard), bytes) : reserve(whole);
    if (poison) guarded_.push_back({t.data, bytes});
    return t;
  }
  View copy(const View& t, Shape stride) override {
    PyObject* object = take(allocate(t.sizes, stride, t.type));
    if (object) copies_.push_back(object);
    PyObject* copied = object ? PyObject_CallMethod(object, "copy_", "O", static_cast<PyObject*>(t.owner)) : nullptr;
    Py_XDECREF(copied);
    View view;
    if (!copied || !read(object, view)) throw std::runtime_error("no copy in another memory order");
    return view;
  }
  bool is_intact() const override {
    const auto intact = [](const auto& memory) { return pygpt::is_intact(memory.first, memory.second); };
    return std::all_of(guarded_.begin(), guarded_.end(), intact);
  }
  void compute(void (*kernel)(const void*), const void* args) override {
    struct ReleaseGil {
      PyThreadState* state = PyEval_SaveThread();
      ~ReleaseGil() { PyEval_RestoreThread(state); }
    } release_gil;
    kernel(args);
  }

  void* reserve(size_t bytes) {
    if (local_used_ + bytes <= local_.size()) return local_.data() + std::exchange(local_used_, local_used_ + bytes);
    heap_.emplace_back(std::aligned_alloc(64, bytes), std::free);
    if (!heap_.back()) throw std::bad_alloc();
    request_huge_pages(heap_.back().get(), bytes);
    return heap_.back().get();
  }

  const bool without_backward_;
  std::array<DLManaged*, 8> results_{};  // those that take() has not released yet
  alignas(64) std::array<char, 1024> local_;  // temporary memory that is too large for it comes from the heap
  size_t local_used_ = 0;
  std::vector<std::unique_ptr<void, void (*)(void*)>> heap_;
  std::vector<std::pair<void*, size_t>> guarded_;  // with PYGPT_POISON=1 what a kernel may write
  std::vector<PyObject*> copies_;
};

// ---------------------------------------------------------------- built-in functions
// The type that PyMethodDef requires of a METH_FASTCALL function.
inline PyCFunction as_fastcall(PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(f));
}

// The op body `f` as a built-in function that returns its first `first` results, or all if `first` is 0.
template <auto f, size_t first>
struct Builtin;
template <size_t results, class... Args, Results<results> (*f)(Call&, Args...), size_t first>
struct Builtin<f, first> {
  static constexpr size_t returned = first ? first : results;
  static inline PyObject* dispatched;  // the same op through the dispatcher
  static inline PyMethodDef method;

  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (is_count(count) && !any_on(*call_modes)) try {
        if (PyObject* result = attempt(args, count, std::index_sequence_for<Args...>())) return result;
      } catch (const WroteOutside& e) {
        PyErr_SetString(PyExc_RuntimeError, e.what());
        return nullptr;
      }
    PyErr_Clear();
    return dispatch(args, count);
  }

 private:
  // Options at the end may be left out, all of them.
  static bool is_count(Py_ssize_t count) {
    constexpr Py_ssize_t all = (kFields<Args> + ...), required = ((kFields<Args> == 1) + ...);
    return count == all || count == required;
  }

  template <size_t... I>
  static PyObject* attempt(PyObject* const* args, Py_ssize_t count, std::index_sequence<I...>) {
    std::tuple<Args...> values;
    if (!(read_argument(args + I, count - Py_ssize_t(I), std::get<I>(values)) && ...)) return nullptr;
    FastCall call(method.ml_name, returned < results);
    try {
      return to_object(call, f(call, std::get<I>(values)...));
    } catch (const WroteOutside&) { throw; } catch (const std::exception&) {
      return nullptr;
    }
  }

  static PyObject* to_object(FastCall& call, const Results<results>& views) {
    if (returned == 1) return call.take(views[0]);
    size_t count = returned;
    while (!views[count - 1].owner) count--;  // omitted
    PyObject* tuple = PyTuple_New(count);
    for (size_t i = 0; tuple && i < count; i++) {
      PyObject* object = call.take(views[i]);
      if (!object || PyTuple_SetItem(tuple, i, object)) Py_CLEAR(tuple);
    }
    return tuple;
  }

  static PyObject* dispatch(PyObject* const* args, Py_ssize_t count) {
    PyObject* tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple && i < count; i++) PyTuple_SetItem(tuple, i, Py_NewRef(args[i]));
    PyObject* all = tuple ? PyObject_CallObject(dispatched, tuple) : nullptr;
    Py_XDECREF(tuple);
    if (!all || returned == results) return all;
    PyObject* some = returned == 1 ? Py_NewRef(PyTuple_GetItem(all, 0)) : PyTuple_GetSlice(all, 0, returned);
    Py_DECREF(all);
    return some;
  }
};

// call_key(allowed, *tensors) returns, as one number, what decides which kernel a fast call gets: dtype, device, and
// whether it needs gradients. It returns None if the call needs the slow path, because a tensor is not exactly a Tensor
// or Parameter, the tensors differ in dtype or device, or a mode is on. Bit i of `allowed`, i < 16, means that tensor i
// may be None. Bit 16 + i means that tensor i may also be int32 or int64, whatever the dtype of the others. Bit 32 + i
// means that tensor i must be of the dtype of the statistics of the others.
inline PyObject* call_key(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const unsigned long long allowed = count > 0 ? PyLong_AsUnsignedLongLong(args[0]) : 0;
  if (PyErr_Occurred()) return nullptr;
  if (!exchange || count < 2 || count > 17 || any_on(*key_modes)) Py_RETURN_NONE;
  ScalarType dtype = ScalarType::Undefined;
  DLTensor lead{}, t;
  bool gradient = false;
  for (Py_ssize_t i = 0; i < count - 1; i++) {
    PyObject* object = args[i + 1];
    if (object == Py_None && allowed >> i & 1) continue;
    if (!view_exact_tensor(object, t)) Py_RETURN_NONE;
    if (!lead.device.type) lead = t;
    if (t.device.type != lead.device.type || t.device.id != lead.device.id) Py_RETURN_NONE;
    const ScalarType type = scalar_type(t.dtype);
    if (is_integer(type)) {
      if (!(allowed >> (16 + i) & 1)) Py_RETURN_NONE;
      continue;
    }
    if (type == ScalarType::Bool) Py_RETURN_NONE;
    if (dtype == ScalarType::Undefined) dtype = type;
    const bool statistics = allowed >> (32 + i) & 1 && dtype != ScalarType::Double;
    if (type != (statistics ? ScalarType::Float : dtype)) Py_RETURN_NONE;
    gradient = gradient || is_true(requires_grad(object, nullptr));
  }
  if (dtype == ScalarType::Undefined) Py_RETURN_NONE;
  const int type = dtype == ScalarType::BFloat16 ? 3 : int(bytes_of(dtype) / 4);
  const int device = (lead.device.type - kCpu) * 256 + lead.device.id;
  return PyLong_FromLong((device * 4 + type) * 2 + (gradient && grad_mode->on()));
}

// Adds a Builtin to the dict `functions` as `name`. ops[op] is its way through the dispatcher.
template <class Builtin>
bool add(PyObject* functions, PyObject* ops, const char* op, const char* name) {
  Builtin::method = {name, as_fastcall(Builtin::call), METH_FASTCALL, nullptr};
  Builtin::dispatched = Py_XNewRef(PyDict_GetItemString(ops, op));
  PyObject* function = Builtin::dispatched ? PyCFunction_NewEx(&Builtin::method, nullptr, nullptr) : nullptr;
  const bool added = function && PyDict_SetItemString(functions, name, function) == 0;
  Py_XDECREF(function);
  return added;
}

// connect(exchange table, (TensorBase, Tensor, Parameter), is_neg of a tensor, is_grad_enabled, key modes, call modes,
// {name: op through the dispatcher}) returns {name: built-in function}, or None if this version of torch does not
// support the fast path. A mode is a predicate, or (module, name of an attribute, its value while the mode is off).
inline PyObject* connect(PyObject*, PyObject* args) {
  PyObject *capsule, *base, *is_neg, *grad, *key_entries, *call_entries, *ops;
  if (!PyArg_ParseTuple(args, "O(OOO)OOO!O!O!", &capsule, &base, &tensor_class, &parameter_class, &is_neg, &grad,
                        &PyTuple_Type, &key_entries, &PyTuple_Type, &call_entries, &PyDict_Type, &ops))
    return nullptr;
  auto table = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!table) return nullptr;
  is_negative = Function(is_neg).method(), requires_grad = property(base, "requires_grad");
  if (table->version.major != 1 || !table->view || !is_negative || !requires_grad) Py_RETURN_NONE;
  Py_INCREF(args);  // keeps everything in it alive for ever
  grad_mode = new Mode(grad);
  for (auto [modes, entries] : {std::pair{key_modes, key_entries}, {call_modes, call_entries}}) {
    modes->clear();
    for (Py_ssize_t i = 0; i < PyTuple_Size(entries); i++) modes->emplace_back(PyTuple_GetItem(entries, i));
  }
  if (PyErr_Occurred()) return nullptr;
  PyObject* functions = PyDict_New();
  bool added = functions;
#define PYGPT_ADD(op, kernel, results)                                       \
  added = added && add<Builtin<&op<kernel>, 0>>(functions, ops, #op, #op) && \
          add<Builtin<&op<kernel>, results>>(functions, ops, #op, #op "_results");
  PYGPT_OPS(PYGPT_ADD, cpu)
#undef PYGPT_ADD
  if (!added) {
    Py_XDECREF(functions);
    return PyErr_Occurred() ? nullptr : PyErr_Format(PyExc_ValueError, "an op is missing");
  }
  exchange = table;
  return functions;
}

}  // namespace pygpt::bind::fast
