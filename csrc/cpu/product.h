#pragma once

// Products whose sums stay in the registers, of packed operands.

#include "cpu/attention_pack.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

// Accumulators of the products, in vectors: they fit into the registers together with one row of the packed operand.
constexpr int kProductRows = 6;
#ifdef __AVX512F__
constexpr int kProductVectors = 4;
#else
constexpr int kProductVectors = 2;
#endif

template <bool kPair>
MPLUG2_INLINE F32 multiply_add(F32 sum, U32 a, U32 b) {
#ifdef __AVX512BF16__
    if constexpr (kPair) {
        return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
#endif
    return sum + (F32)a * (F32)b;
}

// acc[r][n] += sum over s of a[r * a_row + s] * b[s * b_step + n * b_vector + lane].
template <bool kPair, int kRows, int kVectors>
MPLUG2_INLINE void multiply(F32 (&acc)[kRows][kVectors], const Word* a, std::int64_t a_row, const Word* b,
                            std::int64_t b_step, std::int64_t b_vector, std::int64_t steps) {
    for (std::int64_t s = 0; s < steps; ++s, ++a, b += b_step) {
        U32 vectors[kVectors];
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) {
            vectors[n] = load_words(b + n * b_vector);
        }
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            U32 one = a[r * a_row] - U32{};
#if defined(__AVX512BF16__) && defined(__clang__) && __clang_major__ == 16
            __asm__("" : "+v"(one));  // clang 16 crashes on a broadcast pair of bfloat16
#endif
#pragma GCC unroll 4
            for (int n = 0; n < kVectors; ++n) {
                acc[r][n] = multiply_add<kPair>(acc[r][n], one, vectors[n]);
            }
        }
    }
}

// Calls Product::run<rows, vectors>. Both are limited by the registers.
template <typename Product, int kRows = kProductRows, int kVectors = kProductVectors>
MPLUG2_INLINE void dispatch(int rows, int vectors, const Product& product) {
    if constexpr (kRows > 1) {
        if (rows < kRows) {
            return dispatch<Product, kRows - 1, kVectors>(rows, vectors, product);
        }
    }
    if constexpr (kVectors > 1) {
        if (vectors < kVectors) {
            return dispatch<Product, kRows, kVectors - 1>(rows, vectors, product);
        }
    }
    product.template run<kRows, kVectors>();
}

}  // namespace
}  // namespace mplug2_fast::MPLUG2_ISA
