// Calls of accelerated modules that are too small to gain. They run at PyTorch's own speed only if finding them out
// costs no more than the search for parameters that this saves. In Python it costs 3 to 8 us more between kernels,
// whose data replaces the interpreter's in the caches. So this file uses CPython's and PyTorch's C interfaces.

#include "bind/bind.h"
#include "bind/torch_c.h"

namespace py = pybind11;

namespace mplug2_fast {
namespace {

constexpr int kMaxTypes = 4;

struct Range {
    std::int32_t dtype;
    long long begin, end;
};

// mplug2_fast.acceleration.small.SmallCalls, which explains the members.
struct SmallCalls {
    PyObject object;
    long long anywhere;
    Range on_cpu[kMaxTypes];
    int types;
    long long count;
    int few_in_loops_only;
    PyObject* flags;
};

PyTypeObject* small_calls_type;

// Python objects, which are never freed. `functional` is the dict of torch.nn.functional.
struct Names {
    PyObject *state, *small, *parameters, *weight, *bias, *feeds_int8, *normalized_shape, *eps, *linear, *layer_norm;
    PyObject *functional, *python_layer_norm, *native_layer_norm, *has_mode, *found, *plain, *has_autocast, *cpu;
};

Names names;

enum class Fit { large, few, small };

// few: fewer elements than a small call has, of a type for which those are fast, too.
Fit fit(const SmallCalls& calls, PyObject* x) {
    void* tensor = implementation(x);
    std::int64_t elements;
    if (tensor == nullptr || torch.get_numel(&tensor, &elements) != 0) {
        PyErr_Clear();
        return Fit::large;
    }
    if (elements < calls.anywhere) {
        return Fit::small;
    }
    std::int32_t device, dtype;
    if (calls.types == 0 || torch.get_device_type(&tensor, &device) != 0 || device != torch.device_type_cpu() ||
        torch.get_dtype(&tensor, &dtype) != 0) {
        return Fit::large;
    }
    for (int i = 0; i < calls.types; ++i) {
        const Range& range = calls.on_cpu[i];
        if (range.dtype == dtype && elements < range.end) {
            return elements < range.begin ? Fit::few : Fit::small;
        }
    }
    return Fit::large;
}

// --- the type

int init(PyObject* object, PyObject* arguments, PyObject*) {
    auto* self = reinterpret_cast<SmallCalls*>(object);
    PyObject *ranges, *flags;
    if (!PyArg_ParseTuple(arguments, "LO!pO!", &self->anywhere, &PyTuple_Type, &ranges, &self->few_in_loops_only,
                          &PyByteArray_Type, &flags)) {
        return -1;
    }
    const Py_ssize_t types = PyTuple_GET_SIZE(ranges);
    if (types > kMaxTypes) {
        PyErr_Format(PyExc_ValueError, "SmallCalls: at most %d types", kMaxTypes);
        return -1;
    }
    self->types = 0;
    for (; self->types < types; ++self->types) {
        Range& range = self->on_cpu[self->types];
        PyObject* given = PyTuple_GET_ITEM(ranges, self->types);
        if (!PyTuple_Check(given) || !PyArg_ParseTuple(given, "iLL", &range.dtype, &range.begin, &range.end)) {
            if (!PyErr_Occurred()) {
                PyErr_SetString(PyExc_TypeError, "SmallCalls: ranges must be tuples");
            }
            return -1;
        }
    }
    Py_INCREF(flags);
    Py_XSETREF(self->flags, flags);
    return 0;
}

void deallocate(PyObject* object) {
    PyTypeObject* type = Py_TYPE(object);
    Py_XDECREF(reinterpret_cast<SmallCalls*>(object)->flags);
    type->tp_free(object);
    Py_DECREF(type);
}

PyObject* add(PyObject* object, PyObject* x) {
    auto* self = reinterpret_cast<SmallCalls*>(object);
    const bool small = fit(*self, x) == Fit::small;
    self->count += small;
    return PyBool_FromLong(small);
}

PyMethodDef type_methods[] = {
    {"add", add, METH_O, "Counts a call if x is exactly a Tensor or a Parameter and too small, and returns whether."},
    {nullptr, nullptr, 0, nullptr}};

PyObject* get_count(PyObject* self, void*) {
    return PyLong_FromLongLong(reinterpret_cast<SmallCalls*>(self)->count);
}

int set_count(PyObject* self, PyObject* value, void*) {
    const long long count = value == nullptr ? 0 : PyLong_AsLongLong(value);
    if (PyErr_Occurred()) {
        return -1;
    }
    reinterpret_cast<SmallCalls*>(self)->count = count;
    return 0;
}

PyGetSetDef type_attributes[] = {{"count", get_count, set_count, "Small calls so far.", nullptr},
                                 {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyType_Slot type_slots[] = {
    {Py_tp_doc,
     const_cast<char*>(
         "SmallCalls(anywhere, ranges, few_in_loops_only, flags): see mplug2_fast.acceleration.small. ranges: "
         "as gain.TooSmall, with tuples (dtype code, begin, end).")},
    {Py_tp_init, reinterpret_cast<void*>(init)},
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_dealloc, reinterpret_cast<void*>(deallocate)},
    {Py_tp_methods, type_methods},
    {Py_tp_getset, type_attributes},
    {0, nullptr}};

PyType_Spec type_spec = {"mplug2_fast._C.SmallCalls", sizeof(SmallCalls), 0, Py_TPFLAGS_DEFAULT, type_slots};

// --- calls of modules

// A value of a dict, or null if it has none. Calls keep what they use, because other threads may replace it.
py::object item(const py::object& dict, PyObject* name) {
    PyObject* found = PyDict_GetItemWithError(dict.ptr(), name);
    if (found == nullptr) {
        PyErr_Clear();
    }
    return py::reinterpret_borrow<py::object>(found);
}

// A function of torch.nn.functional as it is now, or null before `connect_small_calls`.
py::object functional(PyObject* name) {
    const auto dict = py::reinterpret_borrow<py::object>(names.functional);
    return dict ? item(dict, name) : dict;
}

struct Module {
    py::object own, state, small, weight, bias;

    SmallCalls& calls() const { return *reinterpret_cast<SmallCalls*>(small.ptr()); }
};

// How x fits a module that is exactly of the type and has a weight and a bias; large for others.
Fit find(PyObject* const* arguments, Py_ssize_t count, Module& found) {
    if (count != 3 || reinterpret_cast<PyObject*>(Py_TYPE(arguments[0])) != arguments[2]) {
        return Fit::large;
    }
    found.own = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(arguments[0], nullptr));
    found.state = found.own ? item(found.own, names.state) : py::object();
    found.small =
        py::reinterpret_steal<py::object>(found.state ? PyObject_GetAttr(found.state.ptr(), names.small) : nullptr);
    if (!found.small || Py_TYPE(found.small.ptr()) != small_calls_type || found.calls().flags == nullptr) {
        PyErr_Clear();
        return Fit::large;
    }
    const Fit fits = fit(found.calls(), arguments[1]);
    const py::object parameters = fits == Fit::large ? py::object() : item(found.own, names.parameters);
    if (!parameters || !PyDict_Check(parameters.ptr())) {
        return Fit::large;
    }
    found.weight = item(parameters, names.weight);
    found.bias = item(parameters, names.bias);
    return found.weight && found.bias ? fits : Fit::large;
}

// Whether a call with few rows wins. After calls with many rows its kernel has left the caches, and it may not.
bool few_win(const SmallCalls& calls) {
    return !calls.few_in_loops_only || PyByteArray_AS_STRING(calls.flags)[0] == 0;
}

PyObject* linear(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    Module module;
    const py::object function = functional(names.linear);
    const Fit fits = function ? find(arguments, count, module) : Fit::large;
    if (fits == Fit::large || (fits == Fit::few && few_win(module.calls()))) {
        Py_RETURN_NONE;
    }
    ++module.calls().count;
    if (PyByteArray_GET_SIZE(module.calls().flags) > 0) {
        PyByteArray_AS_STRING(module.calls().flags)[0] = fits == Fit::small;
    }
    PyObject* given[] = {arguments[1], module.weight.ptr(), module.bias.ptr()};
    return PyObject_Vectorcall(function.ptr(), given, 3, nullptr);
}

// Whether a function of torch without arguments, or with one, returns False.
bool is_off(PyObject* test, PyObject* argument) {
    PyObject* on = argument == nullptr ? PyObject_CallNoArgs(test) : PyObject_CallOneArg(test, argument);
    Py_XDECREF(on);
    PyErr_Clear();
    return on == Py_False;
}

PyObject* compute_norm(const Module& module, PyObject* x) {
    const py::object function = functional(names.layer_norm);
    const py::object shape = item(module.own, names.normalized_shape), eps = item(module.own, names.eps);
    if (!function || !shape || !eps || item(module.own, names.feeds_int8)) {
        Py_RETURN_NONE;
    }
    ++module.calls().count;
    PyObject* given[] = {x, shape.ptr(), module.weight.ptr(), module.bias.ptr(), eps.ptr(), Py_True};
    // F.layer_norm only adds whether cuDNN is enabled, which PyTorch ignores, unless a torch function mode is active.
    if (function.ptr() == names.python_layer_norm && is_off(names.has_mode, nullptr)) {
        return PyObject_Vectorcall(names.native_layer_norm, given, 6, nullptr);
    }
    return PyObject_Vectorcall(function.ptr(), given, 5, nullptr);
}

PyObject* layer_norm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    Module module;
    if (find(arguments, count, module) != Fit::small) {
        Py_RETURN_NONE;
    }
    return compute_norm(module, arguments[1]);
}

// Whether both are exactly a Tensor or a Parameter on the CPU, of one type.
bool are_of_one_type(PyObject* x, PyObject* y) {
    std::int32_t types[2], device;
    for (PyObject* object : {x, y}) {
        void* tensor = implementation(object);
        if (tensor == nullptr || torch.get_device_type(&tensor, &device) != 0 || device != torch.device_type_cpu() ||
            torch.get_dtype(&tensor, &types[object == y]) != 0) {
            PyErr_Clear();
            return false;
        }
    }
    return types[0] == types[1];
}

PyObject* layer_norm_alike(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    Module module;
    if (find(arguments, count, module) != Fit::small || !are_of_one_type(arguments[1], module.weight.ptr()) ||
        !is_off(names.has_autocast, names.cpu)) {
        Py_RETURN_NONE;
    }
    const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(module.state.ptr(), names.found));
    const auto plain = py::reinterpret_steal<py::object>(found ? PyObject_GetAttr(found.ptr(), names.plain) : nullptr);
    PyErr_Clear();
    if (plain.ptr() != Py_True) {
        Py_RETURN_NONE;
    }
    return compute_norm(module, arguments[1]);
}

