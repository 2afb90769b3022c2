// <op>_fwd and <op>_bwd as built-in functions of Python, without torch's dispatcher.
//
// A call through the dispatcher costs 1.2 us, and 0.3 to 0.5 us for every tensor in or out. For plain tensors (torch's
// own class, strided, in this machine's memory) outside any mode there is nothing for it to decide: their pointers,
// sizes and strides come from torch's DLPack exchange table (dmlc.github.io/dlpack: DLPackExchangeAPI) at 0.04 us each,
// and so do results, at 0.7 us. Every other call is handed on to the dispatcher as it came; so is one that fails, for
// its error. So these functions are right for all arguments. Two things differ: no TorchFunctionMode sees a plain call, and
// the storage of its results cannot be resized (as that of torch.from_dlpack's cannot).
//
// Beside each op_fwd there is op_fwd_results, which leaves out what only backward reads.
#pragma once
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <array>
#include <memory>

#include "bind.h"

namespace pygpt::direct {

using torch::headeronly::ScalarType;

// ---------------------------------------------------------------- DLPack, version 1
struct DLTensor {
  void* data;
  struct { int32_t type, id; } device;
  int32_t ndim;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManaged {
  struct { uint32_t major, minor; } version;
  void* context;
  void (*deleter)(DLManaged*);
  uint64_t flags;
  DLTensor tensor;
};
struct Exchange {
  struct { uint32_t major, minor; } version;
  void* previous;
  int (*allocate)(DLTensor* like, DLManaged** out, void* context, void (*set_error)(void*, const char*, const char*));
  int (*export_)(void* object, DLManaged** out);
  int (*to_object)(DLManaged*, void** object);  // takes the tensor
  int (*view)(void* object, DLTensor* out);     // for as long as the object is left alone
  int (*stream)(int32_t device_type, int32_t device, void** out);
};
constexpr int kCpu = 1, kFloat = 2, kBfloat = 4;

// Whether f(argument or nothing) is true, or fails.
inline bool truth(PyObject* f, PyObject* argument = nullptr) {
  PyObject* result = argument ? PyObject_CallFunctionObjArgs(f, argument, nullptr) : PyObject_CallNoArgs(f);
  const int value = result ? PyObject_IsTrue(result) : 1;
  Py_XDECREF(result);
  PyErr_Clear();
  return value != 0;
}

// Tells whether any of some modes is on: by functions that then return a true value, and by attributes of modules that
// then have another value than usual.
struct Modes {
  PyObject *functions, *attributes;  // tuples, of functions and of (module, name, usual value)

  bool on() const {
    for (Py_ssize_t i = 0; i < PyTuple_Size(functions); i++)
      if (truth(PyTuple_GetItem(functions, i))) return true;
    for (Py_ssize_t i = 0; i < PyTuple_Size(attributes); i++) {
      PyObject* entry = PyTuple_GetItem(attributes, i);
      PyObject* value = PyObject_GetAttr(PyTuple_GetItem(entry, 0), PyTuple_GetItem(entry, 1));
      const bool usual = value && PyObject_RichCompareBool(value, PyTuple_GetItem(entry, 2), Py_EQ) == 1;
      Py_XDECREF(value);
      PyErr_Clear();
      if (!usual) return true;
    }
    return false;
  }
};

// torch's own, from connect().
inline const Exchange* exchange = nullptr;
inline PyObject *tensor_class, *parameter_class, *is_neg, *requires_grad, *is_grad_enabled;
inline Modes deciding;  // about how a call is served, or differentiated
inline Modes watching;  // whatever the dispatcher is asked to do

// Fills `out` if `object` is one of torch's own tensors of floating point numbers, strided, not a wrapper.
inline bool plain(PyObject* object, DLTensor& out) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != tensor_class && type != parameter_class) return false;
  if (exchange->view(object, &out) != 0) {
    PyErr_Clear();
    return false;
  }
  const auto [code, bits, lanes] = out.dtype;
  return lanes == 1 && (code == kBfloat || (code == kFloat && bits >= 16 && bits <= 64));
}

// ---------------------------------------------------------------- tensors
// What one call has made: results, temporary memory, copies of arguments.
struct Frame {
  bool inference;  // memory for what only backward reads is temporary
  std::array<DLManaged*, 8> made{};
  int count = 0;
  alignas(64) std::array<char, 1024> near;  // temporary memory for small needs, then from the heap
  size_t near_used = 0;
  std::vector<std::unique_ptr<void, void (*)(void*)>> temporary;
  std::vector<PyObject*> copies;

