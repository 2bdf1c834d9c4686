#include "cpu/layer_norm.h"

#include <new>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

constexpr int kUnroll = 4;
constexpr int kStep = kUnroll * kLanes;

// Adds up what `value(i)` gives for the channels from i on, kLanes at a time; `value_first(i, count)` for the last few.
template <typename Value, typename ValueFirst>
MPLUG2_INLINE float total(std::int64_t channels, const Value& value, const ValueFirst& value_first) {
    F32 sums[kUnroll] = {};
    std::int64_t i = 0;
    for (; i + kStep <= channels; i += kStep) {
        for (int u = 0; u < kUnroll; ++u) {
            sums[u] += value(i + u * kLanes);
        }
    }
    for (; i + kLanes <= channels; i += kLanes) {
        sums[0] += value(i);
    }
    if (i < channels) {
        sums[1] += value_first(i, static_cast<int>(channels - i));
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename Element>
struct Row {
    const Element* x;
    const Element* update;
    Element* out;
    Element* sum;
};

// Of a thread, in float32: a row between the passes, and what all rows are multiplied by and moved by.
struct Buffers {
    float* row;
    float* weight;
    float* bias;
};

template <typename Element, bool kUpdate>
void normalise(const LayerNormArguments& a, const Row<Element>& row, const Buffers& buffers) {
    const std::int64_t channels = a.channels;
    float* const buffer = buffers.row;
    const F32 scale = broadcast(a.scale);
    const auto take = [&](std::int64_t i) {
        F32 value = load(row.x + i);
        if constexpr (kUpdate) {
            value += scale * load(row.update + i);
            if (row.sum) {
                store(row.sum + i, value);
            }
        }
        store(buffer + i, value);
        return value;
    };
    const auto take_first = [&](std::int64_t i, int count) {
        F32 value = load_first(row.x + i, count);
        if constexpr (kUpdate) {
            value += scale * load_first(row.update + i, count);
            if (row.sum) {
                store_first(row.sum + i, value, count);
            }
        }
        store_first(buffer + i, value, count);
        return value;
    };
    const float mean = total(channels, take, take_first) / static_cast<float>(channels);
    const F32 means = broadcast(mean);
    const auto square = [&](std::int64_t i) {
        const F32 centred = load(buffer + i) - means;
        return centred * centred;
    };
    const auto square_first = [&](std::int64_t i, int count) {
        float squares[kLanes] = {};
        store_first(squares, load_first(buffer + i, count) - means, count);
        return load(squares) * load(squares);
    };
    const float variance = total(channels, square, square_first) / static_cast<float>(channels);
    const F32 factor = broadcast(1.0f / __builtin_sqrtf(variance + a.eps));
    std::int64_t i = 0;
    for (; i + kLanes <= channels; i += kLanes) {
        const F32 value = (load(buffer + i) - means) * factor;
        store(row.out + i, value * load(buffers.weight + i) + load(buffers.bias + i));
    }
    if (const int count = static_cast<int>(channels - i)) {
        const F32 value = (load_first(buffer + i, count) - means) * factor;
        store_first(row.out + i, value * load_first(buffers.weight + i, count) + load_first(buffers.bias + i, count),
                    count);
    }
}

template <typename Element>
void run(const LayerNormArguments& a) {
    const auto* x = static_cast<const Element*>(a.x);
    const auto* update = static_cast<const Element*>(a.update);
    auto* out = static_cast<Element*>(a.out);
    auto* sums = static_cast<Element*>(a.sum);
    parallel_ranges(a.outer * a.inner, a.threads, [&](std::int64_t begin, std::int64_t end) {
        // On lines of the cache: half of the time is that of access to them. The distance of an odd number of lines
        // keeps them from having the same place in a page.
        const std::int64_t stride = (a.channels + 31) / 32 * 32 + 16;
        constexpr std::align_val_t kLine{64};
        auto* memory = static_cast<float*>(::operator new(3 * stride * sizeof(float), kLine));
        const Buffers buffers = {memory, memory + stride, memory + 2 * stride};
        for (std::int64_t c = 0; c < a.channels; ++c) {
            buffers.weight[c] = a.weight ? to_float(static_cast<const Element*>(a.weight)[c]) : 1.0f;
            buffers.bias[c] = a.bias ? to_float(static_cast<const Element*>(a.bias)[c]) : 0.0f;
        }
        for (std::int64_t r = begin; r < end; ++r) {
            const std::int64_t o = r / a.inner, i = r % a.inner;
            Row<Element> row{};
            row.x = x + o * a.x_outer_stride + i * a.x_inner_stride;
            row.out = out + r * a.channels;
            if (update) {
                row.update = update + o * a.update_outer_stride + i * a.update_inner_stride;
                row.sum = sums ? sums + r * a.channels : nullptr;
                normalise<Element, true>(a, row, buffers);
            } else {
                normalise<Element, false>(a, row, buffers);
            }
        }
        ::operator delete(memory, kLine);
    });
}

}  // namespace

void layer_norm(const LayerNormArguments& arguments) {
    arguments.bf16 ? run<Bf16>(arguments) : run<float>(arguments);
}

}  // namespace mplug2_fast::MPLUG2_ISA
