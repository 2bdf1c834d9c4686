#pragma once

// Splits one call of the attention kernel into pieces of work, and defines the memory of a thread.

#include "cpu/attention.h"
#include "cpu/attention_tile.h"
#include "cpu/buffer.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

// The queries of one (batch, head) are split into groups, whose sums stay in the second-level cache while keys and
// values are read. With a single group, every block of keys is packed just before its use, and the keys are split into
// parts whose results are merged, so that few heads and queries occupy many threads too. With several groups, the keys
// are packed once for all groups. For a few queries, such as beams, packing does not pay: keys and values are read
// without it. The split, and so the result, depends only on the sizes.
constexpr std::int64_t kGroupRows = 288;
constexpr std::int64_t kSmallGroupRows = 96;  // for few heads
constexpr std::int64_t kFewHeads = 16;
constexpr std::int64_t kPartKeys = 1024;
constexpr std::int64_t kFewRows = 48;  // such small groups use smaller blocks of keys
constexpr std::int64_t kFewRowsBlockKeys = 64;
constexpr std::int64_t kUnpackedRows = 12;
constexpr float kLog2E = 1.44269504088896341f;

// `count` split into `parts` equal pieces that are multiples of `unit`; the last may be smaller.
struct Cut {
    std::int64_t count, size, parts;

    Cut(std::int64_t count, std::int64_t largest, std::int64_t unit) : count(count) {
        const std::int64_t pieces = divide_up(count > 0 ? count : 1, largest);
        size = round_up(divide_up(count > 0 ? count : 1, pieces), unit);
        parts = divide_up(count > 0 ? count : 1, size);
    }

    std::int64_t begin(std::int64_t part) const { return part * size; }
    std::int64_t length(std::int64_t part) const { return at_most(size, count - part * size); }
};

// One allocation, divided into pieces that begin on cache lines.
class Scratch {
  public:
    explicit Scratch(std::int64_t bytes) : base_(bytes), next_(base_) {}

    template <typename Item>
    Item* take(std::int64_t count) {
        auto* items = reinterpret_cast<Item*>(next_);
        next_ += bytes<Item>(count);
        return items;
    }

    template <typename Item>
    static std::int64_t bytes(std::int64_t count) {
        return round_up(count * static_cast<std::int64_t>(sizeof(Item)), 64);
    }

  private:
    Buffer<char> base_;
    char* next_;
};

// Sizes that all parts of one call share.
template <bool kPair>
struct Plan {
    const AttentionArguments& a;
    std::int64_t words;         // of a key
    std::int64_t query_stride;  // in words
    std::int64_t value_stride;  // in words of values, floats of sums
    std::int64_t pairs;         // of batch and head
    Cut groups;                 // of queries
    Cut parts;                  // of keys
    bool pack_ahead;            // all keys of a part at once, not block by block
    bool unpacked;
    std::int64_t block_keys;
    float factor;  // of scores in the exponent of two

    explicit Plan(const AttentionArguments& a)
        : a(a),
          words(kPair ? divide_up(a.head_dim, 2) : a.head_dim),
          query_stride(round_up(words, kLanes)),
          value_stride(round_up(a.head_dim, kLanes)),
          pairs(a.batch * a.heads),
          groups(a.q_len, pairs < kFewHeads ? kSmallGroupRows : kGroupRows, kProductRows),
          parts(a.k_len, groups.parts == 1 && !a.causal ? kPartKeys : (a.k_len > 0 ? a.k_len : 1), kLanes),
          pack_ahead(groups.parts > 1),
          unpacked(a.q_len <= kUnpackedRows && !a.causal && a.head_dim % kLanes == 0),
          block_keys(a.q_len <= kFewRows ? kFewRowsBlockKeys : kBlockKeys),
          factor(__builtin_fabsf(a.scale) * kLog2E) {
        // Missing keys have the score -infinity, which must not change.
        factor = factor > 1e-30f ? factor : 1e-30f;
    }

    std::int64_t packed_keys() const { return round_up(pack_ahead ? parts.size : block_keys, kLanes); }
};

// The memory of one thread.
template <bool kPair>
struct Workspace {
    Scratch scratch;
    Word *queries, *keys, *values;
    float *sums, *largest, *totals;  // of each row of a group
    int* limits;                     // number of keys that each row of a group sees
    float *scores, *maxima, *corrections;
    int* tile_limits;
    std::int32_t* index;  // the keys that the mask keeps

    static std::int64_t bytes(const Plan<kPair>& p) {
        return Scratch::bytes<Word>(p.groups.size * p.query_stride) + Scratch::bytes<Word>(p.packed_keys() * p.words) +
               Scratch::bytes<Word>(p.packed_keys() * p.value_stride) +
               Scratch::bytes<float>(p.groups.size * p.value_stride) + 3 * Scratch::bytes<float>(p.groups.size) +
               Scratch::bytes<float>(kTileRows * kScoreStride) + Scratch::bytes<float>(kTileRows * kLanes) +
               2 * Scratch::bytes<float>(kTileRows) + Scratch::bytes<std::int32_t>(p.a.mask ? p.parts.size : 0);
    }

    explicit Workspace(const Plan<kPair>& p)
        : scratch(bytes(p)),
          queries(scratch.take<Word>(p.groups.size * p.query_stride)),
          keys(scratch.take<Word>(p.packed_keys() * p.words)),
          values(scratch.take<Word>(p.packed_keys() * p.value_stride)),
          sums(scratch.take<float>(p.groups.size * p.value_stride)),
          largest(scratch.take<float>(p.groups.size)),
          totals(scratch.take<float>(p.groups.size)),
          limits(scratch.take<int>(p.groups.size)),
          scores(scratch.take<float>(kTileRows * kScoreStride)),
          maxima(scratch.take<float>(kTileRows * kLanes)),
          corrections(scratch.take<float>(kTileRows)),
          tile_limits(scratch.take<int>(kTileRows)),
          index(scratch.take<std::int32_t>(p.a.mask ? p.parts.size : 0)) {}
};

}  // namespace
}  // namespace mplug2_fast::MPLUG2_ISA
