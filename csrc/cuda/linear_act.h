#pragma once

#include <cstdint>

#include "cpu/activations.h"

namespace mplug2_fast::cuda {

enum class Type { bf16, fp16 };

// out = residual + act(x . weight^T + bias) on tensor cores of compute capability 9.0, for any number of rows. Sums,
// activation and the addition of the residual are in float32; the result is rounded once.
//
// `x` is (rows, in), `weight` (out_features, in), `bias` (out_features) or null, `residual` or null and `out` (rows,
// out_features); all have the type `type`. Strides are those of rows, in elements. Sizes of
// features and strides must be multiples of 8, addresses multiples of 16.
struct LinearActArguments {
    const void* x;
    const void* weight;
    const void* bias;
    const void* residual;
    void* out;
    std::int64_t rows, in_features, out_features;
    std::int64_t x_stride, weight_stride, residual_stride, out_stride;
    Activation activation;
    Type type;
};

// Launches on a stream of the current device, without waiting or allocating. Returns an error message, or null.
const char* linear_act(const LinearActArguments& arguments, void* stream);

}  // namespace mplug2_fast::cuda
