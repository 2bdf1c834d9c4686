// out = residual + activation(x . weight^T + bias) for Hopper: wgmma fed by TMA.
//
// One CTA runs on each multiprocessor and computes tile after tile. In its last warpgroup, one thread copies blocks of
// x and weight, 64 wide in the dimension that is summed over, into a ring of stages in shared memory. Two warpgroups
// multiply them in turns: each has its own tile, and while one multiplies, the other finishes its tile.
//
// Two CTAs form a cluster with neighbouring tiles. Each copies half of the block of x, which both need, into the
// shared memory of both.
//
// A finished tile is written through shared memory in boxes of 64 x 64 elements. A box first holds the residual, which
// TMA loaded while the tile was multiplied; the result replaces it, and TMA stores it. TMA loads rows and columns that
// do not exist as zeros, and does not store them.
//
// Shared memory consists of rows of 128 bytes (64 elements). Chunk c of 16 bytes of row r is at chunk c ^ (r % 8),
// which TMA and wgmma call the swizzle of 128 bytes.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "cuda/linear_act.h"

namespace mplug2_fast::cuda {
namespace {

constexpr int kDepth = 64;      // elements of the summed dimension in a stage: 128 bytes
constexpr int kRowBytes = 128;  // of a row in shared memory
constexpr int kBox = 64;        // rows and columns of a box
constexpr int kBoxBytes = kBox * kRowBytes;
constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumers = 2;    // warpgroups that multiply; one more copies
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kAlignment = 1024;  // of swizzled memory: eight rows

// Named barriers; __syncthreads uses 0.
enum { kTurnBarrier = 1, kBoxBarrier = kTurnBarrier + kConsumers };

// The work of a warpgroup, in elements of the output. On an H200 the fastest of 64x256, 128x128 and, of both warpgroups
// together, 128x256 and 256x128, with and without clusters.
constexpr int kRows = 128;
constexpr int kColumns = 128;
constexpr int kStages = 5;
constexpr int kGroup = 4;  // rows of tiles that are computed together and share blocks in the second-level cache

constexpr int kPair = 2;                           // CTAs of a cluster
constexpr int kPairColumns = kPair * kColumns;     // of their tiles
constexpr int kXPart = kRows / kPair;              // rows of x that one CTA copies for both
constexpr int kBlocks = kRows / kBox;              // of 64 rows, what one wgmma computes
constexpr int kBoxes = kBlocks * kColumns / kBox;  // of a tile; each has its own place in shared memory
constexpr int kXBytes = kRows * kRowBytes;
constexpr int kStageBytes = kXBytes + kColumns * kRowBytes;
constexpr int kReleases = kPair * (kWarpgroup / 32);  // warps that release a stage, in both CTAs

// Offsets in shared memory.
constexpr int kBoxesAt = kStages * kStageBytes;
constexpr int kFullAt = kBoxesAt + kConsumers * kBoxes * kBoxBytes;
constexpr int kEmptyAt = kFullAt + 8 * kStages;
constexpr int kResidualAt = kEmptyAt + 8 * kStages;
constexpr int kSharedBytes = kResidualAt + 8 * kConsumers + kAlignment;

struct Maps {
    CUtensorMap x, weight, residual, out;
};

struct Problem {
    const void* bias;
    int columns;    // of the output
    int steps;      // stages per tile
    int pair_rows;  // pairs of tiles; a cluster computes a pair at a time
    int pair_columns;
};

// ---- PTX instructions that C++ lacks. Addresses are those of the shared memory window.

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(std::uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_expect(std::uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the barrier at the same place in CTA `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(std::uint32_t barrier, int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

__device__ __forceinline__ bool barrier_passed(std::uint32_t barrier, int parity) {
    std::uint32_t passed;
    asm volatile(
        "{\n"
        ".reg .pred passed;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 passed, [%1], %2;\n"
        "selp.u32 %0, 1, 0, passed;\n"
        "}"
        : "=r"(passed)
        : "r"(barrier), "r"(parity)
        : "memory");
    return passed != 0;
}

// Waits until the phase with this parity has ended.
__device__ __forceinline__ void barrier_wait(std::uint32_t barrier, int parity) {
    while (!barrier_passed(barrier, parity)) {
    }
}

__device__ __forceinline__ void named_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ int cluster_rank() {
    std::uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile(
        "barrier.cluster.arrive.release;\n"
        "barrier.cluster.wait.acquire;" ::
            : "memory");
}

__device__ __forceinline__ void prefetch(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Loads a box from global into shared memory; `barrier` counts its bytes.
__device__ __forceinline__ void load(std::uint32_t to, const CUtensorMap* map, int column, int row,
                                     std::uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// The same, but into both CTAs of the cluster, at the same place. The barrier of each counts.
__device__ __forceinline__ void load_to_both(std::uint32_t to, const CUtensorMap* map, int column, int row,
                                             std::uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<std::uint16_t>(3))
        : "memory");
}

// Stores a box from shared into global memory, as a separate group.
__device__ __forceinline__ void store(const CUtensorMap* map, int column, int row, std::uint32_t from) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];\n"
        "cp.async.bulk.commit_group;" ::"l"(map),
        "r"(column), "r"(row), "r"(from)
        : "memory");
}

// Waits until all but the last kPending stores of this thread have read their box.
template <int kPending>
__device__ __forceinline__ void wait_for_stores() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Makes this thread's writes to shared memory visible to TMA.
__device__ __forceinline__ void fence_for_stores() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void load_matrices(std::uint32_t (&to)[4], std::uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

__device__ __forceinline__ void store_matrices(std::uint32_t row, const std::uint32_t (&from)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(from[0]),
                 "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
}

// The operand of wgmma whose rows begin at `address`: 64 elements of the summed dimension, the swizzle of 128 bytes
// (1 << 62), 1024 bytes from eight rows to the next. The 16 elements at 16 * k of the summed dimension are those of the
// descriptor + 2 * k, because the swizzle changes bits 4 to 6 of an address, and wgmma swizzles whole addresses.
__device__ __forceinline__ std::uint64_t operand(std::uint32_t address) {
    return (std::uint64_t{1} << 62) | (std::uint64_t{1024 >> 4} << 32) | (std::uint64_t{1} << 16) |
           ((address & 0x3FFFF) >> 4);
}

__device__ __forceinline__ void multiply_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void multiply_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void multiply_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// clang-format off
#define OUTPUTS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OUTPUTS_16(d, i) OUTPUTS_4(d, i), OUTPUTS_4(d, i + 4), OUTPUTS_4(d, i + 8), OUTPUTS_4(d, i + 12)
#define OUTPUTS_64(d) OUTPUTS_16(d, 0), OUTPUTS_16(d, 16), OUTPUTS_16(d, 32), OUTPUTS_16(d, 48)
#define REGISTERS_64 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
    "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
    "%59, %60, %61, %62, %63}"
// clang-format on

// sums = (keep ? sums : 0) + x . weight^T of 64 rows, 128 columns and 16 elements. Thread t holds, at 4 * j + i, row
// 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2) and column 8 * j + 2 * (t % 4) + i % 2.
#define DEFINE_MULTIPLY(Type, type)                                                                                  \
    __device__ __forceinline__ void multiply_add(float (&sums)[64], std::uint64_t x, std::uint64_t weight, int keep, \
                                                 Type) {                                                             \
        asm volatile(                                                                                                \
            "{\n"                                                                                                    \
            ".reg .pred keep;\n"                                                                                     \
            "setp.ne.b32 keep, %66, 0;\n"                                                                            \
            "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " REGISTERS_64                            \
            ", %64, %65, keep, 1, 1, 0, 0;\n"                                                                        \
            "}"                                                                                                      \
            : OUTPUTS_64(sums)                                                                                       \
            : "l"(x), "l"(weight), "r"(keep));                                                                       \
    }
DEFINE_MULTIPLY(__nv_bfloat16, "bf16")
DEFINE_MULTIPLY(__half, "f16")

// Keeps the compiler from using the sums before wgmma has finished.
__device__ __forceinline__ void settle(float (&sums)[kBlocks][64]) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            asm volatile("" : "+f"(sums[b][i])::"memory");
        }
    }
}

// ---- Arithmetic of the epilogue

__device__ __forceinline__ float2 unpack(std::uint32_t pair, __nv_bfloat16) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

__device__ __forceinline__ float2 unpack(std::uint32_t pair, __half) {
    __half2 halves;
    reinterpret_cast<std::uint32_t&>(halves) = pair;
    return __half22float2(halves);
}

__device__ __forceinline__ std::uint32_t pack(float2 values, __nv_bfloat16) {
    std::uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(values.y), "f"(values.x));
    return pair;
}

__device__ __forceinline__ std::uint32_t pack(float2 values, __half) {
    std::uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(values.y), "f"(values.x));
    return pair;
}

template <Activation kActivation>
__device__ __forceinline__ float activate(float x) {
    if constexpr (kActivation == Activation::quick_gelu) {
        // sigmoid(2 y) = (1 + tanh(y)) / 2
        const float half = 0.5f * x;
        float tanh;
        asm("tanh.approx.f32 %0, %1;" : "=f"(tanh) : "f"(0.851f * x));
        return fmaf(half, tanh, half);
    } else if constexpr (kActivation == Activation::gelu) {
        // x * Phi(x), with Phi(-|x|) = poly(t) * exp(-x^2 / 2) / 2 and t = 1 / (1 + 0.3275911 |x| / sqrt(2)):
        // Abramowitz and Stegun, 7.1.26. Using the lower tail for both signs avoids cancellation for negative x; it is
        // zero beyond 14.
        const float size = fminf(fabsf(x), 14.0f);
        const float t = __fdividef(1.0f, fmaf(0.231641888f, size, 1.0f));
        float p = 0.5307027145f;
        p = fmaf(p, t, -0.7265760135f);
        p = fmaf(p, t, 0.7107068705f);
        p = fmaf(p, t, -0.142248368f);
        p = fmaf(p, t, 0.127414796f);
        const float tail = p * t * exp2f(-0.72134752f * size * size);
        return fmaf(-size, tail, x < 0.0f ? 0.0f : x);
    } else {
        return x;
    }
}

// ---- The kernel

// A place in the ring, and the parity of the round in which it is used.
struct Place {
    int stage = 0;
    int parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }

    __device__ __forceinline__ void skip(int steps) {
        parity ^= ((stage + steps) / kStages) & 1;
        stage = (stage + steps) % kStages;
    }
};

// The tiles of a CTA: number i is its half of pair first + i * stride. Pairs are numbered down a group's rows, then in
// the next column.
struct Tiles {
    const Problem& problem;
    int rank, first, stride, count;

    __device__ __forceinline__ Tiles(const Problem& problem, int rank)
        : problem(problem), rank(rank), first(blockIdx.x / kPair), stride(gridDim.x / kPair) {
        const int pairs = problem.pair_rows * problem.pair_columns;
        count = (pairs - first + stride - 1) / stride;
    }

    // The tile's first row and column in the output.
    __device__ __forceinline__ int2 origin(int i) const {
        const int pair = first + i * stride;
        const int in_group = kGroup * problem.pair_columns;
        const int first_row = pair / in_group * kGroup;
        const int rows = min(kGroup, problem.pair_rows - first_row);
        const int within = pair % in_group;
        return make_int2((first_row + within % rows) * kRows, within / rows * kPairColumns + rank * kColumns);
    }
};

// Copies x and weight into the ring. One thread of each CTA.
__device__ __forceinline__ void produce(const Maps& maps, const Problem& problem, const Tiles& tiles,
                                        std::uint32_t base) {
    Place place;
    const int part = tiles.rank * kXPart;
    for (int i = 0; i < tiles.count; ++i) {
        const int2 origin = tiles.origin(i);
        for (int step = 0; step < problem.steps; ++step) {
            const std::uint32_t full = base + kFullAt + 8 * place.stage;
            const std::uint32_t x = base + place.stage * kStageBytes;
            barrier_wait(base + kEmptyAt + 8 * place.stage, place.parity ^ 1);
            barrier_expect(full, kStageBytes);
            load_to_both(x + part * kRowBytes, &maps.x, step * kDepth, origin.x + part, full);
            load(x + kXBytes, &maps.weight, step * kDepth, origin.y, full);
            place.advance();
        }
    }
}

// Loads the residual of a warpgroup's tile into its boxes.
__device__ __forceinline__ void load_residual(const Maps& maps, int row, int column, std::uint32_t boxes,
                                              std::uint32_t barrier) {
    barrier_expect(barrier, kBoxes * kBoxBytes);
#pragma unroll
    for (int i = 0; i < kBoxes; ++i) {
        load(boxes + i * kBoxBytes, &maps.residual, column + i / kBlocks * kBox, row + i % kBlocks * kBox, barrier);
    }
}

// Multiplies and finishes tiles. Run by all threads of the warpgroups that multiply.
template <typename Element, Activation kActivation, bool kResidual>
__device__ __forceinline__ void consume(const Maps& maps, const Problem& problem, const Tiles& tiles,
                                        std::uint32_t base, int warpgroup) {
    const int thread = threadIdx.x % kWarpgroup;
    const int lane = threadIdx.x % 32;
    const std::uint32_t boxes = base + kBoxesAt + warpgroup * kBoxes * kBoxBytes;
    const std::uint32_t residual_barrier = base + kResidualAt + 8 * warpgroup;
    // In a box: the row and the chunk (of two) whose address this lane passes to ldmatrix and stmatrix. The four
    // matrices of 8 x 8 are the upper and the lower half of a warp's 16 rows at one chunk, and the same at the next.
    const int box_row = thread / 32 * 16 + lane % 16;
    const int box_chunk = lane / 16;

    Place place;
    place.skip(warpgroup * problem.steps);
    int residual_parity = 0;
    if constexpr (kResidual) {
        if (thread == 0 && warpgroup < tiles.count) {
            const int2 origin = tiles.origin(warpgroup);
            load_residual(maps, origin.x, origin.y, boxes, residual_barrier);
        }
        __syncwarp();
    }

    const auto release = [&](int stage) {
        if (lane < kPair) {
            barrier_arrive_at(base + kEmptyAt + 8 * stage, lane);
        }
        __syncwarp();
    };

    for (int i = warpgroup; i < tiles.count; i += kConsumers) {
        const int2 origin = tiles.origin(i);

        // Taking turns also keeps this warpgroup from waiting for a round of the ring before the previous one began,
        // which has the same parity as the one before that.
        if (i > 0) {
            named_sync(kTurnBarrier + warpgroup, 2 * kWarpgroup);
        }
        float sums[kBlocks][kColumns / 2];
        int previous = 0;
        for (int step = 0; step < problem.steps; ++step) {
            const std::uint32_t stage = base + place.stage * kStageBytes;
            const std::uint64_t x = operand(stage);
            const std::uint64_t weight = operand(stage + kXBytes);
            barrier_wait(base + kFullAt + 8 * place.stage, place.parity);
            settle(sums);
            multiply_begin();
#pragma unroll
            for (int k = 0; k < kDepth / 16; ++k) {
#pragma unroll
                for (int b = 0; b < kBlocks; ++b) {
                    multiply_add(sums[b], x + b * (kBoxBytes >> 4) + 2 * k, weight + 2 * k, step | k, Element{});
                }
            }
            multiply_commit();
            settle(sums);
            // The previous stage is finished; this one is being multiplied.
            multiply_wait<1>();
            if (step > 0) {
                release(previous);
            }
            previous = place.stage;
            place.advance();
        }
        if (i + 1 < tiles.count) {
            named_arrive(kTurnBarrier + (warpgroup ^ 1), 2 * kWarpgroup);
        }
        multiply_wait<0>();
        settle(sums);
        release(previous);

        if constexpr (kResidual) {
            barrier_wait(residual_barrier, residual_parity);
            residual_parity ^= 1;
        }
        const Element* bias = static_cast<const Element*>(problem.bias);
#pragma unroll
        for (int c = 0; c < kColumns / kBox; ++c) {
            float2 biases[kBox / 8];
#pragma unroll
            for (int j = 0; j < kBox / 8; ++j) {
                const int column = origin.y + c * kBox + 8 * j + 2 * (lane % 4);
                biases[j] = bias && column < problem.columns
                                ? unpack(__ldg(reinterpret_cast<const std::uint32_t*>(bias + column)), Element{})
                                : make_float2(0.0f, 0.0f);
            }
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                const std::uint32_t box = boxes + (c * kBlocks + b) * kBoxBytes;
#pragma unroll
                for (int j = 0; j < kBox / 8; j += 2) {
                    const std::uint32_t at = box + box_row * kRowBytes + (((j + box_chunk) ^ (box_row % 8)) << 4);
                    std::uint32_t residual[4];
                    if constexpr (kResidual) {
                        load_matrices(residual, at);
                    }
                    std::uint32_t results[4];
#pragma unroll
                    for (int m = 0; m < 4; ++m) {
                        const float* sum = &sums[b][4 * (c * (kBox / 8) + j + m / 2) + 2 * (m % 2)];
                        float2 result = make_float2(activate<kActivation>(sum[0] + biases[j + m / 2].x),
                                                    activate<kActivation>(sum[1] + biases[j + m / 2].y));
                        if constexpr (kResidual) {
                            const float2 more = unpack(residual[m], Element{});
                            result.x += more.x;
                            result.y += more.y;
                        }
                        results[m] = pack(result, Element{});
                    }
                    store_matrices(at, results);
                }
                fence_for_stores();
                // After this barrier the box is written, and the place of the next one has been read.
                if (!kResidual && thread == 0) {
                    wait_for_stores<kBoxes - 2>();
                }
                __syncwarp();
                named_sync(kBoxBarrier + warpgroup, kWarpgroup);
                if (thread == 0) {
                    store(&maps.out, origin.y + c * kBox, origin.x + b * kBox, box);
                }
                __syncwarp();
            }
        }
        place.skip(problem.steps);
        if constexpr (kResidual) {
            if (thread == 0 && i + kConsumers < tiles.count) {
                const int2 next = tiles.origin(i + kConsumers);
                wait_for_stores<0>();
                load_residual(maps, next.x, next.y, boxes, residual_barrier);
            }
            __syncwarp();
        }
    }
    if (thread == 0) {
        wait_for_stores<0>();
    }
}

template <typename Element, Activation kActivation, bool kResidual>
__global__ void __launch_bounds__(kThreads, 1)
    linear_act_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Problem problem) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ unsigned char shared[];
    const std::uint32_t base = (shared_address(shared) + kAlignment - 1) / kAlignment * kAlignment;
    const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / kWarpgroup, 0);
    const Tiles tiles(problem, cluster_rank());

    if (threadIdx.x == 0) {
        prefetch(&maps.x);
        prefetch(&maps.weight);
        prefetch(&maps.out);
        for (int stage = 0; stage < kStages; ++stage) {
            barrier_init(base + kFullAt + 8 * stage, 1);
            barrier_init(base + kEmptyAt + 8 * stage, kReleases);
        }
        for (int consumer = 0; consumer < kConsumers; ++consumer) {
            barrier_init(base + kResidualAt + 8 * consumer, 1);
        }
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
    }
    // No CTA of a pair copies into the other before the other's barriers exist, or ends before the other.
    cluster_sync();
    if (warpgroup == kConsumers) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == kConsumers * kWarpgroup) {
            produce(maps, problem, tiles, base);
        }
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume<Element, kActivation, kResidual>(maps, problem, tiles, base, warpgroup);
    }
    cluster_sync();
#endif
}

// ---- Host code

// cuTensorMapEncodeTiled, found at run time so that the driver is not linked; null if it is missing.
decltype(&cuTensorMapEncodeTiled) encoder() {
    static const auto found = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
        if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
            function = nullptr;
        }
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    return found;
}

// The map of a matrix that is copied in boxes of 64 columns and `box_rows` rows.
bool encode(CUtensorMap* map, Type type, const void* matrix, std::int64_t rows, std::int64_t columns,
            std::int64_t stride, int box_rows) {
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
    const cuuint32_t box[2] = {kBox, static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t steps[2] = {1, 1};
    return encoder()(map, type == Type::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                     const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

std::int64_t divide_up(std::int64_t value, int by) {
    return (value + by - 1) / by;
}

// Number of multiprocessors of the current device, or 0.
int multiprocessors() {
    int device = 0;
    int count = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
        return 0;
    }
    return count;
}

template <typename Element, Activation kActivation, bool kResidual>
const char* launch(const LinearActArguments& a, cudaStream_t stream) {
    Maps maps;
    if (!encode(&maps.x, a.type, a.x, a.rows, a.in_features, a.x_stride, kXPart) ||
        !encode(&maps.weight, a.type, a.weight, a.out_features, a.in_features, a.weight_stride, kColumns) ||
        !encode(&maps.out, a.type, a.out, a.rows, a.out_features, a.out_stride, kBox) ||
        !encode(&maps.residual, a.type, kResidual ? a.residual : a.out, a.rows, a.out_features,
                kResidual ? a.residual_stride : a.out_stride, kBox)) {
        return "cuTensorMapEncodeTiled refused a matrix";
    }
    const Problem problem = {
        a.bias, static_cast<int>(a.out_features), static_cast<int>(divide_up(a.in_features, kDepth)),
        static_cast<int>(divide_up(a.rows, kRows)), static_cast<int>(divide_up(a.out_features, kPairColumns))};
    const auto kernel = linear_act_kernel<Element, kActivation, kResidual>;
    const int count = multiprocessors();
    if (count < kPair) {
        return "there is no GPU";
    }
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error == cudaSuccess) {
        const int clusters = std::min(problem.pair_rows * problem.pair_columns, count / kPair);
        cudaLaunchConfig_t configuration = {};
        configuration.gridDim = dim3(static_cast<unsigned>(clusters * kPair));
        configuration.blockDim = dim3(kThreads);
        configuration.dynamicSmemBytes = kSharedBytes;
        configuration.stream = stream;
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = kPair;
        attribute.val.clusterDim.y = 1;
        attribute.val.clusterDim.z = 1;
        configuration.attrs = &attribute;
        configuration.numAttrs = 1;
        error = cudaLaunchKernelEx(&configuration, kernel, maps, problem);
    }
    if (error == cudaSuccess) {
        return nullptr;
    }
    cudaGetLastError();  // clears the error, which others would take for theirs
    return cudaGetErrorString(error);
}

template <typename Element, Activation kActivation>
const char* launch(const LinearActArguments& arguments, cudaStream_t stream) {
    return arguments.residual ? launch<Element, kActivation, true>(arguments, stream)
                              : launch<Element, kActivation, false>(arguments, stream);
}

template <typename Element>
const char* launch(const LinearActArguments& arguments, cudaStream_t stream) {
    switch (arguments.activation) {
        case Activation::none:
            return launch<Element, Activation::none>(arguments, stream);
        case Activation::gelu:
            return launch<Element, Activation::gelu>(arguments, stream);
        case Activation::quick_gelu:
            return launch<Element, Activation::quick_gelu>(arguments, stream);
    }
    return "no such activation";
}

const char* check(const LinearActArguments& a) {
    const auto aligned = [](const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; };
    const auto row = [](std::int64_t stride, std::int64_t columns) { return stride % 8 == 0 && stride >= columns; };
    constexpr std::int64_t kLargest = std::int64_t{1} << 30;
    if (a.rows < 0 || a.in_features < 1 || a.out_features < 1 || a.rows > kLargest || a.in_features > kLargest ||
        a.out_features > kLargest || divide_up(a.rows, kRows) * divide_up(a.out_features, kPairColumns) > kLargest) {
        return "sizes are out of range";
    }
    if (a.in_features % 8 || a.out_features % 8 || !row(a.x_stride, a.in_features) ||
        !row(a.weight_stride, a.in_features) || !row(a.out_stride, a.out_features) ||
        (a.residual && !row(a.residual_stride, a.out_features))) {
        return "sizes and strides of rows are not multiples of 8";
    }
    if (!aligned(a.x) || !aligned(a.weight) || !aligned(a.bias) || !aligned(a.residual) || !aligned(a.out)) {
        return "addresses are not multiples of 16";
    }
    return nullptr;
}

}  // namespace

const char* linear_act(const LinearActArguments& arguments, void* stream) {
    if (const char* error = check(arguments)) {
        return error;
    }
    if (arguments.rows == 0) {
        return nullptr;
    }
    if (!encoder()) {
        return "the driver has no cuTensorMapEncodeTiled";
    }
    const auto on = static_cast<cudaStream_t>(stream);
    return arguments.type == Type::bf16 ? launch<__nv_bfloat16>(arguments, on) : launch<__half>(arguments, on);
}

}  // namespace mplug2_fast::cuda
