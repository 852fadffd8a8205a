// What csrc/cuda/mma.cuh means under g++: the lanes of a warp meet and hand over their words; see mma.cpp.
#pragma once
#include "emulator.h"

namespace emulator {

// Words of all lanes: [lane][word].
void load_matrices_transposed(uint32_t* words, const void* row, int line, const void* pc);
void load_matrices(uint32_t* words, const void* row, int line, const void* pc);
void mma(float* c, const uint32_t* a, const uint32_t* b, int depth, bool bfloat16, int line);
void mma_sparse(float* c, const uint32_t* a, const uint32_t* b, uint32_t metadata, int selector, bool bfloat16,
                int line);

// Of the device that is played; the tests set them.
extern int device_major, device_shared_bytes, device_multiprocessors;

}  // namespace emulator

namespace sparsekd::cuda {

using SharedAddress = uintptr_t;
inline void needs_tensor_cores() {}
inline SharedAddress shared_address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

EMULATOR_UNCHECKED inline void load_matrices_transposed(uint32_t (&words)[4], SharedAddress row,
                                                        int line = __builtin_LINE()) {
  emulator::load_matrices_transposed(words, reinterpret_cast<const void*>(row), line, __builtin_return_address(0));
}
EMULATOR_UNCHECKED inline void load_matrices(uint32_t (&words)[4], SharedAddress row, int line = __builtin_LINE()) {
  emulator::load_matrices(words, reinterpret_cast<const void*>(row), line, __builtin_return_address(0));
}
template <class T>
EMULATOR_UNCHECKED void mma_k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1, int line = __builtin_LINE()) {
  const uint32_t a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
  emulator::mma(c, a, b, 16, std::is_same_v<T, BFloat16>, line);
}
template <class T>
EMULATOR_UNCHECKED void mma_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0, int line = __builtin_LINE()) {
  const uint32_t a[] = {a0, a1}, b[] = {b0};
  emulator::mma(c, a, b, 8, std::is_same_v<T, BFloat16>, line);
}
template <class T, int kSelector>
EMULATOR_UNCHECKED void mma_sparse_k32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata,
                                       int line = __builtin_LINE()) {
  emulator::mma_sparse(c, a, b, metadata, kSelector, std::is_same_v<T, BFloat16>, line);
}

struct DeviceLimits {
  int major, shared_bytes, multiprocessors;
};
inline cudaError_t limits_of(int, DeviceLimits* limits) {
  *limits = {emulator::device_major, emulator::device_shared_bytes, emulator::device_multiprocessors};
  return cudaSuccess;
}

}  // namespace sparsekd::cuda
