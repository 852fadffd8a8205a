// The kernels for AVX2 + FMA.
#if defined(__x86_64__)
// Every standard header comes before the target is raised, so that no shared inline function is compiled for it.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define SPARSEKD_VECTOR_BYTES 32
namespace sparsekd::cpu::avx2 {
namespace {
#include "simd.inc"
namespace narrow {
constexpr int kLanesBytes = SPARSEKD_VECTOR_BYTES;
#include "lane_kernels.inc"
}  // namespace narrow
#include "copy_lines.inc"
#include "spmv.inc"
#include "kd_loss.inc"
#include "epilogue.inc"
#include "max_pool2d.inc"
#include "type_kernels.inc"

template <class T>
constexpr LaneKernels<T> widths[] = {narrow::lane_kernels<T>};
}  // namespace

const Kernels kernels = {
    "avx2",
    type_kernels<float>(1, widths<float>, -1),
    type_kernels<double>(1, widths<double>, -1),
};
}  // namespace sparsekd::cpu::avx2
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
