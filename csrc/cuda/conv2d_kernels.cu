// Launches the kernels of conv2d.cuh and lanes.cuh. (Named apart from conv2d.cpp, whose object would be the same.)
#include "conv2d.cuh"
#include "lanes.cuh"

#include <algorithm>
#include <utility>

namespace sparsekd::cuda {
namespace {

constexpr int kVariants = sizeof(kConv2dVariants) / sizeof(kConv2dVariants[0]);

template <int kIndex>
cudaError_t launch_variant(const Conv2dParams& params, dim3 grid, int warps, cudaStream_t stream) {
  constexpr Conv2dVariant v = kConv2dVariants[kIndex];
  const int plane = v.plane ? v.plane : params.plane;
  Conv2dParams p = params;
  p.shared = conv2d_shared(p.block_channels * v.lane_groups * plane, warps * v.groups, v.vector, p.plane, p.blocks);
  const size_t results = size_t(warps) * v.groups * v.vector * v.lane_groups * 4 * 32 * v.run * sizeof(float);
  const size_t bytes = std::max(size_t(p.shared.bytes), results);
  return SPARSEKD_LAUNCH((conv2d_kernel<v.vector, v.lane_groups, v.groups, v.plane, v.run, v.parts>), grid,
                         dim3(32 * warps), bytes, stream, p);
}

template <int... kIndex>
cudaError_t launch_conv2d(const Conv2dParams& params, const Conv2dVariant& variant, dim3 grid, int warps,
                          cudaStream_t stream, std::integer_sequence<int, kIndex...>) {
  cudaError_t result = cudaSuccess;
  (void)((variant == kConv2dVariants[kIndex] &&
          (result = launch_variant<kIndex>(params, grid, warps, stream), true)) || ...);
  return result;
}

}  // namespace
}  // namespace sparsekd::cuda

using namespace sparsekd::cuda;

int sparsekd_to_lanes(const ToLanesParams* params, void* stream) {
  const unsigned fill_blocks = (params->fill.n_records + kLanesThreads - 1) / kLanesThreads;
  const dim3 grid(params->blocks + fill_blocks, std::min(params->lanes.units, 65535));
  auto* on = static_cast<cudaStream_t>(stream);
  switch (params->dtype) {
    case DType::float16: return SPARSEKD_LAUNCH(to_lanes_kernel<Half>, grid, dim3(kLanesThreads), 0, on, *params);
    case DType::bfloat16: return SPARSEKD_LAUNCH(to_lanes_kernel<BFloat16>, grid, dim3(kLanesThreads), 0, on, *params);
    default: return SPARSEKD_LAUNCH(to_lanes_kernel<float>, grid, dim3(kLanesThreads), 0, on, *params);
  }
}

int sparsekd_records(const RecordsParams* params, int kernel_vector, void* stream) {
  // Warps of a slice: one for so many entries, or other slices to be counted; as many as have counters in 48 KiB.
  const int entries = params->n_vectors / params->row_groups;
  const int others = params->row_groups_per_group * params->slices;
  const int fit = (48 << 10) / int(sizeof(int)) / (params->blocks + 1);
  const int warps = std::max(std::min({std::max(entries / 64, others / 256), kRecordsWarps, fit}), 1);
  const dim3 grid(params->row_groups * params->slices), block(32 * warps);
  const size_t bytes = sizeof(int) * warps * (params->blocks + 1);
  auto* on = static_cast<cudaStream_t>(stream);
  switch (kernel_vector) {
    case 1: return SPARSEKD_LAUNCH(records_kernel<1>, grid, block, bytes, on, *params);
    case 2: return SPARSEKD_LAUNCH(records_kernel<2>, grid, block, bytes, on, *params);
    case 4: return SPARSEKD_LAUNCH(records_kernel<4>, grid, block, bytes, on, *params);
    default: return SPARSEKD_LAUNCH(records_kernel<8>, grid, block, bytes, on, *params);
  }
}

int sparsekd_conv2d(const Conv2dParams* params, const Conv2dVariant* variant, int warps, int64_t grid_x, int grid_y,
                    void* stream) {
  return launch_conv2d(*params, *variant, dim3(static_cast<unsigned>(grid_x), grid_y), warps,
                       static_cast<cudaStream_t>(stream), std::make_integer_sequence<int, kVariants>{});
}
