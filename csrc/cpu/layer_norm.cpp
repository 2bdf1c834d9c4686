#include "cpu/layer_norm.h"

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

// `buffer` holds the row in float32 between the passes.
template <typename Element, bool kUpdate>
void normalise(const LayerNormArguments& a, const Row<Element>& row, float* buffer) {
    const std::int64_t channels = a.channels;
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
    const auto* weight = static_cast<const Element*>(a.weight);
    const auto* bias = static_cast<const Element*>(a.bias);
    std::int64_t i = 0;
    for (; i + kLanes <= channels; i += kLanes) {
        F32 value = (load(buffer + i) - means) * factor;
        value = weight ? value * load(weight + i) : value;
        store(row.out + i, bias ? value + load(bias + i) : value);
    }
    if (const int count = static_cast<int>(channels - i)) {
        F32 value = (load_first(buffer + i, count) - means) * factor;
        value = weight ? value * load_first(weight + i, count) : value;
        store_first(row.out + i, bias ? value + load_first(bias + i, count) : value, count);
    }
}

template <typename Element>
void run(const LayerNormArguments& a) {
    const auto* x = static_cast<const Element*>(a.x);
    const auto* update = static_cast<const Element*>(a.update);
    auto* out = static_cast<Element*>(a.out);
    auto* sums = static_cast<Element*>(a.sum);
    parallel_ranges(a.outer * a.inner, a.threads, [&](std::int64_t begin, std::int64_t end) {
        auto* buffer = new float[a.channels];
        for (std::int64_t r = begin; r < end; ++r) {
            const std::int64_t o = r / a.inner, i = r % a.inner;
            Row<Element> row{x + o * a.x_outer_stride + i * a.x_inner_stride, nullptr, out + r * a.channels, nullptr};
            if (update) {
                row.update = update + o * a.update_outer_stride + i * a.update_inner_stride;
                row.sum = sums ? sums + r * a.channels : nullptr;
                normalise<Element, true>(a, row, buffer);
            } else {
                normalise<Element, false>(a, row, buffer);
            }
        }
        delete[] buffer;
    });
}

}  // namespace

void layer_norm(const LayerNormArguments& arguments) {
    arguments.bf16 ? run<Bf16>(arguments) : run<float>(arguments);
}

}  // namespace mplug2_fast::MPLUG2_ISA
