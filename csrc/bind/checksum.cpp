#include "cpu/checksum.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "bind/bind.h"
#include "cpu/linear_act.h"

namespace py = pybind11;

namespace mplug2_fast {
namespace {

using Pieces = std::vector<std::pair<std::uintptr_t, std::int64_t>>;

std::uint64_t checksum(Isa isa, int threads, const Pieces& pieces, std::int64_t chunk) {
    require(threads >= 1 && chunk >= 1, "checksum: threads and chunks must be positive");
    const py::gil_scoped_release without_the_interpreter;
    std::vector<ChecksumChunk> chunks;
    for (const auto& [address, bytes] : pieces) {
        require(bytes >= 0, "checksum: sizes must not be negative");
        for (std::int64_t begin = 0; begin < bytes; begin += chunk) {
            chunks.push_back({at<const unsigned char>(address) + begin, std::min(chunk, bytes - begin)});
        }
    }
    std::vector<std::uint64_t> hashes(chunks.size());
    checksum_chunks(isa, {chunks.data(), static_cast<std::int64_t>(chunks.size()), hashes.data(), threads});
    std::uint64_t total = pieces.size();
    const std::uint64_t* next = hashes.data();
    for (const auto& [address, bytes] : pieces) {
        const std::int64_t count = (bytes + chunk - 1) / chunk;
        total = checksum_add(total, bytes, next, count);
        next += count;
    }
    return total;
}

}  // namespace

void bind_checksum(py::module_& module) {
    module.def(
        "checksum",
        [](Isa isa, int threads, const Pieces& pieces) { return checksum(isa, threads, pieces, kChecksumChunk); },
        py::arg("isa"), py::arg("threads"), py::arg("pieces"),
        "A 64-bit hash of pieces of memory, each an (address, bytes).");
    module.def(
        "matrix_checksum",
        [](Isa isa, int threads, std::uintptr_t address, std::int64_t bytes, std::int64_t row_bytes) {
            return checksum(isa, threads, {{address, bytes}}, kHashedRows * row_bytes);
        },
        py::arg("isa"), py::arg("threads"), py::arg("address"), py::arg("bytes"), py::arg("row_bytes"),
        "A 64-bit hash of a contiguous matrix, which `linear_act_hashed` also computes.");
}

}  // namespace mplug2_fast
