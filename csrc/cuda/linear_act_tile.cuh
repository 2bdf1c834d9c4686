// One shape of tiles of linear_act, on CUTLASS: TMA brings operands and residual into shared memory, warp groups that
// are specialised multiply, and the epilogue adds bias, activation and residual before TMA stores.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>

#include <cstdint>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <type_traits>

#include "cuda/linear_act_tiles.h"

namespace mplug2_fast::cuda {

// Two consumer warp groups either take tiles in turns, so that the epilogue of one runs beside the products of the
// other, or share each tile.
enum class Groups { take_turns, share };

struct EpilogueArguments {
    Activation activation;
    bool residual;
};

__device__ inline float tanh_approximately(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x * Phi(x) by Abramowitz and Stegun, 7.1.26, within 1e-7 * |x|; the lower tail for both signs keeps negative x from
// cancelling.
__device__ inline float gelu(float x) {
    const float size = fabsf(x);
    const float t = __fdividef(1.0f, 1.0f + 0.231641888f * size);
    float p = 0.5307027145f;
    p = fmaf(p, t, -0.7265760135f);
    p = fmaf(p, t, 0.7107068705f);
    p = fmaf(p, t, -0.142248368f);
    p = fmaf(p, t, 0.127414796f);
    const float tail = p * t * exp2f(-0.72134752f * size * size);
    // An infinite x times the tail's zero is no number; beyond 14 the tail is zero.
    return x == x ? fmaxf(x, 0.0f) - (size > 14.0f ? 0.0f : size * tail) : x;
}

// x * sigmoid(1.702 x) = x / 2 * (1 + tanh(0.851 x)).
__device__ inline float quick_gelu(float x) {
    const float half = 0.5f * x;
    return fmaf(half, tanh_approximately(0.851f * x), half);
}

template <class Fragment>
struct Epilogue {
    using Arguments = EpilogueArguments;

    __device__ Fragment operator()(const Fragment& sums, const Fragment& bias, const Fragment& residual,
                                   const Arguments& arguments) const {
        Fragment out;
#pragma unroll
        for (int i = 0; i < Fragment::kElements; ++i) {
            out[i] = sums[i] + bias[i];
        }
        if (arguments.activation == Activation::quick_gelu) {
#pragma unroll
            for (int i = 0; i < Fragment::kElements; ++i) {
                out[i] = quick_gelu(out[i]);
            }
        } else if (arguments.activation == Activation::gelu) {
#pragma unroll
            for (int i = 0; i < Fragment::kElements; ++i) {
                out[i] = gelu(out[i]);
            }
        }
        if (arguments.residual) {
#pragma unroll
            for (int i = 0; i < Fragment::kElements; ++i) {
                out[i] += residual[i];
            }
        }
        return out;
    }
};
template <>
struct Epilogue<float> {
    using Arguments = EpilogueArguments;
};

// The residual, which is not loaded where there is none.
template <class Element>
struct Residual : cutlass::epilogue::fusion::Sm90SrcFetch<Element> {
    struct SharedStorage {};
    struct Arguments {
        bool given;
    };
    using Params = Arguments;
    bool given;

    CUTLASS_HOST_DEVICE Residual() {}
    CUTLASS_HOST_DEVICE Residual(const Params& params, const SharedStorage&) : given(params.given) {}

    template <class Sizes>
    static constexpr Params to_underlying_arguments(const Sizes&, const Arguments& arguments, void*) {
        return arguments;
    }
    template <class Sizes>
    static bool can_implement(const Sizes&, const Arguments&) {
        return true;
    }
    template <class Sizes>
    static std::size_t get_workspace_size(const Sizes&, const Arguments&) {
        return 0;
    }
    template <class Sizes>
    static cutlass::Status initialize_workspace(const Sizes&, const Arguments&, void*, cudaStream_t,
                                                cutlass::CudaHostAdapter* = nullptr) {
        return cutlass::Status::kSuccess;
    }
    CUTLASS_DEVICE bool is_producer_load_needed() const { return given; }
    CUTLASS_DEVICE bool is_C_load_needed() const { return given; }
    CUTLASS_DEVICE bool is_zero() const { return !given; }
};

template <class Element, int kRows, int kColumns, Groups kGroups, int kClusterRows, int kClusterColumns,
          int kEpilogueColumns>
struct Tile {
    static constexpr int kRowsOfTile = kRows, kColumnsOfTile = kColumns;
    using Shape = cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::_64>;
    using Cluster = cute::Shape<cute::Int<kClusterRows>, cute::Int<kClusterColumns>, cute::_1>;
    using Schedule = std::conditional_t<kGroups == Groups::share, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                                        cutlass::gemm::KernelTmaWarpSpecializedPingpong>;
    using EpilogueSchedule =
        std::conditional_t<kGroups == Groups::share, cutlass::epilogue::TmaWarpSpecializedCooperative,
                           cutlass::epilogue::TmaWarpSpecialized>;
    using EpilogueShape = cute::Shape<cute::Int<kGroups == Groups::share ? 128 : 64>, cute::Int<kEpilogueColumns>>;
    using RowMajor = cutlass::layout::RowMajor;

    static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
    using Fusion =
        cutlass::epilogue::fusion::Sm90EVT<cutlass::epilogue::fusion::Sm90Compute<Epilogue, Element, float, kRound>,
                                           cutlass::epilogue::fusion::Sm90AccFetch,
                                           cutlass::epilogue::fusion::Sm90RowBroadcast<0, Shape, Element, float>,
                                           Residual<Element>>;

    using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Shape, Cluster, EpilogueShape, float, float, Element,
        RowMajor, 8, Element, RowMajor, 8, EpilogueSchedule, Fusion>::CollectiveOp;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, 8, Element,
        cutlass::layout::ColumnMajor, 8, float, Shape, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename CollectiveEpilogue::SharedStorage)>,
        Schedule>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, CollectiveEpilogue,
                                                        cutlass::gemm::PersistentScheduler>;

    static const char* run(const LinearActArguments& given, const Launch& launch) {
        const auto* x = static_cast<const Element*>(given.x);
        const auto* weight = static_cast<const Element*>(given.weight);
        const auto* bias = static_cast<const Element*>(given.bias);
        const auto* residual = static_cast<const Element*>(given.residual);
        auto* out = static_cast<Element*>(given.out);
        typename Kernel::Arguments arguments{
            cutlass::gemm::GemmUniversalMode::kGemm,
            {static_cast<int>(given.rows), static_cast<int>(given.out_features), static_cast<int>(given.in_features),
             1},
            {x, {given.x_stride, {}, 0}, weight, {given.weight_stride, {}, 0}},
            {{{}, {bias, Element(0.0f), {}}, {residual != nullptr}, {given.activation, residual != nullptr}},
             residual != nullptr ? residual : out,
             {residual != nullptr ? given.residual_stride : given.out_stride, {}, 0},
             out,
             {given.out_stride, {}, 0}},
            {},
            {}};
        arguments.hw_info.sm_count = launch.processors;
        arguments.scheduler.max_swizzle_size = launch.swizzle;
        const typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);

        void (*const kernel)(typename Kernel::Params) = cutlass::device_kernel<Kernel>;
        // Of every device, for the current one may be another than before.
        if (cudaError_t error =
                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize)) {
            return cudaGetErrorString(error);
        }
        cudaLaunchAttribute cluster;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {kClusterRows, kClusterColumns, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = Kernel::get_grid_shape(params);
        config.blockDim = Kernel::get_block_shape();
        config.dynamicSmemBytes = Kernel::SharedStorageSize;
        config.stream = launch.stream;
        config.attrs = &cluster;
        config.numAttrs = 1;
        const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
        return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
    }
};

template <int kRows, int kColumns, Groups kGroups, int kClusterRows, int kClusterColumns, int kEpilogueColumns = 32>
const char* run(const LinearActArguments& given, const Launch& launch) {
    if (given.type == Type::bf16) {
        return Tile<cutlass::bfloat16_t, kRows, kColumns, kGroups, kClusterRows, kClusterColumns,
                    kEpilogueColumns>::run(given, launch);
    }
    return Tile<cutlass::half_t, kRows, kColumns, kGroups, kClusterRows, kClusterColumns, kEpilogueColumns>::run(
        given, launch);
}

}  // namespace mplug2_fast::cuda
