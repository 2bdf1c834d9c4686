#pragma once

// Vectors of 32-bit numbers, as wide as the instruction set that a source is compiled for. The compiler has arithmetic
// operators for such types; this file adds loads, stores, conversions and other functions. Everything is in the
// namespace of the instruction set, so that the linker does not mix the builds of a function.

#include <cstdint>
#include <cstring>

#include "cpu/isa.h"

#ifdef MPLUG2_X86
#include <immintrin.h>
#endif

#ifndef MPLUG2_ISA
#error "kernel sources are compiled with MPLUG2_ISA set to a namespace: see CMakeLists.txt"
#endif

#define MPLUG2_INLINE static inline __attribute__((always_inline))

namespace mplug2_fast {

// The upper half of a float.
struct Bf16 {
    std::uint16_t bits;
};

namespace MPLUG2_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t U16 __attribute__((vector_size(2 * kLanes)));

MPLUG2_INLINE F32 broadcast(float value) {
    return value - F32{};
}

MPLUG2_INLINE F32 select(I32 mask, F32 yes, F32 no) {
    return mask ? yes : no;
}

MPLUG2_INLINE F32 maximum(F32 a, F32 b) {
    return a > b ? a : b;
}

MPLUG2_INLINE F32 minimum(F32 a, F32 b) {
    return a < b ? a : b;
}

MPLUG2_INLINE F32 load(const float* from) {
    F32 value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

MPLUG2_INLINE void store(float* to, F32 value) {
    std::memcpy(to, &value, sizeof(value));
}

// One instruction; GCC 12 makes four of the conversion of vectors.
MPLUG2_INLINE F32 widen(U16 half) {
#if defined(__AVX512F__)
    return (F32)((U32)_mm512_cvtepu16_epi32((__m256i)half) << 16);
#elif defined(__AVX2__)
    return (F32)((U32)_mm256_cvtepu16_epi32((__m128i)half) << 16);
#else
    return (F32)(__builtin_convertvector(half, U32) << 16);
#endif
}

MPLUG2_INLINE F32 load(const Bf16* from) {
    U16 half;
    std::memcpy(&half, from, sizeof(half));
    return widen(half);
}

// Rounds to nearest, ties to even; NaN stays NaN.
MPLUG2_INLINE U16 to_bf16_bits(F32 value) {
#ifdef __AVX512BF16__
    return (U16)_mm512_cvtneps_pbh((__m512)value);
#else
    const U32 bits = (U32)value;
    const U32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const U32 quiet = (bits >> 16) | 0x40u;
    return __builtin_convertvector((value == value) ? rounded : quiet, U16);
#endif
}

MPLUG2_INLINE void store(Bf16* to, F32 value) {
    const U16 half = to_bf16_bits(value);
    std::memcpy(to, &half, sizeof(half));
}

// Like `store`, to an address that is a multiple of the vector's size, without the caches: the line is not read before
// it is written. Call `streams_end` before others read the data.
MPLUG2_INLINE void stream(float* to, F32 value) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)value);
#elif defined(__AVX2__)
    _mm256_stream_ps(to, (__m256)value);
#else
    store(to, value);
#endif
}

MPLUG2_INLINE void stream(Bf16* to, F32 value) {
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)to_bf16_bits(value));
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)to_bf16_bits(value));
#else
    store(to, value);
#endif
}

MPLUG2_INLINE void streams_end() {
#ifdef __AVX2__
    _mm_sfence();
#endif
}

// The first `count` < kLanes elements; the other lanes are zero.
template <typename Element>
MPLUG2_INLINE F32 load_first(const Element* from, int count) {
    Element buffer[kLanes] = {};
    std::memcpy(buffer, from, count * sizeof(Element));
    return load(buffer);
}

template <typename Element>
MPLUG2_INLINE void store_first(Element* to, F32 value, int count) {
    Element buffer[kLanes];
    store(buffer, value);
    std::memcpy(to, buffer, count * sizeof(Element));
}

#ifdef __AVX512BW__
MPLUG2_INLINE F32 load_first(const float* from, int count) {
    return (F32)_mm512_maskz_loadu_ps((1u << count) - 1, from);
}

MPLUG2_INLINE F32 load_first(const Bf16* from, int count) {
    return widen((U16)_mm256_maskz_loadu_epi16((1u << count) - 1, from));
}

MPLUG2_INLINE void store_first(float* to, F32 value, int count) {
    _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)value);
}

