#include "cpu/beam_step.h"

#include "cpu/buffer.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

// A row is split into parts of this many words, so that many threads have work, and a part is still in the cache for
// its second pass, which sums the exponentials. Parts and results do not depend on the number of threads.
constexpr std::int64_t kPart = 8192;

struct Candidate {
    float value;
    std::int64_t index;
};

// The best few, best first; among equal ones the lower index first.
class Best {
  public:
    Best(Candidate* list, std::int64_t capacity) : list_(list), capacity_(capacity) {}

    void offer(float value, std::int64_t index) {
        const Candidate offered{value, index};
        std::int64_t at = size_;
        if (size_ < capacity_) {
            ++size_;
        } else if (at == 0 || !is_better(offered, list_[--at])) {
            return;
        }
        for (; at > 0 && is_better(offered, list_[at - 1]); --at) {
            list_[at] = list_[at - 1];
        }
        list_[at] = offered;
    }
    bool full() const { return size_ == capacity_; }
    float worst() const { return list_[size_ - 1].value; }
    std::int64_t size() const { return size_; }

  private:
    // NaN comes before all numbers, as in torch.topk.
    static bool is_better(const Candidate& a, const Candidate& b) {
        const bool a_is_nan = a.value != a.value, b_is_nan = b.value != b.value;
        if (a_is_nan || b_is_nan) {
            return a_is_nan && (!b_is_nan || a.index < b.index);
        }
        return a.value > b.value || (a.value == b.value && a.index < b.index);
    }

    Candidate* list_;
    std::int64_t capacity_, size_ = 0;
};

// The results of one part of a row: the sum of e^(logit - highest), and its best logits as candidates.
struct Part {
    float highest;
    float sum;
    std::int64_t size;
};

MPLUG2_INLINE bool any(I32 mask) {
#if defined(__AVX512DQ__)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    std::int32_t lanes[kLanes], all = 0;
    std::memcpy(lanes, &mask, sizeof(lanes));
    for (int i = 0; i < kLanes; ++i) {
        all |= lanes[i];
    }
    return all != 0;
#endif
}

// `first` is the index of logits[0] in its row.
template <typename Element>
Part scan(const Element* logits, std::int64_t count, std::int64_t first, std::int64_t blocked, Best best) {
    const float lowest = -__builtin_inff();
    const auto offer = [&](std::int64_t i) {
        if (first + i != blocked) {
            const float value = to_float(logits[i]);
            best.offer(value == value ? value : lowest, first + i);
        }
    };
    constexpr int kStep = 4 * kLanes;
    F32 highest = broadcast(lowest);
    float top = lowest;
    std::int64_t i = 0;
    for (; i < count && !best.full(); ++i) {
        offer(i);
        const float value = to_float(logits[i]);
        top = value > top ? value : top;
    }
    for (; i + kStep <= count; i += kStep) {
        F32 v[4], larger[2];
        for (int u = 0; u < 4; ++u) {
            v[u] = load(logits + i + u * kLanes);
        }
        // maximum(a, b) is b if a is NaN: numbers that cannot be NaN come second.
        larger[0] = maximum(v[0], maximum(v[1], broadcast(lowest)));
        larger[1] = maximum(v[2], maximum(v[3], broadcast(lowest)));
        const F32 largest_here = maximum(larger[0], larger[1]);
        highest = maximum(largest_here, highest);
        if (any(largest_here > best.worst())) {
            for (int j = 0; j < kStep; ++j) {
                offer(i + j);
            }
        }
    }
    for (; i < count; ++i) {
        offer(i);
        const float value = to_float(logits[i]);
        top = value > top ? value : top;
    }
    top = largest(maximum(highest, broadcast(top)));

    const F32 shift = broadcast(top == lowest ? 0.0f : top);
    F32 sums[4] = {};
    for (i = 0; i + kStep <= count; i += kStep) {
        for (int u = 0; u < 4; ++u) {
            sums[u] += exponential(load(logits + i + u * kLanes) - shift);
        }
    }
    for (; i < count; i += kLanes) {
        float lanes[kLanes];
        for (int j = 0; j < kLanes; ++j) {
            lanes[j] = i + j < count ? to_float(logits[i + j]) : lowest;
        }
        sums[0] += exponential(load(lanes) - shift);
    }
    return {top, sum((sums[0] + sums[1]) + (sums[2] + sums[3])), best.size()};
}

