#include "cpu/linear_act.h"

#include <array>
#include <optional>
#include <vector>

#include "bind/bind.h"
#include "cpu/checksum.h"

namespace py = pybind11;

namespace mplug2_fast {
namespace {

template <bool kHashed>
std::optional<std::uint64_t> run(Isa isa, bool bf16, int threads, const std::array<std::int64_t, 3>& sizes,
                                 std::uintptr_t x, std::int64_t x_stride, std::uintptr_t weight, std::uintptr_t bias,
                                 Activation activation, std::uintptr_t residual, std::uintptr_t out) {
    const auto [rows, in_features, out_features] = sizes;
    require(rows >= 0 && in_features >= 0 && out_features >= 0 && threads >= 1,
            "linear_act: sizes and threads must be positive");
    const py::gil_scoped_release without_the_interpreter;
    std::vector<std::uint64_t> hashes(kHashed ? (out_features + kHashedRows - 1) / kHashedRows : 0);
    linear_act(
        isa, {at<const void>(x), at<const void>(weight), at<const void>(bias), at<const void>(residual), at<void>(out),
              rows, in_features, out_features, x_stride, activation, bf16, threads, kHashed ? hashes.data() : nullptr});
    if (!kHashed || rows == 0) {
        return std::nullopt;
    }
    return checksum_add(1, out_features * in_features * (bf16 ? 2 : 4), hashes.data(), hashes.size());
}

}  // namespace

void bind_linear_act(py::module_& module) {
    const auto define = [&](const char* name, auto function, const char* description) {
        module.def(name, function, py::arg("isa"), py::arg("bf16"), py::arg("threads"), py::arg("sizes"), py::arg("x"),
                   py::arg("x_stride"), py::arg("weight"), py::arg("bias"), py::arg("activation"), py::arg("residual"),
                   py::arg("out"), description);
    };
    define("linear_act", &run<false>, "Writes the result to `out`.");
    define("linear_act_hashed", &run<true>, "Also returns the weight's `matrix_checksum`, or None if x has no rows.");
}

}  // namespace mplug2_fast