MPLUG2_INLINE void store_first(Bf16* to, F32 value, int count) {
    _mm256_mask_storeu_epi16(to, (1u << count) - 1, (__m256i)to_bf16_bits(value));
}
#endif

MPLUG2_INLINE float to_float(float value) {
    return value;
}

MPLUG2_INLINE float to_float(Bf16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}

MPLUG2_INLINE float sum(F32 value) {
    float lanes[kLanes], total = 0;
    store(lanes, value);
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) {
            lanes[i] += lanes[i + width];
        }
    }
    total = lanes[0];
    return total;
}

// The sums of four vectors.
MPLUG2_INLINE void sum4(const F32 (&v)[4], float* to) {
#ifdef MPLUG2_X86
    // Within each 128 bits: pairs of lanes are added up while two vectors are interleaved, twice.
    typedef float F32x4 __attribute__((vector_size(16)));
#if defined(__AVX512F__)
    const auto low = [](F32 a, F32 b) { return (F32)_mm512_unpacklo_ps((__m512)a, (__m512)b); };
    const auto high = [](F32 a, F32 b) { return (F32)_mm512_unpackhi_ps((__m512)a, (__m512)b); };
#elif defined(__AVX2__)
    const auto low = [](F32 a, F32 b) { return (F32)_mm256_unpacklo_ps((__m256)a, (__m256)b); };
    const auto high = [](F32 a, F32 b) { return (F32)_mm256_unpackhi_ps((__m256)a, (__m256)b); };
#else
    const auto low = [](F32 a, F32 b) { return (F32)_mm_unpacklo_ps((__m128)a, (__m128)b); };
    const auto high = [](F32 a, F32 b) { return (F32)_mm_unpackhi_ps((__m128)a, (__m128)b); };
#endif
    const F32 even = low(v[0], v[2]) + high(v[0], v[2]), odd = low(v[1], v[3]) + high(v[1], v[3]);
    float lanes[kLanes];
    store(lanes, low(even, odd) + high(even, odd));
    F32x4 total = {}, part;
    for (int i = 0; i < kLanes; i += 4) {
        std::memcpy(&part, lanes + i, sizeof(part));
        total += part;
    }
    std::memcpy(to, &total, sizeof(total));
#else
    for (int i = 0; i < 4; ++i) {
        to[i] = sum(v[i]);
    }
#endif
}

MPLUG2_INLINE float largest(F32 value) {
    float lanes[kLanes];
    store(lanes, value);
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) {
            lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
        }
    }
    return lanes[0];
}

MPLUG2_INLINE F32 exp2_of_integer(F32 integer) {
    return (F32)((__builtin_convertvector(integer, I32) + 127) << 23);
}

// The nearest whole number, for values between -2^22 and 2^22.
MPLUG2_INLINE F32 nearest(F32 value) {
    const F32 shift = broadcast(12582912.0f);  // 1.5 * 2^23: a number loses its fraction when added to it
    F32 shifted = value + shift;
    __asm__("" : "+x"(shifted));  // keeps the compiler from simplifying the sum and the difference
    return shifted - shift;
}

// e^value within two units in the last place. Values below -104 give zero, those between -104 and -87 may give zero,
// and those above 89 infinity. NaN stays NaN.
MPLUG2_INLINE F32 exponential(F32 value) {
#ifdef __AVX512F__
    // Scaling handles overflow and underflow; the bounds are for infinite values. Comparing NaN gives the second
    // operand.
    value = minimum(broadcast(89.0f), maximum(broadcast(-104.0f), value));
    const F32 n = (F32)_mm512_roundscale_ps((__m512)(value * 1.44269504088896341f), 0);
    const F32 r = (value - n * 0.693359375f) + n * 2.12194440e-4f;
#else
    const F32 clamped = minimum(maximum(value, broadcast(-87.0f)), broadcast(88.0f));
    const F32 n = nearest(clamped * 1.44269504088896341f);
    const F32 r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
#endif
    F32 p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
#ifdef __AVX512F__
    return (F32)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    F32 result = p * exp2_of_integer(n);
    result = select(value < -87.0f, F32{}, result);
    result = select(value > 88.0f, broadcast(__builtin_inff()), result);
    return select(value == value, result, value);
#endif
}

MPLUG2_INLINE F32 sigmoid(F32 value) {
    return 1.0f / (1.0f + exponential(-value));
}

}  // namespace MPLUG2_ISA
}  // namespace mplug2_fast
