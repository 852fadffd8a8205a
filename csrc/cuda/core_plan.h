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

// int32: [distance | slot] of each record, then where each slice's blocks start, then the order of slices.
at::Tensor make_core_plan(Call& call, const Problem& problem, at::IntArrayRef tiling, const at::Tensor& crow,
                          const at::Tensor& col);

// conv2d_planned by such a plan. `values` are contiguous.
at::Tensor run_core_plan(const at::Tensor& input, const at::Tensor& values, const at::Tensor& plan,
                         at::IntArrayRef tiling, const OptionalTensor& rows, const OptionalTensor& residual,
                         Finish finish, const Conv2dShape& shape);

}  // namespace sparsekd::cuda
