#include "cpu/layer_norm.h"

#include "cpu/buffer.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

constexpr int kUnroll = 4;
constexpr int kStep = kUnroll * kLanes;

// Sums larger than this are written without the caches, where they would replace the x and update that are being read.
// (For the normalised rows, which are written while nothing is read, this is slower.)
constexpr std::int64_t kStreamBytes = 4 << 20;

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

// The memory of a thread, in float32: a row between the passes, and the weight and bias.
struct Buffers {
    float* row;
    float* weight;
    float* bias;
    bool pairs;  // whether weight and bias have, in every 32 channels, the 16 at even places first
};

struct Moments {
    float mean, variance;
};

// The sums of x - k and its square in one pass, `channels` being a multiple of kStep. k is the mean of the first kStep
// channels. If k is more than a standard deviation from the mean, the difference of both sums may lose too much, and
// the variance is NaN.
MPLUG2_INLINE Moments moments_of(const float* x, std::int64_t channels) {
    F32 sums[kUnroll], squares[kUnroll] = {};
    for (int u = 0; u < kUnroll; ++u) {
        sums[u] = load(x + u * kLanes);
    }
    const float first = sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / kStep;
    const F32 firsts = broadcast(first);
    for (int u = 0; u < kUnroll; ++u) {
        sums[u] = F32{};
    }
    for (std::int64_t i = 0; i < channels; i += kStep) {
        for (int u = 0; u < kUnroll; ++u) {
            const F32 value = load(x + i + u * kLanes) - firsts;
            sums[u] += value;
            squares[u] += value * value;
        }
    }
    const float count = static_cast<float>(channels);
    const float more = sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / count;
    const float variance = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / count - more * more;
    return {first + more, more * more <= variance ? variance : __builtin_nanf("")};
}

// Writes the normalised row, which is read from x or from the float32 copy.
template <typename Source, typename Element>
MPLUG2_INLINE void write(const Source* from, Element* out, std::int64_t channels, const Buffers& buffers,
                         Moments moments, float eps) {
    const F32 means = broadcast(moments.mean), factor = broadcast(1.0f / __builtin_sqrtf(moments.variance + eps));
    std::int64_t i = 0;
    for (; i + kLanes <= channels; i += kLanes) {
        const F32 value = (load(from + i) - means) * factor;
        store(out + i, value * load(buffers.weight + i) + load(buffers.bias + i));
    }
    if (const int count = static_cast<int>(channels - i)) {
        const F32 value = (load_first(from + i, count) - means) * factor;
        store_first(out + i, value * load_first(buffers.weight + i, count) + load_first(buffers.bias + i, count),
                    count);
    }
}

#ifdef __AVX512BF16__
// The sums of x and x^2 in one pass, 32 channels per instruction. Products of bf16 numbers are exact in float32, and
// the difference of both sums loses less than rounding x to bf16 did. `channels` is a multiple of 64.
MPLUG2_INLINE Moments moments_of(const Bf16* x, std::int64_t channels) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3F80);
    __m512 sums[2] = {}, squares[2] = {};
    for (std::int64_t i = 0; i < channels; i += 64) {
        for (int u = 0; u < 2; ++u) {
            const __m512bh values = (__m512bh)_mm512_loadu_si512(x + i + 32 * u);
            sums[u] = _mm512_dpbf16_ps(sums[u], values, ones);
            squares[u] = _mm512_dpbf16_ps(squares[u], values, values);
        }
    }
    const float count = static_cast<float>(channels), mean = sum((F32)(sums[0] + sums[1])) / count;
    const float variance = sum((F32)(squares[0] + squares[1])) / count - mean * mean;
    return {mean, variance < 0 ? 0 : variance};
}
#endif

#ifdef __AVX512BF16__
// Writes the normalised row 32 channels at a time: in the loaded 32-bit numbers, the lower halves are the channels at
// even places and the upper halves those at odd places.
MPLUG2_INLINE void write_bf16(const Bf16* x, Bf16* out, std::int64_t channels, const Buffers& buffers, Moments moments,
                              float eps) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    std::uint16_t order[32];
    for (int i = 0; i < 32; ++i) {
        order[i] = static_cast<std::uint16_t>(i / 2 + 16 * (i % 2));
    }
    const __m512i interleaved = _mm512_loadu_si512(order);
    const F32 means = broadcast(moments.mean), factor = broadcast(1.0f / __builtin_sqrtf(moments.variance + eps));
    for (std::int64_t i = 0; i < channels; i += 32) {
        const __m512i both = _mm512_loadu_si512(x + i);
        const F32 even = (F32)_mm512_slli_epi32(both, 16), odd = (F32)_mm512_and_si512(both, upper);
        const float *weight = buffers.weight + i, *bias = buffers.bias + i;
        const F32 even_out = (even - means) * factor * load(weight) + load(bias);
        const F32 odd_out = (odd - means) * factor * load(weight + kLanes) + load(bias + kLanes);
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd_out, (__m512)even_out);
        const __m512i both_out = _mm512_permutexvar_epi16(interleaved, rounded);
        _mm512_storeu_si512(out + i, both_out);
    }
}
#endif

