#pragma once

#include <cstdint>

#include "cpu/activations.h"
#include "cpu/isa.h"

namespace mplug2_fast {

// A weight (outputs, inputs) and a bias (outputs) or null, or those of a layer norm; contiguous. With a scale (outputs)
// the weight is that of linear_int8.
struct WeightAndBias {
    const void* weight;
    const void* bias;
    const float* scale = nullptr;
};

// One layer of a decoder with post-norm residuals, for the newest token of every beam. It calls kernels of csrc/cpu one
// after another without the Python interpreter, whose memory would have to be reloaded after each weight.
//
//     n = norm(x)               s = n + self_out(step_attention(qkv(n)))
//     m = self_norm(s)          c = m + cross_out(attention(query(m), memory))
//     l = cross_norm(c)         out = l + proj(activation(fc(l)))
//
// `x` and `out` are (batch, beams, heads * head_dim), contiguous; the row of a beam is batch * beams + beam. `keys`,
// `values` and `ancestors` are those of StepAttentionArguments. `memory_key` and `memory_value` are (batch, heads,
// tokens, head_dim), with strides in elements for batch, head and token and contiguous channels; with scales (batch,
// heads, tokens) they are those of beam_attention_int8. `mask` is null or (batch, tokens) bytes, contiguous, zero for
// tokens that are not read.
struct DecoderLayerArguments {
    const void* x;
    WeightAndBias norm, qkv, self_out, self_norm, query, cross_out, cross_norm, fc, proj;
    void* keys;
    void* values;
    std::int32_t* ancestors;
    const void* memory_key;
    const void* memory_value;
    const float* memory_key_scale;
    const float* memory_value_scale;
    const std::uint8_t* mask;
    void* out;
    std::int64_t batch, beams, heads, head_dim, hidden, tokens, step;
    std::int64_t keys_strides[3], values_strides[3], ancestors_strides[2];
    std::int64_t memory_key_strides[3], memory_value_strides[3];
    Activation activation;
    float eps;
    bool bf16;
    int threads;
};

void decoder_layer(Isa isa, const DecoderLayerArguments& arguments);

}  // namespace mplug2_fast
