// PyTorch's C interface (torch/csrc/inductor/aoti_torch/c/shim.h). Python passes in the addresses of its functions, so
// the module links no torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>

namespace mplug2_fast {

// The handle is the address of an at::Tensor, which is one pointer to the tensor's implementation.
using Handle = void**;

struct Torch {
    std::int32_t (*get_layout)(Handle, std::int32_t*);
    std::int32_t (*get_storage_size)(Handle, std::int64_t*);
    std::int32_t (*get_storage_offset)(Handle, std::int64_t*);
    std::int32_t (*get_dtype)(Handle, std::int32_t*);
    std::int32_t (*get_numel)(Handle, std::int64_t*);
    std::int32_t (*get_dim)(Handle, std::int64_t*);
    std::int32_t (*get_sizes)(Handle, std::int64_t**);
    std::int32_t (*get_strides)(Handle, std::int64_t**);
    std::int32_t (*get_data_ptr)(Handle, void**);
    std::size_t (*dtype_element_size)(std::int32_t);
    std::int32_t (*layout_strided)();
    std::int32_t (*get_device_type)(Handle, std::int32_t*);
    std::int32_t (*device_type_cpu)();
    // Python objects, which are never freed.
    PyObject *tensor_type, *parameter_type, *dtype_type, *is_neg, *cdata, *requires_grad;
};

inline Torch torch;

// The implementation of an object that is exactly a Tensor or a Parameter; otherwise null.
inline void* implementation(PyObject* object) {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != torch.tensor_type && type != torch.parameter_type) {
        return nullptr;
    }
    PyObject* address = PyObject_GetAttr(object, torch.cdata);
    if (address == nullptr) {
        return nullptr;
    }
    void* found = PyLong_AsVoidPtr(address);
    Py_DECREF(address);
    return found;
}

}  // namespace mplug2_fast
