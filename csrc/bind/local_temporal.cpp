#include "cpu/local_temporal.h"

#include <array>

#include "bind/bind.h"

namespace py = pybind11;

namespace mplug2_fast {

void bind_local_temporal(py::module_& module) {
    module.def(
        "temporal_conv",
        [](Isa isa, bool bf16, int threads, const std::array<std::int64_t, 4>& sizes, std::int64_t kernel,
           std::uintptr_t x, const std::array<std::int64_t, 3>& x_strides, std::uintptr_t weight, std::uintptr_t bias,
           Activation activation, std::uintptr_t out) {
            const auto [batch, frames, tokens, channels] = sizes;
            require(batch >= 0 && frames >= 0 && tokens >= 0 && channels >= 0 && threads >= 1,
                    "temporal_conv: sizes and threads must be positive");
            require(kernel >= 1 && kernel % 2 == 1, "temporal_conv: the kernel must be odd");
            const py::gil_scoped_release without_the_interpreter;
            temporal_conv(
                isa, {at<const void>(x), at<const float>(weight), at<const float>(bias), at<void>(out), batch, frames,
                      tokens, channels, kernel, x_strides[0], x_strides[1], x_strides[2], activation, bf16, threads});
        },
        py::arg("isa"), py::arg("bf16"), py::arg("threads"), py::arg("sizes"), py::arg("kernel"), py::arg("x"),
        py::arg("x_strides"), py::arg("weight"), py::arg("bias"), py::arg("activation"), py::arg("out"));
}

}  // namespace mplug2_fast