  void* borrow(size_t bytes) {
    void* memory = reserve((bytes + 63) / 64 * 64);
    if (bind::poison) pygpt::fill_with_nan(memory, bytes);
    return memory;
  }

  explicit Frame(bool inference) : inference(inference), outer(current) { current = this; }
  ~Frame() {
    current = outer;
    for (DLManaged* m : made)
      if (m) m->deleter(m);
    for (PyObject* copy : copies) Py_DECREF(copy);
  }
  Frame(const Frame&) = delete;

  Frame* outer;
  static inline thread_local Frame* current = nullptr;

 private:
  void* reserve(size_t bytes) {
    if (near_used + bytes <= near.size()) return near.data() + std::exchange(near_used, near_used + bytes);
    temporary.emplace_back(std::aligned_alloc(64, bytes), std::free);
    if (!temporary.back()) throw std::bad_alloc();
    bind::ask_for_large_pages(temporary.back().get(), bytes);
    return temporary.back().get();
  }
};

// With the methods of torch::stable::Tensor that bind.h uses; borrowed from Python or from the frame.
class Tensor {
 public:
  Tensor() = default;
  Tensor(const DLTensor& t, PyObject* object, int result = -1) : t_(t), object_(object), result_(result) {}

  bool defined() const { return true; }
  bool is_cpu() const { return true; }
  int device() const { return 0; }
  int64_t dim() const { return t_.ndim; }
  int64_t size(int64_t d) const { return t_.shape[d]; }
  int64_t stride(int64_t d) const { return t_.strides[d]; }
  bind::Shape sizes() const { return {t_.shape, size_t(t_.ndim)}; }
  bind::Shape strides() const { return {t_.strides, size_t(t_.ndim)}; }
  int64_t numel() const { return bind::product(sizes()); }
  size_t element_size() const { return t_.dtype.bits / 8; }
  void* mutable_data_ptr() const { return static_cast<char*>(t_.data) + t_.byte_offset; }
  const void* const_data_ptr() const { return mutable_data_ptr(); }
  bool is_contiguous() const {
    int64_t step = 1;
    for (int64_t d = dim() - 1; d >= 0; step *= size(d--))
      if (size(d) != 1 && stride(d) != step) return false;
    return true;
  }
  ScalarType scalar_type() const {
    if (t_.dtype.code == kBfloat) return ScalarType::BFloat16;
    return t_.dtype.bits == 64 ? ScalarType::Double : t_.dtype.bits == 32 ? ScalarType::Float : ScalarType::Half;
  }

  PyObject* object() const { return object_; }
  int result() const { return result_; }

 private:
  DLTensor t_;
  PyObject* object_ = nullptr;
  int result_ = -1;  // in the frame
};

// From an argument; nothing where it isn't plain. One that has elements but no data is torch's tensor of zeros; one
// that means its elements negated is the imaginary part of a complex tensor: of one element, or not contiguous.
inline std::optional<Tensor> argument(PyObject* object) {
  DLTensor view;
  if (!plain(object, view) || view.device.type != kCpu) return {};
  const Tensor t(view, object);
  if (!view.data && t.numel() > 0) return {};
  if ((t.numel() == 1 || !t.is_contiguous()) && truth(is_neg, object)) return {};
  return t;
}

inline Tensor allocate(const Tensor& like, bind::Shape size, bind::Shape stride, ScalarType type) {
  const uint8_t code = type == ScalarType::BFloat16 ? kBfloat : kFloat;
  const uint8_t bits = type == ScalarType::Double ? 64 : type == ScalarType::Float ? 32 : 16;
  DLTensor want{nullptr, {kCpu, 0}, int32_t(size.size()), {code, bits, 1}, const_cast<int64_t*>(size.data()),
                nullptr, 0};
  Frame& frame = *Frame::current;
  DLManaged*& made = frame.made.at(frame.count);
  std::string error;
  auto set_error = [](void* to, const char*, const char* message) { *static_cast<std::string*>(to) = message; };
  if (exchange->allocate(&want, &made, &error, set_error)) throw std::runtime_error(error);
  std::copy(stride.begin(), stride.end(), made->tensor.strides);  // of the same memory in another order
  return Tensor(made->tensor, nullptr, frame.count++);
}

