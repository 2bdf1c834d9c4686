#pragma once

// Products of whole numbers, several of them in each 32-bit word: four bytes if the processor multiplies bytes, which
// are then without sign in one operand, or two 16-bit numbers.

#include "cpu/attention_plan.h"
#include "cpu/simd.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

#ifdef __AVX512VNNI__
#define MPLUG2_BYTES 1
using Number = std::uint8_t;     // of x
using WideNumber = std::int8_t;  // of the weight
#else
#define MPLUG2_BYTES 0
using Number = std::int16_t;
using WideNumber = std::int16_t;
#endif
constexpr std::int64_t kNumbers = sizeof(Word) / sizeof(Number);  // in a word

MPLUG2_INLINE I32 load_i32(const std::int32_t* from) {
    I32 value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

// sum + the products of the two 16-bit numbers in each word.
MPLUG2_INLINE I32 dot16(I32 sum, U32 x, U32 weight) {
#if MPLUG2_BYTES
    return (I32)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)x, (__m512i)weight);
#elif defined(__AVX512BW__)
    return sum + (I32)_mm512_madd_epi16((__m512i)x, (__m512i)weight);
#elif defined(__AVX2__)
    return sum + (I32)_mm256_madd_epi16((__m256i)x, (__m256i)weight);
#else
    const I32 low = ((I32)(x << 16) >> 16) * ((I32)(weight << 16) >> 16);
    return sum + low + ((I32)x >> 16) * ((I32)weight >> 16);
#endif
}

// sum + the products of the numbers in each word.
MPLUG2_INLINE I32 dot(I32 sum, U32 x, U32 weight) {
#if MPLUG2_BYTES
    return (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)weight);
#else
    return dot16(sum, x, weight);
#endif
}

// The largest number and the largest negated number of a row, or zero; NaN or infinite if one of the row is.
struct Range {
    float high, low;

    float size() const { return high > low ? high : low; }
    bool finite() const { return high <= 3.4028234e38f && low <= 3.4028234e38f; }
};

MPLUG2_INLINE float largest_float(I32 bits) {
    std::int32_t largest = 0;
#ifdef __AVX512F__
    largest = _mm512_reduce_max_epi32((__m512i)bits);
#else
    std::int32_t lanes[kLanes];
    std::memcpy(lanes, &bits, sizeof(lanes));
    for (int lane = 0; lane < kLanes; ++lane) {
        largest = lanes[lane] > largest ? lanes[lane] : largest;
    }
#endif
    float value;
    std::memcpy(&value, &largest, sizeof(value));
    return value;
}

template <typename Element>
MPLUG2_INLINE Range range(const Element* x, std::int64_t count) {
    I32 high[2] = {}, low[2] = {};
    std::int64_t i = 0;
    // Floats from zero to infinity and NaN are in the order of their bits as integers.
    const auto take = [&](int u, F32 value) {
        const I32 bits = (I32)value, negated = (I32)((U32)value ^ 0x80000000u);
        high[u] = bits > high[u] ? bits : high[u];
        low[u] = negated > low[u] ? negated : low[u];
    };
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        take(0, load(x + i));
        take(1, load(x + i + kLanes));
    }
    for (; i < count; i += kLanes) {
        const std::int64_t left = count - i;
        take(0, left < kLanes ? load_first(x + i, static_cast<int>(left)) : load(x + i));
    }
    return {largest_float(high[0] > high[1] ? high[0] : high[1]), largest_float(low[0] > low[1] ? low[0] : low[1])};
}

#ifdef __AVX512BW__
// Of 16-bit numbers without widening them: the first half of a float is in the same order.
MPLUG2_INLINE Range range(const Bf16* x, std::int64_t count) {
    const __m512i sign = _mm512_set1_epi16(static_cast<short>(0x8000));
    __m512i high = _mm512_setzero_si512(), low = high;
    for (std::int64_t i = 0; i < count; i += 2 * kLanes) {
        const std::int64_t left = count - i;
        const __m512i bits =
            left < 2 * kLanes ? _mm512_maskz_loadu_epi16((1u << left) - 1, x + i) : _mm512_loadu_si512(x + i);
        high = _mm512_max_epi16(high, bits);
        low = _mm512_max_epi16(low, _mm512_xor_si512(bits, sign));
    }
    const auto largest = [](__m512i bits) {
        const __m512i even = _mm512_slli_epi32(bits, 16);
        return largest_float((I32)_mm512_max_epi32(even, _mm512_and_si512(bits, _mm512_set1_epi32(-65536))));
    };
    return {largest(high), largest(low)};
}
#endif

constexpr float kLeastScale = 1.17549435e-38f;  // its inverse is finite

// The whole numbers nearest to values below 2^22 in size, ties to even.
MPLUG2_INLINE I32 nearest_integers(F32 value) {
#if defined(__AVX512F__)
    return (I32)_mm512_cvtps_epi32((__m512)value);
#elif defined(__AVX2__)
    return (I32)_mm256_cvtps_epi32((__m256)value);
#else
    return __builtin_convertvector(nearest(value), I32);
#endif
}

MPLUG2_INLINE F32 factor_of(float scale) {
    return broadcast(scale >= kLeastScale ? 1.0f / scale : 0.0f);
}

// The whole number that `quantise` makes of a value.
MPLUG2_INLINE std::int32_t nearest_integer(float value, float scale) {
    std::int32_t lanes[kLanes];
    const I32 number = nearest_integers(broadcast(value) * factor_of(scale));
    std::memcpy(lanes, &number, sizeof(lanes));
    return lanes[0];
}

// Calls `write(i, numbers)` for every kLanes numbers of a row from i on: the whole numbers nearest to x / scale; behind
// the row's end they are zero. Without a usable scale all are zero, and any number where x is not finite.
template <typename Element, typename Write>
MPLUG2_INLINE void quantise(const Element* x, std::int64_t count, float scale, const Write& write) {
    const F32 factor = factor_of(scale);
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        write(i, nearest_integers(load(x + i) * factor));
    }
    if (i < count) {
        write(i, nearest_integers(load_first(x + i, static_cast<int>(count - i)) * factor));
    }
}

// The scale that results are multiplied with.
MPLUG2_INLINE float result_scale(const Range& range, float scale) {
    return range.finite() ? (scale >= kLeastScale ? scale : 0.0f) : __builtin_nanf("");
}

// Writes kLanes numbers, without those bits that do not fit.
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

// Writes numbers of 8 bits, of which the least is -zero. The largest may have been rounded beyond 255 - zero.
MPLUG2_INLINE void store_bytes(Number* to, I32 numbers, std::int32_t zero) {
#if MPLUG2_BYTES
    const __m128i bytes = _mm512_cvtusepi32_epi8((__m512i)(numbers + zero));
    std::memcpy(to, &bytes, sizeof(bytes));
#else
    const I32 most = I32{} + (255 - zero);
    store_numbers(to, numbers < most ? numbers : most);
#endif
}

}  // namespace
}  // namespace mplug2_fast::MPLUG2_ISA
