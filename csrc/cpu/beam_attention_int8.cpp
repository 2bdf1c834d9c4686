#include "cpu/beam_attention_int8.h"

#include <type_traits>

#include "cpu/attention_parts.h"
#include "cpu/int8.h"
#include "cpu/quantise_memory.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

constexpr std::int64_t kBlock = 64;  // tokens whose weights have one scale

// The even and the odd bytes of words, as 16-bit numbers.
struct Halves {
    U32 even, odd;
};

MPLUG2_INLINE Halves halves(U32 words) {
    typedef std::int16_t I16 __attribute__((vector_size(4 * kLanes)));
    return {(U32)((I16)(words << 8) >> 8), (U32)((I16)words >> 8)};
}

MPLUG2_INLINE U32 all_lanes(Word word) {
    return word - U32{};
}

// Rows of pairs of 16-bit numbers, and their scales.
struct Rows16 {
    const Word* pairs;
    std::int64_t stride;
    const float* scales;
};

// The queries of one (batch, head), rounded. Channels behind the last one are zero.
template <typename Element>
class Queries {
  public:
    Queries(std::int64_t count, std::int64_t head_dim)
        : stride_(round_up(head_dim, 2 * kLanes) / 2), pairs_(count * stride_), scales_(count) {}

    void fill(const Element* from, std::int64_t row_stride, std::int64_t count, std::int64_t head_dim) {
        std::memset(pairs_, 0, count * stride_ * sizeof(Word));
        for (std::int64_t m = 0; m < count; ++m) {
            auto* numbers = reinterpret_cast<std::int16_t*>(pairs_ + m * stride_);
            const Element* row = from + m * row_stride;
            const Range of_row = range(row, head_dim);
            const float scale = of_row.finite() ? of_row.size() / 32767.0f : 0.0f;
            quantise(row, head_dim, scale, [&](std::int64_t i, I32 some) { store_numbers(numbers + i, some); });
            scales_[m] = result_scale(of_row, scale);
        }
    }

    Rows16 from(std::int64_t row) const { return {pairs_ + row * stride_, stride_, scales_ + row}; }

  private:
    const std::int64_t stride_;
    const Buffer<Word> pairs_;
    const Buffer<float> scales_;
};

// The scales of a block's tokens, and what is added to scores: null, or -infinity for tokens that are not read.
class BlockOf {
  public:
    const float *key_scale, *value_scale, *hidden = nullptr;
    float largest_value_scale;  // NaN if one of them is

    BlockOf(const float* key, const float* value, const std::uint8_t* mask, std::int64_t count)
        : key_scale(key), value_scale(value) {
        if (mask || count < kBlock) {
            hide(mask, count);
        }
        I32 largest = {};
        for (std::int64_t j = 0; j < kBlock; j += kLanes) {
            const I32 bits = (I32)load(value_scale + j);
            largest = bits > largest ? bits : largest;
        }
        largest_value_scale = largest_float(largest);
    }
    BlockOf(const BlockOf&) = delete;
    BlockOf& operator=(const BlockOf&) = delete;

  private:
    void hide(const std::uint8_t* mask, std::int64_t count) {
        for (std::int64_t j = 0; j < kBlock; ++j) {
            const bool seen = j < count && (!mask || mask[j]);
            copies_[0][j] = seen ? key_scale[j] : 0;
            copies_[1][j] = seen ? value_scale[j] : 0;
            copies_[2][j] = seen ? 0 : -__builtin_inff();
        }
        key_scale = copies_[0];
        value_scale = copies_[1];
        hidden = copies_[2];
    }

    float copies_[3][kBlock];
};

// Scores of some queries and the tokens of a block, kBlock in a row, and the maximum of each row.
struct Scores {
    Rows16 queries;
    const std::int8_t* keys;
    std::int64_t words, tokens;
    const BlockOf& block;
    float* scores;
    float* most;

