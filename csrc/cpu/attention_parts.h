#pragma once

// The keys of a (batch, head) pair may be split into parts, which different threads attend to. Their results are
// merged.

#include "cpu/attention_tile.h"
#include "cpu/parallel.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

// Turns `vectors` vectors of scores of a row, with the maximum `most`, into weights in place. `largest` and `total` are
// those of the row's earlier blocks; `correction` becomes the factor for the sums of these blocks.
template <bool kWords>
MPLUG2_INLINE void weigh_block(float factor, float* scores, std::int64_t vectors, float most, float& largest,
                               float& total, float& correction) {
    const float old = largest * factor;
    largest = most > largest ? most : largest;
    const float now = reference(largest, factor);
    correction = power_of_two(old - now);
    total = total * correction + weigh<kWords>(scores, vectors, factor, now);
}

template <typename Element>
MPLUG2_INLINE void write_row(Element* to, std::int64_t head_dim, const float* sums, float total) {
    const F32 factor = broadcast(total == 0 ? 0.0f : 1.0f / total);
    std::int64_t c = 0;
    for (; c + kLanes <= head_dim; c += kLanes) {
        store(to + c, load(sums + c) * factor);
    }
    if (c < head_dim) {
        store_first(to + c, load(sums + c) * factor, static_cast<int>(head_dim - c));
    }
}

// Results of parts, [pair][part][row]: `sums` floats, then the largest score and the total of weights.
struct Partial {
    float* base;
    std::int64_t parts, rows, sums;

    std::int64_t stride() const { return sums + kLanes; }
    std::int64_t floats(std::int64_t pairs) const { return pairs * parts * rows * stride(); }

    float* at(std::int64_t pair, std::int64_t part, std::int64_t row) const {
        return base + ((pair * parts + part) * rows + row) * stride();
    }

    void write(std::int64_t pair, std::int64_t part, std::int64_t row, const float* from, float largest,
               float total) const {
        float* to = at(pair, part, row);
        std::memcpy(to, from, sums * sizeof(float));
        to[sums] = largest;
        to[sums + 1] = total;
    }
};

// The row of the result (batch, rows, heads, head_dim).
template <typename Element>
Element* out_row(Element* out, std::int64_t rows, std::int64_t heads, std::int64_t head_dim, std::int64_t pair,
                 std::int64_t row) {
    const std::int64_t batch = pair / heads, head = pair % heads;
    return out + ((batch * rows + row) * heads + head) * head_dim;
}

// Weights are powers of two: of the scores times `factor`.
template <typename Element>
void merge(const Partial& partial, float factor, std::int64_t pairs, std::int64_t heads, std::int64_t head_dim,
           int threads, Element* out) {
    parallel_ranges(pairs * partial.rows, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t r = begin; r < end; ++r) {
            const std::int64_t pair = r / partial.rows, row = r % partial.rows, n = partial.sums;
            float* sums = partial.at(pair, 0, row);
            for (std::int64_t part = 1; part < partial.parts; ++part) {
                const float* other = partial.at(pair, part, row);
                const float largest = other[n] > sums[n] ? other[n] : sums[n];
                const float now = reference(largest, factor);
                const float mine = power_of_two(sums[n] * factor - now);
                const float its = power_of_two(other[n] * factor - now);
                for (std::int64_t c = 0; c < n; c += kLanes) {
                    store(sums + c, load(sums + c) * mine + load(other + c) * its);
                }
                sums[n] = largest;
                sums[n + 1] = sums[n + 1] * mine + other[n + 1] * its;
            }
            write_row(out_row(out, partial.rows, heads, head_dim, pair, row), head_dim, sums, sums[n + 1]);
        }
    });
}

}  // namespace
}  // namespace mplug2_fast::MPLUG2_ISA
