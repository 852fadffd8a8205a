// The kernels for AVX-512 (F, VL, DQ, BW).
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
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw")
#endif
#define SPARSEKD_VECTOR_BYTES 64
namespace sparsekd::cpu::avx512 {
namespace {
#include "simd.inc"
namespace wide {
constexpr int kLanesBytes = 64;
#include "lane_kernels.inc"
}  // namespace wide
namespace narrow {
constexpr int kLanesBytes = 32;
#include "lane_kernels.inc"
}  // namespace narrow
#include "copy_lines.inc"
#include "spmv.inc"
#include "kd_loss.inc"
#include "epilogue.inc"
#include "max_pool2d.inc"
#include "type_kernels.inc"

template <class T>
constexpr LaneKernels<T> widths[] = {wide::lane_kernels<T>, narrow::lane_kernels<T>, wide::lane_kernels<T>};
}  // namespace

const Kernels kernels = {
    "avx512",
    type_kernels<float>(2, widths<float>, 0),
    type_kernels<double>(2, widths<double>, -1),
};
const Kernels narrow_kernels = {
    "avx512",
    type_kernels<float>(1, widths<float> + 1, 1),
    type_kernels<double>(1, widths<double> + 1, -1),
};
}  // namespace sparsekd::cpu::avx512
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
