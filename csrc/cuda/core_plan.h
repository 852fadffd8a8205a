// Plans of the convolution on CUDA cores: its records without the values, and where in [n_vectors, V] those lie. They are
// for inputs of one size.
#pragma once
#include <string_view>
#include <vector>

#include "direct.h"

namespace sparsekd::cuda {

// As many as no tiling of tensor cores has.
constexpr size_t kCoreNumbers = 10;
inline bool for_cuda_cores(at::IntArrayRef tiling) { return tiling.size() == kCoreNumbers; }

Problem core_problem(const Conv2dShape& shape, int64_t vector);

// What the plan depends on beside the pattern; none where no tile has the reach.
std::vector<int64_t> core_tiling(Call& call, const Problem& problem, const at::Tensor& col);

// int32: [slot | distance] of each record, then where each slice's blocks start, then the order of slices.
at::Tensor make_core_plan(Call& call, const Problem& problem, at::IntArrayRef tiling, const at::Tensor& crow,
                          const at::Tensor& col);

// conv2d_planned by such a plan. `values` are contiguous.
at::Tensor run_core_plan(const at::Tensor& input, const at::Tensor& values, const at::Tensor& plan,
                         at::IntArrayRef tiling, const OptionalTensor& rows, const OptionalTensor& residual,
                         Finish finish, const Conv2dShape& shape);

}  // namespace sparsekd::cuda

// The choice without a device to run it on, for float32 images and the 3 numbers of a TensorDevice: the cycles that are
// expected, and whether planes are taken as they lie. `sizes` as sparsekd_tensor_tiling has them. 0 where no tile has
// the reach.
extern "C" int sparsekd_core_cycles(const int64_t* sizes, const int* device, int* flat, double* cycles);
