#pragma once

#include <cstdint>

namespace mplug2_fast {

// At least `bytes`, aligned to cache lines. The calling thread keeps them until it ends or needs more. They are in huge
// pages if the system has them. With small pages, misses of the TLB make a large product 5 to 10% slower.
void* kept_memory(std::int64_t bytes);

}  // namespace mplug2_fast
