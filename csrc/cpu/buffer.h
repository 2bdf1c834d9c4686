#pragma once

#include "cpu/memory.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

// Memory for a number of items, aligned to cache lines. (Classes of the standard library would be compiled for every
// instruction set, and the linker would keep an arbitrary one.)
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
