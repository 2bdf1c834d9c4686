#include "cpu/beam_step.h"

#include <array>

#include "bind/bind.h"

namespace py = pybind11;

namespace mplug2_fast {

void bind_beam_step(py::module_& module) {
    module.def(
        "beam_step",
        [](Isa isa, bool bf16, int threads, const std::array<std::int64_t, 3>& sizes, std::uintptr_t logits,
           const std::array<std::int64_t, 2>& logits_strides, std::uintptr_t cumulative, float penalty,
           std::int64_t blocked, std::uintptr_t scores, std::uintptr_t new_cumulative, std::uintptr_t origin,
           std::uintptr_t token) {
            const auto [batch, beams, words] = sizes;
            require(batch >= 0 && beams >= 0 && words >= 1 && threads >= 1,
                    "beam_step: sizes and threads must be positive");
            require(blocked >= -1 && blocked < words, "beam_step: the blocked word must be one, or -1");
            const py::gil_scoped_release without_the_interpreter;
            beam_step(isa, {at<const void>(logits), at<const float>(cumulative), at<float>(scores),
                            at<float>(new_cumulative), at<std::int64_t>(origin), at<std::int64_t>(token), batch, beams,
                            words, logits_strides[0], logits_strides[1], blocked, penalty, bf16, threads});
        },
        py::arg("isa"), py::arg("bf16"), py::arg("threads"), py::arg("sizes"), py::arg("logits"),
        py::arg("logits_strides"), py::arg("cumulative"), py::arg("penalty"), py::arg("blocked"), py::arg("scores"),
        py::arg("new_cumulative"), py::arg("origin"), py::arg("token"));
}

}  // namespace mplug2_fast
