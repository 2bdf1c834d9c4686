#include "cpu/decoder_layer.h"

#include <array>

#include "bind/bind.h"
#include "cpu/attention.h"
#include "cpu/linear_int8.h"
#include "cpu/step_attention.h"

namespace py = pybind11;

namespace mplug2_fast {

void bind_decoder_layer(py::module_& module) {
    using Two = std::array<std::int64_t, 2>;
    using Three = std::array<std::int64_t, 3>;
    module.def(
        "decoder_layer",
        [](Isa isa, bool bf16, int threads, const std::array<std::int64_t, 7>& sizes, std::uintptr_t x,
           const std::array<std::uintptr_t, 27>& parameters, std::uintptr_t keys, const Three& keys_strides,
           std::uintptr_t values, const Three& values_strides, std::uintptr_t ancestors, const Two& ancestors_strides,
           std::uintptr_t memory_key, const Three& memory_key_strides, std::uintptr_t memory_value,
           const Three& memory_value_strides, std::uintptr_t memory_key_scale, std::uintptr_t memory_value_scale,
           std::uintptr_t mask, Activation activation, float eps, std::uintptr_t out) {
            const auto [batch, beams, heads, head_dim, hidden, tokens, step] = sizes;
            require(batch >= 0 && beams >= 0 && heads >= 1 && hidden >= 0 && tokens >= 0 && step >= 0 && threads >= 1,
                    "decoder_layer: sizes must not be negative, heads and threads must be positive");
            require(head_dim >= 1 && head_dim <= kLargestHead, "decoder_layer: head_dim must be between 1 and 256");
            require(!parameters[5] || (heads * head_dim <= kMostInt8Inputs && hidden <= kMostInt8Inputs),
                    "decoder_layer: there are too many channels for 8-bit weights");
            require(tokens <= INT32_MAX && beams <= INT32_MAX, "decoder_layer: too many tokens");
            const auto part = [&](int index) {
                const auto* of = &parameters[3 * index];
                return WeightAndBias{at<const void>(of[0]), at<const void>(of[1]), at<const float>(of[2])};
            };
            const DecoderLayerArguments arguments{
                at<const void>(x),
                part(0),
                part(1),
                part(2),
                part(3),
                part(4),
                part(5),
                part(6),
                part(7),
                part(8),
                at<void>(keys),
                at<void>(values),
                at<std::int32_t>(ancestors),
                at<const void>(memory_key),
                at<const void>(memory_value),
                at<const float>(memory_key_scale),
                at<const float>(memory_value_scale),
                at<const std::uint8_t>(mask),
                at<void>(out),
                batch,
                beams,
                heads,
                head_dim,
                hidden,
                tokens,
                step,
                {keys_strides[0], keys_strides[1], keys_strides[2]},
                {values_strides[0], values_strides[1], values_strides[2]},
                {ancestors_strides[0], ancestors_strides[1]},
                {memory_key_strides[0], memory_key_strides[1], memory_key_strides[2]},
                {memory_value_strides[0], memory_value_strides[1], memory_value_strides[2]},
                activation,
                eps,
                bf16,
                threads};
            require(ancestors_exist(arguments.ancestors, ancestors_strides.data(), batch * beams, step),
                    "decoder_layer: an ancestor is not one of the rows");
            const py::gil_scoped_release without_the_interpreter;
            decoder_layer(isa, arguments);
        },
        py::arg("isa"), py::arg("bf16"), py::arg("threads"), py::arg("sizes"), py::arg("x"), py::arg("parameters"),
        py::arg("keys"), py::arg("keys_strides"), py::arg("values"), py::arg("values_strides"), py::arg("ancestors"),
        py::arg("ancestors_strides"), py::arg("memory_key"), py::arg("memory_key_strides"), py::arg("memory_value"),
        py::arg("memory_value_strides"), py::arg("memory_key_scale"), py::arg("memory_value_scale"), py::arg("mask"),
        py::arg("activation"), py::arg("eps"), py::arg("out"));
}

}  // namespace mplug2_fast
