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
#include "spmm.inc"
#include "sddmm.inc"
#include "spmv.inc"
#include "transpose.inc"
#include "kd_loss.inc"
#include "epilogue.inc"
}  // namespace

const Kernels kernels = {
    "avx2",
    {&tile_shape<float>, &spmm<float>, &grad_tile_shape<float>, &sddmm<float>, &spmv<float>, &transpose<float>, &gather_lanes<float>,
     &scatter_lanes<float>, &epilogue<float>, &kd_loss_row<float>},
    {&tile_shape<double>, &spmm<double>, &grad_tile_shape<double>, &sddmm<double>, &spmv<double>, &transpose<double>, &gather_lanes<double>,
     &scatter_lanes<double>, &epilogue<double>, &kd_loss_row<double>},
};
}  // namespace sparsekd::cpu::avx2
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
