#pragma once

#include <cstdint>

namespace mplug2_fast {

// RGB frames as a decoder leaves them: bytes, with strides in bytes that may be zero.
struct FramesView {
    const std::uint8_t* data;
    std::int64_t frames, height, width;
    std::int64_t frame_stride, row_stride, column_stride, channel_stride;
};

// Where pixels go: the image in patches of `side` x `side`, and strides in elements by frame, by row of patches, by
// patch and by channel. Within a patch a pixel lies at row * side + column. One patch of the image's size leaves it
// whole.
struct PixelsLayout {
    std::int64_t side;
    std::int64_t frame_stride, band_stride, patch_stride, channel_stride;
};

// Squashes frames to `size` x `size` pixels by nearest neighbour (source index = target index * in / out) and replaces
// each byte x of channel c by table[c][x]. A byte has 256 values, so any normalisation to any type is such a table, and
// what is left to do for a pixel is to fetch.
//
// `table` is (3, 256) and contiguous; its elements and those of `output` have `element_size` bytes: 2, 4 or 8 (anything
// else is left undone and returns false). `frames` must have at least one pixel unless `frames.frames` is 0, and `size`
// must be a multiple of `layout.side`.
bool preprocess_frames(const FramesView& frames, std::int64_t size, const PixelsLayout& layout, const void* table,
                       std::int64_t element_size, void* output, int threads);

}  // namespace mplug2_fast
