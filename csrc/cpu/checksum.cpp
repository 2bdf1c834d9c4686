#include "cpu/checksum.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace mplug2_fast {
namespace MPLUG2_ISA {
namespace {

// Word i of a chunk goes into hash i % 64. That many independent hashes run at the speed of memory.
constexpr int kHashes = 64;
constexpr int kVectors = kHashes / kLanes;
constexpr std::int64_t kBlock = kHashes * 4;

// Each step is a bijection of the state for each word, and of the word for each state, so a change of one word always
// shows. The shift comes before the product: after it, a flipped sign bit would change the state in a way that does not
// depend on the data, and a second change could undo that.
MPLUG2_INLINE void absorb(U32 (&state)[kVectors], const unsigned char* block) {
    for (int i = 0; i < kVectors; ++i) {
        U32 words;
        std::memcpy(&words, block + i * sizeof(words), sizeof(words));
        U32 mixed = state[i] ^ words;
        mixed ^= mixed >> 15;
        state[i] = mixed * 0x2C1B3C6Du;
    }
}

std::uint64_t hash(const ChecksumChunk& chunk) {
    std::uint32_t lanes[kHashes];
    for (int i = 0; i < kHashes; ++i) {
        lanes[i] = (i + 1) * 0x9E3779B9u;
    }
    U32 state[kVectors];
    std::memcpy(state, lanes, sizeof(state));
    const std::int64_t whole = chunk.bytes / kBlock * kBlock;
    for (std::int64_t at = 0; at < whole; at += kBlock) {
        absorb(state, chunk.begin + at);
    }
    if (whole < chunk.bytes) {
        unsigned char rest[kBlock] = {};
        std::memcpy(rest, chunk.begin + whole, chunk.bytes - whole);
        absorb(state, rest);
    }
    std::memcpy(lanes, state, sizeof(lanes));
    std::uint64_t total = checksum_mix(0, chunk.bytes);
    for (int i = 0; i < kHashes; i += 2) {
        total = checksum_mix(total, static_cast<std::uint64_t>(lanes[i]) << 32 | lanes[i + 1]);
    }
    return total;
}

}  // namespace

void checksum_chunks(const ChecksumArguments& arguments) {
    parallel_ranges(arguments.count, arguments.threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            arguments.hashes[i] = hash(arguments.chunks[i]);
        }
    });
}

}  // namespace MPLUG2_ISA
}  // namespace mplug2_fast
