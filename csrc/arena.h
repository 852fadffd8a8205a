// Memory of a network's activations, kept from one forward to the next.
//
// malloc maps large blocks anew at each call and gives them back after it, and the kernel fills every page with zeros
// again: a fifth of VGG-16's time at batch 8. Between enter() and leave(), a thread's CPU tensors of kLeast bytes or
// more come from an arena: the smallest idle block that is at most twice as large, else a new one. Blocks go back to
// it when their tensors end, in whatever thread, and stay idle until the arena itself ends or a whole forward had no
// use for them. Everything else is as before: the allocator in front of torch's hands it on. As torch's does, it gives
// pointers that are their own context (raw_allocate, which oneDNN calls, insists), so a table says whose a block is.
#pragma once
#include <c10/core/CPUAllocator.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "resident.h"

namespace sparsekd {

class Arena : public torch::CustomClassHolder {
 public:
  static constexpr size_t kLeast = 1 << 20;  // bytes; below, malloc keeps blocks itself

  Arena() { install(); }

  void enter() {
    leave();  // where an interrupt kept a forward from it
    {
      const std::lock_guard<std::mutex> lock(shared().mutex);
      auto& idle = pool_->idle;
      for (auto it = idle.begin(); it != idle.end();) it = it->second.used < pool_->forward ? idle.erase(it) : ++it;
      ++pool_->forward;
    }
    entered().push_back(pool_);
    arenas_entered() = entered().size();
  }

  void leave() {
    auto& stack = entered();
    stack.erase(std::find(stack.begin(), stack.end(), pool_), stack.end());
    arenas_entered() = stack.size();
  }

  // Bytes of the blocks that are idle.
  int64_t idle() const {
    const std::lock_guard<std::mutex> lock(shared().mutex);
    int64_t total = 0;
    for (const auto& [size, block] : pool_->idle) total += static_cast<int64_t>(size);
    return total;
  }

 private:
  struct Block {
    at::DataPtr data;
    int64_t used;  // the forward that used it last
  };

  struct Pool {
    std::multimap<size_t, Block> idle;  // by size
    int64_t forward = 0;
  };

  // A block that a tensor has. The pool lives as long as one of its blocks is lent.
  struct Loan {
    std::shared_ptr<Pool> pool;
    size_t size;
    at::DataPtr data;
  };

  // What all arenas of the process share; never destroyed, as tensors may end after all else.
  struct Shared {
    std::mutex mutex;  // of the pools, too
    std::unordered_map<void*, Loan> lent;
    at::Allocator* base = nullptr;
  };

  static Shared& shared() {
    static Shared* const made = new Shared;
    return *made;
  }

  // The arenas that the calling thread is in, the innermost last.
  static std::vector<std::shared_ptr<Pool>>& entered() {
    thread_local std::vector<std::shared_ptr<Pool>> stack;
    return stack;
  }

  static at::DataPtr lend(const std::shared_ptr<Pool>& pool, size_t size) {
    Loan loan{pool, size, {}};
    {
      const std::lock_guard<std::mutex> lock(shared().mutex);
      const auto fit = pool->idle.lower_bound(size);
      if (fit != pool->idle.end() && fit->first / 2 <= size) {
        loan.size = fit->first;
        loan.data = std::move(fit->second.data);
        pool->idle.erase(fit);
      }
    }
    if (!loan.data) loan.data = shared().base->allocate(size);
    void* data = loan.data.get();
    const at::Device device = loan.data.device();
    const std::lock_guard<std::mutex> lock(shared().mutex);
    shared().lent.emplace(data, std::move(loan));
    return {data, data, &end, device};
  }

  // Ends a block of whichever origin.
  static void end(void* data) {
    std::shared_ptr<Pool> pool;  // outlives the lock: its end may free blocks
    {
      const std::lock_guard<std::mutex> lock(shared().mutex);
      const auto found = shared().lent.find(data);
      if (found != shared().lent.end()) {
        Loan& loan = found->second;
        pool = loan.pool;
        pool->idle.emplace(loan.size, Block{std::move(loan.data), pool->forward});
        shared().lent.erase(found);
        return;
      }
    }
    shared().base->raw_deleter()(data);
  }

  class Allocator final : public at::Allocator {
    at::DataPtr allocate(size_t size) override {
      if (size < kLeast || entered().empty()) return shared().base->allocate(size);
      return lend(entered().back(), size);
    }
    at::DeleterFnPtr raw_deleter() const override { return shared().base->raw_deleter() ? &end : nullptr; }
    void copy_data(void* to, const void* from, size_t size) const override { shared().base->copy_data(to, from, size); }
  };

  static void install() {
    static std::once_flag once;
    std::call_once(once, [] {
      shared().base = c10::GetCPUAllocator();
      c10::SetCPUAllocator(new Allocator);
    });
  }

  std::shared_ptr<Pool> pool_ = std::make_shared<Pool>();
};

}  // namespace sparsekd
