#include <array>

#include "bind/bind.h"
#include "cuda/linear_act.h"

namespace py = pybind11;

namespace mplug2_fast {

void bind_linear_act_cuda(py::module_& module) {
    module.def(
        "linear_act_cuda",
        [](bool bf16, const std::array<std::int64_t, 3>& sizes, std::uintptr_t x, std::int64_t x_stride,
           std::uintptr_t weight, std::int64_t weight_stride, std::uintptr_t bias, Activation activation,
           std::uintptr_t residual, std::int64_t residual_stride, std::uintptr_t out, std::uintptr_t stream) {
            const auto [rows, in_features, out_features] = sizes;
            const auto type = bf16 ? cuda::Type::bf16 : cuda::Type::fp16;
            if (const char* error =
                    cuda::linear_act({at<const void>(x), at<const void>(weight), at<const void>(bias),
                                      at<const void>(residual), at<void>(out), rows, in_features, out_features,
                                      x_stride, weight_stride, residual_stride, out_features, activation, type},
                                     at<void>(stream))) {
                throw std::runtime_error(std::string("linear_act_cuda: ") + error);
            }
        },
        py::arg("bf16"), py::arg("sizes"), py::arg("x"), py::arg("x_stride"), py::arg("weight"),
        py::arg("weight_stride"), py::arg("bias"), py::arg("activation"), py::arg("residual"),
        py::arg("residual_stride"), py::arg("out"), py::arg("stream"));
}

}  // namespace mplug2_fast
