// Words of 16-bit values change lanes: from the places where products of matrices leave results to those from where a
// lane stores 16 bytes. g = lane / 4, t = lane % 4.
#pragma once
#include "device.cuh"

namespace sparsekd::cuda {

// Of a 4 x 4 matrix of words each of four lanes holds a row; then each holds a column.
__device__ __forceinline__ void turn_over(uint32_t (&words)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? words[i] : words[i + 1], 1);
    words[i] = odd ? got : words[i];
    words[i + 1] = odd ? words[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? words[i] : words[i + 2], 2);
    words[i] = upper ? got : words[i];
    words[i + 2] = upper ? words[i + 2] : got;
  }
}

// Of an 8 x 8 matrix of 16-bit values a lane holds row g, columns 2 * t + {0, 1}; then it holds column g, rows 2 * t +
// {0, 1}.
__device__ __forceinline__ uint32_t transposed(uint32_t word) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const uint32_t low = __shfl_sync(0xffffffffu, word, 8 * t + g / 2);
  const uint32_t high = __shfl_sync(0xffffffffu, word, 8 * t + 4 + g / 2);
  return g % 2 ? low >> 16 | (high & 0xffff0000u) : (low & 0xffffu) | high << 16;
}

}  // namespace sparsekd::cuda
