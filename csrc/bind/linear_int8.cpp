#include "cpu/linear_int8.h"

#include <array>

#include "bind/bind.h"

namespace py = pybind11;

namespace mplug2_fast {
namespace {

void run(Isa isa, bool bf16, int bits, int threads, const std::array<std::int64_t, 3>& sizes, std::uintptr_t x,
         std::int64_t x_stride, std::uintptr_t weight, std::uintptr_t scale, std::uintptr_t bias, Activation activation,
         std::uintptr_t residual, std::uintptr_t out) {
    const auto [rows, in_features, out_features] = sizes;
    require(rows >= 0 && in_features >= 0 && out_features >= 0 && threads >= 1,
            "linear_int8: sizes and threads must be positive");
    require(in_features <= kMostInt8Inputs, "linear_int8: there are too many in_features");
    require(bits == 8 || bits == 16, "linear_int8: bits must be 8 or 16");
    const py::gil_scoped_release without_the_interpreter;
    linear_int8(isa, {at<const void>(x), at<const std::int8_t>(weight), at<const float>(scale), at<const void>(bias),
                      at<const void>(residual), at<void>(out), rows, in_features, out_features, x_stride, activation,
                      bits, bf16, threads});
}

}  // namespace

void bind_linear_int8(py::module_& module) {
    module.def("linear_int8", &run, py::arg("isa"), py::arg("bf16"), py::arg("bits"), py::arg("threads"),
               py::arg("sizes"), py::arg("x"), py::arg("x_stride"), py::arg("weight"), py::arg("scale"),
               py::arg("bias"), py::arg("activation"), py::arg("residual"), py::arg("out"),
               "Writes the result to `out`.");
}

}  // namespace mplug2_fast
