#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace mplug2_fast {

// out = softmax(scale * q k^T) v for every (batch, head), without a matrix of all scores.
//
// q and out are (batch, q_len, heads, head_dim), k and v (batch, k_len, heads, head_dim). The strides of q, k and v, in
// elements, are those of batch, token and head; channels are contiguous, and out is contiguous altogether. `mask` is
// null or (batch, k_len) bytes with a stride for batch; keys whose byte is zero are not read. With `causal`, query i
// sees the keys up to i. A query that sees no key gets zeros. All are bfloat16 if `bf16`, otherwise float32;
// scores, softmax and sums are in float32. The result does not depend on `threads`.
struct AttentionArguments {
    const void* q;
    const void* k;
    const void* v;
    void* out;
    const std::uint8_t* mask;
    std::int64_t batch, q_len, k_len, heads, head_dim;
    std::int64_t q_strides[3], k_strides[3], v_strides[3];
    std::int64_t mask_stride;
    float scale;
    bool causal, bf16;
    int threads;
};

// The maximum of AttentionArguments::head_dim.
inline constexpr std::int64_t kLargestHead = 256;

MPLUG2_KERNEL(attention, AttentionArguments)

}  // namespace mplug2_fast
