// Memory for one call, kept by the calling thread for the next.
#pragma once
#include <stdint.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

namespace kbn {

struct FreeMemory {
  void operator()(char* memory) const { std::free(memory); }
};

struct KeptMemory {
  std::unique_ptr<char, FreeMemory> memory;
  size_t bytes = 0;
};

// A call takes the memory away while it runs, so that a nested call on the same thread finds none
// and makes its own.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : block_(std::exchange(kept(), KeptMemory{})) {
    if (block_.bytes >= bytes) return;
    block_.memory.reset();
    block_.memory.reset(static_cast<char*>(std::malloc(bytes + kAlignment)));
    if (!block_.memory) throw std::bad_alloc();
    block_.bytes = bytes;
  }
  ~Scratch() {
    if (block_.bytes <= kMostKept) kept() = std::move(block_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Aligned to a cache line.
  char* data() const {
    const auto address = reinterpret_cast<uintptr_t>(block_.memory.get());
    return block_.memory.get() + (kAlignment - address % kAlignment) % kAlignment;
  }

 private:
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kMostKept = 64 << 20;

  static KeptMemory& kept() {
    static thread_local KeptMemory memory;
    return memory;
  }

  KeptMemory block_;
};

}  // namespace kbn
