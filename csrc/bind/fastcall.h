// <op>_fwd and <op>_bwd as built-in functions of Python, without torch's dispatcher.
//
// A call through the dispatcher costs 1.2 us, and 0.3 to 0.5 us for every tensor in or out. For plain tensors (torch's
// own class, strided, in this machine's memory) outside any mode there is nothing for it to decide: their pointers,
// sizes and strides come from torch's DLPack exchange table (dmlc.github.io/dlpack: DLPackExchangeAPI) at 0.04 us each,
// and so do results, at 0.7 us. Every other call is handed on to the dispatcher as it came; so is one that fails, for
// its error. So these functions are right for all arguments. One thing differs: the storage of their results cannot be
// resized (as that of torch.from_dlpack's cannot).
//
// Beside each op_fwd there is op_fwd_results, which leaves out what only backward reads.
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

// ---------------------------------------------------------------- questions to torch
// Whether a function's result is true. A failure counts as true.
inline bool is_true(PyObject* result) {
  if (result == Py_False || result == Py_None) return Py_DECREF(result), false;
  const int value = result ? PyObject_IsTrue(result) : 1;
  Py_XDECREF(result);
  if (value < 0 || !result) PyErr_Clear();
  return value != 0;
}

// A built-in function of torch that can be called without arguments. Its C function is called directly where it can be:
// that saves Python's part of a call, 10 to 25 ns.
class Function {
 public:
  explicit Function(PyObject* object) : object_(object) {
    if (!PyObject_TypeCheck(object, &PyCFunction_Type)) return;
    self_ = PyCFunction_GetSelf(object);
    if (PyCFunction_GetFlags(object) == METH_NOARGS) plain_ = PyCFunction_GetFunction(object);
    if (PyCFunction_GetFlags(object) == (METH_FASTCALL | METH_KEYWORDS))  // as pybind11's are
      keywords_ = reinterpret_cast<WithKeywords>(reinterpret_cast<void*>(PyCFunction_GetFunction(object)));
  }
  PyObject* operator()() const {
    if (plain_) return plain_(self_, nullptr);
    return keywords_ ? keywords_(self_, nullptr, 0, nullptr) : PyObject_CallNoArgs(object_);
  }
  PyCFunction method() const { return plain_; }  // to be called with another self; null where that is impossible

 private:
  using WithKeywords = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);
  PyObject *object_, *self_ = nullptr;
  PyCFunction plain_ = nullptr;
  WithKeywords keywords_ = nullptr;
};

// The C function behind a property of a class, or null.
inline getter property(PyObject* type, const char* name) {
  void* slot = PyType_Check(type) ? PyType_GetSlot(reinterpret_cast<PyTypeObject*>(type), Py_tp_getset) : nullptr;
  for (auto* entry = static_cast<PyGetSetDef*>(slot); entry && entry->name; entry++)
    if (std::strcmp(entry->name, name) == 0) return entry->get;
  return nullptr;
}

// Autocast, a profiler, a dispatch mode, ...: a function that is true while the mode is on, or a module's attribute and
// its value while the mode is off.
class Mode {
 public:
  explicit Mode(PyObject* entry) : function_(entry) {
    PyObject* module;
    if (PyTuple_Check(entry) && PyArg_ParseTuple(entry, "OUO", &module, &name_, &off_))
      names_ = PyModule_GetDict(module);
  }
  bool on() const {
    if (!names_) return is_true(function_());
    PyObject* value = PyDict_GetItemWithError(names_, name_);
    const bool off = value && PyObject_RichCompareBool(value, off_, Py_EQ) == 1;
    PyErr_Clear();
    return !off;
  }

 private:
  Function function_;
  PyObject *names_ = nullptr, *name_ = nullptr, *off_ = nullptr;
};
using Modes = std::vector<Mode>;
inline bool any_on(const Modes& modes) {
  for (const Mode& mode : modes)
    if (mode.on()) return true;
  return false;
}

