#pragma once

// The attention kernel's layout of queries, keys and values. All consist of 32-bit words: a float or, if the processor
// multiplies pairs of bfloat16 (kPair), two neighbours along the dimension that is summed over.
//
//   queries  [row][channel words]
//   keys     [key / kLanes][channel words][kLanes keys]
//   values   [key words][channels]
//
// Rows of words are padded with zeros to whole vectors, keys to kLanes, values to a whole word.

#include "cpu/simd.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

typedef std::uint32_t Word;

MPLUG2_INLINE U32 load_words(const Word* from) {
    U32 value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

MPLUG2_INLINE void store_words(Word* to, U32 value) {
    std::memcpy(to, &value, sizeof(value));
}

MPLUG2_INLINE std::int64_t at_most(std::int64_t value, std::int64_t limit) {
    return value < limit ? value : limit;
}

MPLUG2_INLINE std::int64_t divide_up(std::int64_t value, std::int64_t by) {
    return (value + by - 1) / by;
}

MPLUG2_INLINE std::int64_t round_up(std::int64_t value, std::int64_t to) {
    return divide_up(value, to) * to;
}

// Tokens of one head. With `index`, the tokens that a mask keeps: token j is row index[j].
template <typename Element>
struct Tokens {
    const Element* base;
    std::int64_t stride;
    const std::int32_t* index;

    const Element* operator[](std::int64_t j) const { return base + (index ? index[j] : j) * stride; }
};

// Words of kLanes * (kPair ? 2 : 1) channels. Only the first `count` >= 1 exist; the others are zero.
template <bool kPair>
MPLUG2_INLINE U32 channel_words(const float* from, std::int64_t count) {
    static_assert(!kPair, "pairs are of bfloat16");
#ifdef __AVX512F__
    if (count < kLanes) {
        return (U32)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
    }
    return (U32)load(from);
#else
    return (U32)(count < kLanes ? load_first(from, static_cast<int>(count)) : load(from));
#endif
}

template <bool kPair>
MPLUG2_INLINE U32 channel_words(const Bf16* from, std::int64_t count) {
#ifdef __AVX512BF16__
    if constexpr (kPair) {
        if (count < 2 * kLanes) {
            return (U32)_mm512_maskz_loadu_epi16((1u << count) - 1, from);
        }
        return (U32)_mm512_loadu_si512(from);
    }
#endif
    return (U32)(count < kLanes ? load_first(from, static_cast<int>(count)) : load(from));
}

// Prefetches the line `ahead` bytes further, with the next tokens to pack, into the second-level cache. The address may
// be outside the tensor. (Prefetching into the first level halves the speed, because loads wait.)
MPLUG2_INLINE void prefetch(const void* from, std::int64_t ahead) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(from) + ahead), 0, 2);
}

template <bool kPair, typename Element>
MPLUG2_INLINE void pack_queries(const Tokens<Element>& queries, std::int64_t begin, std::int64_t count,
                                std::int64_t head_dim, std::int64_t stride, bool negate, std::int64_t ahead, Word* to) {
    constexpr int kChannels = kPair ? 2 * kLanes : kLanes;
    const U32 sign = U32{} + (negate ? (kPair ? 0x80008000u : 0x80000000u) : 0u);
    for (std::int64_t row = 0; row < count; ++row) {
        const Element* from = queries[begin + row];
        for (std::int64_t c = 0, w = 0; c < head_dim; c += kChannels, w += kLanes) {
            prefetch(from + c, ahead);
            store_words(to + row * stride + w, channel_words<kPair>(from + c, head_dim - c) ^ sign);
        }
    }
}

#ifdef __AVX512F__

typedef std::uint64_t U64x8 __attribute__((vector_size(64)));
typedef std::uint16_t U16x32 __attribute__((vector_size(64)));

MPLUG2_INLINE U32 low_words(U32 a, U32 b) {  // alternating, of every four
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}

MPLUG2_INLINE U32 high_words(U32 a, U32 b) {
    return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}

