// Memory of large results, kept from one step of training to the next.
//
// malloc gives large blocks back to the system and maps them anew, and the kernel fills every page with zeros again: an
// eighth of a training step of 3 x 3 layers, a third of one of small 1 x 1 layers. A step wants the same sizes as the
// one before it, so that blocks whose tensors have ended wait here for the next result of about their size. There are
// never more of them than were in use at once, nor more than kMost bytes; what no result wanted for kPatience results
// goes back to the system.
#pragma once
#include <c10/core/Allocator.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>

#include "pages.h"

namespace sparsekd {

class ResultPool final : public at::Allocator {
 public:
  static constexpr size_t kLeast = size_t{1} << 20;  // bytes of a result
  static constexpr size_t kMost = size_t{1} << 30;   // that wait at once
  static constexpr int64_t kPatience = 1024;

  // Never destroyed, as tensors may end after all else.
  static ResultPool& shared() {
    static ResultPool* const made = new ResultPool;
    return *made;
  }

  at::DataPtr allocate(size_t bytes) override {
    Block* block = take(bytes);
    if (block == nullptr) {
      auto made = std::make_unique<Block>(Block{nullptr, std::max<size_t>(bytes, 1), 0});
      try {
        made->data = take_pages(made->bytes);
      } catch (const std::bad_alloc&) {
        release();
        made->data = take_pages(made->bytes);
      }
      block = made.release();
    }
    return {block->data, block, &end, at::Device(at::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  // Bytes that wait.
  int64_t idle() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int64_t>(idle_bytes_);
  }
  // Gives all that waits back to the system.
  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!idle_.empty()) drop(idle_.begin());
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
    int64_t since;  // results handed out until it began to wait
  };
  using Idle = std::multimap<size_t, Block*>;  // by size

  // The smallest block that waits and is large enough, if it isn't much too large.
  Block* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++results_;
    Block* found = nullptr;
    if (const auto fit = idle_.lower_bound(bytes); fit != idle_.end() && fit->first - bytes <= bytes / 4 + kHugePage) {
      found = fit->second;
      idle_bytes_ -= found->bytes;
      idle_.erase(fit);
    }
    if (results_ % (kPatience / 8) == 0) {
      for (auto at = idle_.begin(); at != idle_.end();) {
        const auto next = std::next(at);
        if (results_ - at->second->since > kPatience) drop(at);
        at = next;
      }
    }
    return found;
  }

  static void end(void* context) { shared().keep(static_cast<Block*>(context)); }

  void keep(Block* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    block->since = results_;
    idle_bytes_ += block->bytes;
    idle_.emplace(block->bytes, block);
    while (idle_bytes_ > kMost) drop(oldest());
  }

  Idle::iterator oldest() {
    return std::min_element(idle_.begin(), idle_.end(),
                            [](const auto& a, const auto& b) { return a.second->since < b.second->since; });
  }

  void drop(Idle::iterator at) {
    idle_bytes_ -= at->second->bytes;
    give_pages(at->second->data);
    delete at->second;
    idle_.erase(at);
  }

  std::mutex mutex_;
  Idle idle_;
  size_t idle_bytes_ = 0;
  int64_t results_ = 0;  // handed out
};

}  // namespace sparsekd
