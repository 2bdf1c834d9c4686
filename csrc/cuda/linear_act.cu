#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "cuda/linear_act_tiles.h"

namespace mplug2_fast::cuda {

namespace {

constexpr std::int64_t kElements = 8;  // of 16 bytes, the unit of the tensor memory accelerator

bool aligned(const void* address) {
    return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
}

const char* refuse(const LinearActArguments& given) {
    constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
    if (given.rows < 1 || given.in_features < 1 || given.out_features < 1) {
        return "there is nothing to multiply";
    }
    if (given.rows > kMost || given.in_features > kMost || given.out_features > kMost) {
        return "sizes must be below 2^31";
    }
    if ((given.in_features | given.out_features | given.x_stride | given.weight_stride | given.residual_stride |
         given.out_stride) %
        kElements) {
        return "sizes and strides must be multiples of 8";
    }
    if (!aligned(given.x) || !aligned(given.weight) || !aligned(given.bias) || !aligned(given.residual) ||
        !aligned(given.out)) {
        return "addresses must be multiples of 16";
    }
    return nullptr;
}

}  // namespace

const char* linear_act(const LinearActArguments& given, void* stream) {
    if (const char* why = refuse(given)) {
        return why;
    }
    int device = 0;
    Launch launch{0, 1, static_cast<cudaStream_t>(stream)};
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&launch.processors, cudaDevAttrMultiProcessorCount, device);
    }
    if (error != cudaSuccess) {
        return cudaGetErrorString(error);
    }
    return given.rows < 8192 ? linear_act_128x256(given, launch) : linear_act_192x128(given, launch);
}

}  // namespace mplug2_fast::cuda
