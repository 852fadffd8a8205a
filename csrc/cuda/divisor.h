// Division by a number that the host knows: a multiplication, where device code would take some twenty instructions.
// After Granlund and Montgomery, "Division by invariant integers using multiplication", PLDI 1994.
#pragma once
#include <cstdint>

namespace sparsekd::cuda {

struct Divisor {
  int by;
  uint32_t multiplier;
  int shift;
};

// Of 1 ... 2^30.
inline Divisor divisor_of(int64_t by) {
  int shift = 0;
  while ((int64_t{1} << shift) < by) ++shift;
  const uint64_t multiplier = (uint64_t{1} << 32) * ((uint64_t{1} << shift) - static_cast<uint64_t>(by)) /
                                  static_cast<uint64_t>(by) + 1;
  return {static_cast<int>(by), static_cast<uint32_t>(multiplier), shift};
}

}  // namespace sparsekd::cuda
