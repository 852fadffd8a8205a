// The few things that device code takes from its compiler. Under nvcc they are CUDA; under g++ the emulator of
// tests/emulator gives the same names, so that the same kernels run and are checked on a machine with no GPU.
#pragma once
#ifndef __CUDACC__
#include "emulator.h"
#else
#undef NDEBUG  // of assert, which is how a kernel tells of input that is only known on the device
#include <cassert>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace sparsekd::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, Half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Two values as the 16-bit halves of a word, the first the lower.
template <class T>
__device__ __forceinline__ uint32_t word_of(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, Half>) {
    const __half2 two = __floats2half2_rn(low, high);
    memcpy(&word, &two, 4);
  } else {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    memcpy(&word, &two, 4);
  }
  return word;
}

__device__ __forceinline__ float half_of_bits(unsigned bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// The same number, which the compiler does not know: what follows from it is worked out again, where else it would lie in
// a register all the way from where it was needed before.
template <class T>
__device__ __forceinline__ T anew(T x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2^x, within 2^-22 of it; 0 below 2^-126.
__device__ __forceinline__ float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// a / b, within 2^-22 of it; 0 for b above 2^126.
__device__ __forceinline__ float fast_divide(float a, float b) { return __fdividef(a, b); }

// NaN stays.
__device__ __forceinline__ float not_below(float x, float least) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(least));
  return result;
#else
  return x < least ? least : x;
#endif
}
__device__ __forceinline__ float not_above(float x, float most) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(most));
  return result;
#else
  return x > most ? most : x;
#endif
}

#define SPARSEKD_ASSERT(condition, sentence) assert((condition) && sentence)

template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

template <class V>
__device__ __forceinline__ V load_vector(const V* from) {
  return *from;
}
// Nothing where not `there`.
template <class V>
__device__ __forceinline__ void store_vector(V* to, V value, bool there = true) {
  if (there) *to = value;
}

// 16 bytes from global to shared memory, or zeros where not `valid`; nothing where not `there`.
__device__ __forceinline__ void copy_async16(void* to, const void* from, bool valid, bool there = true) {
  if (!there) return;
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(valid ? 16 : 0) : "memory");
#else
  *static_cast<float4*>(to) = valid ? *static_cast<const float4*>(from) : float4{};
#endif
}
__device__ __forceinline__ void copy_async8(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;\n" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from) : "memory");
#else
  *static_cast<float2*>(to) = *static_cast<const float2*>(from);
#endif
}
__device__ __forceinline__ void copy_async4(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from) : "memory");
#else
  *static_cast<float*>(to) = *static_cast<const float*>(from);
#endif
}
__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

#define SPARSEKD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  sparsekd::cuda::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t raised = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(shared_bytes));
    if (raised != cudaSuccess) return raised;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace sparsekd::cuda
#endif
