// Launches the kernels of conv2d_tensor.cuh.
#include "conv2d_tensor.cuh"

#include <utility>

namespace sparsekd::cuda {
namespace {

constexpr int kVariants = sizeof(kTensorVariants) / sizeof(kTensorVariants[0]);

bool same(const TensorVariant& a, const TensorVariant& b) {
  return a.rows == b.rows && a.groups == b.groups && a.positions == b.positions;
}

template <int kIndex>
cudaError_t launch_variant(const TensorConv2dParams& params, dim3 grid, cudaStream_t stream) {
  constexpr TensorVariant v = kTensorVariants[kIndex];
  const dim3 block(params.threads);
  if (params.dtype == DType::float16) {
    return SPARSEKD_LAUNCH((conv2d_tensor_kernel<Half, v.rows, v.groups, v.positions>), grid, block,
                           params.shared_bytes, stream, params);
  }
  return SPARSEKD_LAUNCH((conv2d_tensor_kernel<BFloat16, v.rows, v.groups, v.positions>), grid, block,
                         params.shared_bytes, stream, params);
}

template <int... kIndex>
cudaError_t launch_conv2d(const TensorConv2dParams& params, const TensorVariant& variant, dim3 grid,
                          cudaStream_t stream, std::integer_sequence<int, kIndex...>) {
  cudaError_t result = cudaSuccess;
  (void)((same(kTensorVariants[kIndex], variant) &&
          (result = launch_variant<kIndex>(params, grid, stream), true)) || ...);
  return result;
}

template <int kRows>
cudaError_t launch_values(const TensorValuesParams& params, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t words = int64_t(params.n_octets) * kRows * 4;
  const dim3 grid(static_cast<unsigned>((words + kThreads - 1) / kThreads));
  return SPARSEKD_LAUNCH(tensor_values_kernel<kRows>, grid, dim3(kThreads), 0, stream, params);
}

constexpr int kCopyThreads = 256;
dim3 grid_of_units(int threads, int units) {
  return {static_cast<unsigned>((threads + kCopyThreads - 1) / kCopyThreads),
          static_cast<unsigned>(units < 65535 ? units : 65535)};
}

}  // namespace
}  // namespace sparsekd::cuda

using namespace sparsekd::cuda;

int sparsekd_device_limits(int device, int* limits) {
  DeviceLimits found{};
  const cudaError_t error = limits_of(device, &found);
  limits[0] = found.major;
  limits[1] = found.shared_bytes;
  limits[2] = found.multiprocessors;
  return error;
}

int sparsekd_to_lanes16(const ToLanes16Params* params, void* stream) {
  return SPARSEKD_LAUNCH(to_lanes16_kernel, grid_of_units(params->threads, params->lanes.units), dim3(kCopyThreads), 0,
                         static_cast<cudaStream_t>(stream), *params);
}

int sparsekd_from_lanes16(const FromLanes16Params* params, void* stream) {
  return SPARSEKD_LAUNCH(from_lanes16_kernel, grid_of_units(params->channels * params->of_plane.by, params->units),
                         dim3(kCopyThreads), 0, static_cast<cudaStream_t>(stream), *params);
}

int sparsekd_tensor_plan(const TensorPatternParams* params, int groups, void* stream) {
  auto* on = static_cast<cudaStream_t>(stream);
  const size_t counts = size_t(params->block_slices) * params->block_planes;
  const size_t ints = 5 * counts + 3 * params->block_planes + params->block_slices + params->slices_per_group;
  const cudaError_t error = SPARSEKD_LAUNCH(tensor_planes_kernel, dim3(params->blocks, groups * params->row_blocks),
                                            dim3(32 * kPlanesWarps), sizeof(int) * ints, on, *params);
  if (error != cudaSuccess) return error;
  constexpr int kWarps = 4;
  const dim3 grid((params->row_groups * params->slices + kWarps - 1) / kWarps);
  const size_t bytes = sizeof(int) * kWarps * params->blocks * 18;
  return SPARSEKD_LAUNCH(tensor_columns_kernel, grid, dim3(32 * kWarps), bytes, on, *params);
}

int sparsekd_tensor_values(const TensorValuesParams* params, int rows, void* stream) {
  auto* on = static_cast<cudaStream_t>(stream);
  switch (rows) {
    case 8: return launch_values<8>(*params, on);
    case 16: return launch_values<16>(*params, on);
    case 32: return launch_values<32>(*params, on);
    default: return launch_values<64>(*params, on);
  }
}

int sparsekd_conv2d_tensor(const TensorConv2dParams* params, const TensorVariant* variant, int grid_x, int grid_y,
                           void* stream) {
  return launch_conv2d(*params, *variant, dim3(grid_x, grid_y),
                       static_cast<cudaStream_t>(stream), std::make_integer_sequence<int, kVariants>{});
}
