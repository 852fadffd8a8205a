// Memory that is fetched a little at each call of generated code, ahead of the code that will read it.
#pragma once
#include <algorithm>
#include <cstdint>

#include "generated.h"

namespace sparsekd::cpu {

// To a compiler that sees nothing happen, __builtin_prefetch in a loop of its own is no reason to keep the loop.
inline void fetch_line(const void* at) {
#if defined(__x86_64__)
  asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(at)));
#else
  __builtin_prefetch(at);
#endif
}

// Has memory come nearer bit by bit. Code runs once per position, as often as a small map has them, and nothing fetches
// it as far ahead as it comes from.
class Fetched {
 public:
  Fetched(const void* begin, const void* end, int64_t calls)
      : at_(static_cast<const char*>(begin)),
        end_(static_cast<const char*>(end)),
        each_((end_ - at_ + 64 * calls - 1) / (64 * calls) * 64) {}
  void next() {
    for (const char* const to = end_ - at_ < each_ ? end_ : at_ + each_; at_ < to; at_ += 64) fetch_line(at_);
  }

 private:
  const char* at_;
  const char* end_;
  int64_t each_;
};

// As Fetched, for what the next tile reads of an image.
class FetchedPixels {
 public:
  FetchedPixels(const SpmmTile<float>& tile, int64_t calls)
      : tile_(tile), left_(tile.ahead ? tile.ahead_channels * tile.ahead_lines : 0), each_(ceil_div(left_, calls)) {}
  void next() {
    const int64_t count = std::min(each_, left_);
    left_ -= count;
    for (int64_t i = 0; i < count; ++i) {
      fetch_line(tile_.ahead + channel_ * tile_.ahead_pitch + line_ * kGeneratedLanes);
      if (++line_ < tile_.ahead_lines) continue;
      line_ = 0;
      ++channel_;
    }
  }

 private:
  const SpmmTile<float>& tile_;
  int64_t left_;
  const int64_t each_;
  int64_t channel_ = 0;
  int line_ = 0;
};

}  // namespace sparsekd::cpu
