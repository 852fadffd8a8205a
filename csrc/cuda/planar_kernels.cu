// Launches the kernel of planar.cuh.
#include "planar.cuh"

using namespace sparsekd::cuda;

int sparsekd_planar(const PlanarParams* params, int element_size, void* stream) {
  const dim3 grid(static_cast<unsigned>(params->images * params->channel_tiles * params->pixel_tiles)), block(256);
  const size_t bytes = kPlanarChannels * (kPlanarPixels + 1) * sizeof(uint32_t);
  auto* on = static_cast<cudaStream_t>(stream);
  if (element_size == 2) return SPARSEKD_LAUNCH(planar_kernel<uint16_t>, grid, block, bytes, on, *params);
  return SPARSEKD_LAUNCH(planar_kernel<uint32_t>, grid, block, bytes, on, *params);
}
