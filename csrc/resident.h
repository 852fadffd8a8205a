// Tensors in huge pages (pages.h): large results; and what stays, a network's packed weights and plans, side by side.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <memory>
#include <mutex>

#include "pages.h"
#include "result_pool.h"

namespace sparsekd {

// An uninitialised CPU tensor that asks for huge pages from so many bytes on.
inline at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options, size_t least) {
  at::Tensor result = at::empty(sizes, options);
  if (result.nbytes() >= least) prefer_huge_pages(result.mutable_data_ptr(), result.nbytes());
  return result;
}

// Arenas (arena.h) that the calling thread is in: they lend memory to all tensors.
inline size_t& arenas_entered() {
  thread_local size_t count = 0;
  return count;
}

// What an operator returns: large ones in memory that is used again (result_pool.h).
inline at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
#if !defined(__SANITIZE_ADDRESS__)  // which sees more of blocks that come and go
  size_t bytes = options.dtype().itemsize();
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  if (bytes >= ResultPool::kLeast && arenas_entered() == 0) {
    return at::detail::empty_generic(sizes, &ResultPool::shared(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                     options.dtype().toScalarType(), options.memory_format_opt());
  }
#endif
  return empty_large(sizes, options, ResultPool::kLeast);
}

// An uninitialised contiguous CPU tensor that stays. Pages are shared in the order of the calls, which is that of a
// network's layers, and end with the last of their tensors.
inline at::Tensor empty_resident(at::IntArrayRef sizes, const at::TensorOptions& options) {
  struct Pages {
    explicit Pages(size_t wanted) : bytes(wanted), data(static_cast<char*>(take_pages(bytes))) {}
    ~Pages() { give_pages(data); }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    size_t bytes, used = 0;
    char* data;
  };
  static std::mutex mutex;
  static std::weak_ptr<Pages> last;

  size_t bytes = options.dtype().itemsize();
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  bytes = (bytes + 63) / 64 * 64;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Pages> pages = last.lock();
  if (!pages || pages->used + bytes > pages->bytes) last = pages = std::make_shared<Pages>(bytes);
  void* const data = pages->data + pages->used;
  pages->used += bytes;
  return at::from_blob(data, sizes, [pages](void*) {}, options);
}

}  // namespace sparsekd
