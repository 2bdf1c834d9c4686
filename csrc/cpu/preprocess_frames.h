#pragma once

#include <cstdint>

namespace mplug2_fast {

// RGB frames as decoded: bytes, with strides in bytes that may be zero.
struct FramesView {
    const std::uint8_t* data;
    std::int64_t frames, height, width;
    std::int64_t frame_stride, row_stride, column_stride, channel_stride;
};

// The layout of the result: the image in patches of `side` x `side`, with strides in elements by frame, by row of
// patches, by patch and by channel. Within a patch a pixel is at row * side + column. An image without patches is one
// patch.
struct PixelsLayout {
    std::int64_t side;
    std::int64_t frame_stride, band_stride, patch_stride, channel_stride;
};

// Squashes frames to `size` x `size` pixels by nearest neighbour (source index = target index * in / out) and replaces
// each byte x of channel c by table[c][x]. A byte has 256 values, so a table can hold any normalisation to any
// type.
//
// `table` is (3, 256) and contiguous; its elements and those of `output` have `element_size` bytes: 2, 4 or 8 (with
// another size it does nothing and returns false). `frames` must have at least one pixel unless `frames.frames` is 0,
// and `size` must be a multiple of `layout.side`.
bool preprocess_frames(const FramesView& frames, std::int64_t size, const PixelsLayout& layout, const void* table,
                       std::int64_t element_size, void* output, int threads);

}  // namespace mplug2_fast
