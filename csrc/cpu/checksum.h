#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace mplug2_fast {

// A chunk is hashed by one thread. A checksum depends on the size of its chunks, but on neither the threads nor the
// instruction set.
inline constexpr std::int64_t kChecksumChunk = 128 * 1024;

struct ChecksumChunk {
    const unsigned char* begin;
    std::int64_t bytes;
};

// Writes a 64-bit hash of each chunk's bytes to `hashes`.
struct ChecksumArguments {
    const ChecksumChunk* chunks;
    std::int64_t count;
    std::uint64_t* hashes;
    int threads;
};

MPLUG2_KERNEL(checksum_chunks, ChecksumArguments)

// One step of a 64-bit hash: a bijection of the state for each value, and of the value for each state.
inline std::uint64_t checksum_mix(std::uint64_t state, std::uint64_t value) {
    state ^= value;
    state ^= state >> 32;
    return state * 0x9E3779B97F4A7C15u;
}

// Adds a piece of memory to a checksum: its size and the hashes of its chunks.
inline std::uint64_t checksum_add(std::uint64_t state, std::int64_t bytes, const std::uint64_t* hashes,
                                  std::int64_t count) {
    state = checksum_mix(state, bytes);
    for (std::int64_t i = 0; i < count; ++i) {
        state = checksum_mix(state, hashes[i]);
    }
    return state;
}

}  // namespace mplug2_fast
