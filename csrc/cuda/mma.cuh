// Tensor cores: what device code takes of them from its compiler, beside device.cuh. Fragments as the PTX ISA lays them
// out ("Matrix fragments for mma.m16n8k16", with 16-bit elements): with g = lane / 4, t = lane % 4,
//
//   A, 16 x K: word i holds row g + 8 * (i % 2), columns 2 * t + {0, 1} + 8 * (i / 2)
//   B, K x 8:  word i holds rows 2 * t + {0, 1} + 8 * i, column g
//   C, 16 x 8: element i is row g + 8 * (i / 2), column 2 * t + i % 2
//
// K = 8 has the first half of the words. Of sparse matrices ("Sparse mma.m16n8k32") A is 16 x 16 as above: of each four
// columns of a 16 x 32 matrix the two that are kept. B has two more words, rows 16 and up. Which two is told by two
// bits for each value, in ascending order; with h = t % 2, the lanes t / 2 = selector hold
//
//   metadata:  bits 16 * e + 2 * i and the next, of row g + 8 * e: which of its four columns value i + 8 * h is
//
// The architectures before 8.0 lack them: there they trap, and a kernel that begins with needs_tensor_cores() is
// nothing else.
#pragma once
#include "device.cuh"
#ifndef __CUDACC__
#include "mma.h"
#else
namespace sparsekd::cuda {

__device__ __forceinline__ void needs_tensor_cores() {
#if __CUDA_ARCH__ < 800
  __trap();
  __builtin_unreachable();
#endif
}

using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8 x 8 matrices of 16-bit elements, transposed: lane 8 * i + r gives the address of row r of matrix i, and word i
// of each lane is rows 2 * t + {0, 1}, column g of matrix i.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&words)[4], SharedAddress row) {
#if __CUDA_ARCH__ >= 800
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
#else
  __trap();
#endif
}

// The same without transposing: word i of each lane is row g, columns 2 * t + {0, 1} of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], SharedAddress row) {
#if __CUDA_ARCH__ >= 800
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
#else
  __trap();
#endif
}

#define SPARSEKD_MMA(shape, type, c, words, ...)                                                  \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, " words \
               ", {%0, %1, %2, %3};\n"                                                            \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                   \
               : __VA_ARGS__)

// c += a * b, 16 x 16 by 16 x 8.
template <class T>
__device__ __forceinline__ void mma_k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, Half>) {
    SPARSEKD_MMA("m16n8k16", "f16", c, "{%4, %5, %6, %7}, {%8, %9}", "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0),
                 "r"(b1));
  } else {
    SPARSEKD_MMA("m16n8k16", "bf16", c, "{%4, %5, %6, %7}, {%8, %9}", "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0),
                 "r"(b1));
  }
#else
  __trap();
#endif
}

// c += a * b, 16 x 8 by 8 x 8.
template <class T>
__device__ __forceinline__ void mma_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, Half>) {
    SPARSEKD_MMA("m16n8k8", "f16", c, "{%4, %5}, {%6}", "r"(a0), "r"(a1), "r"(b0));
  } else {
    SPARSEKD_MMA("m16n8k8", "bf16", c, "{%4, %5}, {%6}", "r"(a0), "r"(a1), "r"(b0));
  }
#else
  __trap();
#endif
}
#undef SPARSEKD_MMA

// From PTX 8.5 on the ascending order is said, without which later architectures are slower.
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define SPARSEKD_MMA_SPARSE "mma.sp::ordered_metadata"
#else
#define SPARSEKD_MMA_SPARSE "mma.sp"
#endif

// c += a * b, 16 x 32 (two of each four columns of a kept) by 32 x 8.
template <class T, int kSelector>
__device__ __forceinline__ void mma_sparse_k32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                               uint32_t metadata) {
#if __CUDA_ARCH__ >= 800
#define SPARSEKD_PRODUCT(type)                                                                                    \
  asm volatile(SPARSEKD_MMA_SPARSE ".sync.aligned.m16n8k32.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, " \
                                   "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"          \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),          \
                 "r"(metadata), "n"(kSelector))
  if constexpr (std::is_same_v<T, Half>) {
    SPARSEKD_PRODUCT("f16");
  } else {
    SPARSEKD_PRODUCT("bf16");
  }
#undef SPARSEKD_PRODUCT
#else
  __trap();
#endif
}

// What the host side chooses by.
struct DeviceLimits {
  int major, shared_bytes, multiprocessors;
};
inline cudaError_t limits_of(int device, DeviceLimits* limits) {
  cudaError_t error = cudaDeviceGetAttribute(&limits->major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  return error;
}

}  // namespace sparsekd::cuda
#endif
