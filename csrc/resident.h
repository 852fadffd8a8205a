// Tensors that stay: a network's packed weights and plans, side by side in huge pages (pages.h).
#pragma once
#include <ATen/ops/from_blob.h>

#include <memory>
#include <mutex>

#include "pages.h"

namespace sparsekd {

// An uninitialised contiguous CPU tensor. Pages are shared in the order of the calls, which is that of a network's
// layers, and end with the last of their tensors.
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
