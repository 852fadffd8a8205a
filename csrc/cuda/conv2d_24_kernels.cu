// Launches the kernels of conv2d_24.cuh.
#include "conv2d_24.cuh"

#include <utility>

namespace sparsekd::cuda {
namespace {

constexpr int kVariants = sizeof(kConv2d24Variants) / sizeof(kConv2d24Variants[0]);

template <int kIndex>
cudaError_t launch_variant(const Conv2d24Params& p, cudaStream_t stream) {
  constexpr Conv2d24Variant v = kConv2d24Variants[kIndex];
  const dim3 grid(static_cast<unsigned>(int64_t(p.row_blocks) * p.groups * p.pixel_blocks));
  const size_t bytes = conv2d_24_bytes(v);
  if (p.dtype == DType::float16) {
    return SPARSEKD_LAUNCH((conv2d_24_kernel<Half, v.row_tiles, v.pixel_tiles, v.row_warps, v.pixel_warps, v.depth>),
                           grid, dim3(v.threads()), bytes, stream, p);
  }
  return SPARSEKD_LAUNCH((conv2d_24_kernel<BFloat16, v.row_tiles, v.pixel_tiles, v.row_warps, v.pixel_warps, v.depth>),
                         grid, dim3(v.threads()), bytes, stream, p);
}

template <int... kIndex>
cudaError_t launch(const Conv2d24Params& params, const Conv2d24Variant& variant, cudaStream_t stream,
                   std::integer_sequence<int, kIndex...>) {
  cudaError_t result = cudaSuccess;
  (void)((kConv2d24Variants[kIndex] == variant && (result = launch_variant<kIndex>(params, stream), true)) || ...);
  return result;
}

}  // namespace
}  // namespace sparsekd::cuda

int sparsekd_conv2d_24(const sparsekd::cuda::Conv2d24Params* params, const sparsekd::cuda::Conv2d24Variant* variant,
                       void* stream) {
  using namespace sparsekd::cuda;
  return launch(*params, *variant, static_cast<cudaStream_t>(stream), std::make_integer_sequence<int, kVariants>{});
}
