#include "cpu/preprocess_frames.h"

#include <array>

#include "bind/bind.h"

namespace py = pybind11;

namespace mplug2_fast {

void bind_preprocess_frames(py::module_& module) {
    module.def(
        "preprocess_frames",
        [](std::uintptr_t frames, const std::array<std::int64_t, 3>& frames_height_width,
           const std::array<std::int64_t, 4>& strides, std::int64_t size, const std::array<std::int64_t, 5>& layout,
           std::uintptr_t table, std::int64_t element_size, std::uintptr_t output, int threads) {
            const auto [count, height, width] = frames_height_width;
            require(count >= 0 && height >= 1 && width >= 1 && size >= 1 && threads >= 1,
                    "preprocess_frames: sizes and threads must be positive");
            const PixelsLayout pixels{layout[0], layout[1], layout[2], layout[3], layout[4]};
            require(pixels.side >= 1 && size % pixels.side == 0, "preprocess_frames: patches must fill the image");
            const FramesView view{
                at<const std::uint8_t>(frames), count, height, width, strides[0], strides[1], strides[2], strides[3]};
            const py::gil_scoped_release without_the_interpreter;
            require(
                preprocess_frames(view, size, pixels, at<const void>(table), element_size, at<void>(output), threads),
                "preprocess_frames: elements must have 2, 4 or 8 bytes");
        },
        py::arg("frames"), py::arg("frames_height_width"), py::arg("strides"), py::arg("size"), py::arg("layout"),
        py::arg("table"), py::arg("element_size"), py::arg("output"), py::arg("threads"));
}

}  // namespace mplug2_fast
