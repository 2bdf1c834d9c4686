#include "cpu/quantise_memory.h"

#include "cpu/buffer.h"
#include "cpu/int8.h"
#include "cpu/parallel.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

// Some tokens of one head as bytes, [kMemoryBlock][stride], and their scales. Missing tokens are zero.
template <typename Element>
void round_tokens(const Element* from, std::int64_t token_stride, std::int64_t count, std::int64_t head_dim,
                  std::int64_t stride, std::int32_t* numbers, float* scales) {
    std::memset(numbers, 0, kMemoryBlock * stride * sizeof(std::int32_t));
    for (std::int64_t t = 0; t < count; ++t) {
        const Element* row = from + t * token_stride;
        const Range of_row = range(row, head_dim);
        const float scale = of_row.finite() ? of_row.size() / 127.0f : 0.0f;
        scales[t] = result_scale(of_row, scale);
        quantise(row, head_dim, scale, [&](std::int64_t i, I32 some) {
            some &= 255;
            std::memcpy(numbers + t * stride + i, &some, sizeof(some));
        });
    }
}

MPLUG2_INLINE Word word_of(std::int32_t a, std::int32_t b, std::int32_t c, std::int32_t d) {
    return static_cast<Word>(a | b << 8 | c << 16) | static_cast<Word>(d) << 24;
}

// Four channels of each token.
void write_keys(const std::int32_t* numbers, std::int64_t stride, std::int64_t words, std::int8_t* to) {
    Word block[kMemoryBlock];
    for (std::int64_t w = 0; w < words; ++w, to += sizeof(block)) {
        for (std::int64_t t = 0; t < kMemoryBlock; ++t) {
            const std::int32_t* four = numbers + t * stride + 4 * w;
            block[t] = word_of(four[kWordOrder[0]], four[kWordOrder[1]], four[kWordOrder[2]], four[kWordOrder[3]]);
        }
        std::memcpy(to, block, sizeof(block));
    }
}

// Four tokens of each channel.
void write_values(const std::int32_t* numbers, std::int64_t stride, std::int64_t head_dim, std::int8_t* to) {
    for (std::int64_t t = 0; t < kMemoryBlock; t += 4) {
        for (std::int64_t c = 0; c < head_dim; c += kLanes) {
            U32 words = {};
            for (int byte = 0; byte < 4; ++byte) {
                words |= (U32)load_i32(numbers + (t + kWordOrder[byte]) * stride + c) << (8 * byte);
            }
            const std::int64_t count = at_most(head_dim - c, kLanes);
            std::memcpy(to + c * sizeof(Word), &words, count * sizeof(Word));
        }
        to += head_dim * sizeof(Word);
    }
}

template <typename Element>
void run(const QuantiseMemoryArguments& a) {
    const std::int64_t blocks = divide_up(a.tokens, kMemoryBlock), words = divide_up(a.head_dim, 4);
    const std::int64_t stride = round_up(round_up(a.head_dim, 4), kLanes);
    const std::int64_t key_bytes = words * kMemoryBlock * 4, value_bytes = kMemoryBlock * a.head_dim;
    parallel_ranges(a.batch * blocks, a.threads, [&](std::int64_t begin, std::int64_t end) {
        const Buffer<std::int32_t> numbers(kMemoryBlock * stride);
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t batch = item / blocks, block = item % blocks, token = block * kMemoryBlock;
            const std::int64_t count = at_most(a.tokens - token, kMemoryBlock);
            const auto* key = static_cast<const Element*>(a.key) + batch * a.key_strides[0] + token * a.key_strides[1];
            const auto* value =
                static_cast<const Element*>(a.value) + batch * a.value_strides[0] + token * a.value_strides[1];
            for (std::int64_t head = 0; head < a.heads; ++head) {
                const std::int64_t pair = batch * a.heads + head, at = pair * blocks + block;
                round_tokens(key + head * a.key_strides[2], a.key_strides[1], count, a.head_dim, stride, numbers,
                             a.key_scale + pair * a.tokens + token);
                write_keys(numbers, stride, words, a.keys + at * key_bytes);
                round_tokens(value + head * a.value_strides[2], a.value_strides[1], count, a.head_dim, stride, numbers,
                             a.value_scale + pair * a.tokens + token);
                write_values(numbers, stride, a.head_dim, a.values + at * value_bytes);
            }
        }
    });
}

}  // namespace

void quantise_memory(const QuantiseMemoryArguments& arguments) {
    arguments.bf16 ? run<Bf16>(arguments) : run<float>(arguments);
}

}  // namespace mplug2_fast::MPLUG2_ISA
