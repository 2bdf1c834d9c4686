#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace mplug2_fast {

// Rounds keys and values to 8 bits, in the order in which beam_attention_int8 multiplies them.
//
// `key` and `value` are (batch, tokens, heads, head_dim), with strides in elements for batch, token and head and
// contiguous channels; bfloat16 if `bf16`, otherwise float32. The head of a token has one scale: its largest absolute
// value divided by 127. NaN if it is not finite, 0 if the scale would be below the least normal float. Bytes are the
// rounded quotients, missing tokens and channels are zero.
//
// Four bytes make a word: those of the numbers 0, 2, 1, 3, so that the even and the odd bytes are neighbours.
// `keys` is (batch, heads, blocks, head_dim / 4, kMemoryBlock) words of four channels of a token, `values` (batch,
// heads, blocks, kMemoryBlock / 4, head_dim) words of a channel of four tokens; quotients are rounded up. The scales
// are (batch, heads, tokens). All results are contiguous.
inline constexpr std::int64_t kMemoryBlock = 16;  // tokens
inline constexpr int kWordOrder[4] = {0, 2, 1, 3};

struct QuantiseMemoryArguments {
    const void* key;
    const void* value;
    std::int8_t* keys;
    float* key_scale;
    std::int8_t* values;
    float* value_scale;
    std::int64_t batch, tokens, heads, head_dim;
    std::int64_t key_strides[3], value_strides[3];
    bool bf16;
    int threads;
};

MPLUG2_KERNEL(quantise_memory, QuantiseMemoryArguments)

}  // namespace mplug2_fast
