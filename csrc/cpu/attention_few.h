#pragma once

// Attention of a few queries. Most of the time is spent reading keys and values, so both are used without packing.

#include <type_traits>

#include "cpu/attention_parts.h"
#include "cpu/attention_plan.h"
#include "cpu/few_rows.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

template <typename Element>
using StepOf = std::conditional_t<std::is_same_v<Element, float>, FloatStep, Bf16Step>;

// sums = sums * correction + weights * values, for some rows of sums and vectors of channels.
template <typename Element>
struct FewValues {
    const float* weights;  // rows of kColumns
    Tokens<Element> values;
    std::int64_t first, count, channel, stride;
    float* sums;
    const float* corrections;

    template <int kM, int kVectors>
    __attribute__((noinline)) void run() const {
        const auto [weights, values, first, count, channel, stride, sums, corrections] = *this;
        const std::int64_t ahead = kColumns * values.stride * static_cast<std::int64_t>(sizeof(Element));
        F32 acc[kM][kVectors];
#pragma GCC unroll 6
        for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
            for (int n = 0; n < kVectors; ++n) {
                acc[m][n] = load(sums + m * stride + n * kLanes) * corrections[m];
            }
        }
        for (std::int64_t j = 0; j < count; ++j) {
            const Element* row = values[first + j] + channel;
            F32 vectors[kVectors];
#pragma GCC unroll 4
            for (int n = 0; n < kVectors; ++n) {
                prefetch(row + n * kLanes, ahead);
                vectors[n] = load(row + n * kLanes);
            }
#pragma GCC unroll 6
            for (int m = 0; m < kM; ++m) {
                const F32 weight = broadcast(weights[m * kColumns + j]);
#pragma GCC unroll 4
                for (int n = 0; n < kVectors; ++n) {
                    acc[m][n] += weight * vectors[n];
                }
            }
        }
#pragma GCC unroll 6
        for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
            for (int n = 0; n < kVectors; ++n) {
                store(sums + m * stride + n * kLanes, acc[m][n]);
            }
        }
    }
};

// The products of all queries with up to kColumns keys: `scores` (rows, kColumns), `missing` for lanes without a key.
template <typename Element>
void few_scores(const PackedRows<StepOf<Element>>& queries, const Tokens<Element>& keys, std::int64_t first,
                std::int64_t count, float missing, float* scores, std::int64_t rows) {
    for (std::int64_t j = 0; j < count; j += kRows) {
        Rows<Element> some;
        some.ahead = kColumns * keys.stride;
        for (int r = 0; r < kRows; ++r) {
            some.row[r] = keys[first + at_most(j + r, count - 1)];
        }
        queries.multiply(some, scores + j);
    }
    for (std::int64_t m = 0; m < rows; ++m) {
        for (std::int64_t j = count; j < round_up(count, kLanes); ++j) {
            scores[m * kColumns + j] = missing;
        }
    }
}

// The sums of all queries over one part of the keys: w.sums, w.largest and w.totals.
template <bool kPair, typename Element>
void add_few(const Plan<kPair>& p, const Workspace<kPair>& w, const PackedRows<StepOf<Element>>& queries,
             const Tokens<Element>& keys, const Tokens<Element>& values, std::int64_t keys_there) {
    const std::int64_t rows = p.a.q_len;
    const float sign = p.a.scale < 0 ? -1.0f : 1.0f;
    for (std::int64_t m = 0; m < rows; ++m) {
        w.largest[m] = -__builtin_inff();
        w.totals[m] = 0;
    }
    std::memset(w.sums, 0, rows * p.value_stride * sizeof(float));
    for (std::int64_t first = 0; first < keys_there; first += kColumns) {
        const std::int64_t count = at_most(kColumns, keys_there - first), vectors = divide_up(count, kLanes);
        few_scores(queries, keys, first, count, sign * -__builtin_inff(), w.scores, rows);
        for (std::int64_t m = 0; m < rows; ++m) {
            float* scores = w.scores + m * kColumns;
            F32 most = broadcast(-__builtin_inff());
            for (std::int64_t i = 0; i < vectors; ++i) {
                const F32 signed_scores = load(scores + i * kLanes) * sign;
                store(scores + i * kLanes, signed_scores);
                most = maximum(signed_scores, most);
            }
            weigh_block<false>(p.factor, scores, vectors, largest_of_lanes(most), w.largest[m], w.totals[m],
                               w.corrections[m]);
        }
        const Cut channels(p.a.head_dim / kLanes, kProductVectors, 1);
        for (std::int64_t g = 0; g < channels.parts; ++g) {
            const std::int64_t channel = channels.begin(g) * kLanes;
            for (std::int64_t m = 0; m < rows; m += kProductRows) {
                dispatch(static_cast<int>(at_most(kProductRows, rows - m)), static_cast<int>(channels.length(g)),
                         FewValues<Element>{w.scores + m * kColumns, values, first, count, channel, p.value_stride,
                                            w.sums + m * p.value_stride + channel, w.corrections + m});
            }
        }
    }
}

}  // namespace
}  // namespace mplug2_fast::MPLUG2_ISA