MPLUG2_INLINE U32 low_doubles(U32 a, U32 b) {
    return (U32)__builtin_shufflevector((U64x8)a, (U64x8)b, 0, 8, 2, 10, 4, 12, 6, 14);
}

MPLUG2_INLINE U32 high_doubles(U32 a, U32 b) {
    return (U32)__builtin_shufflevector((U64x8)a, (U64x8)b, 1, 9, 3, 11, 5, 13, 7, 15);
}

MPLUG2_INLINE U32 even_quarters(U32 a, U32 b) {
    return (U32)__builtin_shufflevector((U64x8)a, (U64x8)b, 0, 1, 4, 5, 8, 9, 12, 13);
}

MPLUG2_INLINE U32 odd_quarters(U32 a, U32 b) {
    return (U32)__builtin_shufflevector((U64x8)a, (U64x8)b, 2, 3, 6, 7, 10, 11, 14, 15);
}

// m[i][j] becomes m[j][i].
MPLUG2_INLINE void transpose(U32 (&m)[16]) {
    U32 t[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // 4x4 blocks
        const U32 a = low_words(m[i], m[i + 1]), b = high_words(m[i], m[i + 1]);
        const U32 c = low_words(m[i + 2], m[i + 3]), d = high_words(m[i + 2], m[i + 3]);
        t[i] = low_doubles(a, c);
        t[i + 1] = high_doubles(a, c);
        t[i + 2] = low_doubles(b, d);
        t[i + 3] = high_doubles(b, d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // of blocks
        const U32 a = even_quarters(t[i], t[i + 4]), b = odd_quarters(t[i], t[i + 4]);
        const U32 c = even_quarters(t[i + 8], t[i + 12]), d = odd_quarters(t[i + 8], t[i + 12]);
        m[i] = even_quarters(a, c);
        m[i + 4] = even_quarters(b, d);
        m[i + 8] = odd_quarters(a, c);
        m[i + 12] = odd_quarters(b, d);
    }
}

// A row of `to`, for which only the first channels in `mask` are read.
template <bool kPair>
MPLUG2_INLINE U32 masked_words(const float* from, std::uint32_t mask) {
    return (U32)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
}

template <bool kPair>
MPLUG2_INLINE U32 masked_words(const Bf16* from, std::uint32_t mask) {
    if constexpr (kPair) {
        return (U32)_mm512_maskz_loadu_epi16(mask, from);
    }
    return (U32)widen((U16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from));
}

template <bool kPair, typename Element>
void pack_keys(const Tokens<Element>& keys, std::int64_t begin, std::int64_t count, std::int64_t head_dim,
               std::int64_t ahead, Word* to) {
    constexpr int kChannels = kPair ? 2 * kLanes : kLanes;
    const std::int64_t words = kPair ? divide_up(head_dim, 2) : head_dim;
    for (std::int64_t j = 0; j < count; j += kLanes, to += words * kLanes) {
        const Element* rows[kLanes];
        std::uint32_t exists[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            rows[i] = keys[begin + at_most(j + i, count - 1)];
            exists[i] = j + i < count ? ~0u : 0u;
        }
        for (std::int64_t c = 0, w = 0; c < head_dim; c += kChannels, w += kLanes) {
            const std::int64_t left = head_dim - c;
            const std::uint32_t mask = left < kChannels ? (1u << left) - 1 : ~0u;
            U32 block[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                prefetch(rows[i] + c, ahead);
                block[i] = masked_words<kPair>(rows[i] + c, mask & exists[i]);
            }
            transpose(block);
            if (w + kLanes <= words) {
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) {
                    store_words(to + (w + i) * kLanes, block[i]);
                }
            } else {
                for (int i = 0; i < static_cast<int>(words - w); ++i) {
                    store_words(to + (w + i) * kLanes, block[i]);
                }
            }
        }
    }
}

#else