template <typename Element, bool kUpdate, bool kStream>
void normalise(const LayerNormArguments& a, const Row<Element>& row, const Buffers& buffers) {
#ifdef __AVX512BF16__
    if constexpr (sizeof(Element) == 2 && !kUpdate) {
        if (buffers.pairs) {
            return write_bf16(row.x, row.out, a.channels, buffers, moments_of(row.x, a.channels), a.eps);
        }
    }
#endif
    constexpr bool kCopy = kUpdate || sizeof(Element) != 4;  // or the row is read again where it is
    if constexpr (!kCopy) {
        if (a.channels % kStep == 0) {
            const Moments moments = moments_of(row.x, a.channels);
            if (__builtin_isfinite(moments.variance)) {
                return write(row.x, row.out, a.channels, buffers, moments, a.eps);
            }
        }
    }
    const std::int64_t channels = a.channels;
    float* const buffer = buffers.row;
    const float* from = buffer;
    if constexpr (!kCopy) {
        from = row.x;
    }
    const F32 scale = broadcast(a.scale);
    const auto take = [&](std::int64_t i) {
        F32 value = load(row.x + i);
        __builtin_prefetch(row.x + a.x_inner_stride + i);  // of the next row, while this one is computed with
        if constexpr (kUpdate) {
            value += scale * load(row.update + i);
            __builtin_prefetch(row.update + a.update_inner_stride + i);
            if (row.sum) {
                kStream ? stream(row.sum + i, value) : store(row.sum + i, value);
            }
        }
        if constexpr (kCopy) {
            store(buffer + i, value);
        }
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
        if constexpr (kCopy) {
            store_first(buffer + i, value, count);
        }
        return value;
    };
    const float mean = total(channels, take, take_first) / static_cast<float>(channels);
    const F32 means = broadcast(mean);
    const auto square = [&](std::int64_t i) {
        const F32 centred = load(from + i) - means;
        return centred * centred;
    };
    const auto square_first = [&](std::int64_t i, int count) {
        float squares[kLanes] = {};
        store_first(squares, load_first(from + i, count) - means, count);
        return load(squares) * load(squares);
    };
    const float variance = total(channels, square, square_first) / static_cast<float>(channels);
    write(from, row.out, channels, buffers, {mean, variance}, a.eps);
}

template <typename Element, bool kStream>
void run(const LayerNormArguments& a) {
    const auto* x = static_cast<const Element*>(a.x);
    const auto* update = static_cast<const Element*>(a.update);
    auto* out = static_cast<Element*>(a.out);
    auto* sums = static_cast<Element*>(a.sum);
    parallel_ranges(a.outer * a.inner, a.threads, [&](std::int64_t begin, std::int64_t end) {
        // Aligned to cache lines, because access to them takes half of the time. With a distance of an odd number of
        // lines, they do not have the same place in a page.
        const std::int64_t stride = (a.channels + 31) / 32 * 32 + 16;
        const Buffer<float> memory(3 * stride);
#ifdef __AVX512BF16__
        const bool pairs = sizeof(Element) == 2 && !update && a.channels % 64 == 0;
#else
        constexpr bool pairs = false;
#endif
        const Buffers buffers = {memory, memory + stride, memory + 2 * stride, pairs};
        for (std::int64_t c = 0; c < a.channels; ++c) {
            const std::int64_t place = pairs ? c / 32 * 32 + c % 32 / 2 + 16 * (c % 2) : c;
            buffers.weight[place] = a.weight ? to_float(static_cast<const Element*>(a.weight)[c]) : 1.0f;
            buffers.bias[place] = a.bias ? to_float(static_cast<const Element*>(a.bias)[c]) : 0.0f;
        }
        for (std::int64_t r = begin; r < end; ++r) {
            const std::int64_t o = r / a.inner, i = r % a.inner;
            Row<Element> row{};
            row.x = x + o * a.x_outer_stride + i * a.x_inner_stride;
            row.out = out + r * a.channels;
            if (update) {
                row.update = update + o * a.update_outer_stride + i * a.update_inner_stride;
                row.sum = sums ? sums + r * a.channels : nullptr;
                normalise<Element, true, kStream>(a, row, buffers);
            } else {
                normalise<Element, false, false>(a, row, buffers);
            }
        }
        if (kStream) {
            streams_end();
        }
    });
}

template <typename Element>
void run(const LayerNormArguments& a) {
    const std::int64_t row_bytes = a.channels * static_cast<std::int64_t>(sizeof(Element));
    const bool on_lines = row_bytes % 64 == 0 && reinterpret_cast<std::uintptr_t>(a.sum) % 64 == 0;
    const bool stream = a.sum && on_lines && a.outer * a.inner * row_bytes >= kStreamBytes;
    stream ? run<Element, true>(a) : run<Element, false>(a);
}

}  // namespace

void layer_norm(const LayerNormArguments& arguments) {
    arguments.bf16 ? run<Bf16>(arguments) : run<float>(arguments);
}

}  // namespace mplug2_fast::MPLUG2_ISA
