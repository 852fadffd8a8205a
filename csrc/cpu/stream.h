// Stores past the caches: what is larger than they are doesn't first have to come in, in order to be overwritten.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace sparsekd::cpu {

constexpr int64_t kStreamed = int64_t{8} << 20;  // bytes of a result that is stored so: most of it would leave L2 anyway

inline void stream(const void* from, int64_t bytes, void* to) {
#if defined(__x86_64__)
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0 && bytes % 16 == 0) {
    const auto* source = static_cast<const char*>(from);
    auto* target = static_cast<char*>(to);
    for (int64_t at = 0; at < bytes; at += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + at),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at)));
    }
    return;
  }
#endif
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

// Before others read what was streamed.
inline void end_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace sparsekd::cpu
