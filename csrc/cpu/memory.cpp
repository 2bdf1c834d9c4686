#include "cpu/memory.h"

#include <new>

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

namespace mplug2_fast {
namespace {

constexpr std::align_val_t kLine{64};

class NotEnoughMemory : public std::bad_alloc {
  public:
    const char* what() const noexcept override {
        return "there is not enough memory to compute this call: use smaller batches or shorter sequences";
    }
};

// More than this is refused: the system may grant it, but kill the process when it is written.
std::int64_t most_bytes() {
#ifdef _SC_PHYS_PAGES
    static const std::int64_t bytes =
        static_cast<std::int64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<std::int64_t>(sysconf(_SC_PAGE_SIZE));
    if (bytes > 0) {
        return bytes;
    }
#endif
    return INT64_MAX;
}

}  // namespace

void fail_for_memory() {
    throw NotEnoughMemory();
}

void* allocate(std::int64_t count, std::int64_t size) {
    std::int64_t bytes;
    if (count < 0 || __builtin_mul_overflow(count, size, &bytes) || bytes > most_bytes()) {
        fail_for_memory();
    }
    void* memory = ::operator new(static_cast<std::size_t>(bytes), kLine, std::nothrow);
    if (!memory) {
        fail_for_memory();
    }
    return memory;
}

void release(void* memory) noexcept {
    ::operator delete(memory, kLine);
}

}  // namespace mplug2_fast
