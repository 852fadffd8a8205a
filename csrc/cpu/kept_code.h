// Code of patterns that are being trained, kept with the transposed pattern.
//
// While values are retrained their pattern stays, so that code made for it once (generated.h) serves every step. A
// pattern that is to be trained has its transposed plan made beforehand (transpose_pattern) and given to each forward
// and backward: what is kept belongs to the plan's memory, and ends soon after it. Indices are compared with those that
// code was made for at each call, so that it is never that of another pattern.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace sparsekd::cpu {

// What is kept of one pattern for one size of its input: made for a copy of its indices, of which some may be undefined.
class KeptCode {
 public:
  explicit KeptCode(const std::vector<at::Tensor>& indices);
  virtual ~KeptCode() = default;
  virtual size_t bytes() const = 0;
  bool fits(const std::vector<at::Tensor>& indices) const;
  const std::vector<at::Tensor>& indices() const { return indices_; }

 private:
  std::vector<at::Tensor> indices_;
};

class CodeStore {
 public:
  static constexpr size_t kMost = size_t{1} << 29;  // bytes of code; patterns beyond are interpreted
  static constexpr size_t kSizes = 8;               // of inputs and kinds of code that a pattern is kept for
  using Key = std::vector<int64_t>;
  using Maker = std::function<std::shared_ptr<const KeptCode>()>;

  // Never destroyed, as tensors may end after all else.
  static CodeStore& shared();

  // What belongs to `owner`'s memory under a key, made if it isn't there or isn't for these indices. Null where nothing
  // is gained.
  std::shared_ptr<const KeptCode> get(const at::Tensor& owner, const Key& key, const std::vector<at::Tensor>& indices,
                                      const Maker& make);

  // The same of the pattern with these columns, for whose transposed plan a forward had code kept or looked for; null
  // for one that is not trained.
  std::shared_ptr<const KeptCode> get_by_columns(const at::Tensor& col_indices, const Key& key,
                                                 const std::vector<at::Tensor>& indices, const Maker& make);
  void note_columns(const at::Tensor& owner, const at::Tensor& col_indices);

  // Bytes of code of patterns that are alive.
  int64_t bytes();

 private:
  struct Entry {
    std::shared_ptr<const KeptCode> code;  // null: nothing is gained
    int64_t used;
  };
  struct Pattern {
    c10::weak_intrusive_ptr<c10::StorageImpl> memory;
    std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> columns;
    const c10::StorageImpl* columns_at = nullptr;
    std::map<Key, Entry> entries;
  };

  // Drops what belongs to patterns that ended.
  void sweep();
  Pattern& pattern_of(const at::Tensor& owner);
  std::shared_ptr<const KeptCode> get(Pattern& pattern, const Key& key, const std::vector<at::Tensor>& indices,
                                      const Maker& make);
  size_t held() const;

  std::mutex mutex_;
  std::map<const c10::StorageImpl*, Pattern> patterns_;
  int64_t calls_ = 0;
};

}  // namespace sparsekd::cpu
