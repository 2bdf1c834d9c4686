// Tests whether kernels may read tensors as they are. Every call of an operator runs them.

#include "bind/bind.h"
#include "bind/torch_c.h"

namespace py = pybind11;

namespace mplug2_fast {
namespace {

// Whether the storage holds every element that sizes and strides describe.
bool fits_its_storage(Handle tensor) {
    std::int32_t layout, dtype;
    std::int64_t bytes, offset, axes, *sizes, *strides;
    void* data;
    if (torch.get_layout(tensor, &layout) != 0 || layout != torch.layout_strided() ||
        torch.get_storage_size(tensor, &bytes) != 0 || torch.get_storage_offset(tensor, &offset) != 0 ||
        torch.get_dtype(tensor, &dtype) != 0 || torch.get_dim(tensor, &axes) != 0 ||
        torch.get_sizes(tensor, &sizes) != 0 || torch.get_strides(tensor, &strides) != 0) {
        return false;
    }
    std::int64_t last = offset + 1;
    for (std::int64_t axis = 0; axis < axes; ++axis) {
        if (sizes[axis] == 0) {
            return true;
        }
        last += (sizes[axis] - 1) * strides[axis];
    }
    // Tensors of `torch._efficientzerotensor`, and meta tensors, have a storage without an address.
    return last * static_cast<std::int64_t>(torch.dtype_element_size(dtype)) <= bytes &&
           torch.get_data_ptr(tensor, &data) == 0 && data != nullptr;
}

bool is_plain(PyObject* object, Handle tensor) {
    if (!fits_its_storage(tensor)) {
        return false;
    }
    PyObject* negative = PyObject_CallOneArg(torch.is_neg, object);
    Py_XDECREF(negative);
    return negative == Py_False;
}

// The flags of ops/runtime/memory.py.
enum Facts : long { kPlain = 1, kRequiresGrad = 2, kOnCpu = 4 };

PyObject* facts(PyObject*, PyObject* values) {
    if (!PyTuple_Check(values)) {
        PyErr_SetString(PyExc_TypeError, "facts: expected a tuple");
        return nullptr;
    }
    long found = kPlain | kOnCpu;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(values); ++i) {
        PyObject* value = PyTuple_GET_ITEM(values, i);
        if (value == Py_None || PyBool_Check(value) || PyLong_Check(value) || PyFloat_Check(value) ||
            PyUnicode_Check(value) || reinterpret_cast<PyObject*>(Py_TYPE(value)) == torch.dtype_type) {
            continue;
        }
        void* tensor = implementation(value);
        std::int32_t device;
        if (tensor == nullptr || !is_plain(value, &tensor) || torch.get_device_type(&tensor, &device) != 0) {
            PyErr_Clear();
            return PyLong_FromLong(0);
        }
        if (device != torch.device_type_cpu()) {
            found &= ~kOnCpu;
        }
        if (!(found & kRequiresGrad)) {
            PyObject* requires_grad = PyObject_GetAttr(value, torch.requires_grad);
            if (requires_grad == nullptr) {
                return nullptr;
            }
            if (requires_grad == Py_True) {
                found |= kRequiresGrad;
            }
            Py_DECREF(requires_grad);
        }
    }
    return PyLong_FromLong(found);
}

// Whether the elements of the last axis are adjacent.
bool is_dense(Handle tensor) {
    std::int64_t axes, *sizes, *strides;
    if (torch.get_dim(tensor, &axes) != 0 || torch.get_sizes(tensor, &sizes) != 0 ||
        torch.get_strides(tensor, &strides) != 0) {
        return false;
    }
    return axes == 0 || strides[axes - 1] == 1 || sizes[axes - 1] <= 1;
}

PyObject* are_alike(PyObject*, PyObject* const* tensors, Py_ssize_t count) {
    std::int32_t dtype = -1, first = -1, layout;
    for (Py_ssize_t i = 0; i < count; ++i) {
        if (tensors[i] == Py_None) {
            continue;
        }
        void* tensor = implementation(tensors[i]);
        if (tensor == nullptr || torch.get_layout(&tensor, &layout) != 0 || layout != torch.layout_strided() ||
            torch.get_dtype(&tensor, &dtype) != 0 || !is_dense(&tensor) || (first != -1 && dtype != first)) {
            PyErr_Clear();
            Py_RETURN_FALSE;
        }
        first = dtype;
    }
    Py_RETURN_TRUE;
}

PyMethodDef methods[] = {
    {"facts", facts, METH_O, "As `mplug2_fast.ops.runtime.memory.facts`. Call `connect_torch` first."},
    {"are_alike", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(are_alike)), METH_FASTCALL,
     "Whether all arguments are None, or exactly Tensor or Parameter, of one dtype and with a dense last axis. Call "
     "`connect_torch` first."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_tensors(py::module_& module) {
    PyModule_AddFunctions(module.ptr(), methods);
    module.def(
        "connect_torch",
        [](const py::dict& addresses, const py::object& tensor, const py::object& parameter, const py::object& dtype) {
            const auto connect = [&](auto& function, const char* name) {
                function = reinterpret_cast<std::decay_t<decltype(function)>>(addresses[name].cast<std::uintptr_t>());
            };
            connect(torch.get_layout, "aoti_torch_get_layout");
            connect(torch.get_storage_size, "aoti_torch_get_storage_size");
            connect(torch.get_storage_offset, "aoti_torch_get_storage_offset");
            connect(torch.get_dtype, "aoti_torch_get_dtype");
            connect(torch.get_numel, "aoti_torch_get_numel");
            connect(torch.get_dim, "aoti_torch_get_dim");
            connect(torch.get_sizes, "aoti_torch_get_sizes");
            connect(torch.get_strides, "aoti_torch_get_strides");
            connect(torch.get_data_ptr, "aoti_torch_get_data_ptr");
            connect(torch.dtype_element_size, "aoti_torch_dtype_element_size");
            connect(torch.layout_strided, "aoti_torch_layout_strided");
            connect(torch.get_device_type, "aoti_torch_get_device_type");
            connect(torch.device_type_cpu, "aoti_torch_device_type_cpu");
            torch.tensor_type = py::object(tensor).release().ptr();
            torch.parameter_type = py::object(parameter).release().ptr();
            torch.dtype_type = py::object(dtype).release().ptr();
            torch.is_neg = py::object(tensor.attr("is_neg")).release().ptr();
            torch.cdata = py::str("_cdata").release().ptr();
            torch.requires_grad = py::str("requires_grad").release().ptr();
        },
        py::arg("addresses"), py::arg("tensor"), py::arg("parameter"), py::arg("dtype"),
        "Passes in the addresses of PyTorch's C functions by name, and the types Tensor, Parameter and torch.dtype.");
}

}  // namespace mplug2_fast
