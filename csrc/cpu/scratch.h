// Memory for the time of a call.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../pages.h"

namespace sparsekd::cpu {

// A thread's stack of buffers, kept from one call to the next: fresh pages cost more than what is done in them, and
// what the last call wrote is still in the caches, where the next one writes.
class Scratch {
 public:
  static constexpr size_t kKept = size_t{32} << 20;  // bytes that a thread keeps at most

  void* take(size_t bytes) {
    if (blocks_.empty() || blocks_.back().used + bytes > blocks_.back().bytes) {
      // The outermost buffer of a call: room for all that one took at once before.
      size_t size = std::max(bytes, blocks_.empty() ? most_ : 0);
      char* const data = static_cast<char*>(take_pages(size));
      blocks_.push_back({data, size, 0});
    }
    Block& top = blocks_.back();
    top.used += bytes;
    return top.data + top.used - bytes;
  }

  // Gives back what was taken last.
  void give(size_t bytes) {
    Block& top = blocks_.back();
    most_ = std::max(most_, held());
    top.used -= bytes;
    if (top.used == 0 && (blocks_.size() > 1 || top.bytes < most_ || top.bytes > kKept)) drop();
    if (blocks_.empty() && most_ > kKept) most_ = 0;
  }

  ~Scratch() {
    while (!blocks_.empty()) drop();
  }

  static Scratch& of_thread() {
    thread_local Scratch scratch;
    return scratch;
  }

 private:
  struct Block {
    char* data;
    size_t bytes, used;
  };
  size_t held() const {
    size_t total = 0;
    for (const Block& block : blocks_) total += block.bytes;
    return total;
  }
  void drop() {
    give_pages(blocks_.back().data);
    blocks_.pop_back();
  }
  std::vector<Block> blocks_;
  size_t most_ = 0;  // bytes of all blocks at once, at most
};

// Uninitialised memory on a cache line's border; ends before those that were made before it in the same thread.
template <class T>
struct Buffer {
  explicit Buffer(int64_t elements)
      : bytes((static_cast<size_t>(std::max<int64_t>(elements, 1)) * sizeof(T) + 63) / 64 * 64),
        data(static_cast<T*>(Scratch::of_thread().take(bytes))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { Scratch::of_thread().give(bytes); }
  T* get() const { return data; }

 private:
  size_t bytes;
  T* data;
};

}  // namespace sparsekd::cpu
