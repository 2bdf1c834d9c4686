#include "cpu/attention.h"

#include <array>

#include "bind/bind.h"

namespace py = pybind11;

namespace mplug2_fast {

void bind_attention(py::module_& module) {
    using Strides = std::array<std::int64_t, 3>;
    module.def(
        "attention",
        [](Isa isa, bool bf16, int threads, const std::array<std::int64_t, 5>& sizes, std::uintptr_t q,
           const Strides& q_strides, std::uintptr_t k, const Strides& k_strides, std::uintptr_t v,
           const Strides& v_strides, std::uintptr_t mask, std::int64_t mask_stride, float scale, bool causal,
           std::uintptr_t out) {
            const auto [batch, q_len, k_len, heads, head_dim] = sizes;
            require(batch >= 0 && q_len >= 0 && k_len >= 0 && heads >= 0 && threads >= 1,
                    "attention: sizes must not be negative, threads must be positive");
            require(head_dim >= 1 && head_dim <= kLargestHead, "attention: head_dim must be between 1 and 256");
            require(k_len <= INT32_MAX && q_len <= INT32_MAX, "attention: too many tokens");
            require(!causal || q_len == k_len, "attention: causal needs as many queries as keys");
            const py::gil_scoped_release without_the_interpreter;
            attention(isa, {at<const void>(q),
                            at<const void>(k),
                            at<const void>(v),
                            at<void>(out),
                            at<const std::uint8_t>(mask),
                            batch,
                            q_len,
                            k_len,
                            heads,
                            head_dim,
                            {q_strides[0], q_strides[1], q_strides[2]},
                            {k_strides[0], k_strides[1], k_strides[2]},
                            {v_strides[0], v_strides[1], v_strides[2]},
                            mask_stride,
                            scale,
                            causal,
                            bf16,
                            threads});
        },
        py::arg("isa"), py::arg("bf16"), py::arg("threads"), py::arg("sizes"), py::arg("q"), py::arg("q_strides"),
        py::arg("k"), py::arg("k_strides"), py::arg("v"), py::arg("v_strides"), py::arg("mask"), py::arg("mask_stride"),
        py::arg("scale"), py::arg("causal"), py::arg("out"));
}

}  // namespace mplug2_fast
