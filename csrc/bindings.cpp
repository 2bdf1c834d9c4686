// The module mplug2_fast._C: plain functions on addresses and sizes. Shapes, types and devices are checked by the
// Python operators that call them; what is checked here is only what would otherwise read or write out of bounds.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "cpu/preprocess_frames.h"

namespace py = pybind11;

namespace {

template <typename Pointee>
Pointee* at(std::uintptr_t address) {
    return reinterpret_cast<Pointee*>(address);
}

void preprocess_frames(std::uintptr_t frames, const std::array<std::int64_t, 3>& frames_height_width,
                       const std::array<std::int64_t, 4>& strides, std::int64_t size, std::uintptr_t table,
                       std::int64_t element_size, std::uintptr_t output, int threads) {
    const auto [count, height, width] = frames_height_width;
    if (count < 0 || height < 1 || width < 1 || size < 1 || threads < 1) {
        throw std::invalid_argument("preprocess_frames: sizes and threads must be positive");
    }
    const mplug2_fast::FramesView view{
        at<const std::uint8_t>(frames), count, height, width, strides[0], strides[1], strides[2], strides[3]};
    const py::gil_scoped_release without_the_interpreter;
    if (!mplug2_fast::preprocess_frames(view, size, at<const void>(table), element_size, at<void>(output), threads)) {
        throw std::invalid_argument("preprocess_frames: elements must have 2, 4 or 8 bytes");
    }
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "The native operators of mplug2_fast; called through mplug2_fast.ops.";
#ifdef _OPENMP
    module.attr("openmp") = true;
#else
    module.attr("openmp") = false;
#endif
    module.attr("compiler") = MPLUG2_COMPILER;
    module.def("preprocess_frames", &preprocess_frames, py::arg("frames"), py::arg("frames_height_width"),
               py::arg("strides"), py::arg("size"), py::arg("table"), py::arg("element_size"), py::arg("output"),
               py::arg("threads"));
}