inline void fill_with_nan(const Tensor& t) {
  pygpt::fill_with_nan(t.mutable_data_ptr(), size_t(t.numel()) * t.element_size());
}

inline Tensor for_backward(const Tensor& like, bind::Shape size, ScalarType type) {
  Frame& frame = *Frame::current;
  if (!frame.inference) return bind::empty(like, size, type);
  DLTensor t{};
  t.data = frame.borrow(bind::product(size) * (type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2));
  return Tensor(t, nullptr);
}

inline bool has_backward(const Tensor&) { return !Frame::current->inference; }

inline Tensor contiguous(const Tensor& t) {
  PyObject* copy = PyObject_CallMethod(t.object(), "contiguous", nullptr);
  if (copy) Frame::current->copies.push_back(copy);
  const auto found = copy ? argument(copy) : std::nullopt;
  if (!found) throw std::runtime_error("no contiguous copy");
  return *found;
}

template <class F>
void compute(const Tensor&, const F& kernel) {
  struct Unlocked {
    PyThreadState* state = PyEval_SaveThread();
    ~Unlocked() { PyEval_RestoreThread(state); }
  } unlocked;
  kernel();
}

// ---------------------------------------------------------------- arguments and results
// to = what object says; false if that can't be.
inline bool read(PyObject* object, Tensor& to) {
  const auto found = argument(object);
  if (found) to = *found;
  return found.has_value();
}
inline bool read(PyObject* object, std::optional<Tensor>& to) {
  if (object == Py_None) return true;
  to = argument(object);
  return to.has_value();
}
inline bool read(PyObject* object, bool& to) {
  to = object == Py_True;
  return to || object == Py_False;
}
inline bool read(PyObject* object, double& to) {
  to = PyFloat_AsDouble(object);
  return !PyErr_Occurred();
}
inline bool read(PyObject* object, std::string& to) {
  Py_ssize_t length;
  const char* text = PyUnicode_AsUTF8AndSize(object, &length);
  if (text) to.assign(text, length);
  return text;
}
inline bool read(PyObject* object, bind::Needs& to) {
  if (!PyTuple_Check(object)) return false;
  to.resize(PyTuple_Size(object));
  for (size_t i = 0; i < to.size(); i++) {
    bool need;
    if (!read(PyTuple_GetItem(object, i), need)) return false;
    to[i] = need;
  }
  return true;
}

inline PyObject* to_object(const Tensor& t) {
  void* object = nullptr;
  DLManaged* made = std::exchange(Frame::current->made[t.result()], nullptr);
  return exchange->to_object(made, &object) ? nullptr : static_cast<PyObject*>(object);
}
template <int results, size_t... I, class... T>
PyObject* to_object(const std::tuple<T...>& tensors, std::index_sequence<I...>) {
  if (results == 1) return to_object(std::get<0>(tensors));
  PyObject* tuple = PyTuple_New(results);
  const bool whole = tuple && ([&] {
    PyObject* object = to_object(std::get<I>(tensors));
    return object && PyTuple_SetItem(tuple, I, object) == 0;
  }() && ...);
  if (!whole) Py_CLEAR(tuple);
  return tuple;
}
template <int results>
PyObject* to_object(const Tensor& t) {
  return to_object(t);
}
template <int results, class... T>
PyObject* to_object(const std::tuple<T...>& tensors) {
  return to_object<results>(tensors, std::make_index_sequence<results>());
}

template <class T>
struct Results : std::integral_constant<int, 1> {};
template <class... T>
struct Results<std::tuple<T...>> : std::integral_constant<int, sizeof...(T)> {};

// ---------------------------------------------------------------- the functions
inline PyCFunction fastcall(PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(f));  // as METH_FASTCALL wants it
}

