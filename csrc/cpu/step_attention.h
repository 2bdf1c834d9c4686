#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace mplug2_fast {

// Self-attention in a decoding step: from the newest token of every row to itself and to the tokens before it. Their
// keys and values stay where they were written, possibly in other rows.
//
// `q`, `k` and `v` are (rows, heads, head_dim), of the newest tokens, with strides in elements for row and head and
// contiguous channels; `out` has their shape and is contiguous. `keys` and `values` are (rows, heads, length, head_dim)
// with strides for row, head and position; k and v are written at position `step`. `ancestors` is (rows, length) with
// strides for both: for t < step, [i, t] is the row of keys and values that has token t of row i; i is written
// at [i, step]. Scores, softmax and sums are in float32. All but ancestors are bfloat16 if `bf16`,
// otherwise float32.
struct StepAttentionArguments {
    const void* q;
    const void* k;
    const void* v;
    void* keys;
    void* values;
    std::int32_t* ancestors;
    void* out;
    std::int64_t rows, heads, head_dim, step;
    std::int64_t q_strides[2], k_strides[2], v_strides[2];
    std::int64_t keys_strides[3], values_strides[3], ancestors_strides[2];
    float scale;
    bool bf16;
    int threads;
};

// Whether every ancestor that is read is one of the rows.
inline bool ancestors_exist(const std::int32_t* ancestors, const std::int64_t* strides, std::int64_t rows,
                            std::int64_t step) {
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t t = 0; t < step; ++t) {
            const std::int32_t row = ancestors[i * strides[0] + t * strides[1]];
            if (row < 0 || row >= rows) {
                return false;
            }
        }
    }
    return true;
}

MPLUG2_KERNEL(step_attention, StepAttentionArguments)

}  // namespace mplug2_fast
