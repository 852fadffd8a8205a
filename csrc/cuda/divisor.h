// Division by a number that the host knows and the compiler doesn't: a multiplication, a sum and a shift.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define SPARSEKD_HOST_DEVICE __host__ __device__
#else
#define SPARSEKD_HOST_DEVICE
#endif

namespace sparsekd::cuda {

// For divisors from 1 and dividends below 2^31: with 2^(s-1) < d <= 2^s, n / d is (n + n * m / 2^32) / 2^s, where
// m = 2^32 * (2^s - d) / d + 1, all rounded down (Granlund and Montgomery, "Division by invariant integers using
// multiplication", PLDI 1994).
struct Divisor {
  int by = 1;
  uint32_t multiplier = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t number) : by(static_cast<int>(number)) {
    const auto divisor = static_cast<uint64_t>(number);
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor) / divisor + 1);
  }

  SPARSEKD_HOST_DEVICE uint32_t quotient(uint32_t n) const {
    return (static_cast<uint32_t>(uint64_t(n) * multiplier >> 32) + n) >> shift;
  }
  // `n` becomes the quotient; returns the rest.
  SPARSEKD_HOST_DEVICE uint32_t take(uint32_t& n) const {
    const uint32_t all = n;
    n = quotient(all);
    return all - n * static_cast<uint32_t>(by);
  }
};

}  // namespace sparsekd::cuda
