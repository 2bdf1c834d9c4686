#include "cpu/step_attention.h"

#include "cpu/buffer.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

template <typename Element>
float dot(const Element* a, const Element* b, std::int64_t count) {
    F32 sums = {};
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        sums += load(a + i) * load(b + i);
    }
    if (const int rest = static_cast<int>(count - i)) {
        sums += load_first(a + i, rest) * load_first(b + i, rest);
    }
    return sum(sums);
}

// Turns scores into weights. Times the returned factor, their sum is one. `scores` has room for whole vectors.
MPLUG2_INLINE float weigh(float* scores, std::int64_t count) {
    std::int64_t vectors = 0;
    for (std::int64_t i = count; i % kLanes; ++i) {
        scores[i] = -__builtin_inff();
    }
    F32 most = broadcast(-__builtin_inff());
    for (; vectors * kLanes < count; ++vectors) {
        most = maximum(load(scores + vectors * kLanes), most);
    }
    const F32 shift = broadcast(largest(most));
    F32 total = {};
    for (std::int64_t i = 0; i < vectors; ++i) {
        const F32 weight = exponential(load(scores + i * kLanes) - shift);
        store(scores + i * kLanes, weight);
        total += weight;
    }
    return 1.0f / sum(total);
}

template <typename Element>
void run(const StepAttentionArguments& a) {
    const std::int64_t tokens = a.step + 1;
    parallel_ranges(a.rows * a.heads, a.threads, [&](std::int64_t begin, std::int64_t end) {
        const Buffer<float> scores(tokens + kLanes);
        const Buffer<std::int64_t> rows(tokens);
        for (std::int64_t pair = begin; pair < end; ++pair) {
            const std::int64_t row = pair / a.heads, head = pair % a.heads;
            const auto* q = static_cast<const Element*>(a.q) + row * a.q_strides[0] + head * a.q_strides[1];
            const auto* k = static_cast<const Element*>(a.k) + row * a.k_strides[0] + head * a.k_strides[1];
            const auto* v = static_cast<const Element*>(a.v) + row * a.v_strides[0] + head * a.v_strides[1];
            auto* keys = static_cast<Element*>(a.keys) + head * a.keys_strides[1];
            auto* values = static_cast<Element*>(a.values) + head * a.values_strides[1];
            std::int32_t* ancestors = a.ancestors + row * a.ancestors_strides[0];
            auto* out = static_cast<Element*>(a.out) + pair * a.head_dim;

            const std::size_t bytes = a.head_dim * sizeof(Element);
            std::memcpy(keys + row * a.keys_strides[0] + a.step * a.keys_strides[2], k, bytes);
            std::memcpy(values + row * a.values_strides[0] + a.step * a.values_strides[2], v, bytes);
            if (head == 0) {
                ancestors[a.step * a.ancestors_strides[1]] = static_cast<std::int32_t>(row);
            }
            for (std::int64_t t = 0; t < tokens; ++t) {
                // Checked a second time, because the tensors written here may share memory with the table.
                const std::int64_t origin = t < a.step ? ancestors[t * a.ancestors_strides[1]] : row;
                rows[t] = origin >= 0 && origin < a.rows ? origin : row;
                const Element* key = keys + rows[t] * a.keys_strides[0] + t * a.keys_strides[2];
                scores[t] = dot(q, key, a.head_dim) * a.scale;
            }
            const float factor = weigh(scores, tokens);
            for (std::int64_t c = 0; c < a.head_dim; c += kLanes) {
                const std::int64_t left = a.head_dim - c;
                const int count = static_cast<int>(left < kLanes ? left : kLanes);
                F32 sums = {};
                for (std::int64_t t = 0; t < tokens; ++t) {
                    const Element* value = values + rows[t] * a.values_strides[0] + t * a.values_strides[2] + c;
                    sums += scores[t] * (count == kLanes ? load(value) : load_first(value, count));
                }
                count == kLanes ? store(out + c, sums * factor) : store_first(out + c, sums * factor, count);
            }
        }
    });
}

}  // namespace

void step_attention(const StepAttentionArguments& arguments) {
    arguments.bf16 ? run<Bf16>(arguments) : run<float>(arguments);
}

}  // namespace mplug2_fast::MPLUG2_ISA
