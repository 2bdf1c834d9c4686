#include "cpu/attention.h"

#include "cpu/attention_few.h"
#include "cpu/attention_parts.h"
#include "cpu/attention_plan.h"
#include "cpu/parallel.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

// Adds one block of `count` keys, the first of which is number `first`, to the sums of a group's rows.
template <bool kPair>
void add_block(const Plan<kPair>& p, const Workspace<kPair>& w, std::int64_t rows, std::int64_t first,
               std::int64_t count, const Word* keys, const Word* values) {
    for (std::int64_t tile = 0; tile < rows; tile += kTileRows) {
        const int tile_rows = static_cast<int>(at_most(kTileRows, rows - tile));
        const int* limits = w.limits + tile;
        const int visible = static_cast<int>(at_most(count, limits[tile_rows - 1] - first));  // limits ascend
        if (visible <= 0) {
            continue;
        }
        for (int i = 0; i < tile_rows; ++i) {
            store(w.maxima + i * kLanes, broadcast(-__builtin_inff()));
        }
        const Cut vectors(divide_up(visible, kLanes), kProductVectors, 1);
        for (std::int64_t g = 0; g < vectors.parts; ++g) {
            const std::int64_t begin = vectors.begin(g) * kLanes, length = vectors.length(g);
            const bool limited = limits[0] - first < begin + length * kLanes;
            for (int i = 0; limited && i < tile_rows; ++i) {
                w.tile_limits[i] = static_cast<int>(at_most(limits[i] - first, count) - begin);
            }
            for (int i = 0; i < tile_rows; i += kProductRows) {
                dispatch(static_cast<int>(at_most(kProductRows, tile_rows - i)), static_cast<int>(length),
                         ScoreProduct<kPair>{w.queries + (tile + i) * p.query_stride, p.query_stride,
                                             keys + begin * p.words, p.words, w.scores + i * kScoreStride + begin,
                                             w.maxima + i * kLanes, limited ? w.tile_limits + i : nullptr});
            }
        }
        for (int i = 0; i < tile_rows; ++i) {
            const float most = largest_of_lanes(load(w.maxima + i * kLanes));
            weigh_block<kPair>(p.factor, w.scores + i * kScoreStride, divide_up(visible, kLanes), most,
                               w.largest[tile + i], w.totals[tile + i], w.corrections[i]);
        }
        const Cut channels(p.value_stride / kLanes, kProductVectors, 1);
        for (std::int64_t g = 0; g < channels.parts; ++g) {
            const std::int64_t begin = channels.begin(g) * kLanes;
            for (int i = 0; i < tile_rows; i += kProductRows) {
                dispatch(static_cast<int>(at_most(kProductRows, tile_rows - i)), static_cast<int>(channels.length(g)),
                         ValueProduct<kPair>{reinterpret_cast<const Word*>(w.scores + i * kScoreStride), values + begin,
                                             p.value_stride, kPair ? (visible + 1) / 2 : visible,
                                             w.sums + (tile + i) * p.value_stride + begin, w.corrections + i});
            }
        }
    }
}

// The tokens of one (batch, head) pair, restricted to the keys that this thread handles.
template <typename Element>
struct Source {
    Tokens<Element> q, k, v;
    std::int64_t count;  // of keys
};

template <typename Element>
Tokens<Element> tokens(const void* base, const std::int64_t (&strides)[3], std::int64_t batch, std::int64_t head) {
    return {static_cast<const Element*>(base) + batch * strides[0] + head * strides[2], strides[1], nullptr};
}

template <typename Element, bool kPair>
Source<Element> source(const Plan<kPair>& p, const Workspace<kPair>& w, std::int64_t pair, std::int64_t part) {
    const AttentionArguments& a = p.a;
    const std::int64_t batch = pair / a.heads, head = pair % a.heads;
    Source<Element> s{tokens<Element>(a.q, a.q_strides, batch, head), tokens<Element>(a.k, a.k_strides, batch, head),
                      tokens<Element>(a.v, a.v_strides, batch, head), p.parts.length(part)};
    const std::int64_t begin = p.parts.begin(part);
    s.k.base += begin * s.k.stride;
    s.v.base += begin * s.v.stride;
    if (a.mask) {
        const std::uint8_t* mask = a.mask + batch * a.mask_stride + begin;
        std::int64_t kept = 0;
        for (std::int64_t j = 0; j < s.count; ++j) {
            if (mask[j]) {
                w.index[kept++] = static_cast<std::int32_t>(j);
            }
        }
        s.count = kept;
        s.k.index = s.v.index = w.index;
    }
    return s;
}

