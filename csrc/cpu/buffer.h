#pragma once

#include "cpu/memory.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

// Memory for so many items, on lines of the cache. (Classes of the standard library would be compiled for every
// instruction set, and the linker would keep any one of them.)
template <typename Item>
class Buffer {
  public:
    explicit Buffer(std::int64_t count) : items_(static_cast<Item*>(allocate(count, sizeof(Item)))) {}
    ~Buffer() { release(items_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    operator Item*() const { return items_; }

  private:
    Item* items_;
};

}  // namespace
}  // namespace mplug2_fast::MPLUG2_ISA
