#include "cpu/beam_attention_int8.h"

#include <array>

#include "bind/bind.h"
#include "cpu/attention.h"

namespace py = pybind11;

namespace mplug2_fast {

void bind_beam_attention_int8(py::module_& module) {
    module.def(
        "beam_attention_int8",
        [](Isa isa, bool bf16, int threads, const std::array<std::int64_t, 5>& sizes, std::uintptr_t query,
           const std::array<std::int64_t, 3>& query_strides, std::uintptr_t keys, std::uintptr_t key_scale,
           std::uintptr_t values, std::uintptr_t value_scale, std::uintptr_t mask, float scale, std::uintptr_t out) {
            const auto [batch, queries, tokens, heads, head_dim] = sizes;
            require(batch >= 0 && queries >= 0 && tokens >= 0 && heads >= 0 && threads >= 1,
                    "beam_attention_int8: sizes must not be negative, threads must be positive");
            require(head_dim >= 1 && head_dim <= kLargestHead,
                    "beam_attention_int8: head_dim must be between 1 and 256");
            const py::gil_scoped_release without_the_interpreter;
            beam_attention_int8(isa, {at<const void>(query),
                                      at<const std::int8_t>(keys),
                                      at<const float>(key_scale),
                                      at<const std::int8_t>(values),
                                      at<const float>(value_scale),
                                      at<const std::uint8_t>(mask),
                                      at<void>(out),
                                      batch,
                                      queries,
                                      tokens,
                                      heads,
                                      head_dim,
                                      {query_strides[0], query_strides[1], query_strides[2]},
                                      scale,
                                      bf16,
                                      threads});
        },
        py::arg("isa"), py::arg("bf16"), py::arg("threads"), py::arg("sizes"), py::arg("query"),
        py::arg("query_strides"), py::arg("keys"), py::arg("key_scale"), py::arg("values"), py::arg("value_scale"),
        py::arg("mask"), py::arg("scale"), py::arg("out"));
}

}  // namespace mplug2_fast
