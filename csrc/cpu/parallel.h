#pragma once

#include <cstdint>

namespace mplug2_fast {

// Calls `work(begin, end)` on `threads` contiguous parts of [0, count). The OpenMP runtime is the one that torch has
// loaded, so both share one pool of threads.
template <typename Work>
inline void parallel_ranges(std::int64_t count, int threads, const Work& work) {
    const std::int64_t parts = threads < count ? threads : count;
    if (parts <= 1) {
        if (count > 0) {
            work(std::int64_t{0}, count);
        }
        return;
    }
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(parts))
    for (std::int64_t part = 0; part < parts; ++part) {
        work(count * part / parts, count * (part + 1) / parts);
    }
}

}  // namespace mplug2_fast
