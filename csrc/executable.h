// Memory whose bytes the processor runs: written first, then sealed, never both at once.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "pages.h"

namespace sparsekd {

class ExecutablePages {
 public:
  // Null where the system gives no such memory, as hardened ones may not.
  static std::unique_ptr<const ExecutablePages> of(const std::vector<uint8_t>& code) {
#ifdef __linux__
    // Huge pages for what is large: to find out where small ones are took 5% of a ResNet-50.
    const bool large = code.size() >= kHugePage / 2;
    const size_t bytes = large ? (code.size() + kHugePage - 1) / kHugePage * kHugePage : code.size();
    const size_t taken = large ? bytes + kHugePage : bytes;  // with room to begin at a border
    void* const all = mmap(nullptr, taken, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return nullptr;
    const auto address = reinterpret_cast<uintptr_t>(all);
    auto* const data = reinterpret_cast<uint8_t*>(large ? (address + kHugePage - 1) / kHugePage * kHugePage : address);
    std::unique_ptr<const ExecutablePages> pages(new ExecutablePages(all, taken, data));
    prefer_huge_pages(data, bytes);
    std::memcpy(data, code.data(), code.size());
    if (mprotect(data, bytes, PROT_READ | PROT_EXEC) == 0) return pages;
#else
    (void)code;
#endif
    return nullptr;
  }
  ~ExecutablePages() {
#ifdef __linux__
    munmap(all_, taken_);
#endif
  }
  ExecutablePages(const ExecutablePages&) = delete;
  ExecutablePages& operator=(const ExecutablePages&) = delete;

  const uint8_t* at(size_t offset) const { return data_ + offset; }
  size_t size() const { return taken_; }

 private:
  ExecutablePages(void* all, size_t taken, const uint8_t* data) : all_(all), taken_(taken), data_(data) {}
  void* const all_;
  const size_t taken_;
  const uint8_t* const data_;
};

}  // namespace sparsekd
