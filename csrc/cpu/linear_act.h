#pragma once

#include <cstdint>

#include "cpu/activations.h"
#include "cpu/isa.h"

namespace mplug2_fast {

// out = residual + act(x . weight^T + bias). Sums, activation and the addition of the residual are in float32. For the
// few rows of x in a decoding step, most of the time is spent on reading `weight`, which is not packed. For many rows
// in float32, blocks of it are packed.
//
// `x` is (rows, in) with a stride in elements for its rows, `weight` (out_features, in), `bias` (out_features) or null,
// `residual` and `out` (rows, out_features), the former null or out itself; all but x contiguous. All are
// bfloat16 if `bf16`, otherwise float32.
//
// `hashes`, if not null, takes the hash of each kHashedRows rows of the weight, as a checksum with such chunks has
// them. The rows are hashed while they are in the processor's cache.
inline constexpr std::int64_t kHashedRows = 64;

struct LinearActArguments {
    const void* x;
    const void* weight;
    const void* bias;
    const void* residual;
    void* out;
    std::int64_t rows, in_features, out_features;
    std::int64_t x_stride;
    Activation activation;
    bool bf16;
    int threads;
    std::uint64_t* hashes = nullptr;
};

MPLUG2_KERNEL(linear_act, LinearActArguments)

}  // namespace mplug2_fast
