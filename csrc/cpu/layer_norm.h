#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace mplug2_fast {

// out = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, with s = x + scale * update, row by row, in float32.
//
// Rows are indexed by (outer, inner); `x` and `update` have strides in elements for both and contiguous channels, `out`
// and `sum` are contiguous. `update`, `sum` (to which s is written), `weight` and `bias` may be null. All are
// bfloat16 if `bf16`, otherwise float32.
struct LayerNormArguments {
    const void* x;
    const void* update;
    const void* weight;
    const void* bias;
    void* out;
    void* sum;
    std::int64_t outer, inner, channels;
    std::int64_t x_outer_stride, x_inner_stride;
    std::int64_t update_outer_stride, update_inner_stride;
    float scale, eps;
    bool bf16;
    int threads;
};

MPLUG2_KERNEL(layer_norm, LayerNormArguments)

}  // namespace mplug2_fast
