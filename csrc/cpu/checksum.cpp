#include "cpu/checksum.h"

#include "cpu/digest.h"
#include "cpu/parallel.h"

namespace mplug2_fast::MPLUG2_ISA {

void checksum_chunks(const ChecksumArguments& arguments) {
    parallel_ranges(arguments.count, arguments.threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const ChecksumChunk& chunk = arguments.chunks[i];
            arguments.hashes[i] = Digest(chunk.begin).finish(chunk.begin + chunk.bytes);
        }
    });
}

}  // namespace mplug2_fast::MPLUG2_ISA
