#pragma once

#include <cstdint>

#include "cpu/activations.h"
#include "cpu/isa.h"

namespace mplug2_fast {

// out = residual + act(scales of x's row and of the weight's row * (q(x) . weight^T) + bias), with sums of integers.
//
// Each row of x is rounded to whole numbers q(x), which are multiplied with the row's scale. With 16 bits they go from
// -32767 to 32767, and the scale is the row's largest absolute value divided by 32767. With 8 bits they are 256
// neighbours, among them zero: the scale is the distance of the largest number (or zero) and the least one (or zero)
// divided by 255. A row that is not finite gives NaN; one whose scale is below the least normal float counts as zero.
//
// With 8 bits, the integers are multiplied and added exactly; everything after the sum is float32. Blocks of the weight
// are packed, which pays for many rows. With 16 bits, for the few rows of a decoding step, the weight is read once as
// it is, and exact parts of the sum are added in float32.
//
// `x` is (rows, in_features) with a stride in elements for its rows, `weight` (out_features, in_features) with numbers
// from -127 to 127, `scale` (out_features), `bias` (out_features) or null, `residual` and `out` (rows, out_features),
// the former null; all but x contiguous. x, bias, residual and out are bfloat16 if `bf16`, otherwise float32.
// `in_features` is at most kMostInt8Inputs, so that no sum overflows.
inline constexpr std::int64_t kMostInt8Inputs = 1 << 16;

struct LinearInt8Arguments {
    const void* x;
    const std::int8_t* weight;
    const float* scale;
    const void* bias;
    const void* residual;
    void* out;
    std::int64_t rows, in_features, out_features;
    std::int64_t x_stride;
    Activation activation;
    int bits;
    bool bf16;
    int threads;
};

MPLUG2_VNNI_KERNEL(linear_int8, LinearInt8Arguments)

}  // namespace mplug2_fast
