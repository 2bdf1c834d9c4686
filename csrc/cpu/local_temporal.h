#pragma once

#include <cstdint>

#include "cpu/activations.h"
#include "cpu/isa.h"

namespace mplug2_fast {

// out[b, t, n, c] = act(bias[c] + sum over k of weight[k, c] * x[b, t + k - kernel / 2, n, c]), where frames outside
// the clip are zero: a depthwise convolution over frames. Sums and activation are in float32.
//
// `x` is (batch, frames, tokens, channels) with strides in elements for all but its contiguous channels; `out` is
// contiguous and must not overlap x. Both are bfloat16 if `bf16`, otherwise float32; `weight` (kernel, channels) and
// `bias` (channels) are float32.
struct TemporalConvArguments {
    const void* x;
    const float* weight;
    const float* bias;
    void* out;
    std::int64_t batch, frames, tokens, channels, kernel;
    std::int64_t x_batch_stride, x_frame_stride, x_token_stride;
    Activation activation;
    bool bf16;
    int threads;
};

MPLUG2_KERNEL(temporal_conv, TemporalConvArguments)

}  // namespace mplug2_fast