PyMethodDef functions[] = {
    {"small_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear)), METH_FASTCALL,
     "The result of a swapped Linear (module, x, its class) if x is too small to gain, otherwise None. Call "
     "`connect_small_calls` first."},
    {"small_layer_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(layer_norm)), METH_FASTCALL,
     "The same of a LayerNorm that does not mark its results for 8-bit products."},
    {"small_layer_norm_alike", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(layer_norm_alike)),
     METH_FASTCALL, "The same of a class that computes what LayerNorm does if input and weight have one type."},
    {nullptr, nullptr, 0, nullptr}};

PyObject* kept(const py::object& object) {
    return py::object(object).release().ptr();
}

}  // namespace

void bind_small_calls(py::module_& module) {
    small_calls_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&type_spec));
    if (small_calls_type == nullptr) {
        throw py::error_already_set();
    }
    module.attr("SmallCalls") = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(small_calls_type));
    PyModule_AddFunctions(module.ptr(), functions);
    module.def(
        "connect_small_calls",
        [](const char* state, const char* feeds_int8, const py::module_& functional,
           const py::object& python_layer_norm, const py::object& native_layer_norm, const py::object& has_mode,
           const py::object& has_autocast) {
            names = {kept(py::str(state)),
                     kept(py::str("small")),
                     kept(py::str("_parameters")),
                     kept(py::str("weight")),
                     kept(py::str("bias")),
                     kept(py::str(feeds_int8)),
                     kept(py::str("normalized_shape")),
                     kept(py::str("eps")),
                     kept(py::str("linear")),
                     kept(py::str("layer_norm")),
                     kept(functional.attr("__dict__")),
                     kept(python_layer_norm),
                     kept(native_layer_norm),
                     kept(has_mode),
                     kept(py::str("found")),
                     kept(py::str("plain")),
                     kept(has_autocast),
                     kept(py::str("cpu"))};
        },
        py::arg("state"), py::arg("feeds_int8"), py::arg("functional"), py::arg("python_layer_norm"),
        py::arg("native_layer_norm"), py::arg("has_mode"), py::arg("has_autocast"),
        "Passes in the names of a module's state and of its mark for 8-bit products, torch.nn.functional, its own "
        "layer_norm, torch.layer_norm, and the tests for a torch function mode and autocast.");
}

}  // namespace mplug2_fast
