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
    "baseline",
    type_kernels<float>(1, widths<float>, -1),
    type_kernels<double>(1, widths<double>, -1),
};
}  // namespace sparsekd::cpu::baseline
