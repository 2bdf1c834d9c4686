#pragma once

#include <cstdint>

namespace mplug2_fast {

// `count` items of `size` bytes, aligned to cache lines. Throws std::bad_alloc, with a message, if the machine has too
// little memory.
void* allocate(std::int64_t count, std::int64_t size);
void release(void* memory) noexcept;

[[noreturn]] void fail_for_memory();

}  // namespace mplug2_fast
