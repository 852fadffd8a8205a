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
#include "spmv.inc"
#include "transpose.inc"
#include "kd_loss.inc"
#include "epilogue.inc"
}  // namespace

const Kernels kernels = {
    "baseline",
    {&tile_shape<float>, &spmm<float>, &grad_tile_shape<float>, &sddmm<float>, &spmv<float>, &transpose<float>, &gather_lanes<float>,
     &scatter_lanes<float>, &epilogue<float>, &kd_loss_row<float>},
    {&tile_shape<double>, &spmm<double>, &grad_tile_shape<double>, &sddmm<double>, &spmv<double>, &transpose<double>, &gather_lanes<double>,
     &scatter_lanes<double>, &epilogue<double>, &kd_loss_row<double>},
};
}  // namespace sparsekd::cpu::baseline