// torch's own, from connect().
inline const Exchange* exchange = nullptr;
inline PyObject *tensor_class, *parameter_class;
inline getter requires_grad;
inline PyCFunction is_negative;
inline Modes* resolving = new Modes();  // that change how a call is served or differentiated
inline Modes* running = new Modes();    // that want to see what the dispatcher is asked to do
inline Mode* grad_mode;

// Fills `out` if `object` is one of torch's own tensors, strided, of a dtype that an op takes, and no wrapper.
inline bool plain(PyObject* object, DLTensor& out) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != tensor_class && type != parameter_class) return false;
  if (exchange->view(object, &out) == 0) return scalar_type(out.dtype) != ScalarType::Undefined;
  PyErr_Clear();
  return false;
}

// ---------------------------------------------------------------- arguments
// value = what the object says; false if the dispatcher is needed. That is so for a tensor that has elements but no
// data, as torch's tensors of zeros and functional tensors, and for one whose negative bit is set: its elements are
// those in memory with the other sign.
inline bool read(PyObject* object, View& value) {
  DLTensor t;
  if (!plain(object, t) || t.device.type != kCpu) return false;
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
inline bool read(PyObject* object, std::string_view& value) {
  Py_ssize_t length;
  const char* text = PyUnicode_AsUTF8AndSize(object, &length);
  if (text) value = {text, size_t(length)};
  return text;
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

// ---------------------------------------------------------------- one call
class FastCall final : public Call {
 public:
  // without_backward: memory for what only backward reads is temporary.
  FastCall(const char* op, bool without_backward) : Call(op), without_backward_(without_backward) {}
  ~FastCall() {
    for (DLManaged* m : made_)
      if (m) m->deleter(m);
    for (PyObject* copy : copies_) Py_DECREF(copy);
  }
  bool has_backward() const override { return !without_backward_; }

  // A result as Python's. Null where that fails.
  PyObject* take(const View& result) {
    DLManaged*& made = *std::find(made_.begin(), made_.end(), static_cast<DLManaged*>(result.owner));
    void* object = nullptr;
    return exchange->to_object(std::exchange(made, nullptr), &object) ? nullptr : static_cast<PyObject*>(object);
  }

 private:
  View allocate(Shape size, Shape stride, ScalarType type) override {
    DLTensor want{nullptr, {kCpu, 0}, int32_t(size.size()), dtype_of(type), const_cast<int64_t*>(size.data()),
                  nullptr, 0};
    DLManaged** made = std::find(made_.begin(), made_.end(), nullptr);  // a copy has left its place
    if (made == made_.end()) throw std::runtime_error("more results than any op has");
    std::string error;
    auto set_error = [](void* to, const char*, const char* message) { *static_cast<std::string*>(to) = message; };
    if (exchange->allocate(&want, made, &error, set_error)) throw std::runtime_error(error);
    DLTensor& t = (*made)->tensor;
    std::copy(stride.begin(), stride.end(), t.strides);  // the same memory in another order
    void* data = static_cast<char*>(t.data) + t.byte_offset;
    ask_for_large_pages(data, product(size) * bytes_of(type));
    return {data, {t.shape, size.size()}, {t.strides, size.size()}, type, device(), *made};
  }
  View temporary(Shape size, ScalarType type) override {
    const size_t bytes = product(size) * bytes_of(type);
    void* memory = reserve((bytes + 63) / 64 * 64);
    if (poison) pygpt::fill_with_nan(memory, bytes);
    View t;
    t.data = memory;
    return t;
  }
  View copy(const View& t, Shape stride) override {
    PyObject* made = take(allocate(t.sizes, stride, t.type));
    if (made) copies_.push_back(made);
    PyObject* done = made ? PyObject_CallMethod(made, "copy_", "O", static_cast<PyObject*>(t.owner)) : nullptr;
    Py_XDECREF(done);
    View copied;
    if (!done || !read(made, copied)) throw std::runtime_error("no copy in another memory order");
    return copied;
  }
  void fill_with_nan(const View& t) override { pygpt::fill_with_nan(t.data, t.numel() * bytes_of(t.type)); }
  void compute(void (*kernel)(const void*), const void* args) override {
    struct Unlocked {
      PyThreadState* state = PyEval_SaveThread();
      ~Unlocked() { PyEval_RestoreThread(state); }
    } unlocked;
    kernel(args);
  }

  void* reserve(size_t bytes) {
    if (near_used_ + bytes <= near_.size()) return near_.data() + std::exchange(near_used_, near_used_ + bytes);
    heap_.emplace_back(std::aligned_alloc(64, bytes), std::free);
    if (!heap_.back()) throw std::bad_alloc();
    ask_for_large_pages(heap_.back().get(), bytes);
    return heap_.back().get();
  }

  const bool without_backward_;
  std::array<DLManaged*, 8> made_{};  // and not yet taken
  alignas(64) std::array<char, 1024> near_;  // temporary memory comes from here, then from the heap
  size_t near_used_ = 0;
  std::vector<std::unique_ptr<void, void (*)(void*)>> heap_;
  std::vector<PyObject*> copies_;
};

// ---------------------------------------------------------------- the functions
inline PyCFunction as_fastcall(PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(f));  // as METH_FASTCALL wants it
}

// The op body `f` as a built-in function that gives its first `some` results, or all where some is 0.
template <auto f, size_t some>
struct Builtin;
template <size_t results, class... Args, Results<results> (*f)(Call&, Args...), size_t some>
struct Builtin<f, some> {
  static constexpr size_t given = some ? some : results;
  static inline PyObject* dispatched;  // the same op through the dispatcher
  static inline PyMethodDef method;

  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count == sizeof...(Args) && !any_on(*running))
      if (PyObject* result = attempt(args, std::index_sequence_for<Args...>())) return result;
    PyErr_Clear();
    return dispatch(args, count);
  }

 private:
  template <size_t... I>
  static PyObject* attempt(PyObject* const* args, std::index_sequence<I...>) {
    std::tuple<Args...> values;
    if (!(read(args[I], std::get<I>(values)) && ...)) return nullptr;
    FastCall call(method.ml_name, given < results);
    try {
      return to_object(call, f(call, std::get<I>(values)...));
    } catch (const std::exception&) {
      return nullptr;
    }
  }

  static PyObject* to_object(FastCall& call, const Results<results>& made) {
    if (given == 1) return call.take(made[0]);
    PyObject* tuple = PyTuple_New(given);
    for (size_t i = 0; tuple && i < given; i++) {
      PyObject* object = call.take(made[i]);
      if (!object || PyTuple_SetItem(tuple, i, object)) Py_CLEAR(tuple);
    }
    return tuple;
  }

  static PyObject* dispatch(PyObject* const* args, Py_ssize_t count) {
    PyObject* tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple && i < count; i++) PyTuple_SetItem(tuple, i, Py_NewRef(args[i]));
    PyObject* all = tuple ? PyObject_CallObject(dispatched, tuple) : nullptr;
    Py_XDECREF(tuple);
    if (!all || given == results) return all;
    PyObject* first = given == 1 ? Py_NewRef(PyTuple_GetItem(all, 0)) : PyTuple_GetSlice(all, 0, given);
    Py_DECREF(all);
    return first;
  }
};

