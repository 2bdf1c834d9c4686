#include "cpu/step_attention.h"

#include <array>

#include "bind/bind.h"

namespace py = pybind11;

namespace mplug2_fast {

void bind_step_attention(py::module_& module) {
    using Two = std::array<std::int64_t, 2>;
    using Three = std::array<std::int64_t, 3>;
    module.def(
        "step_attention",
        [](Isa isa, bool bf16, int threads, const std::array<std::int64_t, 4>& sizes, std::uintptr_t q,
           const Two& q_strides, std::uintptr_t k, const Two& k_strides, std::uintptr_t v, const Two& v_strides,
           std::uintptr_t keys, const Three& keys_strides, std::uintptr_t values, const Three& values_strides,
           std::uintptr_t ancestors, const Two& ancestors_strides, float scale, std::uintptr_t out) {
            const auto [rows, heads, head_dim, step] = sizes;
            require(rows >= 0 && heads >= 0 && head_dim >= 0 && step >= 0 && threads >= 1,
                    "step_attention: sizes must not be negative, threads must be positive");
            const StepAttentionArguments arguments{at<const void>(q),
                                                   at<const void>(k),
                                                   at<const void>(v),
                                                   at<void>(keys),
                                                   at<void>(values),
                                                   at<std::int32_t>(ancestors),
                                                   at<void>(out),
                                                   rows,
                                                   heads,
                                                   head_dim,
                                                   step,
                                                   {q_strides[0], q_strides[1]},
                                                   {k_strides[0], k_strides[1]},
                                                   {v_strides[0], v_strides[1]},
                                                   {keys_strides[0], keys_strides[1], keys_strides[2]},
                                                   {values_strides[0], values_strides[1], values_strides[2]},
                                                   {ancestors_strides[0], ancestors_strides[1]},
                                                   scale,
                                                   bf16,
                                                   threads};
            require(ancestors_exist(arguments.ancestors, ancestors_strides.data(), rows, step),
                    "step_attention: an ancestor is not one of the rows");
            const py::gil_scoped_release without_the_interpreter;
            step_attention(isa, arguments);
        },
        py::arg("isa"), py::arg("bf16"), py::arg("threads"), py::arg("sizes"), py::arg("q"), py::arg("q_strides"),
        py::arg("k"), py::arg("k_strides"), py::arg("v"), py::arg("v_strides"), py::arg("keys"),
        py::arg("keys_strides"), py::arg("values"), py::arg("values_strides"), py::arg("ancestors"),
        py::arg("ancestors_strides"), py::arg("scale"), py::arg("out"));
}

}  // namespace mplug2_fast
