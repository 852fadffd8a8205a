#include "kept_code.h"

#include <algorithm>
#include <cstring>

namespace sparsekd::cpu {

KeptCode::KeptCode(const std::vector<at::Tensor>& indices) {
  for (const at::Tensor& tensor : indices) indices_.push_back(tensor.defined() ? tensor.clone() : tensor);
}

bool KeptCode::fits(const std::vector<at::Tensor>& indices) const {
  return std::equal(indices.begin(), indices.end(), indices_.begin(), indices_.end(),
                    [](const at::Tensor& given, const at::Tensor& own) {
                      if (!given.defined() || !own.defined()) return given.defined() == own.defined();
                      return given.numel() == own.numel() &&
                             std::memcmp(given.const_data_ptr(), own.const_data_ptr(), own.nbytes()) == 0;
                    });
}

CodeStore& CodeStore::shared() {
  static CodeStore* const made = new CodeStore;
  return *made;
}

void CodeStore::sweep() {
  for (auto at = patterns_.begin(); at != patterns_.end();) {
    at = at->second.memory.expired() ? patterns_.erase(at) : std::next(at);
  }
}

size_t CodeStore::held() const {
  size_t total = 0;
  for (const auto& [memory, pattern] : patterns_) {
    for (const auto& [key, entry] : pattern.entries) total += entry.code ? entry.code->bytes() : 0;
  }
  return total;
}

int64_t CodeStore::bytes() {
  const std::lock_guard<std::mutex> guard(mutex_);
  sweep();
  return static_cast<int64_t>(held());
}

CodeStore::Pattern& CodeStore::pattern_of(const at::Tensor& owner) {
  const c10::StorageImpl* const memory = owner.storage().unsafeGetStorageImpl();
  auto place = patterns_.find(memory);
  if (place == patterns_.end()) {
    sweep();
    place = patterns_.emplace(memory, Pattern{owner.storage().getWeakStorageImpl(), {}, nullptr, {}}).first;
  }
  return place->second;
}

void CodeStore::note_columns(const at::Tensor& owner, const at::Tensor& col_indices) {
  const std::lock_guard<std::mutex> guard(mutex_);
  Pattern& pattern = pattern_of(owner);
  const c10::StorageImpl* const columns = col_indices.storage().unsafeGetStorageImpl();
  if (pattern.columns_at == columns) return;
  pattern.columns = col_indices.storage().getWeakStorageImpl();
  pattern.columns_at = columns;
}

std::shared_ptr<const KeptCode> CodeStore::get(const at::Tensor& owner, const Key& key,
                                               const std::vector<at::Tensor>& indices, const Maker& make) {
  const std::lock_guard<std::mutex> guard(mutex_);
  return get(pattern_of(owner), key, indices, make);
}

std::shared_ptr<const KeptCode> CodeStore::get_by_columns(const at::Tensor& col_indices, const Key& key,
                                                          const std::vector<at::Tensor>& indices, const Maker& make) {
  const std::lock_guard<std::mutex> guard(mutex_);
  const c10::StorageImpl* const columns = col_indices.storage().unsafeGetStorageImpl();
  for (auto& [memory, pattern] : patterns_) {
    if (pattern.columns_at == columns && !pattern.memory.expired()) return get(pattern, key, indices, make);
  }
  return nullptr;
}

std::shared_ptr<const KeptCode> CodeStore::get(Pattern& pattern, const Key& key,
                                               const std::vector<at::Tensor>& indices, const Maker& make) {
  constexpr int64_t kPatience = 4096;  // calls after which a size of input may make room for another
  ++calls_;
  std::map<Key, Entry>& entries = pattern.entries;
  if (const auto known = entries.find(key); known != entries.end()) {
    known->second.used = calls_;
    const auto& code = known->second.code;
    if (!code || code->fits(indices)) return code;
    entries.erase(known);
  }
  if (entries.size() >= kSizes) {
    const auto oldest = std::min_element(entries.begin(), entries.end(), [](const auto& a, const auto& b) {
      return a.second.used < b.second.used;
    });
    if (calls_ - oldest->second.used < kPatience) return nullptr;
    entries.erase(oldest);
  }
  if (held() >= kMost) return nullptr;
  std::shared_ptr<const KeptCode> code = make();
  entries.emplace(key, Entry{code, calls_});
  return code;
}

}  // namespace sparsekd::cpu
