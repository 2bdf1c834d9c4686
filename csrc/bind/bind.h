#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>

#include "cpu/isa.h"

namespace mplug2_fast {

// Adds one operator's functions to the module. The Python operators that call them check shapes, types and devices. The
// checks here only prevent reads and writes out of bounds. Addresses are of tensors' data.
void bind_attention(pybind11::module_& module);
void bind_beam_attention_int8(pybind11::module_& module);
void bind_beam_step(pybind11::module_& module);
void bind_checksum(pybind11::module_& module);
void bind_decoder_layer(pybind11::module_& module);
void bind_layer_norm(pybind11::module_& module);
void bind_linear_act(pybind11::module_& module);
void bind_linear_act_cuda(pybind11::module_& module);
void bind_linear_int8(pybind11::module_& module);
void bind_local_temporal(pybind11::module_& module);
void bind_preprocess_frames(pybind11::module_& module);
void bind_quantise_memory(pybind11::module_& module);
void bind_small_calls(pybind11::module_& module);
void bind_step_attention(pybind11::module_& module);
void bind_tensors(pybind11::module_& module);

template <typename Pointee>
Pointee* at(std::uintptr_t address) {
    return reinterpret_cast<Pointee*>(address);
}

inline void require(bool condition, const char* message) {
    if (!condition) {
        throw std::invalid_argument(message);
    }
}

}  // namespace mplug2_fast