    template <int kM, int>
    __attribute__((noinline)) void run() const {
        F32 largest[kM];
        for (int m = 0; m < kM; ++m) {
            largest[m] = broadcast(-__builtin_inff());
        }
        for (std::int64_t token = 0; token < tokens; token += kLanes) {
            const auto* at = reinterpret_cast<const Word*>(keys) + token / kMemoryBlock * kMemoryBlock * words +
                             token % kMemoryBlock;
            I32 even[kM] = {}, odd[kM] = {};
            for (std::int64_t w = 0; w < words; ++w) {
                const Word* from = at + w * kMemoryBlock;
                const Halves four = halves(load_words(from));
#pragma GCC unroll 6
                for (int m = 0; m < kM; ++m) {
                    const Word* pairs = queries.pairs + m * queries.stride + 2 * w;
                    even[m] = dot16(even[m], all_lanes(pairs[0]), four.even);
                    odd[m] = dot16(odd[m], all_lanes(pairs[1]), four.odd);
                }
            }
            const F32 scale = load(block.key_scale + token);
            const F32 hidden = block.hidden ? load(block.hidden + token) : F32{};
#pragma GCC unroll 6
            for (int m = 0; m < kM; ++m) {
                const F32 sum = __builtin_convertvector(even[m] + odd[m], F32);
                const F32 score = sum * (scale * queries.scales[m]) + hidden;
                store(scores + m * kBlock + token, score);
                largest[m] = maximum(score, largest[m]);
            }
        }
        for (int m = 0; m < kM; ++m) {
            most[m] = largest_of_lanes(largest[m]);
        }
    }
};

// sums = sums * correction + weights * values, for some queries and vectors of channels, with weights as whole numbers.
struct ValuesOfNumbers {
    Rows16 weights;
    const Word* values;
    std::int64_t quads, stride;
    float* sums;
    std::int64_t sums_stride;
    const float* corrections;

    template <int kM, int kVectors>
    __attribute__((noinline)) void run() const {
        const auto [weights, values, quads, stride, sums, sums_stride, corrections] = *this;
        I32 acc[kM][kVectors] = {};
        for (std::int64_t q = 0; q < quads; ++q) {
            Halves four[kVectors];
#pragma GCC unroll 4
            for (int n = 0; n < kVectors; ++n) {
                const Word* from = values + q * stride + n * kLanes;
                four[n] = halves(load_words(from));
            }
#pragma GCC unroll 6
            for (int m = 0; m < kM; ++m) {
                const Word* pairs = weights.pairs + m * weights.stride + 2 * q;
                const U32 first = all_lanes(pairs[0]), second = all_lanes(pairs[1]);
#pragma GCC unroll 4
                for (int n = 0; n < kVectors; ++n) {
                    acc[m][n] = dot16(dot16(acc[m][n], first, four[n].even), second, four[n].odd);
                }
            }
        }
#pragma GCC unroll 6
        for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
            for (int n = 0; n < kVectors; ++n) {
                float* to = sums + m * sums_stride + n * kLanes;
                store(to, load(to) * corrections[m] + __builtin_convertvector(acc[m][n], F32) * weights.scales[m]);
            }
        }
    }
};

// The same with weights in float32.
struct ValuesOfFloats {
    const float* weights;  // kBlock in a row
    const Word* values;
    std::int64_t quads, stride;
    float* sums;
    std::int64_t sums_stride;
    const float* corrections;

    template <int kM, int kVectors>
    __attribute__((noinline)) void run() const {
        const auto [weights, values, quads, stride, sums, sums_stride, corrections] = *this;
        F32 acc[kM][kVectors];
#pragma GCC unroll 6
        for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
            for (int n = 0; n < kVectors; ++n) {
                acc[m][n] = load(sums + m * sums_stride + n * kLanes) * corrections[m];
            }
        }
        for (std::int64_t q = 0; q < quads; ++q) {
            for (int byte = 0; byte < 4; ++byte) {
                const std::int64_t token = 4 * q + kWordOrder[byte];
#pragma GCC unroll 4
                for (int n = 0; n < kVectors; ++n) {
                    const U32 words = load_words(values + q * stride + n * kLanes);
                    const F32 value = __builtin_convertvector((I32)(words << (24 - 8 * byte)) >> 24, F32);
#pragma GCC unroll 6
                    for (int m = 0; m < kM; ++m) {
                        acc[m][n] += weights[m * kBlock + token] * value;
                    }
                }
            }
        }
#pragma GCC unroll 6
        for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
            for (int n = 0; n < kVectors; ++n) {
                store(sums + m * sums_stride + n * kLanes, acc[m][n]);
            }
        }
    }
};

