#pragma once

#include "cpu/activations.h"
#include "cpu/simd.h"

namespace mplug2_fast::MPLUG2_ISA {

// x * Phi(x), with Phi(-|x|) = poly(t) * exp(-x^2 / 2) / 2 and t = 1 / (1 + 0.3275911 |x| / sqrt(2)): Abramowitz and
// Stegun, 7.1.26. Using the lower tail for both signs avoids cancellation for negative x. Within 1e-7 * |x|.
MPLUG2_INLINE F32 gelu(F32 x) {
    const F32 size = maximum(x, -x);
    const F32 t = 1.0f / (1.0f + 0.231641888f * size);
    F32 p = broadcast(0.5307027145f);
    p = p * t - 0.7265760135f;
    p = p * t + 0.7107068705f;
    p = p * t - 0.142248368f;
    p = p * t + 0.127414796f;
    const F32 tail = p * t * exponential(-0.5f * size * size);
    // An infinite x times a tail of zero would be NaN; beyond 14 the tail is zero.
    const F32 value = maximum(x, F32{}) - select(size > 14.0f, F32{}, size * tail);
    return select(x == x, value, x);
}

// x * sigmoid(1.702 x). `kBits` is the needed precision: 24, or 8 if the result is rounded to bfloat16.
template <int kBits>
MPLUG2_INLINE F32 quick_gelu(F32 x) {
#ifdef __AVX512DQ__
    // e^-1.702x = 2^u = 2^n * 2^r with r in [-1/2, 1/2]; scalef handles overflow in both directions.
    F32 u = x * -2.45546696f;
    if constexpr (kBits > 8) {
        u = minimum(broadcast(126.0f), u);  // keeps NaN, and is finite for the division
    }
    const F32 r = (F32)_mm512_reduce_ps((__m512)u, 0);
    F32 p;
    if constexpr (kBits > 8) {
        p = broadcast(1.32646999e-3f);  // minimises the relative error: 1e-7, and 1e-4 below
        p = p * r + 9.67151e-3f;
        p = p * r + 5.550734e-2f;
        p = p * r + 2.4022242e-1f;
        p = p * r + 6.9314698e-1f;
        p = p * r + 1.0f;
    } else {
        p = broadcast(5.500893e-2f);
        p = p * r + 2.4221097e-1f;
        p = p * r + 6.9328293e-1f;
        p = p * r + 1.0f;
    }
    const F32 divisor = 1.0f + (F32)_mm512_scalef_ps((__m512)p, (__m512)(u - r));
    const F32 inverse = (F32)_mm512_rcp14_ps((__m512)divisor);
    if constexpr (kBits > 8) {
        return x * (inverse * (2.0f - divisor * inverse));
    }
    return x * inverse;
#else
    return x * sigmoid(1.702f * x);
#endif
}

template <Activation kActivation, int kBits = 24>
MPLUG2_INLINE F32 activate(F32 x) {
    if constexpr (kActivation == Activation::gelu) {
        return gelu(x);
    } else if constexpr (kActivation == Activation::quick_gelu) {
        return quick_gelu<kBits>(x);
    } else {
        return x;
    }
}

}  // namespace mplug2_fast::MPLUG2_ISA
