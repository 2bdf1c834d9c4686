#include "cpu/linear_act.h"

#include <array>

#include "bind/bind.h"

namespace py = pybind11;

namespace mplug2_fast {

void bind_linear_act(py::module_& module) {
    module.def(
        "linear_act",
        [](Isa isa, bool bf16, int threads, const std::array<std::int64_t, 3>& sizes, std::uintptr_t x,
           std::int64_t x_stride, std::uintptr_t weight, std::uintptr_t bias, Activation activation,
           std::uintptr_t residual, std::uintptr_t out) {
            const auto [rows, in_features, out_features] = sizes;
            require(rows >= 0 && in_features >= 0 && out_features >= 0 && threads >= 1,
                    "linear_act: sizes and threads must be positive");
            const py::gil_scoped_release without_the_interpreter;
            linear_act(isa, {at<const void>(x), at<const void>(weight), at<const void>(bias), at<const void>(residual),
                             at<void>(out), rows, in_features, out_features, x_stride, activation, bf16, threads});
        },
        py::arg("isa"), py::arg("bf16"), py::arg("threads"), py::arg("sizes"), py::arg("x"), py::arg("x_stride"),
        py::arg("weight"), py::arg("bias"), py::arg("activation"), py::arg("residual"), py::arg("out"));
}

}  // namespace mplug2_fast
