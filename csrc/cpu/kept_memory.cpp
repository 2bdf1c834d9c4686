#include "cpu/kept_memory.h"

#include "cpu/memory.h"

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

namespace mplug2_fast {
namespace {

#ifdef MADV_HUGEPAGE
constexpr std::int64_t kHugePage = 1 << 21;

// Maps fresh pages, because the heap's may be small ones already.
class Kept {
  public:
    ~Kept() { clear(); }

    void* at_least(std::int64_t bytes) {
        if (bytes > usable_) {
            clear();
            bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
            void* base = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (base == MAP_FAILED) {
                fail_for_memory();
            }
            base_ = base;
            usable_ = bytes;
            madvise(first(), usable_, MADV_HUGEPAGE);
        }
        return first();
    }

  private:
    // The first huge page.
    void* first() const {
        const auto address = reinterpret_cast<std::uintptr_t>(base_);
        return reinterpret_cast<void*>((address + kHugePage - 1) / kHugePage * kHugePage);
    }

    void clear() {
        if (base_) {
            munmap(base_, usable_ + kHugePage);
        }
        base_ = nullptr;
        usable_ = 0;
    }

    void* base_ = nullptr;
    std::int64_t usable_ = 0;
};
#else
class Kept {
  public:
    ~Kept() { release(memory_); }

    void* at_least(std::int64_t bytes) {
        if (bytes > usable_) {
            release(memory_);
            memory_ = nullptr;
            usable_ = 0;
            memory_ = allocate(bytes, 1);
            usable_ = bytes;
        }
        return memory_;
    }

  private:
    void* memory_ = nullptr;
    std::int64_t usable_ = 0;
};
#endif

}  // namespace

void* kept_memory(std::int64_t bytes) {
    thread_local Kept kept;
    return kept.at_least(bytes);
}

}  // namespace mplug2_fast
