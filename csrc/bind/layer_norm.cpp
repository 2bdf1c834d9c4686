#include "cpu/layer_norm.h"

#include <array>

#include "bind/bind.h"

namespace py = pybind11;

namespace mplug2_fast {

void bind_layer_norm(py::module_& module) {
    module.def(
        "layer_norm",
        [](Isa isa, bool bf16, int threads, const std::array<std::int64_t, 3>& sizes, std::uintptr_t x,
           const std::array<std::int64_t, 2>& x_strides, std::uintptr_t update,
           const std::array<std::int64_t, 2>& update_strides, float scale, std::uintptr_t weight, std::uintptr_t bias,
           float eps, std::uintptr_t out, std::uintptr_t sum) {
            const auto [outer, inner, channels] = sizes;
            require(outer >= 0 && inner >= 0 && channels >= 1 && threads >= 1,
                    "layer_norm: sizes and threads must be positive");
            const py::gil_scoped_release without_the_interpreter;
            layer_norm(isa, {at<const void>(x), at<const void>(update), at<const void>(weight), at<const void>(bias),
                             at<void>(out), at<void>(sum), outer, inner, channels, x_strides[0], x_strides[1],
                             update_strides[0], update_strides[1], scale, eps, bf16, threads});
        },
        py::arg("isa"), py::arg("bf16"), py::arg("threads"), py::arg("sizes"), py::arg("x"), py::arg("x_strides"),
        py::arg("update"), py::arg("update_strides"), py::arg("scale"), py::arg("weight"), py::arg("bias"),
        py::arg("eps"), py::arg("out"), py::arg("sum"));
}

}  // namespace mplug2_fast
