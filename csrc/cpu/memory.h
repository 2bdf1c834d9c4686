#pragma once

#include <cstdint>

namespace mplug2_fast {

// `count` items of `size` bytes, on lines of the cache; throws std::bad_alloc, with a message, where the machine does
// not have as much memory.
void* allocate(std::int64_t count, std::int64_t size);
void release(void* memory) noexcept;

[[noreturn]] void fail_for_memory();

}  // namespace mplug2_fast
