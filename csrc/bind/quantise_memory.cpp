#include "cpu/quantise_memory.h"

#include <array>

#include "bind/bind.h"

namespace py = pybind11;

namespace mplug2_fast {

void bind_quantise_memory(py::module_& module) {
    using Strides = std::array<std::int64_t, 3>;
    module.def(
        "quantise_memory",
        [](Isa isa, bool bf16, int threads, const std::array<std::int64_t, 4>& sizes, std::uintptr_t key,
           const Strides& key_strides, std::uintptr_t value, const Strides& value_strides, std::uintptr_t keys,
           std::uintptr_t key_scale, std::uintptr_t values, std::uintptr_t value_scale) {
            const auto [batch, tokens, heads, head_dim] = sizes;
            require(batch >= 0 && tokens >= 0 && heads >= 0 && head_dim >= 0 && threads >= 1,
                    "quantise_memory: sizes must not be negative, threads must be positive");
            const py::gil_scoped_release without_the_interpreter;
            quantise_memory(isa, {at<const void>(key),
                                  at<const void>(value),
                                  at<std::int8_t>(keys),
                                  at<float>(key_scale),
                                  at<std::int8_t>(values),
                                  at<float>(value_scale),
                                  batch,
                                  tokens,
                                  heads,
                                  head_dim,
                                  {key_strides[0], key_strides[1], key_strides[2]},
                                  {value_strides[0], value_strides[1], value_strides[2]},
                                  bf16,
                                  threads});
        },
        py::arg("isa"), py::arg("bf16"), py::arg("threads"), py::arg("sizes"), py::arg("key"), py::arg("key_strides"),
        py::arg("value"), py::arg("value_strides"), py::arg("keys"), py::arg("key_scale"), py::arg("values"),
        py::arg("value_scale"));
}

}  // namespace mplug2_fast