// call_key(allowed, *tensors) -> what decides how a plain call is served: dtype, device, and whether it wants gradients,
// as one number; None where the call isn't plain. Bit i of `allowed`, i < 16: tensor i may be None. Bit 16 + i: tensor i
// may be of int32 or int64, whatever the others' one dtype.
inline PyObject* call_key(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const unsigned long allowed = count > 0 ? PyLong_AsUnsignedLong(args[0]) : 0;
  if (PyErr_Occurred()) return nullptr;
  if (!exchange || count < 2 || count > 17 || any_on(*resolving)) Py_RETURN_NONE;
  ScalarType dtype = ScalarType::Undefined;
  DLTensor lead{}, t;
  bool gradient = false;
  for (Py_ssize_t i = 0; i < count - 1; i++) {
    PyObject* object = args[i + 1];
    if (object == Py_None && allowed >> i & 1) continue;
    if (!plain(object, t)) Py_RETURN_NONE;
    if (!lead.device.type) lead = t;
    if (t.device.type != lead.device.type || t.device.id != lead.device.id) Py_RETURN_NONE;
    const ScalarType type = scalar_type(t.dtype);
    if (is_integer(type)) {
      if (!(allowed >> (16 + i) & 1)) Py_RETURN_NONE;
      continue;
    }
    if (dtype == ScalarType::Undefined) dtype = type;
    if (type != dtype) Py_RETURN_NONE;
    gradient = gradient || is_true(requires_grad(object, nullptr));
  }
  if (dtype == ScalarType::Undefined) Py_RETURN_NONE;
  const int type = dtype == ScalarType::BFloat16 ? 3 : int(bytes_of(dtype) / 4);
  const int device = (lead.device.type - kCpu) * 256 + lead.device.id;
  return PyLong_FromLong((device * 4 + type) * 2 + (gradient && grad_mode->on()));
}

