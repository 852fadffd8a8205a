// Launches the kernels of kd_loss.cuh. (Named apart from kd_loss.cpp, whose object would be the same.)
#include "kd_loss.cuh"

#include <utility>

namespace sparsekd::cuda {
namespace {

constexpr int kVariants = sizeof(kKDLossVariants) / sizeof(kKDLossVariants[0]);
constexpr size_t kScratch = kKDLossWarps * sizeof(double);

template <int kIndex>
cudaError_t launch_variant(const KDLossParams& params, cudaStream_t stream) {
  constexpr KDLossVariant v = kKDLossVariants[kIndex];
  return SPARSEKD_LAUNCH((kd_loss_rows_kernel<v.row_lanes, v.items, v.wide>), dim3(params.blocks), dim3(kKDLossThreads),
                         kScratch, stream, params);
}

template <int... kIndex>
cudaError_t launch_rows(const KDLossParams& params, const KDLossVariant& variant, cudaStream_t stream,
                        std::integer_sequence<int, kIndex...>) {
  cudaError_t result = cudaSuccess;
  const auto same = [&](const KDLossVariant& v) {
    return v.row_lanes == variant.row_lanes && v.items == variant.items && v.wide == variant.wide;
  };
  (void)((same(kKDLossVariants[kIndex]) && (result = launch_variant<kIndex>(params, stream), true)) || ...);
  return result;
}

}  // namespace
}  // namespace sparsekd::cuda

using namespace sparsekd::cuda;

int sparsekd_kd_loss_count(const KDLossParams* params, void* stream) {
  return SPARSEKD_LAUNCH(kd_loss_count_kernel, dim3(params->parts), dim3(kKDLossThreads), kScratch,
                         static_cast<cudaStream_t>(stream), *params);
}

int sparsekd_kd_loss_rows(const KDLossParams* params, const KDLossVariant* variant, int wide, void* stream) {
  auto* on = static_cast<cudaStream_t>(stream);
  if (variant) return launch_rows(*params, *variant, on, std::make_integer_sequence<int, kVariants>{});
  const dim3 grid(params->blocks), block(kKDLossThreads);
  if (wide == 4) return SPARSEKD_LAUNCH(kd_loss_long_rows_kernel<4>, grid, block, kScratch, on, *params);
  return SPARSEKD_LAUNCH(kd_loss_long_rows_kernel<1>, grid, block, kScratch, on, *params);
}

int sparsekd_kd_loss_sum(const KDLossParams* params, void* stream) {
  return SPARSEKD_LAUNCH(kd_loss_sum_kernel, dim3(1), dim3(kKDLossThreads), kScratch, static_cast<cudaStream_t>(stream),
                         *params);
}
