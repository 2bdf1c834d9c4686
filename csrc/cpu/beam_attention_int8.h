#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace mplug2_fast {

// Attention to keys and values in 8 bits, as quantise_memory writes them. They are read once for all queries.
//
// `query` is (batch, queries, heads, head_dim), with strides in elements for batch, query and head and contiguous
// channels. The head of a query is rounded to 16 bits, see linear_int8.h. `mask` is null or (batch, tokens) bytes,
// contiguous, zero for tokens that are not read. `out` is (batch, queries, heads, head_dim), contiguous; it and query
// are bfloat16 if `bf16`, otherwise float32. A query that sees no token gets zeros.
//
// Products of queries and keys are exact whole numbers, the softmax is in float32. For bfloat16, the weights of values
// are then rounded to 15 bits, together for 64 tokens, and multiplied as whole numbers.
struct BeamAttentionInt8Arguments {
    const void* query;
    const std::int8_t* keys;
    const float* key_scale;
    const std::int8_t* values;
    const float* value_scale;
    const std::uint8_t* mask;
    void* out;
    std::int64_t batch, queries, tokens, heads, head_dim;
    std::int64_t query_strides[3];
    float scale;
    bool bf16;
    int threads;
};

MPLUG2_VNNI_KERNEL(beam_attention_int8, BeamAttentionInt8Arguments)

}  // namespace mplug2_fast