struct Workspace {
    std::int64_t parts, capacity;  // parts of a row, candidates of a part
    Buffer<Part> part;
    Buffer<Candidate> candidates;

    Workspace(std::int64_t rows, std::int64_t parts, std::int64_t capacity)
        : parts(parts), capacity(capacity), part(rows * parts), candidates(rows * parts * capacity) {}
};

// Combines the parts of all beams of one batch element.
void merge(const BeamStepArguments& a, const Workspace& space, std::int64_t batch, Candidate* best_list) {
    Best best(best_list, a.beams);
    const auto offer = [&](std::int64_t beam, std::int64_t word, float log_probability) {
        const float score = (a.cumulative[batch * a.beams + beam] + log_probability) / a.penalty;
        best.offer(score, beam * a.words + word);
    };
    const Buffer<Candidate> beam_list(space.capacity);
    for (std::int64_t beam = 0; beam < a.beams; ++beam) {
        const std::int64_t row = (batch * a.beams + beam) * space.parts;
        const Part* parts = space.part + row;
        float top = parts[0].highest;
        for (std::int64_t p = 1; p < space.parts; ++p) {
            top = parts[p].highest > top ? parts[p].highest : top;
        }
        double total = 0;
        for (std::int64_t p = 0; p < space.parts; ++p) {
            // A part without a finite logit adds its sum unchanged: zero or NaN.
            const bool empty = parts[p].highest == -__builtin_inff();
            total += parts[p].sum * (empty ? 1.0 : __builtin_exp(static_cast<double>(parts[p].highest) - top));
        }
        const float log_total = static_cast<float>(__builtin_log(total));
        Best beam_best(beam_list, space.capacity);
        for (std::int64_t p = 0; p < space.parts; ++p) {
            for (std::int64_t i = 0; i < parts[p].size; ++i) {
                const Candidate& candidate = space.candidates[(row + p) * space.capacity + i];
                beam_best.offer(candidate.value, candidate.index);
            }
        }
        for (std::int64_t i = 0; i < beam_best.size(); ++i) {
            offer(beam, beam_list[i].index, beam_list[i].value - top - log_total);
        }
        if (a.blocked >= 0) {
            offer(beam, a.blocked, -1e20f);
        }
    }
    for (std::int64_t i = 0; i < a.beams; ++i) {
        const std::int64_t at = batch * a.beams + i;
        a.scores[at] = best_list[i].value;
        a.new_cumulative[at] = best_list[i].value * a.penalty;
        a.origin[at] = best_list[i].index / a.words;
        a.token[at] = best_list[i].index % a.words;
    }
}

template <typename Element>
void run(const BeamStepArguments& a) {
    const auto* logits = static_cast<const Element*>(a.logits);
    const Workspace space(a.batch * a.beams, (a.words + kPart - 1) / kPart, a.beams < a.words ? a.beams : a.words);
    const std::int64_t tasks = a.batch * a.beams * space.parts;
    parallel_ranges(tasks, a.threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t task = begin; task < end; ++task) {
            const std::int64_t row = task / space.parts, part = task % space.parts;
            const std::int64_t first = a.words * part / space.parts, last = a.words * (part + 1) / space.parts;
            const Element* from = logits + row / a.beams * a.batch_stride + row % a.beams * a.beam_stride + first;
            space.part[task] = scan(from, last - first, first, a.blocked,
                                    Best(space.candidates + task * space.capacity, space.capacity));
        }
    });
    const Buffer<Candidate> best_list(a.beams);
    for (std::int64_t batch = 0; batch < a.batch; ++batch) {
        merge(a, space, batch, best_list);
    }
}

}  // namespace

void beam_step(const BeamStepArguments& arguments) {
    if (arguments.batch * arguments.beams > 0) {
        arguments.bf16 ? run<Bf16>(arguments) : run<float>(arguments);
    }
}

}  // namespace mplug2_fast::MPLUG2_ISA