#ifdef __AVX2__
// m[i][j] becomes m[j][i].
MPLUG2_INLINE void transpose(F32 (&m)[8]) {
    F32 t[8];
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {  // 4x4 blocks
        const __m256 a = _mm256_unpacklo_ps((__m256)m[i], (__m256)m[i + 1]);
        const __m256 b = _mm256_unpackhi_ps((__m256)m[i], (__m256)m[i + 1]);
        const __m256 c = _mm256_unpacklo_ps((__m256)m[i + 2], (__m256)m[i + 3]);
        const __m256 d = _mm256_unpackhi_ps((__m256)m[i + 2], (__m256)m[i + 3]);
        t[i] = (F32)_mm256_shuffle_ps(a, c, 0x44);
        t[i + 1] = (F32)_mm256_shuffle_ps(a, c, 0xEE);
        t[i + 2] = (F32)_mm256_shuffle_ps(b, d, 0x44);
        t[i + 3] = (F32)_mm256_shuffle_ps(b, d, 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // of blocks
        m[i] = (F32)_mm256_permute2f128_ps((__m256)t[i], (__m256)t[i + 4], 0x20);
        m[i + 4] = (F32)_mm256_permute2f128_ps((__m256)t[i], (__m256)t[i + 4], 0x31);
    }
}
#endif

template <bool kPair, typename Element>
void pack_keys(const Tokens<Element>& keys, std::int64_t begin, std::int64_t count, std::int64_t head_dim,
               [[maybe_unused]] std::int64_t ahead, Word* to) {
    static_assert(!kPair, "pairs need AVX-512");
    for (std::int64_t j = 0; j < count; j += kLanes, to += head_dim * kLanes) {
        const Element* rows[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            rows[i] = j + i < count ? keys[begin + j + i] : nullptr;
        }
        std::int64_t c = 0;
#ifdef __AVX2__
        for (; j + kLanes <= count && c + kLanes <= head_dim; c += kLanes) {
            F32 block[kLanes];
#pragma GCC unroll 8
            for (int i = 0; i < kLanes; ++i) {
                prefetch(rows[i] + c, ahead);
                block[i] = load(rows[i] + c);
            }
            transpose(block);
#pragma GCC unroll 8
            for (int i = 0; i < kLanes; ++i) {
                store_words(to + (c + i) * kLanes, (U32)block[i]);
            }
        }
#endif
        for (int i = 0; i < kLanes; ++i) {
            for (std::int64_t k = c; k < head_dim; ++k) {
                const float value = rows[i] ? to_float(rows[i][k]) : 0.0f;
                std::memcpy(to + k * kLanes + i, &value, sizeof(value));
            }
        }
    }
}

#endif

template <bool kPair, typename Element>
void pack_values(const Tokens<Element>& values, std::int64_t begin, std::int64_t count, std::int64_t head_dim,
                 std::int64_t stride, std::int64_t ahead, Word* to) {
    for (std::int64_t j = 0; j < count; j += kPair ? 2 : 1, to += stride) {
        const Element* first = values[begin + j];
        if constexpr (kPair) {
#ifdef __AVX512BF16__
            const Element* second = j + 1 < count ? values[begin + j + 1] : nullptr;
            for (std::int64_t c = 0; c < head_dim; c += 2 * kLanes) {
                prefetch(first + c, ahead);
                const U16x32 a = (U16x32)channel_words<true>(first + c, head_dim - c);
                U16x32 b = {};
                if (second) {
                    prefetch(second + c, ahead);
                    b = (U16x32)channel_words<true>(second + c, head_dim - c);
                }
                store_words(to + c,
                            (U32)__builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47));
                if (c + kLanes < stride) {
                    store_words(to + c + kLanes,
                                (U32)__builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22,
                                                             54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61,
                                                             30, 62, 31, 63));
                }
            }
#endif
        } else {
            for (std::int64_t c = 0; c < head_dim; c += kLanes) {
                prefetch(first + c, ahead);
                store_words(to + c, channel_words<false>(first + c, head_dim - c));
            }
        }
    }
}

}  // namespace
}  // namespace mplug2_fast::MPLUG2_ISA
