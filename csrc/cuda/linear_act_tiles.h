#pragma once

#include <cuda_runtime.h>

#include "cuda/linear_act.h"

namespace mplug2_fast::cuda {

struct Launch {
    int processors;  // of the device
    int swizzle;     // so many rows of tiles are gone through together
    cudaStream_t stream;
};

// One file each, for they take long to compile.
const char* linear_act_128x256(const LinearActArguments& given, const Launch& launch);
const char* linear_act_192x128(const LinearActArguments& given, const Launch& launch);

}  // namespace mplug2_fast::cuda
