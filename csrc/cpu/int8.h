#pragma once

// Products of whole numbers, several of them in each 32-bit word: four bytes if the processor multiplies bytes, which
// are then without sign in one operand (its numbers plus 128), or two 16-bit numbers.

#include "cpu/attention_plan.h"
#include "cpu/simd.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

#ifdef __AVX512VNNI__
#define MPLUG2_BYTES 1
using Number = std::uint8_t;     // of x
using WideNumber = std::int8_t;  // of the weight
constexpr std::int32_t kOffset = 128;
#else
#define MPLUG2_BYTES 0
using Number = std::int16_t;
using WideNumber = std::int16_t;
constexpr std::int32_t kOffset = 0;
#endif
constexpr std::int64_t kNumbers = sizeof(Word) / sizeof(Number);  // in a word

MPLUG2_INLINE I32 load_i32(const std::int32_t* from) {
    I32 value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

// sum + the products of the numbers in each word.
MPLUG2_INLINE I32 dot(I32 sum, U32 x, U32 weight) {
#if MPLUG2_BYTES
    return (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)weight);
#elif defined(__AVX512BW__)
    return sum + (I32)_mm512_madd_epi16((__m512i)x, (__m512i)weight);
#elif defined(__AVX2__)
    return sum + (I32)_mm256_madd_epi16((__m256i)x, (__m256i)weight);
#else
    const I32 low = ((I32)(x << 16) >> 16) * ((I32)(weight << 16) >> 16);
    return sum + low + ((I32)x >> 16) * ((I32)weight >> 16);
#endif
}

// The largest absolute value of a row; NaN if one is NaN.
template <typename Element>
MPLUG2_INLINE float largest_size(const Element* x, std::int64_t count) {
    U32 most[4] = {};
    std::int64_t i = 0;
    const auto take = [&](U32& most, F32 value) {
        const U32 size = (U32)value & 0x7FFFFFFFu;  // of floats, in the order of integers; NaN is the largest
        most = size > most ? size : most;
    };
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
        for (int u = 0; u < 4; ++u) {
            take(most[u], load(x + i + u * kLanes));
        }
    }
    for (; i < count; i += kLanes) {
        const std::int64_t left = count - i;
        take(most[0], left < kLanes ? load_first(x + i, static_cast<int>(left)) : load(x + i));
    }
    std::uint32_t lanes[4 * kLanes], largest = 0;
    std::memcpy(lanes, most, sizeof(lanes));
    for (int lane = 0; lane < 4 * kLanes; ++lane) {
        largest = lanes[lane] > largest ? lanes[lane] : largest;
    }
    float value;
    std::memcpy(&value, &largest, sizeof(value));
    return value;
}

// Calls `write(i, numbers)` for every kLanes numbers of a row from i on; numbers behind the row's end are zero. Returns
// the row's scale.
template <typename Element, typename Write>
MPLUG2_INLINE float quantise(const Element* x, std::int64_t count, float most, const Write& write) {
    const float size = largest_size(x, count);
    const bool finite = size <= 3.4028234e38f;
    const F32 factor = broadcast(finite && size > 0 ? most / size : 0.0f);
    for (std::int64_t i = 0; i < count; i += kLanes) {
        const std::int64_t left = count - i;
        const F32 value = left < kLanes ? load_first(x + i, static_cast<int>(left)) : load(x + i);
        const F32 scaled = minimum(broadcast(most), maximum(broadcast(-most), value * factor));
        write(i, __builtin_convertvector(nearest(scaled), I32));
    }
    return finite ? size / most : __builtin_nanf("");
}

// Writes kLanes numbers plus an offset, without those bits that do not fit.
template <typename To>
MPLUG2_INLINE void store_numbers(To* to, I32 numbers) {
    typedef To Narrow __attribute__((vector_size(kLanes * sizeof(To))));
#ifdef __AVX512F__
    if constexpr (sizeof(To) == 1) {
        const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)numbers);
        std::memcpy(to, &bytes, sizeof(bytes));
        return;
    }
#endif
    const Narrow narrow = __builtin_convertvector(numbers, Narrow);
    std::memcpy(to, &narrow, sizeof(narrow));
}

}  // namespace
}  // namespace mplug2_fast::MPLUG2_ISA
