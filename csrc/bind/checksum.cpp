#include "cpu/checksum.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "bind/bind.h"

namespace py = pybind11;

namespace mplug2_fast {

void bind_checksum(py::module_& module) {
    module.def(
        "checksum",
        [](Isa isa, int threads, const std::vector<std::pair<std::uintptr_t, std::int64_t>>& pieces) {
            require(threads >= 1, "checksum: threads must be positive");
            const py::gil_scoped_release without_the_interpreter;
            std::vector<ChecksumChunk> chunks;
            for (const auto& [address, bytes] : pieces) {
                require(bytes >= 0, "checksum: sizes must not be negative");
                for (std::int64_t begin = 0; begin < bytes; begin += kChecksumChunk) {
                    chunks.push_back(
                        {at<const unsigned char>(address) + begin, std::min(kChecksumChunk, bytes - begin)});
                }
            }
            std::vector<std::uint64_t> hashes(chunks.size());
            checksum_chunks(isa, {chunks.data(), static_cast<std::int64_t>(chunks.size()), hashes.data(), threads});
            std::uint64_t total = pieces.size();
            std::size_t next = 0;
            for (const auto& piece : pieces) {
                total = checksum_mix(total, piece.second);
                for (std::int64_t begin = 0; begin < piece.second; begin += kChecksumChunk) {
                    total = checksum_mix(total, hashes[next++]);
                }
            }
            return total;
        },
        py::arg("isa"), py::arg("threads"), py::arg("pieces"),
        "A 64-bit hash of pieces of memory, each an (address, bytes).");
}

}  // namespace mplug2_fast
