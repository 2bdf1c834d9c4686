#pragma once

#include <cstdint>

#include "cpu/memory.h"

namespace mplug2_fast {

// Calls `work(begin, end)` on `threads` contiguous parts of [0, count). The OpenMP runtime is the one that torch has
// loaded, so both share one pool of threads. An exception that leaves a parallel region would end the process. Kernels
// throw only if memory is missing, so that exception is thrown after the region.
template <typename Work>
inline void parallel_ranges(std::int64_t count, int threads, const Work& work) {
    const std::int64_t parts = threads < count ? threads : count;
    if (parts <= 1) {
        if (count > 0) {
            work(std::int64_t{0}, count);
        }
        return;
    }
    bool failed = false;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(parts))
    for (std::int64_t part = 0; part < parts; ++part) {
        try {
            work(count * part / parts, count * (part + 1) / parts);
        } catch (...) {
#pragma omp atomic write
            failed = true;
        }
    }
    if (failed) {
        fail_for_memory();
    }
}

}  // namespace mplug2_fast
