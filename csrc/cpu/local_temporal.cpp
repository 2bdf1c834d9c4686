#include "cpu/local_temporal.h"

#include "cpu/activation.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

constexpr int kUnroll = 4;
// Of one frame. The frames that a kernel reads then fit into the second-level cache.
constexpr std::int64_t kBlockBytes = 16384;

// One token of one frame. `x` and `weight` start at the first tap that is inside the clip.
template <typename Element, Activation kActivation>
MPLUG2_INLINE void convolve(const TemporalConvArguments& a, const Element* x, const float* weight, std::int64_t taps,
                            Element* out) {
    constexpr int kBits = sizeof(Element) == 2 ? 8 : 24;
    std::int64_t c = 0;
    for (; c + kUnroll * kLanes <= a.channels; c += kUnroll * kLanes) {
        F32 sums[kUnroll];
        for (int u = 0; u < kUnroll; ++u) {
            sums[u] = load(a.bias + c + u * kLanes);
        }
        for (std::int64_t tap = 0; tap < taps; ++tap) {
            for (int u = 0; u < kUnroll; ++u) {
                const std::int64_t at = c + u * kLanes;
                sums[u] += load(x + tap * a.x_frame_stride + at) * load(weight + tap * a.channels + at);
            }
        }
        for (int u = 0; u < kUnroll; ++u) {
            store(out + c + u * kLanes, activate<kActivation, kBits>(sums[u]));
        }
    }
    for (; c < a.channels; c += kLanes) {
        const std::int64_t left = a.channels - c;
        const int count = static_cast<int>(left);
        const bool whole = left >= kLanes;
        const auto take = [&](const auto* from) { return whole ? load(from + c) : load_first(from + c, count); };
        F32 sum = take(a.bias);
        for (std::int64_t tap = 0; tap < taps; ++tap) {
            sum += take(x + tap * a.x_frame_stride) * take(weight + tap * a.channels);
        }
        sum = activate<kActivation, kBits>(sum);
        whole ? store(out + c, sum) : store_first(out + c, sum, count);
    }
}

template <typename Element, Activation kActivation>
void run(const TemporalConvArguments& a) {
    if (a.batch * a.frames * a.channels == 0) {
        return;
    }
    const auto* x = static_cast<const Element*>(a.x);
    auto* out = static_cast<Element*>(a.out);
    const std::int64_t fitting = kBlockBytes / (a.channels * static_cast<std::int64_t>(sizeof(Element)));
    const std::int64_t block = fitting > 1 ? fitting : 1;
    const std::int64_t blocks = (a.tokens + block - 1) / block;
    const std::int64_t half = a.kernel / 2;
    // Frame after frame of a block of tokens, so that reads are sequential, and still in the cache for the next frames.
    parallel_ranges(a.batch * blocks, a.threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t task = begin; task < end; ++task) {
            const std::int64_t b = task / blocks, first = task % blocks * block;
            const std::int64_t last = first + block < a.tokens ? first + block : a.tokens;
            for (std::int64_t t = 0; t < a.frames; ++t) {
                const std::int64_t low = t > half ? t - half : 0;
                const std::int64_t high = t + half < a.frames ? t + half + 1 : a.frames;
                const float* weight = a.weight + (low + half - t) * a.channels;
                for (std::int64_t n = first; n < last; ++n) {
                    convolve<Element, kActivation>(
                        a, x + b * a.x_batch_stride + low * a.x_frame_stride + n * a.x_token_stride, weight, high - low,
                        out + ((b * a.frames + t) * a.tokens + n) * a.channels);
                }
            }
        }
    });
}

template <typename Element>
void run(const TemporalConvArguments& a) {
    switch (a.activation) {
        case Activation::none:
            return run<Element, Activation::none>(a);
        case Activation::gelu:
            return run<Element, Activation::gelu>(a);
        case Activation::quick_gelu:
            return run<Element, Activation::quick_gelu>(a);
    }
}

}  // namespace

void temporal_conv(const TemporalConvArguments& arguments) {
    arguments.bf16 ? run<Bf16>(arguments) : run<float>(arguments);
}

}  // namespace mplug2_fast::MPLUG2_ISA
