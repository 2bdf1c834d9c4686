// The module mplug2_fast._C: plain functions on addresses and sizes. Each operator has its own file of bindings.

#include "bind/bind.h"
#include "cpu/activations.h"

namespace py = pybind11;
using namespace mplug2_fast;

PYBIND11_MODULE(_C, module) {
    module.doc() = "The native operators of mplug2_fast; called through mplug2_fast.ops.";
#ifdef _OPENMP
    module.attr("openmp") = true;
#else
    module.attr("openmp") = false;
#endif
    module.attr("compiler") = MPLUG2_COMPILER;
    module.attr("no_cuda_because") = MPLUG2_NO_CUDA_BECAUSE;  // empty if there are kernels for GPUs
    py::enum_<Isa>(module, "Isa", "Instruction sets that the kernels are compiled for, the fastest last.")
        .value("portable", Isa::portable)
        .value("avx2", Isa::avx2)
        .value("avx512", Isa::avx512)
        .value("avx512_vnni", Isa::avx512_vnni)
        .value("avx512_bf16", Isa::avx512_bf16);
    py::enum_<Activation>(module, "Activation", "The activation of a result; gelu is the erf form.")
        .value("none", Activation::none)
        .value("gelu", Activation::gelu)
        .value("quick_gelu", Activation::quick_gelu);
    module.def("isa_named", &isa_named, py::arg("name"));
    module.def("is_compiled", &is_compiled, py::arg("isa"));
    module.def("is_supported", &is_supported, py::arg("isa"));
    bind_attention(module);
    bind_beam_attention_int8(module);
    bind_beam_step(module);
    bind_checksum(module);
    bind_decoder_layer(module);
    bind_layer_norm(module);
    bind_linear_act(module);
#ifdef MPLUG2_CUDA
    bind_linear_act_cuda(module);
#endif
    bind_linear_int8(module);
    bind_local_temporal(module);
    bind_preprocess_frames(module);
    bind_quantise_memory(module);
    bind_small_calls(module);
    bind_step_attention(module);
    bind_tensors(module);
}
