// Elements of a tensor whose type is known when the kernel runs, read and written as fp32.
#pragma once
#include "device.cuh"
#include "dtype.h"

#include <cstring>
#include <type_traits>

namespace sparsekd::cuda {

__device__ __forceinline__ float load_value(const void* values, DType dtype, int64_t index) {
  if (dtype == DType::float32) return static_cast<const float*>(values)[index];
  if (dtype == DType::float16) return to_float(static_cast<const Half*>(values)[index]);
  return to_float(static_cast<const BFloat16*>(values)[index]);
}

// Nothing where not `there`.
__device__ __forceinline__ void store_value(void* to, DType dtype, int64_t index, float value, bool there = true) {
  if (dtype == DType::float32) {
    store_vector(static_cast<float*>(to) + index, value, there);
  } else if (dtype == DType::float16) {
    store_vector(static_cast<Half*>(to) + index, from_float<Half>(value), there);
  } else {
    store_vector(static_cast<BFloat16*>(to) + index, from_float<BFloat16>(value), there);
  }
}

// Four elements at once from an index divisible by 4; `from` begins at a 16-byte boundary.
__device__ __forceinline__ float4 load_four(const void* from, DType dtype, int64_t index) {
  if (dtype == DType::float32) {
    return load_vector(reinterpret_cast<const float4*>(static_cast<const float*>(from) + index));
  }
  const uint2 bits = load_vector(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(from) + index));
  if (dtype == DType::float16) {
    return {half_of_bits(bits.x & 0xffff), half_of_bits(bits.x >> 16), half_of_bits(bits.y & 0xffff),
            half_of_bits(bits.y >> 16)};
  }
  return {__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u), __uint_as_float(bits.y << 16),
          __uint_as_float(bits.y & 0xffff0000u)};
}

// The 16 bits of a value of type T.
template <class T>
__device__ __forceinline__ float float_of_bits(uint32_t bits) {
  if constexpr (std::is_same_v<T, Half>) {
    return half_of_bits(bits);
  } else {
    return __uint_as_float(bits << 16);
  }
}

template <class T>
__device__ __forceinline__ uint32_t bits_of(float value) {
  const T rounded = from_float<T>(value);
  uint16_t bits;
  memcpy(&bits, &rounded, sizeof(bits));
  return bits;
}

}  // namespace sparsekd::cuda
