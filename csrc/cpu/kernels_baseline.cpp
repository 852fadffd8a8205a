// The kernels for any processor: 16-byte vectors (SSE2 on x86-64, NEON on 64-bit Arm).
// Every standard header comes before the target is raised, so that no shared inline function is compiled for it.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels.h"

#define SPARSEKD_VECTOR_BYTES 16
namespace sparsekd::cpu::baseline {
namespace {
#include "simd.inc"
#include "spmm.inc"
#include "sddmm.inc"
#include "stretch.inc"
#include "spmv.inc"
#include "transpose.inc"
#include "kd_loss.inc"
}  // namespace

const Kernels kernels = {
    "baseline",
    {&spmm_shape<float>, &spmm<float>, &sddmm_shape<float>, &sddmm<float>, &spmv<float>, &transpose<float>, &kd_loss_row<float>},
    {&spmm_shape<double>, &spmm<double>, &sddmm_shape<double>, &sddmm<double>, &spmv<double>, &transpose<double>, &kd_loss_row<double>},
    &stretch,
    &scale,
};
}  // namespace sparsekd::cpu::baseline