// Adds `f` to functions as `name`, for `op` of ops.
template <class Builtin>
bool add(PyObject* functions, PyObject* ops, const char* op, const char* name) {
  Builtin::method = {name, as_fastcall(Builtin::call), METH_FASTCALL, nullptr};
  Builtin::dispatched = Py_XNewRef(PyDict_GetItemString(ops, op));
  PyObject* function = Builtin::dispatched ? PyCFunction_NewEx(&Builtin::method, nullptr, nullptr) : nullptr;
  const bool added = function && PyDict_SetItemString(functions, name, function) == 0;
  Py_XDECREF(function);
  return added;
}

// connect(exchange table, (TensorBase, Tensor, Parameter), is_neg of a tensor, is_grad_enabled, resolving modes, running
// modes, {name: op through the dispatcher}) -> {name: function}; None where this torch cannot be called so. A mode is a
// function, or (module, name of an attribute, its value while the mode is off).
inline PyObject* connect(PyObject*, PyObject* args) {
  PyObject *table, *base, *is_neg, *grad, *resolve, *run, *ops;
  if (!PyArg_ParseTuple(args, "O(OOO)OOO!O!O!", &table, &base, &tensor_class, &parameter_class, &is_neg, &grad,
                        &PyTuple_Type, &resolve, &PyTuple_Type, &run, &PyDict_Type, &ops))
    return nullptr;
  auto given = static_cast<const Exchange*>(PyCapsule_GetPointer(table, "dlpack_exchange_api"));
  if (!given) return nullptr;
  is_negative = Function(is_neg).method(), requires_grad = property(base, "requires_grad");
  if (given->version.major != 1 || !given->view || !is_negative || !requires_grad) Py_RETURN_NONE;
  Py_INCREF(args);  // all of it is kept
  grad_mode = new Mode(grad);
  for (auto [modes, entries] : {std::pair{resolving, resolve}, {running, run}}) {
    modes->clear();
    for (Py_ssize_t i = 0; i < PyTuple_Size(entries); i++) modes->emplace_back(PyTuple_GetItem(entries, i));
  }
  if (PyErr_Occurred()) return nullptr;
  PyObject* functions = PyDict_New();
  bool added = functions;
#define PYGPT_ADD(op, kernel, results)                                           \
  added = added && add<Builtin<&op<kernel>, 0>>(functions, ops, #op, #op) &&     \
          add<Builtin<&op<kernel>, results>>(functions, ops, #op, #op "_results");
  PYGPT_OPS(PYGPT_ADD, cpu)
#undef PYGPT_ADD
  if (!added) {
    Py_XDECREF(functions);
    return PyErr_Occurred() ? nullptr : PyErr_Format(PyExc_ValueError, "an op is missing");
  }
  exchange = given;
  return functions;
}

}  // namespace pygpt::bind::fast