// The sums of one group of queries over one part of the keys: w.sums, w.largest and w.totals.
template <bool kPair, typename Element>
void add_part(const Plan<kPair>& p, const Workspace<kPair>& w, const Source<Element>& s, std::int64_t begin,
              std::int64_t rows) {
    constexpr std::int64_t kSize = sizeof(Element);
    const std::int64_t head_dim = p.a.head_dim;
    const bool last_rows = begin + rows == p.a.q_len;
    const std::int64_t q_ahead = (last_rows ? p.a.q_strides[2] - begin * s.q.stride : rows * s.q.stride) * kSize;
    pack_queries<kPair>(s.q, begin, rows, head_dim, p.query_stride, p.a.scale < 0, q_ahead, w.queries);
    std::int64_t seen = 0;
    for (std::int64_t i = 0; i < rows; ++i) {
        if (!p.a.causal) {
            seen = s.count;
        } else if (s.k.index) {
            while (seen < s.count && s.k.index[seen] <= begin + i) {
                ++seen;
            }
        } else {
            seen = at_most(begin + i + 1, s.count);
        }
        w.limits[i] = static_cast<int>(seen);
        w.largest[i] = -__builtin_inff();
        w.totals[i] = 0;
    }
    std::memset(w.sums, 0, rows * p.value_stride * sizeof(float));
    const Cut blocks(s.count, p.block_keys, kLanes);
    for (std::int64_t b = 0; b < blocks.parts && blocks.begin(b) < seen; ++b) {
        const std::int64_t first = blocks.begin(b), count = blocks.length(b);
        if (p.pack_ahead) {
            add_block(p, w, rows, first, count, w.keys + first * p.words,
                      w.values + first / (kPair ? 2 : 1) * p.value_stride);
        } else {
            // packed next: the following block, or the first block of the next head
            const bool last = b + 1 == blocks.parts;
            const std::int64_t k_ahead = (last ? p.a.k_strides[2] - first * s.k.stride : count * s.k.stride) * kSize;
            const std::int64_t v_ahead = (last ? p.a.v_strides[2] - first * s.v.stride : count * s.v.stride) * kSize;
            pack_keys<kPair>(s.k, first, count, head_dim, k_ahead, w.keys);
            pack_values<kPair>(s.v, first, count, head_dim, p.value_stride, v_ahead, w.values);
            add_block(p, w, rows, first, count, w.keys, w.values);
        }
    }
}

template <bool kPair, typename Element>
void run(const AttentionArguments& a) {
    const Plan<kPair> p(a);
    if (p.pairs <= 0 || a.q_len <= 0) {
        return;
    }
    constexpr std::int64_t kSize = sizeof(Element);
    const bool split = p.parts.parts > 1;
    Partial partial{nullptr, p.parts.parts, a.q_len, p.value_stride};
    const Buffer<float> results(split ? partial.floats(p.pairs) : 0);
    partial.base = results;
    auto* const out = static_cast<Element*>(a.out);
    const std::int64_t per_pair = split ? p.parts.parts : p.groups.parts;
    parallel_ranges(p.pairs * per_pair, a.threads, [&](std::int64_t begin, std::int64_t end) {
        const Workspace<kPair> w(p);
        PackedRows<StepOf<Element>> few(p.unpacked ? a.q_len : 0, a.head_dim);
        Source<Element> s{};
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t pair = item / per_pair;
            const std::int64_t part = split ? item % per_pair : 0, group = split ? 0 : item % per_pair;
            if (split || group == 0 || item == begin) {
                s = source<Element>(p, w, pair, part);
                if (p.pack_ahead) {
                    pack_keys<kPair>(s.k, 0, s.count, a.head_dim, a.k_strides[2] * kSize, w.keys);
                    pack_values<kPair>(s.v, 0, s.count, a.head_dim, p.value_stride, a.v_strides[2] * kSize, w.values);
                }
            }
            const std::int64_t first = p.groups.begin(group), rows = p.groups.length(group);
            if (p.unpacked) {
                few.fill(s.q.base, s.q.stride, static_cast<int>(rows));
                add_few<kPair>(p, w, few, s.k, s.v, s.count);
            } else {
                add_part<kPair>(p, w, s, first, rows);
            }
            for (std::int64_t i = 0; i < rows; ++i) {
                const float* sums = w.sums + i * p.value_stride;
                if (split) {
                    partial.write(pair, part, i, sums, w.largest[i], w.totals[i]);
                } else {
                    write_row(out_row(out, a.q_len, a.heads, a.head_dim, pair, first + i), a.head_dim, sums,
                              w.totals[i]);
                }
            }
        }
    });
    if (split) {
        merge(partial, p.factor, p.pairs, a.heads, a.head_dim, a.threads, out);
    }
}

}  // namespace

void attention(const AttentionArguments& arguments) {
#ifdef __AVX512BF16__
    constexpr bool kPair = true;
#else
    constexpr bool kPair = false;
#endif
    arguments.bf16 ? run<kPair, Bf16>(arguments) : run<false, float>(arguments);
}

}  // namespace mplug2_fast::MPLUG2_ISA
