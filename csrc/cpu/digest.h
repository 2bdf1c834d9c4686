#pragma once

#include <cstring>

#include "cpu/checksum.h"
#include "cpu/simd.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

// The hash of one chunk of a checksum, see checksum.h. The bytes may be absorbed in several steps, for example while a
// product reads them.
class Digest {
    // Word i of a chunk goes into hash i % 64. That many independent hashes run at the speed of memory.
    static constexpr int kHashes = 64;
    static constexpr int kVectors = kHashes / kLanes;
    static constexpr std::int64_t kBlock = kHashes * 4;

  public:
    explicit Digest(const void* begin) : begin_(static_cast<const unsigned char*>(begin)), at_(begin_) {
        for (int i = 0; i < kHashes; ++i) {
            lanes_[i] = (i + 1) * 0x9E3779B9u;
        }
    }

    // Absorbs the whole blocks that end at or before `end`.
    void absorb_until(const void* end) {
        const std::int64_t blocks = (static_cast<const unsigned char*>(end) - at_) / kBlock;
        absorb(at_, blocks);
        at_ += blocks * kBlock;
    }

    // The hash of all bytes from the beginning to `end`.
    std::uint64_t finish(const void* end) {
        absorb_until(end);
        if (const std::int64_t left = static_cast<const unsigned char*>(end) - at_) {
            unsigned char rest[kBlock] = {};
            std::memcpy(rest, at_, left);
            absorb(rest, 1);
        }
        std::uint64_t total = checksum_mix(0, static_cast<const unsigned char*>(end) - begin_);
        for (int i = 0; i < kHashes; i += 2) {
            total = checksum_mix(total, static_cast<std::uint64_t>(lanes_[i]) << 32 | lanes_[i + 1]);
        }
        return total;
    }

  private:
    // Each step is a bijection of the state for each word, and of the word for each state, so a change of one word
    // always shows. The shift comes before the product: after it, a flipped sign bit would change the state in a way
    // that does not depend on the data, and a second change could undo that.
    void absorb(const unsigned char* block, std::int64_t blocks) {
        U32 state[kVectors];
        std::memcpy(state, lanes_, sizeof(state));
        for (; blocks > 0; --blocks, block += kBlock) {
            for (int i = 0; i < kVectors; ++i) {
                U32 words;
                std::memcpy(&words, block + i * sizeof(words), sizeof(words));
                U32 mixed = state[i] ^ words;
                mixed ^= mixed >> 15;
                state[i] = mixed * 0x2C1B3C6Du;
            }
        }
        std::memcpy(lanes_, state, sizeof(state));
    }

    const unsigned char *begin_, *at_;
    std::uint32_t lanes_[kHashes];
};

}  // namespace
}  // namespace mplug2_fast::MPLUG2_ISA