// `f` of bind.h as a built-in function that gives its first `results` results, or all.
template <auto f, int results>
struct Builtin;
template <class R, class... Args, R (*f)(Args...), int results>
struct Builtin<f, results> {
  static constexpr int kAll = Results<R>::value, kGiven = results ? results : kAll;
  static inline PyObject* dispatched;  // the same op through the dispatcher

  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count == sizeof...(Args) && !watching.on())
      if (PyObject* result = attempt(args, std::index_sequence_for<Args...>())) return result;
    PyErr_Clear();
    PyObject* tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple && i < count; i++) PyTuple_SetItem(tuple, i, Py_NewRef(args[i]));
    PyObject* all = tuple ? PyObject_CallObject(dispatched, tuple) : nullptr;
    Py_XDECREF(tuple);
    if (!all || kGiven == kAll) return all;
    PyObject* given = kGiven == 1 ? Py_NewRef(PyTuple_GetItem(all, 0)) : PyTuple_GetSlice(all, 0, kGiven);
    Py_DECREF(all);
    return given;
  }

  static inline PyMethodDef method = {nullptr, fastcall(call), METH_FASTCALL, nullptr};

 private:
  template <size_t... I>
  static PyObject* attempt(PyObject* const* args, std::index_sequence<I...>) {
    Frame frame(kGiven < kAll);
    std::tuple<Args...> values;
    try {
      if (!(read(args[I], std::get<I>(values)) && ...)) return nullptr;
      return to_object<kGiven>(f(std::get<I>(values)...));
    } catch (const std::exception&) {
      return nullptr;
    }
  }
};

// kind(optional, *tensors) -> what decides how a plain call is served: dtype, device, and whether it wants gradients,
// as one number; None where the call isn't plain. Bit i of `optional`: tensor i may be None.
inline PyObject* kind(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const long optional = PyLong_AsLong(args[0]);
  DLTensor first{};
  bool gradient = false;
  for (Py_ssize_t i = 1; i < count; i++) {
    if (args[i] == Py_None && optional >> (i - 1) & 1) continue;
    DLTensor t;
    if (!exchange || !plain(args[i], t)) Py_RETURN_NONE;
    if (first.dtype.bits == 0) first = t;
    if (t.dtype.code != first.dtype.code || t.dtype.bits != first.dtype.bits) Py_RETURN_NONE;
    if (t.device.type != first.device.type || t.device.id != first.device.id) Py_RETURN_NONE;
    if (gradient) continue;
    PyObject* wants = PyObject_GetAttr(args[i], requires_grad);
    gradient = wants == Py_True;
    Py_XDECREF(wants);
  }
  if (deciding.on()) Py_RETURN_NONE;
  const int dtype = first.dtype.code == kBfloat ? 3 : first.dtype.bits / 32;
  const int device = (first.device.type - kCpu) * 256 + first.device.id;
  return PyLong_FromLong((device * 4 + dtype) * 2 + (gradient && truth(is_grad_enabled)));
}

// Adds Builtin to functions as `name`, for `op` of ops.
template <class Builtin>
bool add(PyObject* functions, PyObject* ops, const char* op, const char* name) {
  Builtin::method.ml_name = name;
  Builtin::dispatched = Py_XNewRef(PyDict_GetItemString(ops, op));
  PyObject* function = Builtin::dispatched ? PyCFunction_NewEx(&Builtin::method, nullptr, nullptr) : nullptr;
  const bool added = function && PyDict_SetItemString(functions, name, function) == 0;
  Py_XDECREF(function);
  return added;
}

// connect(exchange table, Tensor, Parameter, Tensor.is_neg, is_grad_enabled, deciding functions, attributes, watching
// functions, attributes, {name: op through the dispatcher}) -> {name: function}
inline PyObject* connect(PyObject*, PyObject* args) {
  PyObject *table, *ops;
  if (!PyArg_ParseTuple(args, "OOOOOOOOOO", &table, &tensor_class, &parameter_class, &is_neg, &is_grad_enabled,
                        &deciding.functions, &deciding.attributes, &watching.functions, &watching.attributes, &ops))
    return nullptr;
  auto found = static_cast<const Exchange*>(PyCapsule_GetPointer(table, "dlpack_exchange_api"));
  if (!found) return nullptr;
  if (found->version.major != 1 || !found->view) Py_RETURN_NONE;
  Py_INCREF(args);  // all of it is kept
  requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* functions = PyDict_New();
  bool added = functions;
#define PYGPT_ADD(op, kernel, results)                                                          \
  added = added && add<Builtin<&bind::op<Tensor, kernel>, 0>>(functions, ops, #op, #op) &&      \
          add<Builtin<&bind::op<Tensor, kernel>, results>>(functions, ops, #op, #op "_results");
  PYGPT_OPS(PYGPT_ADD, cpu)
#undef PYGPT_ADD
  if (!added) {
    Py_XDECREF(functions);
    return PyErr_Occurred() ? nullptr : PyErr_Format(PyExc_ValueError, "an op is missing");
  }
  exchange = found;
  return functions;
}

}  // namespace pygpt::direct
