// Memory in huge pages, where the system has them to give.
//
// A forward reads all its weights and activations once, tens of megabytes that the caches and the address translation
// do not hold: with pages of 4 KiB a good part of it would be spent on finding out where the pages are, and cache sets
// would be shared by chance.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace sparsekd {

constexpr size_t kHugePage = size_t{2} << 20;

// Asks for huge pages where whole ones lie in memory that was just allocated. A hint: without it all is as well, but
// slower.
inline void prefer_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// Uninitialised; `bytes` becomes a multiple of kHugePage.
inline void* take_pages(size_t& bytes) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* const data = ::operator new(bytes, std::align_val_t{kHugePage});
  prefer_huge_pages(data, bytes);
  return data;
}

inline void give_pages(void* data) { ::operator delete(data, std::align_val_t{kHugePage}); }

}  // namespace sparsekd
