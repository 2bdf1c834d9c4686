#pragma once

// The arithmetic of the attention kernel on one tile: a few queries against one block of packed keys and values.

#include "cpu/product.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

constexpr int kTileRows = 4 * kProductRows;
constexpr int kBlockKeys = 320;
// In floats. A power of two would put the rows of a tile into the same few sets of the first-level cache.
constexpr int kScoreStride = kBlockKeys + 16;

MPLUG2_INLINE I32 lane_numbers() {
    I32 numbers;
    for (int i = 0; i < kLanes; ++i) {
        numbers[i] = i;
    }
    return numbers;
}

// Scores of some queries and vectors of keys, and the maximum of each row in each lane.
template <bool kPair>
struct ScoreProduct {
    const Word* queries;
    std::int64_t query_stride;
    const Word* keys;
    std::int64_t words;
    float* scores;
    float* maxima;      // [row][kLanes]
    const int* limits;  // number of keys from this one on that each row sees; null for all

    template <int kRows, int kVectors>
    __attribute__((noinline)) void run() const {
        const auto [queries, query_stride, keys, words, scores, maxima, limits] =
            *this;  // copies avoid reloads after stores
        F32 acc[kRows][kVectors] = {};
        multiply<kPair>(acc, queries, query_stride, keys, kLanes, words * kLanes, words);
        if (limits) {
            const I32 lanes = lane_numbers();
            for (int r = 0; r < kRows; ++r) {
                for (int n = 0; n < kVectors; ++n) {
                    acc[r][n] = select(lanes + n * kLanes < limits[r], acc[r][n], broadcast(-__builtin_inff()));
                }
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            F32 most = load(maxima + r * kLanes);
#pragma GCC unroll 4
            for (int n = 0; n < kVectors; ++n) {
                store(scores + r * kScoreStride + n * kLanes, acc[r][n]);
                most = maximum(acc[r][n], most);
            }
            store(maxima + r * kLanes, most);
        }
    }
};

// sums = sums * correction + weights * values, for some queries and vectors of channels.
template <bool kPair>
struct ValueProduct {
    const Word* weights;  // in the rows of the scores
    const Word* values;
    std::int64_t value_stride, steps;
    float* sums;
    const float* corrections;

    template <int kRows, int kVectors>
    __attribute__((noinline)) void run() const {
        const auto [weights, values, value_stride, steps, sums, corrections] = *this;
        F32 acc[kRows][kVectors];
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            const F32 correction = broadcast(corrections[r]);
#pragma GCC unroll 4
            for (int n = 0; n < kVectors; ++n) {
                acc[r][n] = load(sums + r * value_stride + n * kLanes) * correction;
            }
        }
        multiply<kPair>(acc, weights, kScoreStride, values, value_stride, kLanes, steps);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
            for (int n = 0; n < kVectors; ++n) {
                store(sums + r * value_stride + n * kLanes, acc[r][n]);
            }
        }
    }
};

// 2^value for value <= 0, exactly 1 for 0; -infinity gives 0, NaN stays NaN. Computed as 2^n with an integer n, times a
// polynomial for 2^f with f in [0, 1). Its relative error is 8.3e-8, or 8.6e-5 with kRough: a fortieth of the error of
// rounding to bfloat16.
template <bool kRough>
MPLUG2_INLINE F32 power_of_two(F32 value) {
#ifdef __AVX512F__
    const F32 f = (F32)_mm512_reduce_ps((__m512)value, _MM_FROUND_TO_NEG_INF);
#else
    const F32 clamped = maximum(broadcast(-126.0f), value);
    const F32 n = nearest(clamped - 0.5f);
    const F32 f = clamped - n;
#endif
    F32 p;
    if constexpr (kRough) {
        p = broadcast(7.7067051e-2f);
        p = p * f + 2.2764498e-1f;
        p = p * f + 6.9511679e-1f;
    } else {
        p = broadcast(1.86713021e-3f);
        p = p * f + 9.01703002e-3f;
        p = p * f + 5.57999133e-2f;
        p = p * f + 2.40164450e-1f;
        p = p * f + 6.93151312e-1f;
    }
    p = p * f + 1.0f;
#ifdef __AVX512F__
    return (F32)_mm512_maskz_scalef_ps(0xFFFF, (__m512)p, (__m512)value);  // without a mask GCC warns
#else
    p = p * exp2_of_integer(n);
    p = select(value < -126.0f, F32{}, p);
    return select(value == value, p, value);
#endif
}

MPLUG2_INLINE float power_of_two(float value) {
    return power_of_two<false>(broadcast(value))[0];
}

#ifdef __AVX512F__
typedef float F32x8 __attribute__((vector_size(32)));
typedef float F32x4 __attribute__((vector_size(16)));

template <typename Combine>
MPLUG2_INLINE float reduce(F32 value, const Combine& combine) {
    const F32x8 a = combine(__builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7),
                            __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15));
    const F32x4 b = combine(__builtin_shufflevector(a, a, 0, 1, 2, 3), __builtin_shufflevector(a, a, 4, 5, 6, 7));
    const F32x4 c = combine(b, __builtin_shufflevector(b, b, 2, 3, 0, 1));
    return combine(c, __builtin_shufflevector(c, c, 1, 0, 3, 2))[0];
}

MPLUG2_INLINE float sum_of_lanes(F32 value) {
    return reduce(value, [](auto a, auto b) { return a + b; });
}

MPLUG2_INLINE float largest_of_lanes(F32 value) {
    return reduce(value, [](auto a, auto b) { return a > b ? a : b; });
}
#else
MPLUG2_INLINE float sum_of_lanes(F32 value) {
    return sum(value);
}

MPLUG2_INLINE float largest_of_lanes(F32 value) {
    return largest(value);
}
#endif

// The reference of a row's weights, 2^((score - reference) * factor). Without a visible key the largest score is
// -infinity, and the weights must be zero.
MPLUG2_INLINE float reference(float largest, float factor) {
    return largest == -__builtin_inff() ? 0.0f : largest * factor;
}

// Turns `vectors` vectors of scores into weights, in place, as words, and returns their sum. Weights of pairs are
// rounded to bfloat16 and need half the memory.
template <bool kPair>
MPLUG2_INLINE float weigh(float* scores, std::int64_t vectors, float factor, float reference) {
    const F32 factors = broadcast(factor), references = broadcast(reference);
    const auto weight = [&](std::int64_t i) {
        return power_of_two<kPair>(load(scores + i * kLanes) * factors - references);
    };
    F32 sums = {}, more = {};
    std::int64_t i = 0;
    for (; i + 2 <= vectors; i += 2) {
        const F32 a = weight(i), b = weight(i + 1);
        sums += a;
        more += b;
#ifdef __AVX512BF16__
        if constexpr (kPair) {
            const auto pairs = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
            std::memcpy(scores + i * (kLanes / 2), &pairs, sizeof(pairs));
            continue;
        }
#endif
        store(scores + i * kLanes, a);
        store(scores + (i + 1) * kLanes, b);
    }
    if (i < vectors) {
        const F32 a = weight(i);
        sums += a;
#ifdef __AVX512BF16__
        if constexpr (kPair) {
            const auto pairs = _mm512_cvtne2ps_pbh((__m512)F32{}, (__m512)a);
            std::memcpy(scores + i * (kLanes / 2), &pairs, sizeof(pairs));
            return sum_of_lanes(sums + more);
        }
#endif
        store(scores + i * kLanes, a);
    }
    return sum_of_lanes(sums + more);
}

}  // namespace
}  // namespace mplug2_fast::MPLUG2_ISA
