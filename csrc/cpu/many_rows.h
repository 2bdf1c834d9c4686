#pragma once

// Products of many rows with the rows of a weight, in blocks that fit into the caches: a panel of the weight into the
// first level, a block of x into the second, the packed columns into the third (Goto and van de Geijn, "Anatomy of
// high-performance matrix multiplication", 2008).

#include "cpu/activation.h"
#include "cpu/attention_plan.h"
#include "cpu/kept_memory.h"
#include "cpu/linear_act.h"
#include "cpu/parallel.h"
#include "cpu/product.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

constexpr std::int64_t kPanelColumns = kProductVectors * kLanes;
constexpr std::int64_t kBlockDepth = 512;
constexpr std::int64_t kBlockRows = 192;
constexpr std::int64_t kBlockColumns = 4096;
constexpr std::int64_t kRowGap = 16;  // keeps the rows of a block of x out of the same sets of the cache

// Some rows of out and up to kPanelColumns of its columns: a part of the sum over the depth.
struct PanelProduct {
    const float* x;
    std::int64_t x_stride, depth;
    const Word* panel;
    float* out;
    std::int64_t out_stride;
    int columns;
    bool first, last;  // parts of the sum
    const float *bias, *residual;
    Activation activation;

    template <int kRows, int kVectors>
    __attribute__((noinline)) void run() const {
        const auto [x, x_stride, depth, panel, out, out_stride, columns, first, last, bias, residual, activation] =
            *this;  // copies avoid reloads after stores
        F32 acc[kRows][kVectors] = {};
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            __builtin_prefetch(out + r * out_stride, 1);
        }
        multiply<false>(acc, reinterpret_cast<const Word*>(x), x_stride, panel, kLanes, depth * kLanes, depth);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
            for (int n = 0; n < kVectors; ++n) {
                const std::int64_t column = n * kLanes, at = r * out_stride + column;
                const int count = columns - static_cast<int>(column);
                const bool whole = count >= kLanes;
                const auto take = [&](const float* from) { return whole ? load(from) : load_first(from, count); };
                F32 value = first ? acc[r][n] : acc[r][n] + take(out + at);
                if (last) {
                    value = bias ? value + take(bias + column) : value;
                    value = activation == Activation::gelu         ? gelu(value)
                            : activation == Activation::quick_gelu ? quick_gelu<24>(value)
                                                                   : value;
                    value = residual ? value + take(residual + at) : value;
                }
                whole ? store(out + at, value) : store_first(out + at, value, count);
            }
        }
    }
};

void multiply_columns(const LinearActArguments& a, std::int64_t begin, std::int64_t end) {
    const auto* x = static_cast<const float*>(a.x);
    const auto* weight = static_cast<const float*>(a.weight);
    const auto* bias = static_cast<const float*>(a.bias);
    const auto* residual = static_cast<const float*>(a.residual);
    auto* out = static_cast<float*>(a.out);
    const Cut columns(end - begin, kBlockColumns, kPanelColumns);
    const Cut depths(a.in_features, kBlockDepth, kLanes), rows(a.rows, kBlockRows, kProductRows);
    const std::int64_t x_stride = depths.size + kRowGap;
    const std::int64_t panel_bytes = Scratch::bytes<Word>(columns.size * depths.size);
    char* memory = static_cast<char*>(kept_memory(panel_bytes + Scratch::bytes<float>(rows.size * x_stride)));
    Word* panels = reinterpret_cast<Word*>(memory);
    float* block = reinterpret_cast<float*>(memory + panel_bytes);
    for (std::int64_t n = 0; n < columns.parts; ++n) {
        const std::int64_t column = begin + columns.begin(n), width = columns.length(n);
        for (std::int64_t d = 0; d < depths.parts; ++d) {
            const std::int64_t k = depths.begin(d), depth = depths.length(d);
            const Tokens<float> of_weight{weight + k, a.in_features, nullptr};
            const auto ahead = static_cast<std::int64_t>(sizeof(float)) * kLanes * a.in_features;
            pack_keys<false>(of_weight, column, width, depth, ahead, panels);
            for (std::int64_t m = 0; m < rows.parts; ++m) {
                const std::int64_t row = rows.begin(m), height = rows.length(m);
                for (std::int64_t r = 0; r < height; ++r) {
                    std::memcpy(block + r * x_stride, x + (row + r) * a.x_stride + k, depth * sizeof(float));
                }
                for (std::int64_t c = 0; c < width; c += kPanelColumns) {
                    const int count = static_cast<int>(at_most(kPanelColumns, width - c));
                    for (std::int64_t r = 0; r < height; r += kProductRows) {
                        const std::int64_t at = (row + r) * a.out_features + column + c;
                        dispatch(static_cast<int>(at_most(kProductRows, height - r)),
                                 static_cast<int>(divide_up(count, kLanes)),
                                 PanelProduct{block + r * x_stride, x_stride, depth, panels + c * depth, out + at,
                                              a.out_features, count, d == 0, d + 1 == depths.parts,
                                              bias ? bias + column + c : nullptr, residual ? residual + at : nullptr,
                                              a.activation});
                    }
                }
            }
        }
    }
}

// The threads share the columns, so that the result does not depend on their number.
void multiply_many_rows(const LinearActArguments& a) {
    parallel_ranges(divide_up(a.out_features, kPanelColumns), a.threads, [&](std::int64_t begin, std::int64_t end) {
        multiply_columns(a, begin * kPanelColumns, at_most(end * kPanelColumns, a.out_features));
    });
}

}  // namespace
}  // namespace mplug2_fast::MPLUG2_ISA