// Scores of up to kProductRows queries, which become weights of values: times their scales.
template <typename Element>
class Weights {
    static constexpr bool kWhole = !std::is_same_v<Element, float>;  // numbers

  public:
    float* scores() { return scores_; }

    // Turns the scores of a row, with the maximum `most`, into weights. `largest` and `total` are those of the row's
    // earlier blocks; returns the factor for the sums of these.
    float weigh(int row, const BlockOf& block, float factor, float most, float& largest, float& total) {
        const float old = largest * factor;
        largest = most > largest ? most : largest;
        const float now = reference(largest, factor);
        // No weight is larger, but for the rounding of powers: the largest number is a little below 2^15.
        const float bound = power_of_two(most * factor - now) * block.largest_value_scale;
        const float scale = bound / 32750.0f;
        const F32 inverse = factor_of(scale);
        float* scores = scores_ + row * kBlock;
        F32 sums = {};
#pragma GCC unroll 4
        for (std::int64_t j = 0; j < kBlock; j += kLanes) {
            const F32 weight = power_of_two<kWhole>(load(scores + j) * factor - now);
            sums += weight;
            const F32 scaled = weight * load(block.value_scale + j);
            if constexpr (kWhole) {
                store_numbers(reinterpret_cast<std::int16_t*>(pairs_) + row * kBlock + j,
                              nearest_integers(scaled * inverse));
            } else {
                store(scores + j, scaled);
            }
        }
        scales_[row] = scale == scale ? (scale >= kLeastScale ? scale : 0.0f) : scale;
        const float correction = power_of_two(old - now);
        total = total * correction + sum_of_lanes(sums);
        return correction;
    }

    auto weights() const {
        if constexpr (kWhole) {
            return Rows16{pairs_, kBlock / 2, scales_};
        } else {
            return static_cast<const float*>(scores_);
        }
    }

  private:
    alignas(64) float scores_[kProductRows * kBlock];
    alignas(64) Word pairs_[kProductRows * kBlock / 2];
    float scales_[kProductRows];
};

template <typename Element>
class Attention {
  public:
    explicit Attention(const BeamAttentionInt8Arguments& a)
        : a_(a),
          words_(divide_up(a.head_dim, 4)),
          blocks_(divide_up(a.tokens, kMemoryBlock)),
          parts_(a.tokens, kPartKeys, kBlock),
          factor_(a.scale * kLog2E),
          partial_{nullptr, parts_.parts, a.queries, round_up(a.head_dim, kLanes)} {}

    void run() {
        const std::int64_t pairs = a_.batch * a_.heads, parts = parts_.parts;
        auto* out = static_cast<Element*>(a_.out);
        const Buffer<float> results(parts > 1 ? partial_.floats(pairs) : 0);
        partial_.base = results;
        parallel_ranges(pairs * parts, a_.threads, [&](std::int64_t begin, std::int64_t end) {
            Queries<Element> queries(a_.queries, a_.head_dim);
            const Buffer<float> memory(a_.queries * (partial_.sums + 2));
            float *const sums = memory, *const largest = sums + a_.queries * partial_.sums,
                         *const totals = largest + a_.queries;
            const std::int64_t copied = a_.head_dim == partial_.sums ? 0 : kBlock / 4 * partial_.sums;
            const Buffer<Word> copy(copied);
            std::memset(copy, 0, copied * sizeof(Word));
            for (std::int64_t item = begin; item < end; ++item) {
                const std::int64_t pair = item / parts, part = item % parts;
                if (part == 0 || item == begin) {
                    const std::int64_t batch = pair / a_.heads, head = pair % a_.heads;
                    queries.fill(static_cast<const Element*>(a_.query) + batch * a_.query_strides[0] +
                                     head * a_.query_strides[2],
                                 a_.query_strides[1], a_.queries, a_.head_dim);
                }
                add_part(queries, pair, part, sums, largest, totals, copy);
                for (std::int64_t row = 0; row < a_.queries; ++row) {
                    const float* of_row = sums + row * partial_.sums;
                    if (parts > 1) {
                        partial_.write(pair, part, row, of_row, largest[row], totals[row]);
                    } else {
                        write_row(out_row(out, a_.queries, a_.heads, a_.head_dim, pair, row), a_.head_dim, of_row,
                                  totals[row]);
                    }
                }
            }
        });
        if (parts > 1) {
            merge(partial_, factor_, pairs, a_.heads, a_.head_dim, a_.threads, out);
        }
    }

