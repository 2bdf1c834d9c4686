#include "preprocess_frames.h"

#include <vector>

namespace mplug2_fast {
namespace {

// The table is faster than computing: the work is limited by memory, and two IEEE divisions per value cost as much as
// the load, even sixteen at a time. Gather instructions are slower than plain loads.
template <typename Element>
void preprocess(const FramesView& frames, std::int64_t size, const PixelsLayout& layout, const Element* table,
                Element* output, int threads) {
    std::vector<std::int64_t> columns(size);
    for (std::int64_t x = 0; x < size; ++x) {
        columns[x] = x * frames.width / size * frames.column_stride;
    }
    const std::int64_t rows = frames.frames * size, side = layout.side;
    const std::int64_t green = frames.channel_stride, blue = 2 * frames.channel_stride;

#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t frame = row / size, y = row % size;
        const std::uint8_t* source =
            frames.data + frame * frames.frame_stride + y * frames.height / size * frames.row_stride;
        Element* red_row = output + frame * layout.frame_stride + y / side * layout.band_stride + y % side * side;
        for (const std::int64_t* offsets = columns.data(); offsets != columns.data() + size; offsets += side) {
            Element* green_row = red_row + layout.channel_stride;
            Element* blue_row = green_row + layout.channel_stride;
            for (std::int64_t x = 0; x < side; ++x) {
                const std::uint8_t* pixel = source + offsets[x];
                red_row[x] = table[pixel[0]];
                green_row[x] = table[256 + pixel[green]];
                blue_row[x] = table[512 + pixel[blue]];
            }
            red_row += layout.patch_stride;
        }
    }
}

template <typename Element>
bool preprocess_as(const FramesView& frames, std::int64_t size, const PixelsLayout& layout, const void* table,
                   void* output, int threads) {
    preprocess(frames, size, layout, static_cast<const Element*>(table), static_cast<Element*>(output), threads);
    return true;
}

}  // namespace

bool preprocess_frames(const FramesView& frames, std::int64_t size, const PixelsLayout& layout, const void* table,
                       std::int64_t element_size, void* output, int threads) {
    switch (element_size) {
        case 2:
            return preprocess_as<std::uint16_t>(frames, size, layout, table, output, threads);
        case 4:
            return preprocess_as<std::uint32_t>(frames, size, layout, table, output, threads);
        case 8:
            return preprocess_as<std::uint64_t>(frames, size, layout, table, output, threads);
        default:
            return false;
    }
}

}  // namespace mplug2_fast
