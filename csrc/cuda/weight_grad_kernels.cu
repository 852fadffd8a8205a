// Launches the kernels of weight_grad.cuh. (Named apart from weight_grad.cpp, whose object would be the same.)
#include "weight_grad.cuh"

#include <iterator>
#include <utility>

namespace sparsekd::cuda {
namespace {

template <int kIndex>
cudaError_t launch_variant(const WeightGradParams& params, dim3 grid, int warps, cudaStream_t stream) {
  constexpr Conv2dVariant v = kWeightGradVariants[kIndex];
  const size_t plane = v.plane ? v.plane : params.plane;
  const size_t bytes = 2 * params.block_channels * v.lane_groups * plane * 16 + params.plane * sizeof(int2) +
                       32 * sizeof(int);
  return SPARSEKD_LAUNCH((weight_grad_kernel<v.vector, v.lane_groups, weight_grad_groups(v), v.plane>), grid,
                         dim3(32 * warps), bytes, stream, params);
}

template <int... kIndex>
cudaError_t launch_weight_grad(const WeightGradParams& params, const Conv2dVariant& variant, dim3 grid, int warps,
                               cudaStream_t stream, std::integer_sequence<int, kIndex...>) {
  cudaError_t result = cudaSuccess;
  (void)((variant == kWeightGradVariants[kIndex] && (result = launch_variant<kIndex>(params, grid, warps, stream), true)) ||
         ...);
  return result;
}

}  // namespace
}  // namespace sparsekd::cuda

using namespace sparsekd::cuda;

int sparsekd_weight_grad(const WeightGradParams* params, const Conv2dVariant* variant, int warps, int grid_y,
                         void* stream) {
  return launch_weight_grad(*params, *variant, dim3(params->splits, grid_y), warps, static_cast<cudaStream_t>(stream),
                            std::make_integer_sequence<int, std::size(kWeightGradVariants)>{});
}

int sparsekd_weight_grad_sum(const WeightGradSumParams* params, void* stream) {
  constexpr int kThreads = 256;
  const int64_t count = int64_t(params->n_vectors) * params->vector;
  const dim3 grid(static_cast<unsigned>((count + kThreads - 1) / kThreads));
  return SPARSEKD_LAUNCH(weight_grad_sum_kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), *params);
}