  private:
    void add_part(const Queries<Element>& queries, std::int64_t pair, std::int64_t part, float* sums, float* largest,
                  float* totals, Word* copy) const {
        std::memset(sums, 0, a_.queries * partial_.sums * sizeof(float));
        for (std::int64_t row = 0; row < a_.queries; ++row) {
            largest[row] = -__builtin_inff();
            totals[row] = 0;
        }
        const std::int64_t first = parts_.begin(part), end = first + parts_.length(part);
        for (std::int64_t token = first; token < end; token += kBlock) {
            const std::int64_t count = at_most(end - token, kBlock);
            const BlockOf block(a_.key_scale + pair * a_.tokens + token, a_.value_scale + pair * a_.tokens + token,
                                a_.mask ? a_.mask + pair / a_.heads * a_.tokens + token : nullptr, count);
            const Word* values = block_values(pair, token, count, copy);
            for (std::int64_t row = 0; row < a_.queries; row += kProductRows) {
                add_block(queries, pair, token, count, block, values, row, sums + row * partial_.sums, largest + row,
                          totals + row);
            }
        }
    }

    // Adds a block to the sums of up to kProductRows queries.
    void add_block(const Queries<Element>& queries, std::int64_t pair, std::int64_t token, std::int64_t count,
                   const BlockOf& block, const Word* values, std::int64_t row, float* sums, float* largest,
                   float* totals) const {
        using Values = std::conditional_t<std::is_same_v<Element, float>, ValuesOfFloats, ValuesOfNumbers>;
        const int rows = static_cast<int>(at_most(kProductRows, a_.queries - row));
        const std::int64_t tokens = round_up(count, kMemoryBlock), memory = pair * blocks_ + token / kMemoryBlock;
        Weights<Element> weights;
        float most[kProductRows], corrections[kProductRows];
        dispatch(rows, 1,
                 Scores{queries.from(row), a_.keys + memory * kMemoryBlock * words_ * 4, words_, tokens, block,
                        weights.scores(), most});
        for (int m = 0; m < rows; ++m) {
            for (std::int64_t j = tokens; j < kBlock; ++j) {
                weights.scores()[m * kBlock + j] = -__builtin_inff();
            }
            corrections[m] = weights.weigh(m, block, factor_, most[m], largest[m], totals[m]);
        }
        const Cut channels(divide_up(a_.head_dim, kLanes), kProductVectors, 1);
        for (std::int64_t g = 0; g < channels.parts; ++g) {
            const std::int64_t channel = channels.begin(g) * kLanes;
            dispatch(rows, static_cast<int>(channels.length(g)),
                     Values{weights.weights(), values + channel, tokens / 4, partial_.sums, sums + channel,
                            partial_.sums, corrections});
        }
    }

    // The values of a block, [quads][partial_.sums] words: those in memory, or a copy if the head is not whole vectors.
    const Word* block_values(std::int64_t pair, std::int64_t token, std::int64_t count, Word* copy) const {
        const std::int64_t quads = round_up(count, kMemoryBlock) / 4;
        const auto* from = reinterpret_cast<const Word*>(a_.values) +
                           (pair * blocks_ + token / kMemoryBlock) * (kMemoryBlock / 4) * a_.head_dim;
        if (a_.head_dim == partial_.sums) {
            return from;
        }
        for (std::int64_t q = 0; q < quads; ++q) {
            std::memcpy(copy + q * partial_.sums, from + q * a_.head_dim, a_.head_dim * sizeof(Word));
        }
        return copy;
    }

    const BeamAttentionInt8Arguments& a_;
    const std::int64_t words_, blocks_;
    const Cut parts_;
    const float factor_;
    Partial partial_;
};

}  // namespace

void beam_attention_int8(const BeamAttentionInt8Arguments& arguments) {
    if (arguments.batch * arguments.heads <= 0 || arguments.queries <= 0) {
        return;
    }
    arguments.bf16 ? Attention<Bf16>(arguments).run() : Attention<float>(arguments).run();
}

}  // namespace mplug2_fast::MPLUG2_ISA
